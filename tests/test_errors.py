"""Each mistake and each fault that a user can fix: one clear line, exit code 1, and nothing half-written."""

import builtins
import errno
import gzip
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from conftest import ROOT, records_of, run_as_process, the_error, train
from PIL import Image
from safetensors.torch import save_file

import image_annotate
import main
import valid
from annotate import pictures
from methods.classifier import usage
from methods.modern import ModernObjective
from methods.networks import build_network, preprocessing_for
from methods.recipes import recipe_config
from methods.teacher import Teacher
from utils import machine
from utils.checkpoint import load_weights, save_weights
from utils.cli import Interrupted, UserError, run_script
from utils.files import write_atomically

pytestmark = pytest.mark.usefixtures("no_fetch")
DISK_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
SMALL = ("--network", "paper-mnist", "--batch-size", 16, "--epochs", 2, "--device", "cpu", "--no-download")
ALL_WEIGHTS = {"last.pt", "result.json", "model.safetensors"}


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
    files = [path for path in folder.rglob("*") if path.is_file()]
    odd = [path.name for path in files if path.name.startswith(".") or path.suffix in (".tmp", ".part")]
    assert not odd
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            for line in path.read_text().splitlines():
                json.loads(line)
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".safetensors":
            load_weights(path)


# --- settings and devices ---------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [("--lr", "nan"), ("--threads", -1)])
def test_settings_that_cannot_be(fail_to_train, setting):
    """test_config.py has every setting."""
    message, folder = fail_to_train(*setting)
    assert setting[0] in message
    assert not folder.exists()


@pytest.mark.parametrize("script", [main, valid])
def test_a_device_that_is_not_there(monkeypatch, fail, tiny_data, quick_run, tmp_path, script):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ("--run-dir", tmp_path / "run") if script is main else ("--weights", quick_run)
    message = fail(script, "--device", "cuda", "--data-dir", tiny_data, *arguments, "--no-download")
    assert "--device cuda" in message
    assert "--device cpu" in message, "it names what works"
    assert not (tmp_path / "run").exists()


def test_compiling_without_a_compiler(monkeypatch, fail_to_train):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    message, folder = fail_to_train("--compile")
    assert "--compile" in message
    assert "g++" in message
    assert not folder.exists()
    machine.check_compiler(torch.device("cuda"))  # there it needs none


# --- data -------------------------------------------------------------------------------------------


def test_no_network_for_missing_data(tmp_path):
    """A process whose every connection is refused."""
    refused = "http://127.0.0.1:9"
    environment = {key: value for key, value in os.environ.items() if key.lower() not in ("no_proxy", "dann_mirror")}
    environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), refused)
    data, run = tmp_path / "data", tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "main.py", "--data-dir", data, "--run-dir", run, "--device", "cpu"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    message = the_error(done.stderr)
    assert "train_32x32.mat" in message
    assert "refused" in message
    assert f"`python download_data.py svhn --data-dir {data}`" in message
    assert done.stdout == ""
    assert not [path for path in data.rglob("*") if path.is_file()]
    assert not run.exists()


