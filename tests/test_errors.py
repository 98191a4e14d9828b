"""Each mistake and each fault that a user can fix: one clear line, exit code 1, and nothing half-written."""

import errno
import gzip
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    go_on,
    interrupt_after,
    records_of,
    result_of,
    run_as_process,
    state_of,
    the_error,
    train,
    weights_of,
)
from PIL import Image
from safetensors.torch import save_file
from torch.torch_version import TorchVersion

import image_annotate
import main
import valid
from data_loader import CLASS_NAMES
from methods.classifier import usage
from methods.modern import ModernObjective
from methods.networks import build_network, preprocessing_for
from methods.recipes import Config
from methods.run import Run
from methods.teacher import Teacher
from utils import machine, pictures
from utils.checkpoint import load_weights, save_weights
from utils.cli import Interrupted, UserError, run_script
from utils.files import write_atomically

pytestmark = pytest.mark.usefixtures("no_fetch")
DISK_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
SMALL = ("--network", "paper-mnist", "--batch-size", 16, "--epochs", 2, "--device", "cpu", "--no-download")
READERS = {
    ".json": lambda path: json.loads(path.read_text()),
    ".jsonl": lambda path: records_of(path.parent),
    ".pt": lambda path: state_of(path.parent),
    ".safetensors": load_weights,
}


@pytest.fixture
def fail_to_train(fail, tiny_data, tmp_path):
    """Run main.py on a small scale, which must fail; returns its error line and the run folder."""

    def run(*arguments):
        folder = tmp_path / "run"
        message = fail(main, *SMALL, "--data-dir", tiny_data, "--run-dir", folder, *arguments)
        assert_nothing_half_written(folder)
        return message, folder

    return run


