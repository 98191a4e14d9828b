"""Checkpoints to go on from, and weights to keep."""

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from utils.cli import UserError, say
from utils.files import write_atomically

PREVIOUS = "previous.pt"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the state of a run: plain dicts, tensors and numbers alone.

    The one before stays beside it as previous.pt; it makes room when the new one has been read back without an error.
    """

    def write(file: Path) -> None:
        torch.save(state, file)
        _load_torch(file)
        if path.exists():
            os.replace(path, path.with_name(PREVIOUS))

    write_atomically(path, write)


def load_checkpoint(path: Path) -> dict:
    """Read what `save_checkpoint` wrote; where that is damaged or gone, what it wrote before, with a line that says so.

    Raises: UserError when neither is there, or both are something else.
    """
    previous = path.with_name(PREVIOUS)
    if not path.is_file() and not previous.is_file():
        raise UserError(
            f"{path.parent} is no run that can be resumed: {path} is missing; start one with `python main.py`"
        )
    try:
        return _load_torch(path)
    except UserError:
        if not previous.is_file():
            raise
    state = _load_torch(previous)
    fault = "damaged" if path.is_file() else "missing"
    say(f"{path} is {fault}: going on from {previous}, which was written before")
    return state


def _load_torch(path: Path) -> dict:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch itself would not look at its checksums
                if damaged := archive.testzip():
                    raise ValueError(f"its part {damaged} has the wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise a dozen kinds for bytes that are no checkpoint
        unsafe = isinstance(error, pickle.UnpicklingError) and "eights only" in str(error)
        reason = "pickled code, which is not run" if unsafe else " ".join(str(error).split())[:120]
        raise UserError(f"{path} is not a checkpoint of tensors ({reason}): use a file that main.py wrote") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a state dict: use a file that main.py wrote")
    return state


def save_weights(path: Path, weights: dict[str, Tensor], about: dict) -> None:
    """Write a state dict as safetensors, with `about` (plain values) in the file's metadata."""
    contiguous = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    metadata = {"dann": json.dumps(about, sort_keys=True)}
    write_atomically(path, lambda file: file.write_bytes(save(contiguous, metadata)))  # save_file hides it from others


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Read weights and what is said about them from `.safetensors`, or from a run's `last.pt`.

    Raises: UserError for a file that is missing, no state dict, or says nothing of its network.
    """
    if not path.is_file():
        raise UserError(f"there are no weights at {path}: train with `python main.py`, or name others")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("dann", "null"))
                weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
        except (SafetensorError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{path} is no safetensors file ({reason}): use a file that main.py wrote") from None
    else:
        state = _load_torch(path)
        weights, about = state.get("model", state), state.get("use")
        if state.get("teacher"):  # which is what is tested and kept
            average = state["teacher"]["average"]
            weights = {key.removeprefix("module."): average[key] for key in average if key.startswith("module.")}
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} holds no state dict of tensors: use a file that main.py wrote")
    if not isinstance(about, dict):
        raise UserError(f"{path} does not say which network its weights belong to: use a file that main.py wrote")
    return weights, about


def check_shapes(model: torch.nn.Module, weights: dict[str, Tensor], path: Path, network: str) -> None:
    """Raise UserError when weights are of another architecture than a network's."""
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in weights.items()}
    if shapes != theirs:
        odd = sorted(key for key in shapes.keys() | theirs.keys() if shapes.get(key) != theirs.get(key))
        raise UserError(
            f"{path} holds weights of another architecture than {network}: {len(odd)} of {len(shapes)} tensors differ, "
            f"first {odd[0]} ({theirs.get(odd[0], 'missing')} instead of {shapes.get(odd[0], 'none')}); "
            f"use weights of {network}"
        )