@pytest.mark.parametrize("file", ["MNIST/raw/t10k-images-idx3-ubyte.gz", "train_32x32.mat"])
def test_damaged_data(fail_to_train, tiny_data, tmp_path, file):
    """test_readers.py has every kind of damage."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    path = data / file
    content = path.read_bytes()
    damaged = gzip.compress(gzip.decompress(content)[:-784]) if path.suffix == ".gz" else content[: len(content) // 2]
    path.write_bytes(damaged)
    message, folder = fail_to_train("--data-dir", data)
    assert str(path) in message
    assert f"python download_data.py {'svhn' if path.suffix == '.mat' else 'mnist'}" in message
    assert path.read_bytes() == damaged, "a file of the user's is left alone"
    assert not folder.exists()


@pytest.mark.parametrize("download", ["--no-download", "--download"])
@pytest.mark.parametrize("below", ["none", "file/data"])
def test_a_data_folder_that_is_not_there_or_cannot_be(monkeypatch, fail_to_train, tmp_path, below, download):
    """Below a regular file, which stops the superuser too."""
    if below == "file/data":
        monkeypatch.undo()  # it may be fetched, but there is nowhere to put it
    (tmp_path / "file").write_text("no folder")
    message, folder = fail_to_train("--data-dir", tmp_path / below, download)
    if below == "file/data":
        assert str(tmp_path / below) in message
    elif download == "--no-download":
        assert str(tmp_path / below / "train_32x32.mat") in message
        assert f"`python download_data.py svhn --data-dir {tmp_path / below}`" in message
    assert (tmp_path / "file").read_text() == "no folder"
    assert not (tmp_path / "none").exists()
    assert not folder.exists()


# --- run folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "run"])
def test_a_run_folder_that_cannot_be(fail_to_train, tmp_path, below):
    (tmp_path / "file").write_text("no folder")
    folder = tmp_path / "file" / below
    assert str(folder) in fail_to_train("--run-dir", folder)[0]
    assert (tmp_path / "file").read_text() == "no folder"


@pytest.mark.parametrize("file", ["result.json", "last.pt"])
def test_a_folder_that_holds_a_run(fail, tiny_data, tmp_path, file):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / file).write_text("{}")
    message = fail(main, *SMALL, "--data-dir", tiny_data, "--run-dir", folder)
    assert f"`--resume {folder}`" in message
    assert {path.name: path.read_text() for path in folder.iterdir()} == {file: "{}"}


# --- training ---------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(fail_to_train):
    message, folder = fail_to_train("--lr", 1e30, "--lr-schedule", "constant", "--precision", "fp32")
    for word in ("step 1", "epoch 1", "label loss", "domain loss", "lambda_p", "learning rate 1e+30", "--lr"):
        assert word in message
    assert not {path.name for path in folder.iterdir()} & ALL_WEIGHTS


def test_a_teacher_loss_that_is_not_finite_is_named(monkeypatch, fail_to_train):
    forward = ModernObjective.forward

    def spoil(*arguments):
        losses, others = forward(*arguments)
        return losses | {"loss_teacher": losses["loss_teacher"] * float("nan")}, others

    monkeypatch.setattr(ModernObjective, "forward", spoil)
    message, folder = fail_to_train("--recipe", "modern", "--network", "modern", "--dry-run")
    assert "teacher loss nan" in message
    assert "step 0" in message
    assert not {path.name for path in folder.iterdir()} & ALL_WEIGHTS


def test_the_checkpoint_before_a_loss_that_is_not_finite_stays(monkeypatch, fail_to_train):
    """The rate rises in the second epoch: what the first one left is good, and is not written over."""
    original = main.learning_rate
    monkeypatch.setattr(main, "learning_rate", lambda config, p, step: 1e30 if step >= 5 else original(config, p, step))
    message, folder = fail_to_train()
    assert "step 6 (epoch 2)" in message
    state = torch.load(folder / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 0)
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("spoilt", ["weights", "teacher"])
def test_weights_that_the_last_step_spoilt_are_not_kept(monkeypatch, fail_to_train, spoilt):
    """The loss of each step was finite, but not the update after the last one: nothing to test, nothing to keep."""
    owner, name = (main, "step") if spoilt == "weights" else (Teacher, "follow")
    original, steps = getattr(owner, name), []

    def spoil(self, *arguments):
        original(self, *arguments)
        steps.append(1)
        if len(steps) == 2:
            for weight in self.model.parameters():
                weight.data.fill_(float("nan"))

    monkeypatch.setattr(owner, name, spoil)
    settings = ("--recipe", "modern", "--network", "modern", "--epoch-steps", 2, "--epochs", 1)
    message, folder = fail_to_train(*settings)
    assert "not finite" in message
    assert ("teacher" in message) == (spoilt == "teacher")
    assert not {path.name for path in folder.iterdir()} & ALL_WEIGHTS


# --- a full disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["writing", "renaming"])
@pytest.mark.parametrize("error", [DISK_FULL, RuntimeError("PytorchStreamWriter failed writing file")])
def test_a_file_is_whole_or_as_it_was(monkeypatch, tmp_path, when, error):
    """torch raises either of these errors."""

    def write(file):
        file.write_text("half")
        if when == "writing":
            raise error

    def refuse(source, destination):
        raise error

    (tmp_path / "file").write_text("before")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=str(tmp_path / "file")) as caught:
        write_atomically(tmp_path / "file", write)
    assert "space" in str(caught.value)
    assert [path.read_text() for path in tmp_path.glob("[.f]*")] == ["before"]


@pytest.mark.parametrize("file", ["config.json", "last.pt", "model.safetensors", "result.json"])
def test_full_disk_for_each_file_of_a_run(monkeypatch, fail_to_train, file):
    replace = os.replace

    def refuse(source, destination):
        if Path(destination).name == file:
            raise DISK_FULL
        replace(source, destination)

    monkeypatch.setattr(os, "replace", refuse)
    message, folder = fail_to_train()
    assert f"{folder / file} ({DISK_FULL.strerror})" in message
    assert not (folder / file).exists()
    if file in ("model.safetensors", "result.json"):
        assert (folder / "last.pt").exists(), "the training is not lost"


def test_full_disk_for_a_later_checkpoint(monkeypatch, fail_to_train, tiny_data):
    """The one before stays, and the run can go on from it once there is space."""
    torch_save, calls = torch.save, []

    def save_once(state, file):
        calls.append(file)
        torch_save(state, file)
        if len(calls) == 2:
            file.write_bytes(file.read_bytes()[:9999])
            raise DISK_FULL

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_once)
        _, folder = fail_to_train()
    assert torch.load(folder / "last.pt", weights_only=True)["epoch"] == 1
    train("--resume", folder, "--data-dir", tiny_data, "--device", "cpu")
    assert [record["epoch"] for record in records_of(folder)] == [1, 2]


def test_full_disk_for_metrics(monkeypatch, fail_to_train):
    """Each line goes to a device that is always full."""
    path_open = Path.open

    def open_full(path, mode="r", *arguments, **options):
        full = path.name == "metrics.jsonl" and "a" in mode
        return builtins.open("/dev/full", "w") if full else path_open(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_full)
    message, folder = fail_to_train()
    assert f"{folder / 'metrics.jsonl'} ({DISK_FULL.strerror})" in message


def test_full_disk_when_resuming_keeps_the_metrics(monkeypatch, fail, quick_run, tiny_data, tmp_path):
    folder = shutil.copytree(quick_run, tmp_path / "run")
    before = (folder / "metrics.jsonl").read_text()
    assert len(before.splitlines()) == 2
    write_text = Path.write_text

    def write_nothing(path, text, *arguments, **options):
        write_text(path, "")  # opening a file for writing empties it
        raise DISK_FULL

    monkeypatch.setattr(Path, "write_text", write_nothing)
    assert "metrics.jsonl" in fail(main, "--resume", folder, "--data-dir", tiny_data)
    assert (folder / "metrics.jsonl").read_text() == before
    assert_nothing_half_written(folder)


FULL_DISK_FOR_EVENTS = """
import tensorboardX.record_writer
tensorboardX.record_writer.open_file = lambda path: open("/dev/full", "wb")
import main
from watch.board import Board
Board.compare = Board.show_predictions = lambda *_: None
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


