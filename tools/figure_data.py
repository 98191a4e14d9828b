"""What the figures are made from: trained networks with their records, and the two domains' images."""

import dataclasses
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_loader import DigitSet
from digits.domains import load_side_by_side
from methods.classifier import Classifier, load_classifier
from methods.recipes import Config
from tools.tables import METHOD_NAMES
from utils.cli import UserError

ALWAYS = ("epoch", "lambda_p", "learning_rate", "loss_label", "source_accuracy", "target_accuracy")
WHERE_ADAPTED = ("loss_domain", "domain_accuracy")  # null or missing in an epoch without gradient reversal


@dataclass(frozen=True)
class Network:
    """A trained network as the figures show it.

    Args:
        label: what the figures call it.
        settings: of its training, as far as its weights tell; the others have their defaults.
        records: one a trained epoch, from metrics.jsonl.
    """

    label: str
    classifier: Classifier
    settings: Config
    records: list[dict[str, Any]]

    @property
    def pair(self) -> str:
        """The domains it was trained for."""
        return f"{self.classifier.source} → {self.classifier.target}"

    def features(self, images: Tensor, domain: str = "target") -> np.ndarray:
        """What the extractor makes of images of a domain. Shape: (N, C, H, W) uint8 -> (N, F) float32"""
        return self.classifier.features(images, domain).cpu().numpy()


def training_command(settings: Config, folder: Path, method: str | None = None) -> str:
    """The command that trains such a network into a folder."""
    words = ["python", "main.py", "--recipe", settings.recipe, "--source", settings.source, "--target", settings.target]
    words += ["--method", method or settings.method, "--seed", str(settings.seed), "--run-dir", str(folder)]
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
    classifier = load_classifier(str(folder), device, allow_download=False)
    names = {item.name for item in dataclasses.fields(Config) if item.name != "modern"}
    settings = Config(**{name: value for name, value in classifier.training.items() if name in names})
    again = training_command(settings, folder.with_name(folder.name + "-again"))
    records = read_records(folder / "metrics.jsonl", f"train the run again with `{again}`")
    return Network(METHOD_NAMES[settings.method], classifier, settings, records)


def read_records(path: Path, fix: str) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, one an epoch; `fix` ends the line that says what is wrong with it."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for record in records:
            values = [record[key] for key in ALWAYS]
            values += [record[key] for key in WHERE_ADAPTED if record.get(key) is not None]
            if not all(isinstance(value, int | float) for value in values):
                raise TypeError("a value is no number")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {fix}") from None
    except KeyError as error:
        raise UserError(f"{path} is damaged (a line has no {error}): {fix}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): {fix}") from None
    if not records:
        raise UserError(f"{path} is empty: {fix}")
    return records


def side_by_side(network: Network, other: Network, folder: Path) -> list[Network]:
    """The network to compare with and the network, in the order to show, labelled apart.

    Raises: UserError when they were trained on different pairs of domains.
    """
    if network.pair != other.pair:
        command = training_command(network.settings, Path("runs/source-only"), "source-only")
        pairs = f"{network.pair} and {other.pair}"
        raise UserError(f"{folder} belongs to another pair ({pairs}): train its counterpart with `{command}`")
    if network.label == other.label:
        network, other = (
            dataclasses.replace(each, label=f"{each.label}, {each.settings.recipe}, seed {each.settings.seed}")
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


def load_domains(classifier: Classifier, data_dir: Path, download: bool) -> Domains:
    """Read what a network was trained and tested on, fetching what is missing when `download` allows it."""
    keys = [(name, split) for name in (classifier.source, classifier.target) for split in ("train", "test")]
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
