"""What the figures are made from: trained networks with their records, and the two domains' images."""

import dataclasses
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_loader import DigitSet
from tools.tables import METHOD_NAMES
from utils.cli import UserError
from utils.config import Config
from valid import Evaluation, Reader, evaluate, load_reader, load_side_by_side, outputs

ALWAYS = ("epoch", "lambda_p", "learning_rate", "loss_label", "source_accuracy", "target_accuracy")
WHERE_ADAPTED = ("loss_domain", "domain_accuracy")  # null in an epoch without gradient reversal


@dataclass(frozen=True)
class Network:
    """A trained network as the figures show it.

    Args:
        label: what the figures call it.
        records: one a trained epoch, from metrics.jsonl.
    """

    label: str
    reader: Reader
    records: list[dict]
    device: torch.device

    @property
    def config(self) -> Config:
        """The settings it was trained with."""
        return self.reader.config

    @property
    def precision(self) -> str:
        """What valid.py tests with."""
        return self.reader.precision_on(self.device)

    def evaluate(self, digits: DigitSet) -> Evaluation:
        """Counts of right and wrong, by the one accuracy code."""
        return evaluate(self.reader.model, digits, self.reader.preprocess, self.device, self.precision)

    def features(self, images: Tensor) -> np.ndarray:
        """What the extractor makes of the images, in eval mode. Shape: (N, C, H, W) uint8 -> (N, F) float32"""
        extractor = self.reader.model.extractor
        return outputs(extractor, images, self.reader.preprocess, self.device, self.precision).cpu().numpy()


def training_command(config: Config, folder: Path, method: str | None = None) -> str:
    """The command that trains such a network into a folder."""
    words = ["python", "main.py", "--recipe", config.recipe, "--source", config.source, "--target", config.target]
    words += ["--method", method or config.method, "--seed", str(config.seed), "--run-dir", str(folder)]
    return shlex.join(words)


def load_network(folder: Path, device: torch.device) -> Network:
    """Read the weights and the records of a run folder.

    Raises: UserError for a run that is not there or not finished, or whose files are damaged.
    """
    quoted = shlex.quote(str(folder))
    if not (folder / "model.safetensors").is_file():
        if (folder / "last.pt").is_file():
            raise UserError(f"the run in {folder} is not finished: go on with `python main.py --resume {quoted}`")
        raise UserError(f"there is no run in {folder}: train one with `python main.py --run-dir {quoted}`")
    reader = load_reader(str(folder), device, allow_download=False)
    again = training_command(reader.config, folder.with_name(folder.name + "-again"))
    records = read_records(folder / "metrics.jsonl", f"train the run again with `{again}`")
    return Network(METHOD_NAMES[reader.config.method], reader, records, device)


def read_records(path: Path, mend: str) -> list[dict]:
    """The records of a metrics.jsonl, one an epoch; `mend` ends the line that says what is wrong with it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        for record in records:
            values = [record[key] for key in ALWAYS]
            values += [record[key] for key in WHERE_ADAPTED if record[key] is not None]
            if not all(isinstance(value, int | float) for value in values):
                raise TypeError("a value is no number")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {mend}") from None
    except KeyError as error:
        raise UserError(f"{path} is damaged (a line has no {error}): {mend}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): {mend}") from None
    if not records:
        raise UserError(f"{path} is empty: {mend}")
    return records


def side_by_side(network: Network, other: Network, folder: Path) -> list[Network]:
    """The network to compare with and the network, in the order to show, labelled apart.

    Raises: UserError when they were trained on different pairs of domains.
    """
    pairs = [(each.config.source, each.config.target) for each in (network, other)]
    if pairs[0] != pairs[1]:
        told = " and ".join(f"{source} → {target}" for source, target in pairs)
        command = training_command(network.config, Path("runs/source-only"), "source-only")
        raise UserError(f"{folder} belongs to another pair ({told}): train its counterpart with `{command}`")
    if network.label == other.label:
        network, other = (
            dataclasses.replace(each, label=f"{each.label}, {each.config.recipe}, seed {each.config.seed}")
            for each in (network, other)
        )
    if network.label == other.label:
        other = dataclasses.replace(other, label=f"{other.label} ({folder.name})")
    return [other, network]


@dataclass(frozen=True)
class Domains:
    """Both splits of both domains."""

    source_train: DigitSet
    source_test: DigitSet
    target_train: DigitSet
    target_test: DigitSet


def load_domains(config: Config, data_dir: Path, download: bool) -> Domains:
    """Read what a network was trained and tested on, fetching what is missing when `download` allows it."""
    keys = [(name, split) for name in (config.source, config.target) for split in ("train", "test")]
    sets = load_side_by_side(keys, data_dir, download)
    return Domains(*(sets[key] for key in keys))


def sample(test: DigitSet, train: DigitSet, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` different images of a domain with their labels: test images, and training images where those run out.

    Shape: -> (count, C, H, W) uint8, (count,) int64; fewer when the domain has fewer
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = [], []
    for part in (test, train):
        chosen = torch.randperm(len(part), generator=generator)[:count]
        images.append(part.images[chosen])
        labels.append(part.labels[chosen])
        count -= len(chosen)
    return torch.cat(images), torch.cat(labels)