def test_a_tensorboard_folder_that_cannot_be(fail_to_train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("no folder")
    assert "tensorboard" in fail_to_train()[0]
    assert (tmp_path / "run" / "tensorboard").read_text() == "no folder"


# --- weights ----------------------------------------------------------------------------------------


def about():
    return usage("quick", preprocessing_for(recipe_config("quick")), "svhn", "mnist", "fp32", {})


def state():
    return build_network("quick").state_dict()


def keep(path, **changes):
    """Good weights, but for some of what stands beside them; what is changed to None is not there."""
    described = {key: value for key, value in (about() | changes).items() if value is not None}
    save_weights(path, state(), described)


def cut_short(path):
    keep(path)
    path.write_bytes(path.read_bytes()[:-1000])


class Trap:
    """Loading this pickle would run a command of the file's choice."""

    def __reduce__(self):
        return os.mkdir, (str(Trap.folder),)


def trap(path):
    Trap.folder = path.parent / "trapped"
    torch.save({"model": Trap()}, path)


WEIGHTS_THAT_ARE_NONE = {
    "of another architecture": (".safetensors", lambda path: keep(path, network="paper-mnist")),
    "of an unknown architecture": (".safetensors", lambda path: keep(path, network="network-of-tomorrow")),
    "without classes": (".safetensors", lambda path: keep(path, classes=None)),
    "without preprocessing": (".safetensors", lambda path: keep(path, preprocessing=None)),
    "another preprocessing": (".safetensors", lambda path: keep(path, preprocessing={"size": 32, "mean": [0, 0, 0]})),
    "without metadata": (".safetensors", lambda path: save_file(state(), path)),
    "foreign metadata": (".safetensors", lambda path: save_file(state(), path, {"format": "pt"})),
    "metadata that are no JSON": (".safetensors", lambda path: save_file(state(), path, {"dann": "{"})),
    "cut short": (".safetensors", cut_short),
    "random bytes": (".safetensors", lambda path: path.write_bytes(random.Random(0).randbytes(3000))),
    "nothing": (".safetensors", lambda path: path.write_bytes(b"")),
    "a list": (".pt", lambda path: torch.save([1, 2, 3], path)),
    "no archive": (".pt", lambda path: path.write_bytes(random.Random(0).randbytes(3000))),
    "an empty file": (".pt", lambda path: path.write_bytes(b"")),
    "a whole module": (".pt", lambda path: torch.save(build_network("quick"), path)),
    "a plain pickle": (".pt", lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=2))),
    "not tensors alone": (".pt", lambda path: torch.save({"model": {"name": "text"}, "use": about()}, path)),
    "a state dict alone": (".pt", lambda path: torch.save(state(), path)),
    "a trap": (".pt", trap),
}


