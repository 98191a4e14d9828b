"""Readers: the files of each domain as images and labels, whatever is wrong with them said in a line.

A file is known by its content, not by its name: packed or not, and in the formats in which these sets go around.
"""

import bz2
import gzip
import shlex
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

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
Arrays = tuple[np.ndarray, np.ndarray]  # images and labels


@dataclass(frozen=True)
class Reading:
    """What a reader returns: uint8 images (N, C, H, W), C = 1 or 3, and labels (N,), or what `checked` understands."""

    images: np.ndarray
    labels: np.ndarray
    files: tuple[Path, ...] = ()  # where they come from; none for images that are made


class MissingData(UserError):
    """A file of a domain is not there; the message names the command that brings it."""


def _find(domain: str, data_dir: Path, *names: str) -> Path:
    """The first of these files that is there."""
    try:
        for path in (data_dir / name for name in names):
            if path.is_file():
                return path
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): give a folder that can be read as --data-dir"
        ) from None
    command = f"python download_data.py {domain} --data-dir {shlex.quote(str(data_dir))}"
    raise MissingData(f"{data_dir / names[0]} is missing: run `{command}`")


def _malformed(domain: str, path: Path, detail: str) -> UserError:
    fix = f"move it away and run `python download_data.py {domain} --data-dir DIR` with its data folder as DIR"
    return UserError(f"{path} is no file of {domain} that can be used ({detail}): {fix}")


def _parse(domain: str, path: Path, parse: Callable[[Path], T]) -> T:
    """Parse a file; whatever a damaged one makes the parser raise becomes one line that names the file."""
    try:
        return parse(path)
    except PermissionError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): make it readable") from None
    # Parsers of damaged bytes raise nearly anything: struct.error, zlib.error, EOFError, KeyError, scipy's own, ….
    except Exception as error:
        raise _malformed(domain, path, " ".join(str(error).split())[:120] or type(error).__name__) from None


def _reading(domain: str, files: tuple[Path, ...], images: np.ndarray, labels: np.ndarray) -> Reading:
    labels = labels.astype(np.int64)
    if len(images) != len(labels) or not len(labels):
        raise _malformed(domain, files[-1], f"{len(images)} images but {len(labels)} labels")
    if labels.min() < 0 or labels.max() > 9:
        raise _malformed(domain, files[-1], f"labels from {labels.min()} to {labels.max()}")
    return Reading(images, labels, files)


def unpacked(path: Path) -> bytes:
    """A file's content, without the compression of gzip or bzip2 if it has one."""
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        return gzip.decompress(data)
    return bz2.decompress(data) if data[:3] == b"BZh" else data


def _parse_idx(path: Path, dimensions: int) -> np.ndarray:
    """MNIST's IDX format: two zero bytes, type 8 (uint8), number of dimensions, big-endian sizes, data."""
    data = unpacked(path)
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError("no IDX header")
    if data[3] != dimensions:
        raise ValueError(f"{data[3]} dimensions, not {dimensions}")
    shape = np.frombuffer(data, ">u4", data[3], offset=4)
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if body.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{body.size} bytes of data where the header announces {np.prod(shape, dtype=np.int64)}")
    return body.reshape(shape)


def _idx_file(data_dir: Path, stem: str) -> Path:
    """One of MNIST's files: `stem`, or with a dot before "idx", in MNIST/raw or beside the others, packed or not."""
    stems = (stem, stem.replace("-idx", ".idx"))
    names = [f"{folder}{name}{end}" for folder in ("MNIST/raw/", "") for name in stems for end in (".gz", "")]
    return _find("mnist", data_dir, *names)


def _parse_keras(path: Path, split: str) -> Arrays:
    with np.load(path) as file:
        images, labels = file[f"x_{split}"], file[f"y_{split}"]
    return images, labels


def _parse_csv(path: Path) -> Arrays:
    """Rows of a label and 784 grey levels, below a header or not."""
    with path.open() as file:
        header = not file.read(1).isdigit()
    rows = np.loadtxt(path, np.uint8, delimiter=",", skiprows=int(header), ndmin=2)
    return rows[:, 1:].reshape(-1, 28, 28), rows[:, 0]