def assert_nothing_half_written(folder):
    """No temporary file is left, and what bears a final name can be read."""
    for path in folder.rglob("*"):
        assert not path.name.startswith(".")
        assert path.suffix not in (".tmp", ".part")
        READERS.get(path.suffix, Path.stat)(path)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(("--lr", "nan"), ""), (("--threads", -1), ""), (("--device", "cuda"), "--device cpu"), (("--compile",), "g++")],
)
def test_settings_and_devices_that_cannot_be(monkeypatch, fail_to_train, arguments, told):
    """test_config.py has every setting."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    message, folder = fail_to_train(*arguments)
    assert arguments[0] in message
    assert told in message, "it names what works or what is missing"
    assert not folder.exists()


def test_a_torch_that_compiles_anew_for_each_lambda(monkeypatch, fail_to_train):
    monkeypatch.setattr(machine.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1+cu130"))
    message, folder = fail_to_train("--compile")
    assert "torch 2.13" in message
    assert "2.12.1" in message
    assert not folder.exists()
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.0"))
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    machine.check_compiler(torch.device("cuda"))  # which needs no C++ compiler


def test_weights_cannot_be_tested_on_a_device_that_is_not_there(monkeypatch, fail, tiny_data, quick_run):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = fail(valid, "--device", "cuda", "--data-dir", tiny_data, "--weights", quick_run, "--no-download")
    assert "--device cuda" in message
    assert "--device cpu" in message


@pytest.mark.parametrize(
    ("file", "run_dir", "told"),
    [("file", "file", "file"), ("file", "file/run", "file/run"), ("run/tensorboard", "run", "run/tensorboard")],
)
def test_a_run_folder_that_cannot_be_because_of_a_file(fail_to_train, tmp_path, file, run_dir, told):
    (tmp_path / "run").mkdir()
    (tmp_path / file).write_text("no folder")
    assert str(tmp_path / told) in fail_to_train("--run-dir", tmp_path / run_dir)[0]
    assert (tmp_path / file).read_text() == "no folder"


@pytest.mark.parametrize("file", ["result.json", "last.pt"])
def test_a_folder_that_holds_a_run(fail, tmp_path, file):
    (tmp_path / file).write_text("{}")
    assert f"`--resume {tmp_path}`" in fail(main, *SMALL, "--run-dir", tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {file: "{}"}


def test_no_network_for_missing_data(tmp_path):
    """A process whose every connection is refused."""
    environment = {key: value for key, value in os.environ.items() if key.lower() not in ("no_proxy", "dann_mirror")}
    proxies = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    environment |= dict.fromkeys(proxies, "http://127.0.0.1:9")
    data, run = tmp_path / "data", tmp_path / "run"
    done = run_as_process("main.py", "--data-dir", data, "--run-dir", run, "--device", "cpu", env=environment)
    assert done.returncode == 1
    message = the_error(done.stderr)
    for words in ("train_32x32.mat", "refused", f"`python download_data.py svhn --data-dir {data}`"):
        assert words in message
    assert done.stdout == ""
    assert not [path for path in data.rglob("*") if path.is_file()]
    assert not run.exists()


@pytest.mark.parametrize(
    ("file", "damage", "domain"),
    [
        ("MNIST/raw/t10k-images-idx3-ubyte.gz", lambda gz: gzip.compress(gzip.decompress(gz)[:-784]), "mnist"),
        ("train_32x32.mat", lambda mat: mat[: len(mat) // 2], "svhn"),
    ],
)
def test_damaged_data(fail_to_train, tiny_data, tmp_path, file, damage, domain):
    """test_readers.py has every kind of damage."""
    path = shutil.copytree(tiny_data, tmp_path / "data") / file
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    message, folder = fail_to_train("--data-dir", tmp_path / "data")
    assert str(path) in message
    assert f"python download_data.py {domain}" in message
    assert path.read_bytes() == damaged, "a file of the user's is left alone"
    assert not folder.exists()


@pytest.mark.parametrize(
    ("data", "download"), [("none", "--no-download"), ("file/data", "--no-download"), ("file/data", "--download")]
)
def test_a_data_folder_that_is_not_there_or_cannot_be(monkeypatch, fail_to_train, tmp_path, data, download):
    """Below a regular file, which stops the superuser too, there is nowhere to put what may be fetched."""
    monkeypatch.undo()
    (tmp_path / "file").write_text("no folder")
    message, _ = fail_to_train("--data-dir", tmp_path / data, download)
    assert str(tmp_path / data) in message
    if data == "none":
        assert str(tmp_path / "none/train_32x32.mat") in message
        assert f"`python download_data.py svhn --data-dir {tmp_path / 'none'}`" in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "no folder"


@pytest.mark.parametrize(
    ("owner", "name", "told"),
    [
        (ModernObjective, "forward", r"step 1 \(epoch 1\).*teacher loss nan"),
        (main, "step", "the weights are not finite"),
        (Teacher, "follow", "the teacher's weights are not finite"),
    ],
    ids=["teacher's loss", "weights", "teacher"],
)
def test_what_is_not_finite_after_the_last_step_is_named_and_not_kept(monkeypatch, fail_to_train, owner, name, told):
    """Also weights that its update spoilt, though every loss was finite: nothing to test, nothing to keep."""
    original, steps = getattr(owner, name), []

    def spoil(of, *arguments):
        outcome = original(of, *arguments)
        steps.append(1)
        if len(steps) == 2 and outcome:
            return outcome[0] | {"loss_teacher": outcome[0]["loss_teacher"] * float("nan")}, outcome[1]
        if len(steps) == 2:
            for weight in of.model.parameters():
                weight.data.fill_(float("nan"))
        return outcome

    monkeypatch.setattr(owner, name, spoil)
    message, folder = fail_to_train("--recipe", "modern", "--network", "modern", "--epoch-steps", 2, "--epochs", 1)
    assert re.search(told, message)
    assert not {path.name for path in folder.iterdir()} & {"last.pt", "result.json", "model.safetensors"}


def test_steps_with_a_gradient_that_is_not_finite_are_left_out_on_request(monkeypatch, tiny_data, tmp_path, capsys):
    """They are named, change no weight and count in no mean; that a run has left some out is in its result."""
    original, losses = main.DannObjective.forward, []

    def spoil(objective, *arguments):
        named, others = original(objective, *arguments)
        losses.append(named["loss_label"].item())
        return (named | {"loss_label": named["loss_label"] * (float("inf") if len(losses) == 2 else 1)}), others

    monkeypatch.setattr(main.DannObjective, "forward", spoil)
    settings = ("--network", "small", "--batch-size", 16, "--epochs", 2, "--precision", "fp32", "--on-nan", "skip")
    folder = tmp_path / "run"
    train(*settings, "--data-dir", tiny_data, "--run-dir", folder, "--device", "cpu", "--no-download")
    assert "warning: step 1 (epoch 1) is left out" in capsys.readouterr().err
    assert result_of(folder)["skipped_steps"] == 1
    means = [np.mean([losses[0], *losses[2:4]]), np.mean(losses[4:])]
    assert [record["loss_label"] for record in records_of(folder)] == pytest.approx(means, rel=1e-5)
    assert all(value.isfinite().all() for value in weights_of(folder).values())
    monkeypatch.setattr(main.DannObjective, "forward", lambda *arguments: spoil_all(original(*arguments)))
    with pytest.raises(UserError, match="no step of epoch 1 had a finite gradient"):
        train(*settings, "--data-dir", tiny_data, "--run-dir", tmp_path / "other", "--device", "cpu", "--no-download")


def spoil_all(outcome):
    losses, others = outcome
    return {name: loss * float("nan") for name, loss in losses.items()}, others


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_named_with_what_takes_less(monkeypatch, fail_to_train, error):
    def step(*_):
        raise error

    monkeypatch.setattr(main, "step", step)
    message, _ = fail_to_train()
    assert "out of memory" in message
    assert "--batch-size" in message


def test_the_checkpoint_before_a_loss_that_is_not_finite_stays(monkeypatch, fail_to_train):
    """The rate rises in the second epoch: what the first one left is good, and is not written over."""
    original = main.learning_rate
    monkeypatch.setattr(main, "learning_rate", lambda config, p, step: 1e30 if step >= 5 else original(config, p, step))
    message, folder = fail_to_train()
    assert "step 6 (epoch 2)" in message
    state = state_of(folder)
    assert (state["epoch"], state["step"]) == (1, 0)
    assert all(value.isfinite().all() for value in state["model"].values())


def full_disk(*_):
    raise DISK_FULL


@pytest.mark.parametrize("when", ["writing", "renaming"])
@pytest.mark.parametrize("error", [DISK_FULL, RuntimeError("PytorchStreamWriter failed writing file")])
def test_a_file_is_whole_or_as_it_was(monkeypatch, tmp_path, when, error):
    """torch raises either of these errors."""

    def refuse(*_):
        raise error

    def write(file):
        file.write_text("half")
        if when == "writing":
            refuse()

    (tmp_path / "file").write_text("before")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=f"{tmp_path / 'file'}.* space"):
        write_atomically(tmp_path / "file", write)
    assert [path.read_text() for path in tmp_path.glob("[.f]*")] == ["before"]


@pytest.mark.parametrize("file", ["config.json", "last.pt", "model.safetensors", "result.json"])
def test_full_disk_for_each_file_of_a_run(monkeypatch, fail_to_train, file):
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (full_disk if names[1].name == file else replace)(*names))
    message, folder = fail_to_train()
    assert f"{folder / file} ({DISK_FULL.strerror})" in message
    assert not (folder / file).exists()
    if file in ("model.safetensors", "result.json"):
        assert (folder / "last.pt").exists(), "the training is not lost"


def test_a_run_folder_that_is_removed_while_it_is_written(monkeypatch, fail_to_train, tmp_path):
    interrupt_after(monkeypatch, Run, "count_step", 2, lambda: shutil.rmtree(tmp_path / "run"))
    message, folder = fail_to_train()
    assert str(folder) in message
    assert "No such file or directory" in message
    assert not folder.exists()


def test_full_disk_for_a_later_checkpoint(monkeypatch, fail_to_train, tiny_data):
    """The one before stays, and the run can go on from it once there is space."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, torch, "save", 2, full_disk)
        _, folder = fail_to_train()
    assert state_of(folder)["epoch"] == 1
    go_on(folder, tiny_data)
    assert [record["epoch"] for record in records_of(folder)] == [1, 2]


