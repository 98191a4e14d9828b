"""A network ready for use: its weights, and what has to be done to images before it sees them."""

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_loader import CLASS_NAMES, Preprocessing
from methods.networks import build_network, input_shape, on_device
from methods.recipes import NORMALISATIONS, Config
from model import DANN
from utils import machine
from utils.checkpoint import check_shapes, load_weights
from utils.cli import UserError
from utils.pretrained import find_weights

BATCH = 1000
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # characters that a terminal may obey


@dataclass(frozen=True)
class Evaluation:
    """The outcome of a test: counts, rows the true digit, columns the predicted, and what each image was predicted as.

    Shape: confusion (K, K) int64, predicted (N,) int64
    """

    confusion: Tensor
    predicted: Tensor

    @property
    def correct(self) -> int:
        """Number of images predicted right."""
        return int(self.confusion.trace())

    @property
    def total(self) -> int:
        """Number of images."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """correct / total, in [0, 1]; nan where no image was tested."""
        return self.correct / self.total if self.total else math.nan


@dataclass(frozen=True)
class Classifier:
    """Classifies uint8 images of any size.

    Args:
        model: in training it may be in training mode; it is restored to its mode after each use.
        precision: "fp32" or "bf16".
        classes: the K names of the classes.
        source, target: the domains it was trained for.
        training: a free record of how it was trained, for people and figures.
        path: the file of its weights.
    """

    model: DANN
    preprocess: Preprocessing
    device: torch.device
    precision: str
    classes: tuple[str, ...] = CLASS_NAMES
    source: str = ""
    target: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()

    @contextlib.contextmanager
    def _testing(self, part: nn.Module) -> Iterator[None]:
        """The network or a part of it in eval mode, without gradients, at its precision."""
        was_training = part.training
        part.eval()
        with torch.inference_mode(), machine.autocast(self.device, self.precision):
            yield
        part.train(was_training)

    def outputs(self, part: nn.Module, images: Tensor, domain: str) -> Tensor:
        """What the network, or a part of it that takes images, makes of them, in eval mode.

        Args:
            domain: "source" or "target", whose batch statistics the network takes where it has those of both.

        Shape: (N, C, H, W) uint8 -> (N, F) float32 on the device
        """
        with self._testing(part):
            batches = images.split(BATCH)
            return torch.cat([part(self.preprocess(batch.to(self.device)), domain).float() for batch in batches])

    def features(self, images: Tensor, domain: str = "target") -> Tensor:
        """What the extractor makes of images. Shape: (N, C, H, W) uint8 -> (N, F) float32 on the device"""
        return self.outputs(self.model.extractor, images, domain)

    def predict(self, features: Tensor) -> Tensor:
        """Class probabilities of what `features` returned. Shape: (N, F) -> (N, K) float32 on the CPU"""
        with self._testing(self.model.classifier):
            return self.model.classifier(features).float().softmax(1).cpu()

    def probabilities(self, images: Tensor, domain: str = "target") -> Tensor:
        """Class probabilities. Shape: (N, C, H, W) uint8 -> (N, K) float32 on the CPU"""
        return self.outputs(self.model, images, domain).softmax(1).cpu()


def usage(config: Config, preprocess: Preprocessing, classes: tuple[str, ...], training: dict) -> dict:
    """What stands beside weights: all that is needed to use them, and under "training" a record for people."""
    return {
        **{key: getattr(config, key) for key in ("network", "source", "target", "precision")},
        "classes": list(classes),
        "preprocessing": asdict(preprocess),
        "training": training,
    }


def load_classifier(
    name: str | None, device: torch.device, allow_download: bool = True, precision: str = "as-trained"
) -> Classifier:
    """Load weights by name, path or URL, as `utils.pretrained.find_weights` takes them.

    Args:
        precision: "fp32", "bf16", or "as-trained", which is fp32 where the machine has no bf16.

    Raises: UserError for weights that are not there, or are no network's of this version.
    """
    path = find_weights(name, allow_download)
    weights, about = load_weights(path)
    try:
        preprocess = _checked(about)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(
            f"{path} does not say what its weights are of: use a file that this version's main.py wrote"
        ) from None
    except UserError as error:
        raise UserError(f"{path} holds weights of no network of this version: {error}") from None
    network, classes = about["network"], tuple(about["classes"])
    with torch.device("meta"):  # shapes alone: what is named may be too large for the memory
        check_shapes(build_network(network, classes=len(classes)), weights, path, network)
    model = build_network(network, classes=len(classes))
    model.load_state_dict(weights)
    model = on_device(model, device).eval()
    if precision == "as-trained":
        precision = about["precision"] if machine.has_bf16(device) else "fp32"
    details = (about["source"], about["target"], about["training"], path)
    return Classifier(model, preprocess, device, precision, classes, *details)


def _checked(about: dict) -> Preprocessing:
    """The preprocessing of weights whose `usage` a stranger may have written.

    Raises: UserError where there is no such network; KeyError, TypeError or ValueError for what main.py never writes.
    """
    network, pixels, classes = about["network"], about["preprocessing"], about["classes"]
    if not re.fullmatch(r"[\w:@.-]{1,80}", network):
        raise ValueError
    channels, size, _ = input_shape(network)
    preprocess = Preprocessing(size, pixels["normalisation"], tuple(pixels["mean"]), channels == 1)
    sound = (
        asdict(preprocess) == {**pixels, "mean": preprocess.mean}
        and preprocess.normalisation in NORMALISATIONS
        and len(preprocess.mean) == 3
        and all(map(math.isfinite, preprocess.mean))
        and about["precision"] in ("fp32", "bf16")
        and not any(map(CONTROL.search, (about["source"], about["target"], *classes)))
        and len(set(classes)) == len(classes) > 0
        and isinstance(about["training"], dict)
    )
    if not sound:
        raise ValueError
    return preprocess
