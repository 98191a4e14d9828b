"""Fixtures that several tests share: tiny data sets in the official formats, and the real ones where they are."""

import bz2
import gzip
import itertools
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

import main
from data_loader import load_domain
from utils.synth_digits import render_digits

ROOT = Path(__file__).resolve().parent.parent
TINY_COUNTS = {"svhn": (40, 23), "mnist": (64, 37), "usps": (30, 11)}  # training and test images of `tiny_data`


@pytest.fixture(autouse=True)
def _heed_ctrl_c():
    """Python's own handler of Ctrl-C, which a shell's background jobs ignore, and afterwards the one before."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write a uint8 array as MNIST's IDX file, compressed when the name ends in .gz."""
    data = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def write_svhn(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write images (N, 32, 32, 3) and labels 0…9 as SVHN's .mat file, where zero is called 10."""
    y = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
    savemat(path, {"X": np.ascontiguousarray(images.transpose(1, 2, 3, 0)), "y": y}, do_compression=True)


def usps_line(label: int, pixels: np.ndarray) -> str:
    """One line of libsvm text: the digit plus one, then `index:value` with indices from 1 and values in [-1, 1]."""
    values = pixels.reshape(-1) / 255 * 2 - 1
    return f"{label + 1} " + " ".join(f"{i}:{value:.4f}" for i, value in enumerate(values, 1))


def write_usps(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write images (N, 16, 16) and labels 0…9 as USPS's compressed text."""
    lines = [usps_line(label, pixels) for label, pixels in zip(labels.tolist(), images, strict=True)]
    path.write_bytes(bz2.compress(("\n".join(lines) + "\n").encode()))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tensors of tests are so small that threads only wait for each other, the more so on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A data folder of a few random images each, every digit about equally often, in the official formats."""
    folder = tmp_path_factory.mktemp("tiny_data")
    rng = np.random.default_rng(0)

    def digits(count: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.integers(0, 256, (count, *shape), dtype=np.uint8), rng.permutation(np.arange(count) % 10)

    for split, name in enumerate(("train", "test")):
        write_svhn(folder / f"{name}_32x32.mat", *digits(TINY_COUNTS["svhn"][split], 32, 32, 3))
    for split, name in enumerate(("train", "t10k")):
        images, labels = digits(TINY_COUNTS["mnist"][split], 28, 28)
        write_idx(folder / f"MNIST/raw/{name}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"MNIST/raw/{name}-labels-idx1-ubyte.gz", labels.astype(np.uint8))
    for split, name in enumerate(("usps.bz2", "usps.t.bz2")):
        write_usps(folder / name, *digits(TINY_COUNTS["usps"][split], 16, 16))
    return folder


@pytest.fixture
def few_synth(monkeypatch):
    """Every hundredth of the synth digits, for want of a minute to render them all."""
    monkeypatch.setattr(
        "data_loader.load_synth_digits", lambda seed, start, count, folders: render_digits(seed, start, count // 100)
    )


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The data folder that DANN_DATA_DIR names; without it the test is skipped."""
    folder = os.environ.get("DANN_DATA_DIR")
    if not folder:
        pytest.skip("needs real data: set DANN_DATA_DIR to a folder that download_data.py has filled")
    return Path(folder)


@pytest.fixture(scope="session")
def large_optdigits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's training digits, enlarged without steps. Shape: (1297, 40, 40) uint8 and (1297,)."""
    digits = load_domain("optdigits", "train", Path())
    framed = np.pad(digits.images[:, 0].numpy(), ((0, 0), (1, 1), (1, 1)))
    images = [np.asarray(Image.fromarray(image).resize((40, 40), Image.BICUBIC)) for image in framed]
    return np.stack(images), digits.labels.numpy()


def run_as_process(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script as its users do, in a process of its own."""
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def start(monkeypatch, *arguments):
    """Run main.py with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["main.py", *map(str, arguments)])
    main.main()


def settings(tiny_data):
    """A small run: three epochs of four steps."""
    return (
        "--network", "paper-mnist", "--image-size", 32, "--batch-size", 16, "--epochs", 3, "--precision", "fp32",
        "--device", "cpu", "--no-download", "--data-dir", tiny_data,
    )  # fmt: skip


class Killed(Exception):
    """Stands for a process that ends without writing anything more."""


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def kill():
    raise Killed


def interrupt_after(monkeypatch, method, count, interruption):
    """Call `interruption` when a method of the trainer has returned for the `count`-th time."""
    original = getattr(main.Trainer, method)
    numbers = itertools.count(1)

    def call_and_interrupt(*arguments):
        outcome = original(*arguments)
        if next(numbers) == count:
            interruption()
        return outcome

    monkeypatch.setattr(main.Trainer, method, call_and_interrupt)