def test_full_disk_for_metrics(monkeypatch, fail_to_train):
    """Each line goes to a device that is always full."""
    path_open = Path.open

    def open_full(path, mode="r", *others, **options):
        full = path.name == "metrics.jsonl" and "a" in mode
        return path_open(Path("/dev/full") if full else path, mode, *others, **options)

    monkeypatch.setattr(Path, "open", open_full)
    message, folder = fail_to_train()
    assert f"{folder / 'metrics.jsonl'} ({DISK_FULL.strerror})" in message


def test_full_disk_when_resuming_keeps_the_metrics(monkeypatch, fail, quick_run, tiny_data, tmp_path):
    folder = shutil.copytree(quick_run, tmp_path / "run")
    before = records_of(folder)
    assert len(before) == 2
    write_text = Path.write_text

    def write_nothing(path, *_):
        write_text(path, "")  # opening a file for writing empties it
        raise DISK_FULL

    monkeypatch.setattr(Path, "write_text", write_nothing)
    assert "metrics.jsonl" in fail(main, "--resume", folder, "--data-dir", tiny_data)
    assert records_of(folder) == before
    assert_nothing_half_written(folder)


FULL_DISK_FOR_EVENTS = """
import tensorboardX.record_writer
tensorboardX.record_writer.open_file = lambda path: open("/dev/full", "wb")
import main
from watch.board import Board
Board.compare = Board.show_features = Board.show_predictions = lambda *_: None
main.run_script(main.main)
"""


