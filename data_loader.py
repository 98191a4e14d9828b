"""The domains, the one preprocessing function, augmentation, and the loader that pairs source and target.

Whole sets live as uint8 tensors on the training device; a batch is gathered, augmented and preprocessed there at once.
"""

import bz2
import gzip
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import NETWORKS
from utils.augmentation import Draws, augment, draw, neighbours, standardise
from utils.cli import UserError
from utils.config import Config
from utils.data_files import LICENCES, data_files, md5_of
from utils.synth_digits import load_synth_digits

REPOSITORY_DATA = Path(__file__).resolve().parent / "data"


@dataclass(frozen=True)
class Domain:
    """One row of the table of domains.

    `read(data_dir, split)` returns uint8 images (N, C, H, W), C = 1 or 3, and int64 labels (N,) in 0…9.
    """

    name: str
    title: str
    train_images: int
    test_images: int
    size: str
    classes: int
    licence: str
    read: Callable[[Path, str], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class DigitSet:
    """Images of one split of a domain, on one device.

    Shape: images (N, C, H, W) uint8, C = 1 or 3; labels (N,) int64 in 0…9
    """

    domain: str
    split: str
    images: Tensor
    labels: Tensor
    mark: str  # how results name this data: "MNIST", or "SVHN subset, 23,412" when a file is not the official one
    checksums: dict[str, str]  # file (relative to the data folder) -> md5

    def __len__(self) -> int:
        return len(self.images)


class MissingData(UserError):
    """A file of a domain is not there; the message names the command that brings it."""


def _find(domain: str, data_dir: Path, name: str) -> Path:
    """The file, or without its `.gz` as torchvision leaves it."""
    try:
        for path in (data_dir / name, data_dir / name.removesuffix(".gz")):
            if path.is_file():
                return path
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): give a folder that can be read as --data-dir"
        ) from None
    command = f"python download_data.py {domain} --data-dir {shlex.quote(str(data_dir))}"
    raise MissingData(f"{data_dir / name} is missing: run `{command}`")


def _malformed(domain: str, path: Path, detail: str) -> UserError:
    mend = f"delete it and run `python download_data.py {domain} --data-dir DIR` with its data folder as DIR"
    return UserError(f"{path} is truncated or malformed ({detail}): {mend}")


def _parse(domain: str, path: Path, parse: Callable[[Path], object]):
    """Parse a file; whatever a damaged one makes the parser raise becomes one line that names the file."""
    try:
        return parse(path)
    except PermissionError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): make it readable") from None
    # Parsers of damaged bytes raise nearly anything: struct.error, zlib.error, EOFError, KeyError, scipy's own, ….
    except Exception as error:
        raise _malformed(domain, path, " ".join(str(error).split())[:120] or type(error).__name__) from None


