"""Sets of digits, the one preprocessing, and the loader that pairs source with labels and target without.

Whole sets live as uint8 tensors on the training device; a batch is gathered, augmented and preprocessed there at once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.cli import UserError, listed

CLASS_NAMES = tuple("0123456789")
UNLABELLED = -1  # in place of a label
LARGEST_ON_DEVICE = 2**30  # bytes; larger sets stay where they are, and batches of them are moved


@dataclass(frozen=True)
class DigitSet:
    """Images of one split of a domain, on one device.

    Shape: images (N, C, H, W) uint8, C = 1 or 3; labels (N,) int64, indices of the K names in `classes`, or UNLABELLED
    """

    domain: str
    split: str
    images: Tensor
    labels: Tensor
    mark: str  # how results name this data: "MNIST", or "SVHN subset, 23,412" when a file is not the official one
    checksums: dict[str, str]  # file (relative to the data folder) -> md5
    classes: tuple[str, ...] = CLASS_NAMES

    def __len__(self) -> int:
        return len(self.images)


def standardise(x: Tensor) -> Tensor:
    """Zero mean and unit variance over all pixels and channels of an image; a blank one becomes zero, not noise."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) / x.std((1, 2, 3), correction=0, keepdim=True).clamp_min(1e-3)


@dataclass(frozen=True)
class Preprocessing:
    """What turns uint8 images of any size into the network's input: in training, testing and annotation alike.

    Args:
        image_size: height and width of the network's input, pixels.
        normalisation: "unit" leaves [0, 1]; "mean" subtracts `mean`; "per-image" makes each image zero-mean with
            unit variance over all its pixels and channels.
        mean: the mean pixel in [0, 1], one value a colour.
        grey: the network takes one channel; of colours counts the direction in which the image varies most.

    Shape: (N, C, H, W) uint8, C = 1 or 3 -> (N, 1 if grey else 3, image_size, image_size) float32
    """

    image_size: int
    normalisation: str = "unit"
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    grey: bool = False

    def resize(self, images: Tensor) -> Tensor:
        """Bring uint8 images to the network's size and, for a grey one, to one channel; what fits stays as it is."""
        channels = 1 if self.grey else images.shape[1]
        shape = (channels, self.image_size, self.image_size)
        if images.shape[1:] == shape:
            return images
        if images.device.type == "mps":  # not every torch can interpolate with antialiasing there
            return self.resize(images.cpu()).to(images.device)
        parts = []
        for part in images.split(4096):  # in parts, because floats take four times the memory
            x = part.float()
            x = principal_grey(x) if self.grey else x
            if x.shape[1:] != shape:
                x = F.interpolate(x, shape[1:], mode="bilinear", antialias=True)
            parts.append(x.round_().clamp_(0, 255).byte())
        return torch.cat(parts) if parts else images.new_empty((0, *shape))

    def __call__(self, images: Tensor) -> Tensor:
        return self.normalise(self.resize(images).float().div_(255))

    def normalise(self, x: Tensor) -> Tensor:
        """From [0, 1], (N, 1 or 3, H, W), to the network's input, (N, 1 or 3, H, W), channels last in memory."""
        if self.normalisation == "per-image":
            x = standardise(x)
        if x.shape[1] == 1 and not self.grey:
            x = x.expand(-1, 3, -1, -1)
        if self.normalisation == "mean":
            x = x - x.new_tensor(self.mean).view(1, 3, 1, 1)
        return x.contiguous(memory_format=torch.channels_last)


def principal_grey(x: Tensor) -> Tensor:
    """One channel from three: the first principal component of an image's colours, where a digit stands out most.

    The mean of the colours would lose a digit that differs from its wall in hue alone. Brighter stays brighter, the
    mean over the pixels stays, and three equal channels give that channel.

    Shape: (N, 1 or 3, H, W) -> (N, 1, H, W)
    """
    if x.shape[1] == 1:
        return x
    mean = x.mean((2, 3), keepdim=True)
    varying = (x - mean).flatten(2)
    covariance = (varying @ varying.mT).double()
    component = torch.linalg.eigh(covariance).eigenvectors[..., -1].to(x.dtype)  # of the largest eigenvalue
    component = component * torch.where(component.sum(1, keepdim=True) < 0, -1.0, 1.0) / math.sqrt(3)
    return mean.mean(1, keepdim=True) + torch.einsum("nc,ncp->np", component, varying).view(len(x), 1, *x.shape[2:])


def mean_pixel(images: Sequence[Tensor]) -> tuple[float, float, float]:
    """Mean colour in [0, 1] of several sets of uint8 images, each set with equal weight."""
    means = []
    for part in images:
        mean = torch.stack([chunk.float().mean((0, 2, 3)) * len(chunk) for chunk in part.split(4096)]).sum(0) / len(
            part
        )
        means.append(mean.expand(3) / 255)
    return tuple(round(value, 6) for value in torch.stack(means).mean(0).tolist())


def seed_of(*parts: int) -> int:
    """A well-mixed 63-bit seed that depends on all of the given whole numbers ≥ 0, and on how many they are."""
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0]) >> 1