@pytest.mark.parametrize("case", WEIGHTS_THAT_ARE_NONE)
def test_weights_that_are_none(fail, tiny_data, tmp_path, case):
    suffix, make = WEIGHTS_THAT_ARE_NONE[case]
    path = tmp_path / f"weights{suffix}"
    make(path)
    before = path.read_bytes()
    message = fail(valid, "--weights", path, "--data-dir", tiny_data, "--device", "cpu")
    assert str(path) in message
    assert "main.py wrote" in message or "paper-mnist" in message, "it says what to use instead"
    assert path.read_bytes() == before
    assert not (tmp_path / "trapped").exists(), "a weights file ran code"


def test_weights_whose_size_differs_in_one_tensor(fail, tiny_data, tmp_path):
    weights = state() | {"classifier.layers.0.bias": torch.zeros(11)}
    save_weights(tmp_path / "odd.safetensors", weights, about())
    message = fail(valid, "--weights", tmp_path / "odd.safetensors", "--data-dir", tiny_data, "--device", "cpu")
    assert "1 of " in message
    assert "classifier.layers.0.bias" in message
    assert "(11,)" in message
    assert "(10,)" in message


def test_weights_that_are_none_in_a_process(tmp_path):
    """As a user sees it: the exit code, and one line without a traceback."""
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    done = run_as_process("valid.py", "--weights", tmp_path / "weights.pt", "--no-download")
    assert done.returncode == 1
    assert "weights.pt" in the_error(done.stderr)
    assert done.stdout == ""


# --- pictures ---------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "seven.png"
    Image.effect_noise((20, 10), 50).save(path)
    return path


