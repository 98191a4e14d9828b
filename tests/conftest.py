"""Fixtures that several tests share: tiny data sets in the official formats, and the real ones where they are."""

import bz2
import gzip
import itertools
import json
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
from safetensors.torch import load_file
from scipy.io import savemat
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from digits.domains import load_domain
from digits.synth import render_digits
from utils.cli import Interrupted, UserError, run_script
from watch.board import Board

ROOT = Path(__file__).resolve().parent.parent
TINY_COUNTS = {"svhn": (40, 23), "mnist": (64, 37), "usps": (30, 11)}  # training and test images of `tiny_data`
compiled_for_all_lambdas = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="earlier versions than torch 2.13 compile anew for each λ"
)
DRAWN = {
    name: getattr(Board, name) for name in ("compare", "show_features", "show_predictions")
}  # what draws a run's figures


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
def _small_and_quick():
    """One thread, for more only wait for each other; figures, nine tenths of a small run, in `whole_run` alone."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name in DRAWN:
            patch.setattr(Board, name, lambda *_: None)
        yield


@pytest.fixture
def no_fetch(monkeypatch):
    """No test reaches for data elsewhere."""

    def refuse(names, *_):
        raise UserError(f"a test tried to download {list(names)}")

    monkeypatch.setattr("digits.domains.fetch", refuse)


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
        "digits.readers.load_synth_digits", lambda seed, start, count, folders: render_digits(seed, start, count // 100)
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


def run_as_process(*words: object, **options) -> subprocess.CompletedProcess:
    """What `python` with these words does, in a process of its own."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120, "cwd": ROOT} | options
    return subprocess.run([sys.executable, *map(str, words)], text=True, **options)


def train(*arguments):
    """Run main.py in this process."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, arguments)])
        main.main()


def settings(tiny_data):
    """A small run: three epochs of four steps."""
    words = "--network paper-mnist --batch-size 16 --epochs 3 --precision fp32 --device cpu --no-download"
    return (*words.split(), "--data-dir", tiny_data)


@pytest.fixture(scope="session")
def whole_run(tiny_data, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run of `settings` that was drawn, every third step logged; not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("watch.watcher.LOG_EVERY_STEPS", 3)
        for name, draw in DRAWN.items():
            patch.setattr(Board, name, draw)
        train(*settings(tiny_data), "--run-dir", folder)
    return folder


@pytest.fixture(scope="session")
def quick_run(tiny_data, tmp_path_factory) -> Path:
    """The folder of a short run: batch-normed, on per-image normalised SVHN and MNIST; not to be changed."""
    folder = tmp_path_factory.mktemp("quick") / "run"
    words = "--batch-size 16 --epochs 2 --device cpu --no-download"
    train(*words.split(), "--data-dir", tiny_data, "--run-dir", folder)
    return folder


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def state_of(folder: Path) -> dict:
    return torch.load(folder / "last.pt", weights_only=True)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def records_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"), dict.fromkeys(("scalars", "images", "histograms"), 0))
    return events.Reload()


def the_error(stderr: str) -> str:
    """The one line that a failed script says beside its log."""
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert errors == stderr.splitlines()[-1:], stderr
    assert "Traceback" not in stderr
    assert len(errors[0]) < 600, "a clear line is a short one"
    return errors[0]


@pytest.fixture
def fail(monkeypatch, capsys):
    """Run a script in this process, which must end with exit code 1; returns its error line."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_script(script.main)
        assert ended.value.code == 1
        said = capsys.readouterr()
        assert '{"' not in said.out, "a script that failed has no result"
        return the_error(said.err)

    return run


class Killed(Exception):
    """Stands for a process that ends without writing anything more."""


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def kill():
    raise Killed


def interrupt_after(monkeypatch, owner, name, count, interruption):
    """Call `interruption` when a function of a module or class has returned for the `count`-th time."""
    original = getattr(owner, name)
    numbers = itertools.count(1)

    def call_and_interrupt(*arguments, **more):
        outcome = original(*arguments, **more)
        if next(numbers) == count:
            interruption()
        return outcome

    monkeypatch.setattr(owner, name, call_and_interrupt)


def interrupted_run(owner, name, count, interruption, *arguments):
    """A run of main.py that ends when a function of a module or class has returned for the `count`-th time."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, owner, name, count, interruption)
        with pytest.raises((Killed, Interrupted)):
            train(*arguments)


def go_on(folder, tiny_data, *arguments):
    train("--resume", folder, "--data-dir", tiny_data, "--device", "cpu", "--no-download", *arguments)
