"""The readers: official formats written by the tests themselves, damaged files, and the real data where it is."""

import bz2
import dataclasses
import gzip
import hashlib
import io
import struct
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import TINY_COUNTS, usps_line, write_idx, write_svhn, write_usps
from scipy.io import loadmat, savemat
from sklearn.datasets import load_digits
from torchvision.datasets import USPS
from torchvision.datasets.mnist import read_image_file, read_label_file

from digits.domains import DOMAINS, load_domain
from digits.files import DATA_FILES, data_files
from digits.readers import MissingData, Reading
from utils.cli import UserError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (12, 28, 28), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
SMALL = RNG.integers(0, 256, (12, 16, 16), dtype=np.uint8)
LABELS = np.arange(12) % 10

MNIST_IMAGES, MNIST_LABELS = "MNIST/raw/train-images-idx3-ubyte.gz", "MNIST/raw/train-labels-idx1-ubyte.gz"
FILES = {
    ("svhn", "train"): {"train_32x32.mat"},
    ("svhn", "test"): {"test_32x32.mat"},
    ("mnist", "train"): {MNIST_IMAGES, MNIST_LABELS},
    ("mnist", "test"): {"MNIST/raw/t10k-images-idx3-ubyte.gz", "MNIST/raw/t10k-labels-idx1-ubyte.gz"},
    ("usps", "train"): {"usps.bz2"},
    ("usps", "test"): {"usps.t.bz2"},
}


def fill(folder: Path) -> Path:
    """Training files of 12 images for each domain that has files."""
    write_idx(folder / MNIST_IMAGES, GREY)
    write_idx(folder / MNIST_LABELS, LABELS.astype(np.uint8))
    write_svhn(folder / "train_32x32.mat", COLOUR, LABELS)
    write_usps(folder / "usps.bz2", SMALL, LABELS)
    return folder


# ---- what is read


@pytest.mark.parametrize(
    ("name", "pixels"), [("svhn", COLOUR), ("mnist", GREY[..., None]), ("usps", SMALL[..., None])], ids=TINY_COUNTS
)
def test_what_was_written_is_read_exactly(tmp_path, name, pixels):
    digits = load_domain(name, "train", fill(tmp_path))
    assert (digits.domain, digits.split) == (name, "train")
    assert (digits.images.dtype, digits.labels.dtype) == (torch.uint8, torch.int64)
    assert digits.images.is_contiguous()
    assert np.array_equal(digits.images.permute(0, 2, 3, 1).numpy(), pixels)
    assert digits.labels.tolist() == LABELS.tolist()


def test_unpacked_idx_files_have_big_endian_headers(tmp_path):
    """A header byte for byte as the format's description gives it: 00 00 08 03, then the sizes."""
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    pixels = bytes(range(256)) * 3 + bytes(16)
    (raw / "t10k-images-idx3-ubyte").write_bytes(bytes.fromhex("00000803 00000001 0000001c 0000001c") + pixels)
    (raw / "t10k-labels-idx1-ubyte").write_bytes(bytes.fromhex("00000801 00000001 07"))
    digits = load_domain("mnist", "test", tmp_path)
    assert digits.images.shape == (1, 1, 28, 28)
    assert bytes(digits.images.flatten().tolist()) == pixels
    assert digits.labels.tolist() == [7]


def test_svhn_calls_zero_ten_or_zero(tmp_path):
    savemat(tmp_path / "test_32x32.mat", {"X": X[..., :4], "y": np.array([[10], [1], [9], [0]], np.uint8)})
    assert load_domain("svhn", "test", tmp_path).labels.tolist() == [0, 1, 9, 0]


def test_usps_values_between_grey_levels_are_rounded(tmp_path):
    (tmp_path / "usps.t.bz2").write_bytes(usps_text("1 1:-0.5 " + " ".join(f"{i}:0.2" for i in range(2, 257))))
    image = load_domain("usps", "test", tmp_path).images.flatten()
    assert image.tolist() == [64, *[153] * 255]  # 63.75 and 153