def read_mnist(data_dir: Path, split: str) -> Reading:
    """MNIST, (N, 1, 28, 28): its four IDX files, else Keras' mnist.npz, else mnist_train.csv and mnist_test.csv."""
    stem = "train" if split == "train" else "t10k"
    try:
        files = tuple(_idx_file(data_dir, f"{stem}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    except MissingData:
        keras, csv = data_dir / "mnist.npz", data_dir / f"mnist_{split}.csv"
        if keras.is_file():
            files, arrays = (keras,), _parse("mnist", keras, partial(_parse_keras, split=split))
        elif csv.is_file():
            files, arrays = (csv,), _parse("mnist", csv, _parse_csv)
        else:
            raise
    else:
        images, labels = files
        arrays = (
            _parse("mnist", images, lambda path: _parse_idx(path, 3)),
            _parse("mnist", labels, lambda path: _parse_idx(path, 1)),
        )
    return _reading("mnist", files, arrays[0][:, None], arrays[1])


def _parse_mat(path: Path) -> Arrays:
    """SVHN's X and y, of MATLAB's old format or of v7.3, whose axes HDF5 keeps in reverse."""
    import h5py  # imported where they are needed: half a second
    from scipy.io import loadmat

    if h5py.is_hdf5(path):
        with h5py.File(path) as file:
            contents = {name: file[name][()].T for name in ("X", "y") if name in file}
    else:
        contents = loadmat(path, variable_names=("X", "y"))
    if "X" not in contents or "y" not in contents:
        raise ValueError(f"it has no variable {'X' if 'X' not in contents else 'y'}")
    images, labels = contents["X"], contents["y"].reshape(-1)
    if images.shape[:3] == (32, 32, 3):
        images = images.transpose(3, 0, 1, 2)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
        raise ValueError(f"X is {images.dtype} {images.shape}, not uint8 (32, 32, 3, N) or (N, 32, 32, 3)")
    if labels.size and not (labels == labels.astype(np.int64)).all():
        raise ValueError("labels that are no whole numbers")
    if labels.size and (labels.min() < 0 or labels.max() > 10):
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, not within 0–10")
    return images.transpose(0, 3, 1, 2), labels.astype(np.int64) % 10


def read_svhn(data_dir: Path, split: str) -> Reading:
    """SVHN format 2 (cropped digits), (N, 3, 32, 32). The files call zero 10; here it is 0."""
    path = _find("svhn", data_dir, f"{split}_32x32.mat")
    return _reading("svhn", (path,), *_parse("svhn", path, _parse_mat))


def _usps_images(values: np.ndarray, low: float) -> np.ndarray:
    """Rows of 256 values from `low` to 1 as images. Shape: (N, 256) -> (N, 1, 16, 16) uint8"""
    if values.shape[1:] != (256,):
        raise ValueError(f"{values.shape[1:]} values a line, not 256")
    if not ((values >= low) & (values <= 1)).all():
        raise ValueError(f"values outside [{low:g}, 1]")
    return ((values.reshape(-1, 1, 16, 16) - low) / (1 - low) * 255).round().astype(np.uint8)


def _parse_libsvm(path: Path) -> Arrays:
    """`label index:value …`, labels 1…10, values in [-1, 1]."""
    rows = [line.split() for line in unpacked(path).splitlines()]
    labels = np.array([int(row[0]) for row in rows]) - 1
    return _usps_images(np.array([[item.split(b":")[1] for item in row[1:]] for row in rows], np.float32), -1), labels


def _parse_zip_codes(path: Path) -> Arrays:
    """`label value …`, labels 0…9, values in [-1, 1]: zip.train and zip.test of "Elements of Statistical Learning"."""
    rows = np.array([line.split() for line in unpacked(path).splitlines()], np.float32)
    return _usps_images(rows[:, 1:], -1), rows[:, 0]


def _parse_usps_h5(path: Path, split: str) -> Arrays:
    """Groups train and test, each of data (N, 256) in [0, 1] and target (N,)."""
    import h5py

    with h5py.File(path) as file:
        values, labels = file[f"{split}/data"][()], file[f"{split}/target"][()]
    return _usps_images(values, 0), labels


def read_usps(data_dir: Path, split: str) -> Reading:
    """USPS, (N, 1, 16, 16), from libsvm's text, from usps.h5, or from zip.train.gz and zip.test.gz."""
    libsvm = "usps" if split == "train" else "usps.t"
    path = _find("usps", data_dir, f"{libsvm}.bz2", libsvm, "usps.h5", f"zip.{split}.gz", f"zip.{split}")
    parse = _parse_zip_codes if path.name.startswith("zip.") else _parse_libsvm
    if path.suffix == ".h5":
        parse = partial(_parse_usps_h5, split=split)
    return _reading("usps", (path,), *_parse("usps", path, parse))


def read_mnist_m(data_dir: Path, split: str) -> Reading:
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
    files = () if path == photographs else (path,)
    return _reading("mnist-m", files, images.transpose(0, 3, 1, 2), labels)


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
    digits = read_mnist(data_dir, "train")
    pixels, photographs = digits.images[:, 0], read_photographs(folder)
    if not photographs:
        raise UserError(f"{folder} has no photographs in train or val: put those of BSDS500 there, or move it away")
    made_of = f"{zlib.crc32(pixels.tobytes()):08x}_{len(photographs)}"
    name = f"mnist-m/blended_v{MNIST_M_VERSION}_seed{MNIST_M_SEED}_{made_of}.npz"
    return cached(
        name,
        len(pixels),
        [data_dir, REPOSITORY_DATA],
        lambda: (blend(pixels, photographs, MNIST_M_SEED), digits.labels),
    )


def read_synth(data_dir: Path, split: str) -> Reading:
    """Our SYN NUMBERS, (N, 3, 32, 32), rendered once and cached."""
    start = 0 if split == "train" else SYNTH_TEST_START
    images, labels = load_synth_digits(SYNTH_SEED, start, SYNTH_IMAGES[split], [data_dir, REPOSITORY_DATA])
    return Reading(images.transpose(0, 3, 1, 2), labels)


def read_optdigits(data_dir: Path, split: str) -> Reading:
    """scikit-learn's handwritten digits, (N, 1, 8, 8): the first 1,297 to train, the last 500 to test."""
    from sklearn.datasets import load_digits  # imported where it is needed: a second

    digits = load_digits()
    part = slice(None, OPTDIGITS_TRAIN) if split == "train" else slice(OPTDIGITS_TRAIN, None)
    images = (digits.images[part] * (255 / 16)).round().astype(np.uint8)
    return Reading(images[:, None], digits.target[part])