def png_of_size(width, height):
    """A PNG file of a hundred bytes that says how large it is, and has hardly a pixel."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


PICTURES_THAT_ARE_NONE = {  # what is done to a picture, and a word of what is said beside its name
    "not there": (Path.unlink, ""),
    "an empty file": (lambda path: path.write_bytes(b""), ""),
    "a text": (lambda path: path.write_bytes(b"no picture"), ""),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:150]), ""),
    "a folder without pictures": (lambda path: path.unlink() or path.mkdir() or (path / "a.txt").write_text("a"), ""),
    "too many pixels": (lambda path: Image.new("L", (200, 200)).save(path), "smaller"),
    "too high": (lambda path: Image.new("L", (1, 5000)).save(path), "smaller"),
    "too wide": (lambda path: Image.new("L", (5000, 1)).save(path), "smaller"),
    "no size": (lambda path: path.write_bytes(png_of_size(0, 0)), ""),
    "no width": (lambda path: path.write_bytes(png_of_size(0, 20)), ""),
    "as large as makes Pillow warn": (lambda path: path.write_bytes(png_of_size(9_500, 9_500)), "smaller"),
    "a bomb of ten gigabytes": (lambda path: path.write_bytes(png_of_size(60_000, 60_000)), "smaller"),
}


@pytest.mark.parametrize("case", PICTURES_THAT_ARE_NONE)
def test_pictures_that_are_none(monkeypatch, fail, quick_run, picture, tmp_path, case):
    """All pictures are looked at before one is written."""
    if case.startswith("too"):
        monkeypatch.setattr(pictures, "LARGEST_PIXELS", 10_000)
        monkeypatch.setattr(pictures, "LARGEST_SIDE", 1000)
    good = shutil.copy(picture, tmp_path / "good.png")
    spoil, word = PICTURES_THAT_ARE_NONE[case]
    spoil(picture)
    message = fail(image_annotate, "--weights", quick_run, "--output-dir", tmp_path / "out", "-f", good, picture)
    assert str(picture) in message
    assert ("smaller" in message) == (word == "smaller")
    assert not (tmp_path / "out").exists()


def test_weights_to_compare_with_that_are_none(fail, quick_run, picture, tmp_path):
    arguments = ("-f", picture, "--weights", quick_run, "--output-dir", tmp_path / "out")
    assert "nowhere" in fail(image_annotate, *arguments, "--compare", "nowhere")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be(fail, quick_run, picture):
    arguments = ("-f", picture, "--weights", quick_run, "--output-dir", picture / "out")
    assert str(picture / "out") in fail(image_annotate, *arguments)


def test_full_disk_for_a_picture(monkeypatch, fail, quick_run, picture, tmp_path):
    def save_half(page, file, *arguments, **options):
        Path(file).write_bytes(b"\x89PNG")
        raise DISK_FULL

    monkeypatch.setattr(Image.Image, "save", save_half)
    message = fail(image_annotate, "-f", picture, "--weights", quick_run, "--output-dir", tmp_path / "out")
    assert DISK_FULL.strerror in message
    assert list((tmp_path / "out").iterdir()) == []


# --- what all scripts share -------------------------------------------------------------------------


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


def test_a_fault_of_the_program_is_not_hidden():
    """An error that no user can fix keeps its traceback."""
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 // 0)


def test_a_result_that_cannot_be_printed():
    """`python valid.py > file` on a full disk: the last thing that can fail, and it fails in one line."""
    script = "from utils.cli import run_script; run_script(lambda: print('{}'))"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=30
        )
    assert done.returncode == 1
    assert DISK_FULL.strerror in the_error(done.stderr)


def test_a_pipe_that_is_closed():
    """`python valid.py | head -1` ends without a word."""
    script = "from utils.cli import run_script; run_script(lambda: [print('x' * 100) for _ in range(10000)])"
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=30) == 1
    process.stderr.close()