def test_optdigits_are_scikit_learns():
    theirs = load_digits()
    train, test = (load_domain("optdigits", split, Path("/nonexistent")) for split in ("train", "test"))
    assert (len(train), len(test)) == (1297, 500)
    assert train.mark == test.mark == "optdigits"
    pixels = torch.cat((train.images, test.images)).numpy().reshape(1797, 64)  # both parts, each image once
    assert np.abs(pixels - theirs.data / 16 * 255).max() <= 0.5
    assert torch.cat((train.labels, test.labels)).tolist() == theirs.target.tolist()


def test_synth_asks_for_images_that_are_not_shared(monkeypatch, tmp_path):
    asked = []

    def load(seed, start, count, folders):
        asked.append((seed, start, start + count, folders[0]))
        images = np.zeros((count, 32, 32, 3), np.uint8)
        images[1, 4, 9, 2] = 90  # row 4, column 9, blue
        return images, np.arange(count) % 10

    monkeypatch.setattr("digits.readers.load_synth_digits", load)
    train, test = (load_domain("synth", split, tmp_path) for split in ("train", "test"))
    assert train.images[1, 2, 4, 9] == train.images.sum() == 90
    assert train.labels[:12].tolist() == [*range(10), 0, 1]
    (seed, start, end, folder), (test_seed, test_start, test_end, _) = asked
    assert (len(train), len(test)) == (end - start, test_end - test_start) == (20_000, 2_000)
    assert seed == test_seed
    assert end <= test_start or test_end <= start
    assert folder == tmp_path


# ---- the same data as people have them


def npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def h5(**arrays) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, array in arrays.items():
            file[name.replace("_", "/")] = array
    return buffer.getvalue()


def csv(header: str) -> bytes:
    rows = np.column_stack((LABELS, GREY.reshape(12, -1))).tolist()
    return "\n".join([header] * bool(header) + [",".join(map(str, row)) for row in rows]).encode()


def zip_codes() -> bytes:
    values = SMALL.reshape(12, -1) / 255 * 2 - 1
    return "".join(
        f"{y}.0000 {' '.join(f'{v:.3f}' for v in row)} \n" for y, row in zip(LABELS, values, strict=True)
    ).encode()


def test_other_names_and_formats_are_read_exactly(tmp_path):
    images, labels = idx(12, 28, 28, data=GREY.tobytes()), idx(12, data=LABELS.astype(np.uint8).tobytes())
    ten = np.where(LABELS == 0, 10, LABELS)[:, None]
    colour, values = COLOUR.transpose(1, 2, 3, 0), SMALL.reshape(12, -1) / 255
    cases = [
        ("mnist", {"MNIST/raw/train-images.idx3-ubyte": images, "MNIST/raw/train-labels.idx1-ubyte": labels}),
        ("mnist", {"train-images-idx3-ubyte.gz": gzip.compress(images), "train-labels.idx1-ubyte": labels}),
        ("mnist", {MNIST_IMAGES: images, MNIST_LABELS: labels}),
        ("mnist", {"mnist.npz": npz(x_train=GREY, y_train=LABELS.astype(np.uint8), x_test=GREY[:1], y_test=[1])}),
        ("mnist", {"mnist_train.csv": csv("")}),
        ("mnist", {"mnist_train.csv": csv("label," + ",".join(f"pixel{i}" for i in range(784)))}),
        ("svhn", {"train_32x32.mat": mat73(X=colour, y=ten.astype(float))}),
        ("svhn", {"train_32x32.mat": mat(X=COLOUR, y=ten)}),
        ("usps", {"usps.h5": h5(train_data=values, train_target=LABELS, test_data=values[:1], test_target=[1])}),
        ("usps", {"zip.train.gz": gzip.compress(zip_codes())}),
        ("usps", {"zip.train": zip_codes()}),
        ("usps", {"usps": bz2.decompress(usps_text(*map(usps_line, LABELS, SMALL)))}),
    ]  # fmt: skip
    for number, (name, files) in enumerate(cases):
        folder = tmp_path / str(number)
        for file, content in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        digits = load_domain(name, "train", folder)
        pixels = {"mnist": GREY[:, None], "svhn": COLOUR.transpose(0, 3, 1, 2), "usps": SMALL[:, None]}[name]
        assert np.array_equal(digits.images.numpy(), pixels), files.keys()
        assert digits.labels.tolist() == LABELS.tolist(), files.keys()
        assert digits.checksums == {file: hashlib.md5(content).hexdigest() for file, content in files.items()}