def shuffled_passes(count: int, length: int, seed: int) -> Tensor:
    """`length` indices into a set of `count`: pass after pass, each a new permutation. Shape: -> (length,) int64."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(count, generator=generator) for _ in range(-(-length // count))]
    return torch.cat(passes)[:length]


Draws = dict[str, Tensor]  # what a view has drawn, by name; images first in every tensor


class View(Protocol):
    """How images look in training. What is drawn and what is done with it are apart (see `PairedLoader.epoch`)."""

    def draw(self, count: int, size: int, generator: torch.Generator) -> Draws:
        """What `apply` needs for `count` images of `size` × `size` pixels."""

    def apply(self, images: Tensor, index: Tensor, draws: Draws) -> Tensor:
        """Images of a set, changed as drawn. Shape: (N, C, S, S) uint8, (B,), B of each draw -> (B, C, S, S)"""


Views = Callable[[int, int], Sequence[View]]  # of an epoch and a step in it: that of the source, those of the target


class PairedLoader:
    """Batches (x_s, y_s, x_t): source images and labels, target images. It never holds a target label.

    An epoch is one pass over the larger set, its last batch filled up from a new pass; the smaller set starts again as
    often as it takes. Each pass of each set has an order of its own, which depends only on (seed, epoch), as does what
    the views draw.

    Args:
        source: labelled set. target_images: (M, C, H, W) uint8.
        batch_size: images of each domain in a batch.
        preprocess: the same for both domains.
        views: how the images are augmented.
        device: where batches are made, and sets of at most LARGEST_ON_DEVICE kept.
        steps: batches an epoch, when it shall not follow from the sizes of the sets.
        part: of each batch to give out, for one of several processes; together they give out the same images, changed
            in the same way, as one would.

    Shape: x_s, x_t (B, C, S, S) float32, with V > 1 views of the target x_t (V, B, C, S, S); y_s (B,) int64
    """

    def __init__(
        self,
        source: DigitSet,
        target_images: Tensor,
        batch_size: int,
        seed: int,
        preprocess: Preprocessing,
        views: Views,
        device: torch.device | str = "cpu",
        steps: int | None = None,
        part: slice = slice(None),
    ):
        self.images_s, self.images_t = (
            images if images.nbytes > LARGEST_ON_DEVICE else images.to(device)
            for images in map(preprocess.resize, (source.images, target_images))
        )
        self.labels_s = source.labels.to(device)
        self.batch_size, self.seed, self.preprocess, self.views, self.part = batch_size, seed, preprocess, views, part
        self.steps = steps or -(-max(len(self.images_s), len(self.images_t)) // batch_size)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches of epoch `epoch` (from 0), from step `first_step` on."""
        length, device = self.steps * self.batch_size, self.labels_s.device
        order_s = shuffled_passes(len(self.images_s), length, seed_of(self.seed, epoch, 0)).to(device)
        order_t = shuffled_passes(len(self.images_t), length, seed_of(self.seed, epoch, 1)).to(device)
        generator = torch.Generator(device).manual_seed(seed_of(self.seed, epoch, 2))

        for step in range(self.steps):
            # Drawn for the whole batch, and for steps already done, so that the draws are the same each time.
            view_s, *views_t = self.views(epoch, step)
            size = self.preprocess.image_size
            draws_s, *draws_t = (view.draw(self.batch_size, size, generator) for view in (view_s, *views_t))
            if step < first_step:
                continue
            batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
            index_s, index_t = order_s[batch][self.part], order_t[batch][self.part]
            x_s = self._seen(view_s, self.images_s, index_s, draws_s)
            x_t = [
                self._seen(view, self.images_t, index_t, drawn) for view, drawn in zip(views_t, draws_t, strict=True)
            ]
            yield x_s, self.labels_s[index_s], torch.stack(x_t) if len(x_t) > 1 else x_t[0]

    def _seen(self, view: View, images: Tensor, index: Tensor, draws: Draws) -> Tensor:
        return self.preprocess.normalise(view.apply(images, index, {k: v[self.part] for k, v in draws.items()}))


def pick(images: Tensor, index: Tensor) -> Tensor:
    """Images of a set on the device of the index, wherever the set is. Shape: (M, ...), (*) -> (*, ...)"""
    return images[index.to(images.device)].to(index.device)


def spread_index(digits: DigitSet, count: int) -> Tensor:
    """Numbers of `count` images at equal distances over a set, or of all where it has fewer. Shape: -> (count,)"""
    count = min(count, len(digits))
    return torch.arange(count) * len(digits) // max(count, 1)


def spread_over(digits: DigitSet, count: int) -> DigitSet:
    """The images that `spread_index` numbers."""
    index = spread_index(digits, count)
    return replace(digits, images=digits.images[index], labels=digits.labels[index])


def relabelled(digits: DigitSet, classes: tuple[str, ...], drop: bool = False) -> DigitSet:
    """A set whose labels are indices of these classes.

    Args:
        drop: leave out images of other classes.

    Raises: UserError for images of other classes, where these are not left out.
    """
    others = [name for name in digits.classes if name not in classes]
    if others and not drop:
        raise UserError(f"{digits.domain} has classes ({listed(others)}) that are none of the known: {listed(classes)}")
    if digits.classes == classes or not digits.classes:
        return replace(digits, classes=classes)
    numbers = torch.tensor([classes.index(name) if name in classes else UNLABELLED for name in digits.classes])
    labels = numbers[digits.labels]
    if others:
        kept = labels != UNLABELLED
        return replace(digits, images=digits.images[kept], labels=labels[kept], classes=classes)
    return replace(digits, labels=labels, classes=classes)