def test_full_disk_for_tensorboard(tiny_data, tmp_path):
    """A process, because what it must not do is wait for ever, or say more when it ends."""
    arguments = (*SMALL, "--epochs", 12, "--data-dir", tiny_data, "--run-dir", tmp_path / "run")
    done = run_as_process("-c", FULL_DISK_FOR_EVENTS, *arguments)
    assert done.returncode == 1, done.stderr
    message = the_error(done.stderr)
    assert "tensorboard" in message
    assert DISK_FULL.strerror in message
    assert_nothing_half_written(tmp_path / "run")


@pytest.mark.parametrize("most", [20_000, 400_000])
def test_a_quota_ends_a_run_with_one_line(tiny_data, tmp_path, most):
    """Files may have so many bytes: fewer than the events, or than the checkpoint."""
    arguments = (*SMALL, "--epochs", 2, "--data-dir", tiny_data, "--run-dir", tmp_path / "run")
    done = run_as_process(
        "main.py", *arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    )
    assert done.returncode == 1, done.stderr
    assert "free some space" in the_error(done.stderr)
    assert_nothing_half_written(tmp_path / "run")


ABOUT = usage(Config(precision="fp32"), preprocessing_for(Config()), CLASS_NAMES, {})
PIXELS = ABOUT["preprocessing"]
ODD = "classifier.layers.0.bias"
NOISE = random.Random(0).randbytes(3000)


def state():
    return build_network("small").state_dict()


def keep(path, **changes):
    """Good weights, but for some of what stands beside them; what is changed to None is not there."""
    save_weights(path, state(), {key: value for key, value in (ABOUT | changes).items() if value is not None})


def write(content):
    return lambda path: path.write_bytes(content)