# ---- marks and checksums


def test_unpacked_files_are_official_by_their_content(monkeypatch, tmp_path):
    """Other images under MNIST's names are not MNIST, whether packed or not."""
    monkeypatch.setitem(DOMAINS, "mnist", dataclasses.replace(DOMAINS["mnist"], train_images=12))
    images, labels = idx(12, 28, 28, data=GREY.tobytes()), idx(12, data=LABELS.astype(np.uint8).tobytes())
    files = [
        dataclasses.replace(file, md5="of the packed file", unpacked_md5=hashlib.md5(content).hexdigest())
        for file, content in zip(data_files("mnist", "train"), (images, labels), strict=True)
    ]
    monkeypatch.setitem(DATA_FILES, "mnist", tuple(files))
    mirrored = idx(12, 28, 28, data=GREY.transpose(0, 2, 1).tobytes())
    for content, mark in ((images, "MNIST"), (mirrored, "MNIST unofficial, 12")):
        for name, pack in (("train-images.idx3-ubyte", bytes), ("train-images-idx3-ubyte.gz", gzip.compress)):
            folder = tmp_path / mark / name
            folder.mkdir(parents=True)
            (folder / name).write_bytes(pack(content))
            (folder / "train-labels-idx1-ubyte").write_bytes(labels)
            assert load_domain("mnist", "train", folder).mark == mark


@pytest.mark.parametrize("name", TINY_COUNTS)
def test_other_files_than_the_official_ones_are_marked(tiny_data, name):
    for split, count in zip(("train", "test"), TINY_COUNTS[name], strict=True):
        digits = load_domain(name, split, tiny_data)
        assert digits.mark == f"{name.upper()} subset, {count}"
        sums = {file: hashlib.md5((tiny_data / file).read_bytes()).hexdigest() for file in FILES[name, split]}
        assert digits.checksums == sums


def test_marks_tell_official_files_of_the_right_count_from_others(monkeypatch, tiny_data):
    row = DOMAINS["svhn"]
    read_more = dataclasses.replace(row, read=lambda *_: Reading(torch.zeros(1234, 1, 1, 1), torch.zeros(1234)))
    monkeypatch.setitem(DOMAINS, "svhn", read_more)
    assert load_domain("svhn", "train", tiny_data).mark == "SVHN subset, 1,234"
    monkeypatch.setitem(DOMAINS, "svhn", dataclasses.replace(row, train_images=40, test_images=23))
    assert load_domain("svhn", "train", tiny_data).mark == "SVHN unofficial, 40"
    sums = [hashlib.md5((tiny_data / file.path).read_bytes()).hexdigest() for file in DATA_FILES["svhn"]]
    official = [dataclasses.replace(file, md5=md5) for file, md5 in zip(DATA_FILES["svhn"], sums, strict=True)]
    monkeypatch.setitem(DATA_FILES, "svhn", tuple(official))
    assert [load_domain("svhn", split, tiny_data).mark for split in ("train", "test")] == ["SVHN", "SVHN"]


def test_files_belong_to_their_split():
    assert {(name, split): {file.path for file in data_files(name, split)} for name, split in FILES} == FILES
    assert all(data_files(name) == DATA_FILES[name] for name in DATA_FILES)
    assert data_files("synth") == data_files("optdigits", "test") == ()


# ---- what is missing or damaged


def refusal(name: str, split: str, folder: Path) -> UserError:
    """The error, of one line, with which a domain is not read."""
    with pytest.raises(UserError) as caught:
        load_domain(name, split, folder)
    assert "\n" not in str(caught.value)
    return caught.value


def mat(**contents) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, contents)
    return buffer.getvalue()


