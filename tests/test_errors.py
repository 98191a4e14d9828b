"""Each mistake and each fault that a user can mend: one clear line, exit code 1, and nothing half-written."""

import builtins
import bz2
import errno
import gzip
import io
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

import numpy as np
import pytest
import torch
from conftest import write_idx, write_svhn
from PIL import Image
from safetensors.torch import save_file
from scipy.io import savemat

import download_data
import image_annotate
import main
import valid
from data_loader import Preprocessing
from model import DANN
from utils import machine, pictures, pretrained
from utils.checkpoint import load_weights, save_weights
from utils.cli import Interrupted, UserError, run_script
from utils.config import recipe_config, to_dict

ROOT = Path(__file__).resolve().parent.parent
DISK_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
SMALL = (
    "--network", "paper-mnist", "--image-size", 32, "--batch-size", 16, "--epochs", 2, "--device", "cpu",
    "--no-download",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_shelf(monkeypatch, tmp_path):
    """No network, and a shelf of weights of the test's own."""

    def no_download(names, *arguments, **options):
        raise UserError(f"a test tried to download {list(names)}")

    monkeypatch.setattr(valid, "fetch", no_download)
    monkeypatch.setattr(pretrained, "PRETRAINED", tmp_path / "pretrained")
    (tmp_path / "pretrained").mkdir()
    entry = {"file": "digits.safetensors", "sha256": "0" * 64, "url": None}
    index = {"default": "digits", "weights": {"digits": entry}}
    (tmp_path / "pretrained" / "index.json").write_text(json.dumps(index))


def the_error(stderr):
    """The one line that a failed script says beside its log."""
    lines = stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert lines[-1] == errors[0], stderr
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


@pytest.fixture
def data(tiny_data, tmp_path):
    """A copy of the tiny data, to be damaged."""
    shutil.copytree(tiny_data, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def run_of_main(tiny_data, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("errors") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        arguments = (*SMALL, "--data-dir", tiny_data, "--run-dir", folder)
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, arguments)])
        main.main()
    return folder


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


# --- settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--source", "mnist", "--target", "mnist"), "source and target are both mnist"),
        (("--epochs", 0), "--epochs must be above 0, not 0"),
        (("--batch-size", -1), "--batch-size must be above 0"),
        (("--lr", "nan"), "--lr must be above 0, not nan"),
        (("--momentum", -0.1), "--momentum must not be negative"),
        (("--lambda-max", -1), "--lambda-max must not be negative"),
        (("--seed", -1), "--seed must not be negative"),
        (("--dropout", 1), "--dropout must be at least 0 and below 1"),
        (("--network", "quick", "--image-size", 28), "quick takes --image-size 32, not 28"),
        ((*SMALL, "--frozen-convolutions", 1, 3), "--frozen-convolutions"),
        ((*SMALL, "--frozen-convolutions", 0), "--frozen-convolutions"),
        ((*SMALL, "--threads", -1), "--threads"),
    ],
)
def test_settings_out_of_range(fail, tiny_data, tmp_path, arguments, told):
    message = fail(main, *arguments, "--data-dir", tiny_data, "--run-dir", tmp_path / "run", "--no-download")
    assert told in message
    assert not (tmp_path / "run").exists()


def test_batches_too_small_for_batch_statistics(fail, tiny_data, tmp_path):
    """One image has no variance: the batch-normed network can't be trained on it."""
    settings = (*SMALL, "--network", "quick", "--batch-size", 1, "--separate-domains")
    assert "--batch-size" in fail(main, *settings, "--data-dir", tiny_data, "--run-dir", tmp_path / "run")


@pytest.mark.parametrize("script", [main, valid])
def test_a_device_that_is_not_there(monkeypatch, fail, tiny_data, run_of_main, tmp_path, script):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ("--run-dir", tmp_path / "run") if script is main else ("--weights", run_of_main)
    message = fail(script, "--device", "cuda", "--data-dir", tiny_data, *arguments, "--no-download")
    assert "--device cuda" in message
    assert "--device cpu" in message, "it names what works"
    assert not (tmp_path / "run").exists()


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
    assert "cannot download train_32x32.mat" in message
    assert "Connection refused" in message
    assert f"`python download_data.py svhn --data-dir {data}`" in message
    assert done.stdout == ""
    assert not [path for path in data.rglob("*") if path.is_file()]
    assert not run.exists()