class Trap:
    """Loading this pickle would run a command of the file's choice."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


WEIGHTS_THAT_ARE_NONE = {
    "of another architecture.safetensors": lambda path: keep(path, network="paper-mnist"),
    "of an unknown architecture.safetensors": lambda path: keep(path, network="network-of-tomorrow"),
    "of another shape.safetensors": lambda path: save_weights(path, state() | {ODD: torch.zeros(11)}, ABOUT),
    "without classes.safetensors": lambda path: keep(path, classes=None),
    "without preprocessing.safetensors": lambda path: keep(path, preprocessing=None),
    "another preprocessing.safetensors": lambda path: keep(path, preprocessing={"size": 32, "mean": [0, 0, 0]}),
    "a network that is a number.safetensors": lambda path: keep(path, network=1),
    "a network with an escape.safetensors": lambda path: keep(path, network="\x1b[31mred"),
    "a network with a long name.safetensors": lambda path: keep(path, network="small" * 1000),
    "a network for other sizes.safetensors": lambda path: keep(path, preprocessing=PIXELS | {"image_size": 10**9}),
    "another number of channels.safetensors": lambda path: keep(path, preprocessing=PIXELS | {"grey": True}),
    "a mean of text.safetensors": lambda path: keep(path, preprocessing=PIXELS | {"mean": ["0", "0", "0"]}),
    "a mean that is none.safetensors": lambda path: keep(path, preprocessing=PIXELS | {"mean": [0, 0, math.nan]}),
    "a mean of four.safetensors": lambda path: keep(path, preprocessing=PIXELS | {"mean": [0, 0, 0, 0]}),
    "normalised like nothing.safetensors": lambda path: keep(path, preprocessing=PIXELS | {"normalisation": None}),
    "a precision that is none.safetensors": lambda path: keep(path, precision="fp8"),
    "no source.safetensors": lambda path: keep(path, source=None),
    "ten classes of one name.safetensors": lambda path: keep(path, classes=["0"] * 10),
    "classes that are numbers.safetensors": lambda path: keep(path, classes=list(range(10))),
    "classes with an escape.safetensors": lambda path: keep(path, classes=[*"012345678", "\x1b]0;9"]),
    "a record that is none.safetensors": lambda path: keep(path, training="long"),
    "without metadata.safetensors": lambda path: save_file(state(), path),
    "foreign metadata.safetensors": lambda path: save_file(state(), path, {"format": "pt"}),
    "metadata that are no JSON.safetensors": lambda path: save_file(state(), path, {"dann": "{"}),
    "cut short.safetensors": lambda path: keep(path) or path.write_bytes(path.read_bytes()[:-1000]),
    "random bytes.safetensors": write(NOISE),
    "nothing.safetensors": write(b""),
    "a list.pt": lambda path: torch.save([1, 2, 3], path),
    "no archive.pt": write(NOISE),
    "an empty file.pt": write(b""),
    "a whole module.pt": lambda path: torch.save(build_network("small"), path),
    "a plain pickle.pt": write(pickle.dumps({"a": 1}, protocol=2)),
    "not tensors alone.pt": lambda path: torch.save({"model": {"name": "text"}, "use": ABOUT}, path),
    "a state dict alone.pt": lambda path: torch.save(state(), path),
    "a trap.pt": lambda path: torch.save({"model": Trap()}, path),
}


@pytest.mark.parametrize("case", WEIGHTS_THAT_ARE_NONE)
def test_weights_that_are_none(monkeypatch, fail, tiny_data, tmp_path, case):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / case
    WEIGHTS_THAT_ARE_NONE[case](path)
    before = path.read_bytes()
    message = fail(valid, "--weights", path, "--data-dir", tiny_data, "--device", "cpu")
    assert str(path) in message
    assert re.search("main.py wrote|(choose one|use weights) of (.*small|paper-mnist)", message), (
        "it says what to use instead"
    )
    assert "\x1b" not in message
    if "module" in case or "trap" in case:
        assert "pickled code, which is not run" in message
    if "shape" in case:
        assert re.search(rf"\b1 of \d+ .*{ODD}.*\(11,\).*\(10,\)", message)
    assert path.read_bytes() == before
    assert not (tmp_path / "trapped").exists(), "a weights file ran code"


def test_weights_that_name_a_network_larger_than_the_memory(monkeypatch, fail, tmp_path):
    """Which is never built: a file of a megabyte must not take more than its due."""
    devices = []

    def spied(*arguments, **options):
        devices.append(torch.get_default_device().type)
        return build_network(*arguments, **options)

    monkeypatch.setattr("methods.classifier.build_network", spied)
    huge = "torchvision:vit_h_14@518"
    keep(tmp_path / "weights.safetensors", network=huge, preprocessing=PIXELS | {"image_size": 518})
    assert huge in fail(valid, "--weights", tmp_path / "weights.safetensors", "--device", "cpu")
    assert devices == ["meta"]


def test_weights_that_are_none_in_a_process(tmp_path):
    """As a user sees it: the exit code, and one line without a traceback."""
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    done = run_as_process("valid.py", "--weights", tmp_path / "weights.pt", "--no-download")
    assert (done.returncode, done.stdout) == (1, "")
    assert "weights.pt" in the_error(done.stderr)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "seven.png"
    Image.effect_noise((20, 10), 50).save(path)
    return path


@pytest.fixture
def fail_to_annotate(fail, quick_run, tmp_path):
    return lambda *rest: fail(image_annotate, "--weights", quick_run, "--output-dir", tmp_path / "out", "-f", *rest)


def png_of_size(width, height):
    """A PNG file of a hundred bytes that says how large it is, and has hardly a pixel."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