def mat73(**contents) -> bytes:
    """As MATLAB's v7.3 keeps arrays: in HDF5, axes in reverse."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, array in contents.items():
            file[name] = array.T
    return buffer.getvalue()


def idx(*shape: int, magic: bytes = b"\0\0\x08", data: bytes | None = None) -> bytes:
    """An IDX file; its data are zeros, unless given."""
    body = bytes(int(np.prod(shape))) if data is None else data
    return magic + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + body


def usps_text(*lines: str) -> bytes:
    return bz2.compress(("\n".join(lines) + "\n").encode())


X = COLOUR.transpose(1, 2, 3, 0)
Y = np.where(LABELS == 0, 10, LABELS)[:, None].astype(np.uint8)
ROW = usps_line(3, SMALL[0])
MNIST_GZ = gzip.compress(idx(12, 28, 28, data=GREY.tobytes()))
USPS_BZ2 = usps_text(ROW, ROW)
DAMAGED = {
    "mnist: truncated .gz": (MNIST_IMAGES, MNIST_GZ[: len(MNIST_GZ) // 2]),
    "mnist: a flipped byte": (MNIST_IMAGES, MNIST_GZ[:999] + bytes([MNIST_GZ[999] ^ 255]) + MNIST_GZ[1000:]),
    "mnist: empty file": (MNIST_IMAGES, b""),
    "mnist: empty archive": (MNIST_IMAGES, gzip.compress(b"")),
    "mnist: no archive": (MNIST_IMAGES, b"<html>404 Not Found</html>"),
    "mnist: wrong magic": (MNIST_IMAGES, gzip.compress(idx(12, 28, 28, magic=b"\0\0\x0d"))),
    "mnist: header cut short": (MNIST_IMAGES, gzip.compress(idx(12, 28, 28)[:9])),
    "mnist: data cut short": (MNIST_IMAGES, gzip.compress(idx(12, 28, 28)[:-1])),
    "mnist: too much data": (MNIST_IMAGES, gzip.compress(idx(12, 28, 28) + b"\0")),
    "mnist: fewer labels than images": (MNIST_LABELS, gzip.compress(idx(11))),
    "mnist: a label of 10": (MNIST_LABELS, gzip.compress(idx(12, data=bytes([10, *range(11)])))),
    "mnist: labels where images belong": (MNIST_IMAGES, gzip.compress(idx(12))),
    "mnist: images where labels belong": (MNIST_LABELS, gzip.compress(idx(12, 28, 28))),
    "svhn: garbage": ("train_32x32.mat", np.random.default_rng(1).bytes(5000)),
    "svhn: text": ("train_32x32.mat", b"<html>404 Not Found</html>"),
    "svhn: empty file": ("train_32x32.mat", b""),
    "svhn: truncated": ("train_32x32.mat", mat(X=X, y=Y)[:20_000]),
    "svhn: without X": ("train_32x32.mat", mat(y=Y)),
    "svhn: without y": ("train_32x32.mat", mat(X=X)),
    "svhn: X as (N, 3, 32, 32)": ("train_32x32.mat", mat(X=COLOUR.transpose(0, 3, 1, 2), y=Y)),
    "svhn: labels between": ("train_32x32.mat", mat(X=X, y=Y / 2)),
    "svhn: v7.3 without y": ("train_32x32.mat", mat73(X=X)),
    "svhn: X without colour": ("train_32x32.mat", mat(X=X[:, :, 0], y=Y)),
    "svhn: X of floats": ("train_32x32.mat", mat(X=X / 255, y=Y)),
    "svhn: no images": ("train_32x32.mat", mat(X=X[..., :0], y=Y[:0])),
    "svhn: a label of 11": ("train_32x32.mat", mat(X=X, y=np.where(Y == 4, 11, Y))),
    "svhn: a label of −1": ("train_32x32.mat", mat(X=X, y=np.where(Y == 4, -1, Y.astype(np.int8)))),
    "svhn: fewer labels than images": ("train_32x32.mat", mat(X=X, y=Y[:-1])),
    "usps: a short row": ("usps.bz2", usps_text(ROW, ROW.rsplit(" ", 1)[0], ROW)),
    "usps: short rows alone": ("usps.bz2", usps_text(*[ROW.rsplit(" ", 1)[0]] * 3)),
    "usps: a label of 11": ("usps.bz2", usps_text(ROW, usps_line(10, SMALL[0]))),
    "usps: a label of 0": ("usps.bz2", usps_text(ROW, usps_line(-1, SMALL[0]))),
    "usps: no label": ("usps.bz2", usps_text(ROW, ROW.split(" ", 1)[1])),
    "usps: no number": ("usps.bz2", usps_text(ROW.replace(":", ":x"))),
    "usps: an empty line": ("usps.bz2", usps_text(ROW, "", ROW)),
    "usps: empty file": ("usps.bz2", b""),
    "usps: truncated": ("usps.bz2", USPS_BZ2[: len(USPS_BZ2) // 2]),
    "usps: no text": ("usps.bz2", bytes(range(256))),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(tmp_path, case):
    name, (file, content) = case.split(":")[0], DAMAGED[case]
    load_domain(name, "train", fill(tmp_path))  # before the damage all is well
    (tmp_path / file).write_bytes(content)
    error = refusal(name, "train", tmp_path)
    # Where counts of MNIST's two files differ, either may be the wrong one.
    assert str(tmp_path / file) in str(error) or "12 images but 11 labels" in str(error)
    assert f"python download_data.py {name}" in str(error)
    assert len(str(error)) < 600
    assert not isinstance(error, MissingData)  # it must be moved away first: fetching would not be tried


@pytest.mark.parametrize(
    ("name", "split", "file"), [(*key, file) for key, files in FILES.items() for file in sorted(files)]
)
def test_missing_files(tmp_path, tiny_data, name, split, file):
    for other in FILES[name, split] - {file}:
        (tmp_path / other).parent.mkdir(parents=True)
        (tmp_path / other).write_bytes((tiny_data / other).read_bytes())
    error = refusal(name, split, tmp_path)
    assert isinstance(error, MissingData)
    assert str(tmp_path / file) in str(error)
    assert f"python download_data.py {name} --data-dir {tmp_path}" in str(error)


@pytest.mark.parametrize("name", TINY_COUNTS)
def test_a_folder_that_cannot_be_one_and_a_file_without_permission(tmp_path, name, monkeypatch):
    """For root nothing is forbidden, so that the refusal is made up."""
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("long" * 100)):
        message = str(refusal(name, "train", folder))
        assert str(folder) in message
        assert "--data-dir" in message

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    fill(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr("scipy.io.loadmat", refuse)
    message = str(refusal(name, "train", tmp_path))
    assert "Permission denied" in message
    assert str(tmp_path) in message


# ---- the real data


def test_real_mnist_is_what_torchvision_reads(real_data, tmp_path):
    for split, prefix in (("train", "train"), ("test", "t10k")):
        digits = load_domain("mnist", split, real_data)
        assert digits.mark == "MNIST"
        for kind, theirs, ours in (
            ("images-idx3", read_image_file, digits.images[:, 0]),
            ("labels-idx1", read_label_file, digits.labels),
        ):
            copy = tmp_path / f"{prefix}-{kind}"
            copy.write_bytes(gzip.decompress((real_data / f"MNIST/raw/{prefix}-{kind}-ubyte.gz").read_bytes()))
            assert torch.equal(theirs(str(copy)), ours)


def test_real_usps_is_what_torchvision_reads(real_data):
    train, test = (load_domain("usps", split, real_data) for split in ("train", "test"))
    assert (len(train), len(test)) == (7291, 2007)
    assert set(train.labels.tolist()) == set(range(10))
    theirs = USPS(str(real_data), train=False)
    assert test.labels.tolist() == theirs.targets
    # torchvision cuts off the fraction of a grey level where we round.
    assert set(np.unique(test.images[:, 0].numpy().astype(int) - theirs.data.astype(int))) <= {0, 1}


def test_real_svhn_is_what_scipy_reads(real_data):
    for split, count in (("train", 73257), ("test", 26032)):
        digits = load_domain("svhn", split, real_data)
        assert (len(digits) == count) == (digits.mark == "SVHN"), "there may be a subset, then the mark says so"
        assert set(digits.labels.tolist()) == set(range(10))
        assert digits.labels.bincount().argmax() == 1  # SVHN's ones are its commonest digit, 19 % of it
        assert 0.12 < (digits.labels == 1).float().mean() < 0.26
    contents = loadmat(real_data / "test_32x32.mat")
    for number in (0, 7, len(digits) - 1):
        assert np.array_equal(digits.images[number].permute(1, 2, 0).numpy(), contents["X"][:, :, :, number])
        assert digits.labels[number] == contents["y"][number, 0] % 10