def _as_tensors(domain: str, path: Path, images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    labels = labels.astype(np.int64)
    if len(images) != len(labels) or not len(labels):
        raise _malformed(domain, path, f"{len(images)} images but {len(labels)} labels")
    if labels.min() < 0 or labels.max() > 9:
        raise _malformed(domain, path, f"labels from {labels.min()} to {labels.max()}")
    return torch.from_numpy(np.array(images, order="C")), torch.from_numpy(labels)


def _parse_idx(path: Path, dimensions: int) -> np.ndarray:
    """MNIST's IDX format: two zero bytes, type 8 (uint8), number of dimensions, big-endian sizes, data."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError("no IDX header")
    if data[3] != dimensions:
        raise ValueError(f"{data[3]} dimensions, not {dimensions}")
    shape = np.frombuffer(data, ">u4", data[3], offset=4)
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if body.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{body.size} bytes of data where the header announces {np.prod(shape, dtype=np.int64)}")
    return body.reshape(shape)


def read_mnist(data_dir: Path, split: str) -> tuple[Tensor, Tensor]:
    """MNIST, (N, 1, 28, 28), from the official files under MNIST/raw, compressed or not."""
    prefix = "train" if split == "train" else "t10k"
    images = _find("mnist", data_dir, f"MNIST/raw/{prefix}-images-idx3-ubyte.gz")
    labels = _find("mnist", data_dir, f"MNIST/raw/{prefix}-labels-idx1-ubyte.gz")
    pixels = _parse("mnist", images, lambda path: _parse_idx(path, 3))[:, None]
    return _as_tensors("mnist", labels, pixels, _parse("mnist", labels, lambda path: _parse_idx(path, 1)))


def read_svhn(data_dir: Path, split: str) -> tuple[Tensor, Tensor]:
    """SVHN format 2 (cropped digits), (N, 3, 32, 32). The files call zero 10; here it is 0."""

    def parse(path: Path) -> tuple[np.ndarray, np.ndarray]:
        from scipy.io import loadmat  # imported where it is needed: half a second

        contents = loadmat(path, variable_names=("X", "y"))
        if "X" not in contents or "y" not in contents:
            raise ValueError(f"it has no variable {'X' if 'X' not in contents else 'y'}")
        images, labels = contents["X"], contents["y"].reshape(-1)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
            raise ValueError(f"X is {images.dtype} {images.shape}, not uint8 (32, 32, 3, N)")
        if labels.size and (labels.min() < 0 or labels.max() > 10):
            raise ValueError(f"labels from {labels.min()} to {labels.max()}, not within 0–10")
        return images.transpose(3, 2, 0, 1), labels.astype(np.int64) % 10

    path = _find("svhn", data_dir, f"{split}_32x32.mat")
    return _as_tensors("svhn", path, *_parse("svhn", path, parse))


def read_usps(data_dir: Path, split: str) -> tuple[Tensor, Tensor]:
    """USPS, (N, 1, 16, 16), from the libsvm text files: `label index:value …`, labels 1…10, values in [-1, 1]."""

    def parse(path: Path) -> tuple[np.ndarray, np.ndarray]:
        rows = [line.split() for line in bz2.decompress(path.read_bytes()).splitlines()]
        labels = np.array([int(row[0]) for row in rows]) - 1
        values = np.array([[item.split(b":")[1] for item in row[1:]] for row in rows], dtype=np.float32)
        if values.shape[1:] != (256,):
            raise ValueError(f"{values.shape[1:]} values a line, not 256")
        if not (np.abs(values) <= 1).all():
            raise ValueError("values outside [-1, 1]")
        return ((values.reshape(-1, 1, 16, 16) + 1) / 2 * 255).round().astype(np.uint8), labels

    path = _find("usps", data_dir, "usps.bz2" if split == "train" else "usps.t.bz2")
    return _as_tensors("usps", path, *_parse("usps", path, parse))


SYNTH_SEED, SYNTH_TEST_START = (
    0,
    10_000_000,
)  # test images come after any training image that will ever be drawn


def read_synth(data_dir: Path, split: str) -> tuple[Tensor, Tensor]:
    """Our SYN NUMBERS, (N, 3, 32, 32), rendered once and cached."""
    row = DOMAINS["synth"]
    start, count = (0, row.train_images) if split == "train" else (SYNTH_TEST_START, row.test_images)
    images, labels = load_synth_digits(SYNTH_SEED, start, count, [data_dir, REPOSITORY_DATA])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64))


OPTDIGITS_TRAIN = 1297


def read_optdigits(data_dir: Path, split: str) -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits, (N, 1, 8, 8): the first 1,297 to train, the last 500 to test."""
    from sklearn.datasets import load_digits  # imported where it is needed: a second

    digits = load_digits()
    part = slice(None, OPTDIGITS_TRAIN) if split == "train" else slice(OPTDIGITS_TRAIN, None)
    images = (digits.images[part] * (255 / 16)).round().astype(np.uint8)
    return torch.from_numpy(images[:, None]), torch.from_numpy(digits.target[part].astype(np.int64))


_ROWS = (
    Domain("svhn", "SVHN", 73257, 26032, "32×32 colour", 10, LICENCES["svhn"], read_svhn),
    Domain("mnist", "MNIST", 60000, 10000, "28×28 grey", 10, LICENCES["mnist"], read_mnist),
    Domain("usps", "USPS", 7291, 2007, "16×16 grey", 10, LICENCES["usps"], read_usps),
    Domain("synth", "synth", 20000, 2000, "32×32 colour", 10, "MIT, rendered here", read_synth),
    Domain("optdigits", "optdigits", OPTDIGITS_TRAIN, 500, "8×8 grey", 10, "CC BY 4.0 (UCI)", read_optdigits),
)
DOMAINS: dict[str, Domain] = {row.name: row for row in _ROWS}


def load_domain(name: str, split: str, data_dir: Path) -> DigitSet:
    """Read one split, "train" or "test", of a domain.

    Raises: MissingData, or UserError for a file that can't be read or is malformed.
    """
    row = DOMAINS[name]
    images, labels = row.read(data_dir, split)
    checksums, official = {}, True
    for file in data_files(name, split):
        path = data_dir / file.path
        if path.is_file():  # an uncompressed copy has no official checksum
            checksums[file.path] = md5_of(path)
            official &= checksums[file.path] == file.md5
    expected = row.train_images if split == "train" else row.test_images
    kind = "subset" if len(images) < expected else "unofficial"
    mark = row.title if official and len(images) == expected else f"{row.title} {kind}, {len(images):,}"
    return DigitSet(name, split, images, labels, mark, checksums)


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


def preprocessing_for(config: Config, images: Sequence[Tensor] = ()) -> Preprocessing:
    """What the configuration does to images; `images` are the training sets, whose mean pixel it may need."""
    mean = mean_pixel(images) if config.normalisation == "mean" and images else (0.0, 0.0, 0.0)
    grey = NETWORKS[config.network].channels == 1
    return Preprocessing(config.image_size, config.normalisation, mean, grey)


def seed_of(*parts: int) -> int:
    """A well-mixed 63-bit seed that depends on all of the given whole numbers ≥ 0."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def shuffled_passes(count: int, length: int, seed: int) -> Tensor:
    """`length` indices into a set of `count`: pass after pass, each a new permutation. Shape: -> (length,) int64."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(count, generator=generator) for _ in range(-(-length // count))]
    return torch.cat(passes)[:length]


class PairedLoader:
    """Batches (x_s, y_s, x_t): source images and labels, target images. It never holds a target label.

    An epoch is one pass over the larger set, its last batch filled up from a new pass; the smaller set starts again as
    often as it takes. Each pass of each set has an order of its own, which depends only on (seed, epoch), as does what
    augmentation draws.

    Args:
        source: labelled set. target_images: (M, C, H, W) uint8.
        batch_size: images of each domain in a batch.
        preprocess: the same for both domains.
        augmentation: as `utils.augmentation.draw` takes it.
        device: where the sets are kept and batches are made.
        steps: batches an epoch, when it shall not follow from the sizes of the sets.
        share: the part of each batch to give out, for one of several processes; together they give out the same
            images, changed in the same way, as one would.
        two_views: x_t holds each target image twice, as augmented and, for a teacher, under "weak".
        target_strong_share: of the target's images that "strong" changes strongly, 0 to 1.

    Shape: x_s, x_t (B, C, S, S) float32, with two views x_t (2, B, C, S, S); y_s (B,) int64
    """

    def __init__(
        self,
        source: DigitSet,
        target_images: Tensor,
        batch_size: int,
        seed: int,
        preprocess: Preprocessing,
        augmentation: str = "none",
        device: torch.device | str = "cpu",
        steps: int | None = None,
        share: slice = slice(None),
        two_views: bool = False,
        target_strong_share: float = 1.0,
    ):
        self.images_s = preprocess.resize(source.images).to(device)
        self.labels_s = source.labels.to(device)
        self.images_t = preprocess.resize(target_images).to(device)
        self.batch_size, self.seed, self.preprocess, self.share = batch_size, seed, preprocess, share
        self.augmentation, self.two_views, self.target_strong_share = augmentation, two_views, target_strong_share
        self.steps = steps or -(-max(len(self.images_s), len(self.images_t)) // batch_size)

    def batch(self, images: Tensor, index: Tensor, draws: Draws) -> Tensor:
        """Gather, augment and preprocess. Shape: (N, C, S, S) uint8, (B,), B of each draw -> (B, C, S, S)."""
        others = neighbours(images, draws)
        others = None if others is None else others.float().div_(255)
        return self.preprocess.normalise(augment(images[index].float().div_(255), draws, others))

    def epoch(
        self, epoch: int, first_step: int = 0, mild_from: float = math.inf
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches of epoch `epoch` (from 0), from step `first_step` on.

        From step `mild_from` on, which may lie in another epoch, changes are "mild" (utils/augmentation.py).
        """
        length, device = self.steps * self.batch_size, self.images_s.device
        order_s = shuffled_passes(len(self.images_s), length, seed_of(self.seed, epoch, 0)).to(device)
        order_t = shuffled_passes(len(self.images_t), length, seed_of(self.seed, epoch, 1)).to(device)
        generator = torch.Generator(device).manual_seed(seed_of(self.seed, epoch, 2))

        for step in range(self.steps):
            augmentation = "mild" if step >= mild_from else self.augmentation
            # Views of the source and of the target. They are drawn for the whole batch, and for steps already done, so
            # that they are the same each time.
            views = [(augmentation, 1.0), (augmentation, self.target_strong_share), *[("weak", 1.0)] * self.two_views]
            size = self.preprocess.image_size
            draws = [draw(view, self.batch_size, size, generator, share) for view, share in views]
            if step < first_step:
                continue
            part = slice(step * self.batch_size, (step + 1) * self.batch_size)
            index_s, index_t = order_s[part][self.share], order_t[part][self.share]
            draws_s, *draws_t = ({name: values[self.share] for name, values in drawn.items()} for drawn in draws)
            x_s = self.batch(self.images_s, index_s, draws_s)
            x_t = [self.batch(self.images_t, index_t, drawn) for drawn in draws_t]
            yield x_s, self.labels_s[index_s], torch.stack(x_t) if self.two_views else x_t[0]


def limit(digits: DigitSet, count: int) -> DigitSet:
    """The first `count` images, for dry runs."""
    return replace(digits, images=digits.images[:count], labels=digits.labels[:count])