PICTURES_THAT_ARE_NONE = {  # what is done to a picture
    "not there": Path.unlink,
    "an empty file": write(b""),
    "a text": write(b"no picture"),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:150]),
    "a folder without pictures": lambda path: path.unlink() or path.mkdir() or (path / "a.txt").write_text("a"),
    "no size": write(png_of_size(0, 0)),
    "no width": write(png_of_size(0, 20)),
    "too many pixels": lambda path: Image.new("L", (200, 200)).save(path),
    "too high": lambda path: Image.new("L", (1, 5000)).save(path),
    "too wide": lambda path: Image.new("L", (5000, 1)).save(path),
    "huge, so that Pillow warns": write(png_of_size(9_500, 9_500)),
    "huge, a bomb of ten gigabytes": write(png_of_size(60_000, 60_000)),
}


@pytest.mark.parametrize("case", PICTURES_THAT_ARE_NONE)
def test_pictures_that_are_none(monkeypatch, fail_to_annotate, picture, tmp_path, case):
    """All pictures are looked at before one is written."""
    if case.startswith("too"):
        monkeypatch.setattr(pictures, "LARGEST_PIXELS", 10_000)
        monkeypatch.setattr(pictures, "LARGEST_SIDE", 1000)
    good = shutil.copy(picture, tmp_path / "good.png")
    PICTURES_THAT_ARE_NONE[case](picture)
    message = fail_to_annotate(good, picture)
    assert str(picture) in message
    assert ("smaller" in message) == case.startswith(("too", "huge"))
    assert not (tmp_path / "out").exists()


def test_weights_to_compare_with_and_output_folders_that_cannot_be(fail_to_annotate, picture, tmp_path):
    assert "nowhere" in fail_to_annotate(picture, "--compare", "nowhere")
    assert not (tmp_path / "out").exists()
    assert str(picture / "out") in fail_to_annotate(picture, "--output-dir", picture / "out")


def test_full_disk_for_a_picture(monkeypatch, fail_to_annotate, picture, tmp_path):
    def save_half(page, file, *_, **options):
        Path(file).write_bytes(b"\x89PNG")
        raise DISK_FULL

    monkeypatch.setattr(Image.Image, "save", save_half)
    assert DISK_FULL.strerror in fail_to_annotate(picture)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a\n  b: do `c`"), 1, "error: a b: do `c`"),
        (Interrupted("go on with `c`"), 130, "go on with `c`"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(capsys, error, code, line):
    def script():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_script(script)
    assert ended.value.code == code
    assert capsys.readouterr().err == line + "\n"


def test_an_error_that_no_user_can_fix_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 // 0)


def test_a_result_that_cannot_be_printed():
    """`python valid.py > file` on a full disk: the last thing that can fail, and it fails in one line."""
    script = "from utils.cli import run_script; run_script(lambda: print('{}'))"
    with open("/dev/full", "w") as full:
        done = run_as_process("-c", script, stdout=full)
    assert done.returncode == 1
    assert DISK_FULL.strerror in the_error(done.stderr)


def test_a_pipe_that_is_closed():
    """`python valid.py | head -1` ends without a word."""
    script = "from utils.cli import run_script; run_script(lambda: [print('x' * 100) for _ in range(10000)])"
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