def test_missing_data_that_may_not_be_fetched(fail, tmp_path):
    message = fail(main, *SMALL, "--data-dir", tmp_path / "none", "--run-dir", tmp_path / "run")
    assert "train_32x32.mat is missing" in message
    assert f"`python download_data.py svhn --data-dir {tmp_path / 'none'}`" in message
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "run").exists()


def truncate_images(data):
    path = data / "MNIST/raw/train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    return path


def truncate_inside(data):
    """A good gzip file of too few images."""
    path = data / "MNIST/raw/t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-784]))
    return path


def label_ten(data):
    path = data / "MNIST/raw/train-labels-idx1-ubyte.gz"
    write_idx(path, np.full(64, 10, np.uint8))
    return path


def no_x(data):
    path = data / "train_32x32.mat"
    savemat(path, {"y": np.ones((40, 1), np.uint8)})
    return path


def no_y(data):
    path = data / "train_32x32.mat"
    savemat(path, {"X": np.zeros((32, 32, 3, 40), np.uint8)})
    return path


def label_eleven(data):
    path = data / "test_32x32.mat"
    write_svhn(path, np.zeros((23, 32, 32, 3), np.uint8), np.full(23, 11))
    return path


def no_matrix(data):
    path = data / "test_32x32.mat"
    path.write_bytes(random.Random(0).randbytes(5000))
    return path


def fewer_labels(data):
    path = data / "MNIST/raw/train-labels-idx1-ubyte.gz"
    shutil.copy(data / "MNIST/raw/t10k-labels-idx1-ubyte.gz", path)
    return path


def empty(data):
    path = data / "MNIST/raw/t10k-images-idx3-ubyte.gz"
    path.write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("damage", "detail"),
    [
        (truncate_images, "ended before"),
        (truncate_inside, "header announces"),
        (label_ten, "10"),
        (no_x, "no variable X"),
        (no_y, "no variable y"),
        (label_eleven, "11"),
        (no_matrix, ""),
        (fewer_labels, "64 images but 37 labels"),
        (empty, ""),
    ],
)
def test_damaged_data(fail, data, tmp_path, damage, detail):
    path = damage(data)
    before = path.read_bytes()
    message = fail(main, *SMALL, "--data-dir", data, "--run-dir", tmp_path / "run")
    assert f"{path} is truncated or malformed" in message
    assert detail in message
    assert f"python download_data.py {'svhn' if path.suffix == '.mat' else 'mnist'}" in message
    assert path.read_bytes() == before, "a file of the user's is left alone"
    assert not (tmp_path / "run").exists()


def test_labels_outside_of_usps(fail, data, tmp_path):
    """The files call zero 1: a label 0 is none of the ten."""
    line = "0 " + " ".join(f"{i}:0.5" for i in range(1, 257))
    (data / "usps.bz2").write_bytes(bz2.compress(f"{line}\n{line}\n".encode()))
    arguments = (*SMALL, "--source", "usps", "--data-dir", data, "--run-dir", tmp_path / "run")
    assert "usps.bz2 is truncated or malformed (labels from -1 to -1)" in fail(main, *arguments)


@pytest.mark.parametrize("arguments", [("--no-download",), ()])
def test_a_data_folder_that_cannot_be(monkeypatch, fail, tmp_path, arguments):
    """Below a regular file, which stops the superuser too."""
    monkeypatch.setattr(valid, "fetch", download_data.fetch)
    (tmp_path / "file").write_text("no folder")
    folder = tmp_path / "file" / "data"
    message = fail(main, "--data-dir", folder, "--run-dir", tmp_path / "run", "--device", "cpu", *arguments)
    assert str(folder) in message
    assert (tmp_path / "file").read_text() == "no folder"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("below", ["", "run"])
def test_a_run_folder_that_cannot_be(fail, tiny_data, tmp_path, below):
    (tmp_path / "file").write_text("no folder")
    folder = tmp_path / "file" / below
    message = fail(main, *SMALL, "--data-dir", tiny_data, "--run-dir", folder)
    assert f"cannot write to the folder {folder}" in message
    assert (tmp_path / "file").read_text() == "no folder"


