"""The state of a training run, which its checkpoint keeps."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.teacher import Teacher
from model import DANN
from utils import machine
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.cli import UserError
from utils.distributed import Processes
from utils.files import locked, make_folder


@dataclass
class Run:
    """The state of a training run: all that changes while it trains, and what its checkpoint says of it.

    Args:
        folder: where it is kept.
        teacher: None where the recipe has none.
        config: its settings, plain values.
        use: what is needed to use its weights, plain values.
        data: what it trains on, plain values; a checkpoint of other data is refused.
        steps_per_epoch: optimiser steps.
        sessions: what each part of it, between two interruptions, was made with (`machine.session`).
        epoch, step: the next step to do: its epoch, and its number within the epoch.
        sums: of this epoch's steps, of each loss and each other value that is logged.
        records: of the epochs done, as metrics.jsonl has them.
        skipped: the numbers of the steps that were left out, for their gradient was not finite.
        seconds, train_seconds: so far, with and without tests.
    """

    folder: Path
    model: DANN
    optimizer: torch.optim.Optimizer
    teacher: Teacher | None
    config: dict[str, Any]
    use: dict[str, Any]
    data: dict[str, Any]
    steps_per_epoch: int
    dry_run: bool
    sessions: list[dict]
    epoch: int = 0
    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    records: list[dict] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    seconds: float = 0.0
    train_seconds: float = 0.0

    PLAIN: ClassVar = (
        *("config", "use", "data", "steps_per_epoch", "dry_run", "sessions", "epoch", "step", "sums"),
        *("records", "skipped", "seconds", "train_seconds"),
    )
    TENSORS: ClassVar = ("model", "teacher", "optimizer", "rng")

    @property
    def tested_model(self) -> DANN:
        """The network that is tested and kept: the teacher where there is one."""
        return self.teacher.model if self.teacher else self.model

    @property
    def steps_done(self) -> int:
        """Optimiser steps since the start of the run."""
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def skips(self) -> bool:
        """Whether the step that has just been done was left out."""
        return bool(self.skipped) and self.skipped[-1] == self.steps_done

    def count_step(self, values: dict[str, Tensor]) -> None:
        """Count a step, and add its losses, and whatever else is logged, to the epoch's sums; one left out has none."""
        if not self.skips:
            sums = self.sums
            self.sums = {name: value + sums[name] if name in sums else value for name, value in values.items()}
        self.step += 1

    def end_epoch(self) -> dict[str, float]:
        """Go on to the next epoch; returns the means over this one's steps, for which it waits for the device.

        Raises: UserError when a loss or a weight is not finite, or all steps were left out.
        """
        steps = self.step - sum(number >= self.epoch * self.steps_per_epoch for number in self.skipped)
        if not steps:
            raise UserError(f"no step of epoch {self.epoch + 1} had a finite gradient: try a smaller --lr")
        means = {name: (total / steps).item() for name, total in self.sums.items()}
        self.check_losses(means)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        self.check_weights()
        return means

    def check_losses(self, values: dict[str, float], state: str = "") -> None:
        """Raise UserError when a loss is not finite; `state` says with what it came about."""
        losses = {name: value for name, value in values.items() if name.startswith("loss_")}
        if not all(map(math.isfinite, losses.values())):
            named = ", ".join(f"{name.removeprefix('loss_')} loss {value:.4g}" for name, value in losses.items())
            raise UserError(
                f"the loss is not finite at step {self.steps_done} (epoch {self.epoch + 1}): {named}{state}; "
                "try a smaller --lr or --precision fp32"
            )

    def check_weights(self) -> None:
        """Raise UserError when a weight is not finite, as the last step may have left it."""
        networks = {"weights": self.model} | ({"teacher's weights": self.teacher.model} if self.teacher else {})
        for name, network in networks.items():
            if not all(weight.isfinite().all() for weight in network.state_dict().values()):
                raise UserError(
                    f"the {name} are not finite after step {self.steps_done}: try a smaller --lr or --precision fp32"
                )

    def save(self, device: torch.device, processes: Processes) -> None:
        """Write last.pt; a run that goes on from it ends with the same bits (CPU, fp32)."""
        self.check_weights()
        own_rng = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            own_rng["cuda"] = torch.cuda.get_rng_state(device)
        rng = processes.gather(own_rng)
        if not processes.writes:
            return
        state = {name: getattr(self, name) for name in self.PLAIN}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "rng": rng}
        state["teacher"] = self.teacher and self.teacher.state_dict()
        save_checkpoint(self.folder / "last.pt", state)

    def load(self, state: dict[str, Any], device: torch.device, processes: Processes) -> None:
        """Go on from what `save` wrote; raises UserError where that is of other data, processes or versions."""
        try:
            self._load(state, device, processes)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of as many kinds as there are things that another version keeps otherwise
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"{self.folder / 'last.pt'} was made by another version of this program ({reason}): train again"
            ) from None

    def _load(self, state: dict[str, Any], device: torch.device, processes: Processes) -> None:
        if (count := len(state["rng"])) != processes.count:
            launcher = Processes(count=count).launcher
            raise UserError(
                f"{self.folder} was trained by {count} processes, not {processes.count}: "
                f"resume it with `{launcher} {' '.join(machine.script())} --resume …`"
            )
        if state["steps_per_epoch"] != self.steps_per_epoch or state["data"] != self.data:
            same = "resume with the same --data-dir, and the same pictures and --common-classes"
            raise UserError(f"{self.folder} was trained on other data: {same}")
        self.model.load_state_dict(state["model"])
        if self.teacher:
            self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sums = {name: total.to(device) for name, total in state["sums"].items()}
        self.epoch, self.step = state["epoch"], state["step"]
        self.records, self.skipped = state["records"], state["skipped"]
        self.seconds, self.train_seconds = state["seconds"], state["train_seconds"]
        self.sessions = [*state["sessions"], *self.sessions]
        rng = state["rng"][processes.rank]
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], device)


@contextlib.contextmanager
def run_folder_made(folder: Path) -> Iterator[None]:
    """Make a run's folder and keep other processes from running in it; what a killed one left half written goes.

    Raises: UserError where another process runs in it, or it can't be written.
    """

    def refuse() -> None:
        raise UserError(f"another process trains in {folder}: wait for it to end, or choose another --run-dir")

    make_folder(folder)
    with locked(folder, refuse):
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)
        yield


def read_state(folder: Path) -> dict[str, Any]:
    """What `Run.save` wrote into a folder; raises UserError when it isn't there or is something else."""
    path = folder / "last.pt"
    state = load_checkpoint(path)
    if missing := sorted({*Run.PLAIN, *Run.TENSORS} - state.keys()):
        raise UserError(
            f"{path} is no checkpoint of a run of this version (it lacks {', '.join(missing)}): "
            "name a folder that main.py wrote, or train again"
        )
    return state
