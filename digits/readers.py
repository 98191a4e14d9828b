"""Readers: the files of each domain as images and labels, whatever is wrong with them said in a line."""

import bz2
import gzip
import shlex
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from digits.cache import ImageSet, cached
from digits.mnist_m import blend, read_archive, read_photographs
from digits.synth import load_synth_digits
from utils.cli import UserError

REPOSITORY_DATA = Path(__file__).resolve().parent.parent / "data"
SYNTH_SEED, SYNTH_IMAGES = 0, {"train": 20_000, "test": 2_000}
SYNTH_TEST_START = 10_000_000  # test images come after any training image that will ever be drawn
OPTDIGITS_TRAIN = 1297
MNIST_M_IMAGES = {"train": 59_001, "test": 9_001}
MNIST_M_SEED, MNIST_M_VERSION = 0, 1  # raise the version whenever the pixels change
T = TypeVar("T")


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
    fix = f"move it away and run `python download_data.py {domain} --data-dir DIR` with its data folder as DIR"
    return UserError(f"{path} is truncated or malformed ({detail}): {fix}")


def _parse(domain: str, path: Path, parse: Callable[[Path], T]) -> T:
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


def read_mnist_m(data_dir: Path, split: str) -> tuple[Tensor, Tensor]:
    """MNIST-M, (N, 3, 32, 32), from the official archive, which is unpacked once.

    Without it the test set comes from `mnist_m_test.npz` (arrays `images` and `labels`), and training images are made
    of MNIST's training digits and the photographs in the data folder's BSDS500.
    """
    archive, repacked, photographs = (data_dir / name for name in ("mnist_m.tar.gz", "mnist_m_test.npz", "BSDS500"))
    if split == "test" and repacked.is_file() and not archive.is_file():
        path, (images, labels) = repacked, _parse("mnist-m", repacked, _parse_npz)
    elif split == "train" and photographs.is_dir() and not archive.is_file():
        path, (images, labels) = photographs, _blended(data_dir, photographs)
    else:
        path = _find("mnist-m", data_dir, archive.name)
        images, labels = _parse("mnist-m", path, lambda path: _unpacked(path, split))
    return _as_tensors("mnist-m", path, images.transpose(0, 3, 1, 2), labels)


def _unpacked(archive: Path, split: str) -> ImageSet:
    name = f"mnist-m/{split}_v{MNIST_M_VERSION}.npz"
    return cached(name, MNIST_M_IMAGES[split], [archive.parent], lambda: read_archive(archive, split))


def _parse_npz(path: Path) -> ImageSet:
    with np.load(path) as file:
        images, labels = file["images"], file["labels"]
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
        raise ValueError(f"images are {images.dtype} {images.shape}, not uint8 (N, 32, 32, 3)")
    return images, labels


def _blended(data_dir: Path, folder: Path) -> ImageSet:
    digits, labels = read_mnist(data_dir, "train")
    pixels, photographs = digits[:, 0].numpy(), read_photographs(folder)
    if not photographs:
        raise UserError(f"{folder} has no photographs in train or val: put those of BSDS500 there, or move it away")
    made_of = f"{zlib.crc32(pixels.tobytes()):08x}_{len(photographs)}"
    name = f"mnist-m/blended_v{MNIST_M_VERSION}_seed{MNIST_M_SEED}_{made_of}.npz"
    return cached(
        name,
        len(labels),
        [data_dir, REPOSITORY_DATA],
        lambda: (blend(pixels, photographs, MNIST_M_SEED), labels.numpy()),
    )


def read_synth(data_dir: Path, split: str) -> tuple[Tensor, Tensor]:
    """Our SYN NUMBERS, (N, 3, 32, 32), rendered once and cached."""
    start = 0 if split == "train" else SYNTH_TEST_START
    images, labels = load_synth_digits(SYNTH_SEED, start, SYNTH_IMAGES[split], [data_dir, REPOSITORY_DATA])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64))


def read_optdigits(data_dir: Path, split: str) -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits, (N, 1, 8, 8): the first 1,297 to train, the last 500 to test."""
    from sklearn.datasets import load_digits  # imported where it is needed: a second

    digits = load_digits()
    part = slice(None, OPTDIGITS_TRAIN) if split == "train" else slice(OPTDIGITS_TRAIN, None)
    images = (digits.images[part] * (255 / 16)).round().astype(np.uint8)
    return torch.from_numpy(images[:, None]), torch.from_numpy(digits.target[part].astype(np.int64))