# --- run folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["result.json", "last.pt"])
def test_a_folder_that_holds_a_run(fail, tiny_data, tmp_path, file):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / file).write_text("{}")
    message = fail(main, *SMALL, "--data-dir", tiny_data, "--run-dir", folder)
    assert f"{folder} holds a run already" in message
    assert f"--resume {folder}" in message
    assert {path.name: path.read_text() for path in folder.iterdir()} == {file: "{}"}


def test_resuming_with_other_settings(fail, run_of_main, tiny_data):
    message = fail(main, "--resume", run_of_main, "--seed", 7, "--lr", 0.5, "--data-dir", tiny_data)
    assert "seed is 0 there, 7 here" in message
    assert "lr is 0.01 there, 0.5 here" in message
    assert_nothing_half_written(run_of_main)


def test_resuming_what_is_no_run(fail, tiny_data, tmp_path):
    message = fail(main, "--resume", tmp_path, "--data-dir", tiny_data)
    assert f"{tmp_path} is no run that can be resumed" in message
    (tmp_path / "last.pt").write_bytes(random.Random(0).randbytes(3000))
    assert "last.pt is not a checkpoint of tensors" in fail(main, "--resume", tmp_path, "--data-dir", tiny_data)


# --- training ---------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(fail, tiny_data, tmp_path):
    folder = tmp_path / "run"
    settings = (*SMALL, "--lr", 1e30, "--lr-schedule", "constant", "--precision", "fp32")
    message = fail(main, *settings, "--data-dir", tiny_data, "--run-dir", folder)
    assert "the loss is not finite at step 1 (epoch 1)" in message
    for word in ("label loss", "domain loss", "lambda_p", "learning rate 1e+30", "--lr"):
        assert word in message
    assert not {path.name for path in folder.iterdir()} & {"last.pt", "result.json", "model.safetensors"}
    assert_nothing_half_written(folder)


def test_the_checkpoint_before_a_loss_that_is_not_finite_stays(monkeypatch, fail, tiny_data, tmp_path):
    """The rate rises in the second epoch: what the first one left is good, and is not written over."""
    original = main.learning_rate
    monkeypatch.setattr(main, "learning_rate", lambda config, p, step: 1e30 if step >= 5 else original(config, p, step))
    message = fail(main, *SMALL, "--data-dir", tiny_data, "--run-dir", tmp_path / "run")
    assert "not finite at step 6 (epoch 2)" in message
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 0)
    assert all(value.isfinite().all() for value in state["model"].values())
    assert_nothing_half_written(tmp_path / "run")


def test_weights_that_the_last_step_spoilt_are_not_kept(monkeypatch, fail, tiny_data, tmp_path):
    """The loss of each step was finite, but not the update after the last one: nothing to test, nothing to keep."""
    train_step = main.Trainer.train_step

    def spoil(trainer, *arguments):
        outcome = train_step(trainer, *arguments)
        if trainer.step == trainer.loader.steps - 1:
            for weight in trainer.model.parameters():
                weight.data.fill_(float("nan"))
        return outcome

    monkeypatch.setattr(main.Trainer, "train_step", spoil)
    message = fail(main, *SMALL, "--epochs", 1, "--data-dir", tiny_data, "--run-dir", tmp_path / "run")
    assert "not finite" in message
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "last.pt").exists()


# --- a full disk ------------------------------------------------------------------------------------


def half_then(error, write):
    """A writer that leaves half of a file behind and then fails as a full disk does."""

    def write_half(value, file, *arguments):
        whole = io.BytesIO()
        write(value, whole, *arguments)
        Path(file).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        raise error

    return write_half


@pytest.mark.parametrize(
    "error",
    [DISK_FULL, RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")],
)
def test_full_disk_for_the_checkpoint(monkeypatch, fail, tiny_data, tmp_path, error):
    """torch raises either of these."""
    monkeypatch.setattr(torch, "save", half_then(error, torch.save))
    message = fail(main, *SMALL, "--data-dir", tiny_data, "--run-dir", tmp_path / "run")
    assert f"cannot write {tmp_path / 'run' / 'last.pt'}" in message
    assert "space" in message
    assert not (tmp_path / "run" / "last.pt").exists()
    assert_nothing_half_written(tmp_path / "run")


def test_full_disk_for_a_later_checkpoint(monkeypatch, fail, tiny_data, tmp_path):
    """The one before stays, and the run can go on from it once there is space."""
    folder = tmp_path / "run"
    torch_save, calls = torch.save, []

    def save_once(state, file):
        calls.append(file)
        (torch_save if len(calls) == 1 else half_then(DISK_FULL, torch_save))(state, file)

    monkeypatch.setattr(torch, "save", save_once)
    assert "cannot write" in fail(main, *SMALL, "--data-dir", tiny_data, "--run-dir", folder)
    assert torch.load(folder / "last.pt", weights_only=True)["epoch"] == 1
    assert_nothing_half_written(folder)
    monkeypatch.setattr(torch, "save", torch_save)
    monkeypatch.setattr(sys, "argv", ["main.py", "--resume", str(folder), "--data-dir", str(tiny_data)])
    main.main()
    assert [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_full_disk_for_the_weights(monkeypatch, fail, tiny_data, tmp_path):
    write_bytes = Path.write_bytes

    def write_half(file, content):
        write_bytes(file, content[: len(content) // 2])
        if ".safetensors" in file.name:
            raise DISK_FULL

    monkeypatch.setattr(Path, "write_bytes", write_half)
    message = fail(main, *SMALL, "--data-dir", tiny_data, "--run-dir", tmp_path / "run")
    assert f"cannot write {tmp_path / 'run' / 'model.safetensors'}" in message
    assert "No space left on device" in message
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert (tmp_path / "run" / "last.pt").exists(), "the training is not lost"
    assert_nothing_half_written(tmp_path / "run")


@pytest.mark.parametrize("file", ["config.json", "last.pt", "model.safetensors", "result.json"])
def test_full_disk_when_renaming(monkeypatch, fail, tiny_data, tmp_path, file):
    replace = os.replace

    def refuse(source, destination):
        if Path(destination).name == file:
            raise DISK_FULL
        replace(source, destination)

    monkeypatch.setattr(os, "replace", refuse)
    message = fail(main, *SMALL, "--data-dir", tiny_data, "--run-dir", tmp_path / "run")
    assert f"cannot write {tmp_path / 'run' / file} (No space left on device)" in message
    assert not (tmp_path / "run" / file).exists()
    assert_nothing_half_written(tmp_path / "run")


def test_full_disk_for_metrics(monkeypatch, fail, tiny_data, tmp_path):
    """Each line goes to a device that is always full."""
    path_open = Path.open

    def open_full(path, mode="r", *arguments, **options):
        full = path.name == "metrics.jsonl" and "a" in mode
        return builtins.open("/dev/full", "w") if full else path_open(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_full)
    message = fail(main, *SMALL, "--data-dir", tiny_data, "--run-dir", tmp_path / "run")
    assert f"cannot write {tmp_path / 'run' / 'metrics.jsonl'} (No space left on device)" in message
    assert_nothing_half_written(tmp_path / "run")


def test_full_disk_when_resuming_keeps_the_metrics(monkeypatch, fail, run_of_main, tiny_data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_of_main, folder)
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
from utils.cli import run_script
run_script(main.main)
"""


def test_full_disk_for_tensorboard(tiny_data, tmp_path):
    """A process, because what it must not do is wait for ever, or say more when it ends."""
    arguments = (*SMALL, "--epochs", 12, "--data-dir", tiny_data, "--run-dir", tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK_FOR_EVENTS, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    message = the_error(done.stderr)
    assert "tensorboard" in message
    assert "No space left on device" in message
    assert_nothing_half_written(tmp_path / "run")


def test_a_tensorboard_folder_that_cannot_be(fail, tiny_data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("no folder")
    message = fail(main, *SMALL, "--data-dir", tiny_data, "--run-dir", tmp_path / "run")
    assert "tensorboard" in message
    assert (tmp_path / "run" / "tensorboard").read_text() == "no folder"


# --- weights ----------------------------------------------------------------------------------------


def about(network):
    config = recipe_config("quick")
    settings = to_dict(config) | {"network": network, "source": "svhn", "target": "mnist", "precision": "fp32"}
    return {"config": settings, "preprocessing": {"image_size": 32, "normalisation": "unit", "mean": [0.0, 0.0, 0.0]}}


def of_another_architecture(path):
    save_weights(path, DANN("quick", 0.0).state_dict(), about("paper-mnist"))


def of_an_unknown_architecture(path):
    save_weights(path, DANN("quick", 0.0).state_dict(), about("network-of-tomorrow"))


def without_metadata(path):
    save_file(DANN("quick", 0.0).state_dict(), path)


def with_foreign_metadata(path):
    save_file(DANN("quick", 0.0).state_dict(), path, {"format": "pt"})


def with_broken_metadata(path):
    save_file(DANN("quick", 0.0).state_dict(), path, {"dann": "{"})


def of_another_version(path):
    described = about("quick")
    described["config"].pop("gamma")
    save_weights(path, DANN("quick", 0.0).state_dict(), described)


def cut_short(path):
    save_weights(path, DANN("quick", 0.0).state_dict(), about("quick"))
    path.write_bytes(path.read_bytes()[:-1000])


def pickled_list(path):
    torch.save([1, 2, 3], path)


def random_bytes(path):
    path.write_bytes(random.Random(0).randbytes(3000))


def nothing(path):
    path.write_bytes(b"")


def whole_module(path):
    torch.save(DANN("quick", 0.0), path)


def plain_pickle(path):
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2))


def not_tensors(path):
    torch.save({"model": {"weight": torch.zeros(2), "name": "text"}, "about": about("quick")}, path)


def bare_state_dict(path):
    torch.save(DANN("quick", 0.0).state_dict(), path)


class Trap:
    """Loading this pickle would run a command of the file's choice."""

    def __reduce__(self):
        return os.mkdir, (str(Trap.folder),)


def trap(path):
    Trap.folder = path.parent / "trapped"
    torch.save({"model": Trap()}, path)


@pytest.mark.parametrize(
    ("make", "suffix", "told"),
    [
        (of_another_architecture, ".safetensors", "another architecture than paper-mnist"),
        (of_an_unknown_architecture, ".safetensors", "does not say which network"),
        (without_metadata, ".safetensors", "does not say which network"),
        (with_foreign_metadata, ".safetensors", "does not say which network"),
        (with_broken_metadata, ".safetensors", "use a file that main.py wrote"),
        (of_another_version, ".safetensors", "another version of this program (gamma)"),
        (cut_short, ".safetensors", "is no safetensors file"),
        (random_bytes, ".safetensors", "is no safetensors file"),
        (nothing, ".safetensors", "is no safetensors file"),
        (pickled_list, ".pt", "holds a list, not a state dict"),
        (random_bytes, ".pt", "is not a checkpoint of tensors"),
        (nothing, ".pt", "is not a checkpoint of tensors"),
        (whole_module, ".pt", "is not a checkpoint of tensors"),
        (plain_pickle, ".pt", "use a file that main.py wrote"),
        (not_tensors, ".pt", "holds no state dict of tensors"),
        (bare_state_dict, ".pt", "does not say which network"),
        (trap, ".pt", "is not a checkpoint of tensors"),
    ],
)
def test_weights_that_are_none(fail, tiny_data, tmp_path, make, suffix, told):
    path = tmp_path / f"weights{suffix}"
    make(path)
    before = path.read_bytes()
    message = fail(valid, "--weights", path, "--data-dir", tiny_data, "--device", "cpu")
    assert told in message
    if make is not of_another_version:
        assert str(path) in message
    assert path.read_bytes() == before
    assert not (tmp_path / "trapped").exists(), "a weights file ran code"


def test_weights_whose_size_differs_in_one_tensor(fail, tiny_data, tmp_path):
    weights = DANN("quick", 0.0).state_dict()
    weights["classifier.layers.0.bias"] = torch.zeros(11)
    save_weights(tmp_path / "odd.safetensors", weights, about("quick"))
    message = fail(valid, "--weights", tmp_path / "odd.safetensors", "--data-dir", tiny_data, "--device", "cpu")
    assert "1 of " in message
    assert "classifier.layers.0.bias ((11,) instead of (10,))" in message


def test_weights_that_are_none_in_a_process(tmp_path):
    """As a user sees it: the exit code, and one line without a traceback."""
    random_bytes(tmp_path / "weights.pt")
    done = subprocess.run(
        [sys.executable, "valid.py", "--weights", tmp_path / "weights.pt", "--no-download"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "weights.pt is not a checkpoint of tensors" in the_error(done.stderr)
    assert done.stdout == ""


# --- pictures ---------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "seven.png"
    Image.effect_noise((20, 10), 50).save(path)
    return path


def test_a_picture_that_is_not_there(fail, run_of_main, picture, tmp_path):
    arguments = ("-f", picture, tmp_path / "eight.png", "--weights", run_of_main, "--output-dir", tmp_path / "out")
    message = fail(image_annotate, *arguments)
    assert "eight.png" in message
    assert not (tmp_path / "out").exists(), "all pictures are looked at before one is written"


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_a_picture_that_is_none(fail, run_of_main, picture, tmp_path, content):
    picture.write_bytes(picture.read_bytes()[:150] if content is None else content)
    message = fail(image_annotate, "-f", picture, "--weights", run_of_main, "--output-dir", tmp_path / "out")
    assert f"{picture} can't be read as a picture" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [(200, 200), (1, 5000), (5000, 1)])
def test_a_picture_that_is_too_large(monkeypatch, fail, run_of_main, tmp_path, size):
    """In pixels, or in the length of a side."""
    monkeypatch.setattr(pictures, "LARGEST_PIXELS", 10_000)
    monkeypatch.setattr(pictures, "LARGEST_SIDE", 1000)
    path = tmp_path / "large.png"
    Image.new("L", size).save(path)
    message = fail(image_annotate, "-f", path, "--weights", run_of_main, "--output-dir", tmp_path / "out")
    assert "large.png" in message
    assert "smaller" in message
    assert not (tmp_path / "out").exists()


def png_of_size(width, height):
    """A PNG file of a hundred bytes that says how large it is, and has hardly a pixel."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize("size", [(0, 0), (0, 20), (9_500, 9_500), (60_000, 60_000)])
def test_a_picture_that_only_claims_its_size(fail, run_of_main, tmp_path, size):
    """Nothing, as much as makes Pillow warn, and a bomb of ten gigabytes in a hundred bytes."""
    path = tmp_path / "claim.png"
    path.write_bytes(png_of_size(*size))
    message = fail(image_annotate, "-f", path, "--weights", run_of_main, "--output-dir", tmp_path / "out")
    assert "claim.png" in message
    assert ("smaller" in message) == (min(size) > 0)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_pictures(fail, run_of_main, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    message = fail(image_annotate, "-f", tmp_path / "empty", "--weights", run_of_main)
    assert f"there is no picture in the folder {tmp_path / 'empty'}" in message


def test_weights_to_compare_with_that_are_none(fail, run_of_main, picture, tmp_path):
    arguments = ("-f", picture, "--weights", run_of_main, "--output-dir", tmp_path / "out")
    assert "no weights at nowhere" in fail(image_annotate, *arguments, "--compare", "nowhere")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be(fail, run_of_main, picture):
    message = fail(image_annotate, "-f", picture, "--weights", run_of_main, "--output-dir", picture / "out")
    assert f"cannot write to the folder {picture / 'out'}" in message


def test_full_disk_for_a_picture(monkeypatch, fail, run_of_main, picture, tmp_path):
    def save_half(page, file, *arguments, **options):
        Path(file).write_bytes(b"\x89PNG")
        raise DISK_FULL

    monkeypatch.setattr(Image.Image, "save", save_half)
    arguments = ("-f", picture, "--weights", run_of_main, "--output-dir", tmp_path / "out")
    assert "No space left on device" in fail(image_annotate, *arguments)
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
    """An error that no user can mend keeps its traceback."""
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
    assert "No space left on device" in the_error(done.stderr)


def test_a_reader_that_goes_away():
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


def test_preprocessing_of_weights_is_checked(fail, tiny_data, tmp_path):
    described = about("quick")
    described["preprocessing"] = {"size": Preprocessing(32).image_size}
    save_weights(tmp_path / "odd.safetensors", DANN("quick", 0.0).state_dict(), described)
    message = fail(valid, "--weights", tmp_path / "odd.safetensors", "--data-dir", tiny_data, "--device", "cpu")
    assert "does not say which network" in message


def test_compiling_without_a_compiler(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"--compile needs a C\+\+ compiler"):
        machine.check_compiler(torch.device("cpu"))
    machine.check_compiler(torch.device("cuda"))
