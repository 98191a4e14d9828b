"""A run that is interrupted and goes on ends with the same bits as one that was left alone."""

import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT, Killed, interrupt_after, kill, press_ctrl_c, records_of, train
from safetensors.torch import load_file

import main
from methods.options import parse_arguments, resume_command
from methods.run import Run
from utils import machine
from utils.cli import Interrupted, UserError, run_script
from utils.distributed import ALONE

pytestmark = pytest.mark.usefixtures("no_fetch")
MACHINE = ("--device", "cpu", "--precision", "fp32", "--no-download")

# Two recipes: one that draws at random wherever it can, batch-normed, with AdamW's three tensors a weight; and
# one with two phases. 64 images in batches of 16 make four steps an epoch.
SMALL = (
    "--network", "quick", "--dropout", 0.3, "--augmentation", "affine", "--optimizer", "adamw", "--lr", 0.002,
    "--epochs", 3, "--batch-size", 16,
)  # fmt: skip
WARM = ("--recipe", "cnn-grl", "--warm-start-epochs", 2, "--epochs", 2, "--batch-size", 16)
# The teacher's weights, its mean prediction and its count of steps have to come back too.
TAUGHT = ("--recipe", "modern", "--epochs", 3, "--epoch-steps", 4, "--batch-size", 8, "--confidence", 0.1)
STEPS_AN_EPOCH = 4
STEP, SAVE = (main, "step"), (Run, "save")  # functions after which runs are interrupted


def go_on(folder, tiny_data):
    train("--resume", folder, "--data-dir", tiny_data, "--device", "cpu", "--no-download")


def interrupted_run(owner_and_name, count, interruption, *arguments):
    """A run that ends when a function has returned for the `count`-th time; returns what it said."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, *owner_and_name, count, interruption)
        with pytest.raises((Killed, Interrupted)) as ended:
            train(*arguments)
    return str(ended.value)


def comparable(value):
    """Nested dicts and lists with the bits of each tensor in its place."""
    if isinstance(value, dict):
        return {key: comparable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [comparable(inner) for inner in value]
    return (value.dtype, value.shape, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value


def what_is_left(folder):
    """Everything that a run leaves and that does not depend on the clock or on how it was started."""
    result = json.loads((folder / "result.json").read_text())
    state = torch.load(folder / "last.pt", weights_only=True)
    for key in ("command", "commit", "resumed", "seconds_to", "seconds", "images_per_second"):
        result.pop(key)
    for key in ("sessions", "seconds", "train_seconds"):
        state.pop(key)
    metrics = [
        {key: value for key, value in record.items() if key not in ("seconds", "images_per_second")}
        for record in records_of(folder)
    ]
    weights = load_file(folder / "model.safetensors")
    return comparable({"metrics": metrics, "result": result, "last.pt": state, "weights": weights})


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def small_run(tiny_data, tmp_path_factory):
    """The folder of an uninterrupted run of the small recipe."""
    folder = tmp_path_factory.mktemp("small") / "run"
    train(*SMALL, *MACHINE, "--data-dir", tiny_data, "--run-dir", folder)
    return folder


@pytest.fixture(scope="module")
def warm_run(tiny_data, tmp_path_factory):
    """The folder of an uninterrupted run with a warm start."""
    folder = tmp_path_factory.mktemp("warm") / "run"
    train(*WARM, *MACHINE, "--data-dir", tiny_data, "--run-dir", folder)
    return folder


@pytest.fixture(scope="module")
def stopped_run(tiny_data, tmp_path_factory):
    """The folder of a run of the small recipe that was interrupted in its second epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    interrupted_run(STEP, 6, press_ctrl_c, *SMALL, *MACHINE, "--data-dir", tiny_data, "--run-dir", folder)
    return folder


@pytest.fixture
def half_run(stopped_run, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(stopped_run, tmp_path / "half")


# --- the same bits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "count", "interruption"),
    [
        pytest.param(SAVE, 1, kill, id="killed between the first and the second epoch"),
        pytest.param(STEP, 7, kill, id="killed within the second epoch"),
        pytest.param(STEP, 1, press_ctrl_c, id="Ctrl-C in the first step"),
        pytest.param(STEP, 6, press_ctrl_c, id="Ctrl-C within the second epoch"),
        pytest.param(STEP, 8, press_ctrl_c, id="Ctrl-C in the last step of an epoch"),
        pytest.param(SAVE, 2, press_ctrl_c, id="Ctrl-C between two epochs"),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(small_run, tiny_data, tmp_path, function, count, interruption):
    folder = tmp_path / "run"
    interrupted_run(function, count, interruption, *SMALL, *MACHINE, "--data-dir", tiny_data, "--run-dir", folder)
    assert not (folder / "result.json").exists()
    go_on(folder, tiny_data)
    assert what_is_left(folder) == what_is_left(small_run)


def test_a_run_with_a_teacher_ends_with_the_same_bits(tiny_data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(*TAUGHT, *MACHINE, "--data-dir", tiny_data, "--run-dir", whole)
    interrupted_run(STEP, 6, press_ctrl_c, *TAUGHT, *MACHINE, "--data-dir", tiny_data, "--run-dir", parts)
    with pytest.raises(UserError, match=r"\(confidence is 0\.1 there, 0\.9 here\)"):
        train("--resume", parts, "--recipe", "modern", "--confidence", 0.9, "--data-dir", tiny_data)
    go_on(parts, tiny_data)
    expected = what_is_left(whole)
    state = torch.load(whole / "last.pt", weights_only=True)
    assert state["teacher"]["average"]["n_averaged"] == 1 + 12, "it starts as a copy"
    assert expected["metrics"][-1]["loss_teacher"] > 0
    assert what_is_left(parts) == expected


@pytest.mark.parametrize(
    ("function", "counts", "interruption"),
    [
        # After 3 of 16 steps (warm start), 8 (its last step, before the momentum is forgotten), 10 and 14 (reversal).
        pytest.param(STEP, (3, 5, 2, 4), press_ctrl_c, id="Ctrl-C in both phases"),
        pytest.param(SAVE, (2,), kill, id="killed between the phases"),
    ],
)
def test_a_run_with_a_warm_start_ends_with_the_same_bits(warm_run, tiny_data, tmp_path, function, counts, interruption):
    folder = tmp_path / "run"
    arguments = (*WARM, *MACHINE, "--data-dir", tiny_data, "--run-dir", folder)
    for count in counts:
        interrupted_run(function, count, interruption, *arguments)
        arguments = ("--resume", folder, "--data-dir", tiny_data, "--device", "cpu")
    state = torch.load(folder / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == ((3, 2) if interruption is press_ctrl_c else (2, 0))
    train(*arguments)
    assert what_is_left(folder) == what_is_left(warm_run)
    records = records_of(warm_run)
    assert ["loss_domain" in record for record in records] == [False, False, True, True], "there were two phases"
    assert [record["p"] for record in records] == [0, 0, 0.5, 1]


def test_random_draws_matter_in_these_runs(small_run, half_run, tiny_data):
    """With another generator state in its checkpoint the run ends elsewhere: the comparison can fail."""
    state = torch.load(half_run / "last.pt", weights_only=True)
    state["rng"] = [{"cpu": torch.Generator().manual_seed(99).get_state()}]
    torch.save(state, half_run / "last.pt")
    go_on(half_run, tiny_data)
    found, expected = (load_file(folder / "model.safetensors") for folder in (half_run, small_run))
    assert any(not torch.equal(found[key], expected[key]) for key in expected)


def test_resuming_a_finished_run_repeats_its_result(small_run, tiny_data, tmp_path, capsys):
    folder = shutil.copytree(small_run, tmp_path / "run")
    (folder / "result.json").unlink()
    capsys.readouterr()
    go_on(folder, tiny_data)
    assert what_is_left(folder) == what_is_left(small_run)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    before = json.loads((small_run / "result.json").read_text())
    for key in ("source_correct", "target_correct", "source_accuracy", "target_accuracy", "seconds"):
        assert said[key] == before[key]


# --- what is told of the parts of a run -------------------------------------------------------------


def test_time_adds_up_over_interruptions(half_run, tiny_data):
    before = torch.load(half_run / "last.pt", weights_only=True)
    assert 0 < before["train_seconds"] <= before["seconds"]
    go_on(half_run, tiny_data)
    after = torch.load(half_run / "last.pt", weights_only=True)
    assert after["seconds"] > before["seconds"]
    result = json.loads((half_run / "result.json").read_text())
    assert result["seconds"] == pytest.approx(after["seconds"], abs=0.01)
    images = 3 * STEPS_AN_EPOCH * 2 * 16
    assert result["images_per_second"] == pytest.approx(images / after["train_seconds"], rel=0.01, abs=0.1)


def test_the_printed_command_goes_on_alike_and_the_result_keeps_both_parts(monkeypatch, capsys, tiny_data, tmp_path):
    """Taken from the screen: the same data, device, threads and so on; a dry run stays one."""
    compiled, threads = [], [1]
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    monkeypatch.setattr(machine, "check_compiler", lambda device: None)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    data, folder = shutil.copytree(tiny_data, tmp_path / "my data"), tmp_path / "a run"
    options = ("--device", "cpu", "--threads", 2, "--compile", "--no-download", "--data-dir", data)
    with monkeypatch.context() as patch:
        interrupt_after(patch, *STEP, 2, press_ctrl_c)
        with pytest.raises(SystemExit) as ended:
            run_script(lambda: train(*SMALL, *options, "--dry-run", "--run-dir", folder))
    assert ended.value.code == 130
    said = capsys.readouterr()
    assert said.out == "", "an interrupted run has no result"
    python, script, *words = shlex.split(re.search(r"`(.*)`", said.err.splitlines()[-1])[1])
    assert (python, script) == ("python", "main.py")
    compiled.clear()
    threads.append(1)
    train(*words)
    assert compiled
    result = json.loads((folder / "result.json").read_text())
    assert (result["dry_run"], result["epochs"]) == (True, 2)
    (second,) = result["resumed"]
    for part, flag in ((result, "--dry-run"), (second, "--resume")):
        assert flag in shlex.split(part["command"])
        assert (part["threads"], part["compile"], part["processes"]) == (2, True, 1)
        assert part["machine"] == machine.describe(torch.device("cpu"))
        assert part["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    "options",
    [(), ("--data-dir", "my data"), ("--device", "cpu"), ("--threads", "3"), ("--compile",), ("--no-download",)],
    ids=" ".join,
)
def test_the_command_that_resumes_keeps_what_was_given_and_no_more(monkeypatch, tmp_path, options):
    monkeypatch.setattr(sys, "argv", ["main.py", *options])
    before, _ = parse_arguments()
    words = shlex.split(resume_command(before, tmp_path / "run", ALONE))
    assert words == ["python", "main.py", "--resume", str(tmp_path / "run"), *options]
    monkeypatch.setattr(sys, "argv", words[1:])
    after, _ = parse_arguments()
    assert vars(after) == vars(before) | {"resume": tmp_path / "run"}


# --- what can't be resumed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--seed", 5), ["seed", "0", "5"]),
        (("--batch-size", 8, "--dropout", 0.1), ["batch_size", "16", "8", "dropout", "0.3", "0.1"]),
        (("--recipe", "paper"), ["recipe", "dann", "paper"]),
        (("--epochs", 9), ["epochs", "3", "9"]),
        (("--method", "source-only"), ["method", "dann", "source-only"]),
    ],
)
def test_other_settings_are_refused_and_named(fail, stopped_run, tiny_data, arguments, told):
    before = files_of(stopped_run)
    message = fail(main, "--resume", stopped_run, *arguments, "--data-dir", tiny_data)
    words = re.findall(r"[\w.-]+", message.replace(str(stopped_run), ""))
    assert not [word for word in told if word not in words], message
    assert files_of(stopped_run) == before


def test_the_same_settings_may_be_repeated(half_run, tiny_data):
    train("--resume", half_run, *SMALL, "--data-dir", tiny_data, "--device", "cpu")
    assert (half_run / "result.json").exists()


@pytest.mark.parametrize("change", ["fewer images", "other bytes"])
def test_other_data_are_refused_and_nothing_is_lost(fail, stopped_run, tiny_data, tmp_path, change):
    """With other images the rest of the run would be another experiment, also where there are as many of them."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    train_images = data / "MNIST/raw/train-images-idx3-ubyte.gz"
    if change == "fewer images":  # 37 in place of 64
        for name in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz"):
            shutil.copy(data / f"MNIST/raw/t10k-{name}", data / f"MNIST/raw/train-{name}")
    else:
        content = bytearray(gzip.decompress(train_images.read_bytes()))
        content[-1] ^= 1
        train_images.write_bytes(gzip.compress(content))
    before = files_of(stopped_run)
    message = fail(main, "--resume", stopped_run, "--data-dir", data, "--device", "cpu")
    assert str(stopped_run) in message
    assert "--data-dir" in message
    assert files_of(stopped_run) == before


def test_a_folder_that_is_no_run_is_refused(fail, tmp_path):
    message = fail(main, "--resume", tmp_path / "no-such-folder")
    assert "no-such-folder" in message
    assert "python main.py" in message
    assert not (tmp_path / "no-such-folder").exists()
    (tmp_path / "empty").mkdir()
    assert "empty" in fail(main, "--resume", tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize(
    "key", ["model", "optimizer", "step", "rng", "sessions", "data", "dry_run", "weights", "bytes"]
)
def test_a_checkpoint_that_lacks_something_is_refused(fail, small_run, tiny_data, tmp_path, key):
    """Of an earlier version, say, or weights alone: one line that names the file, and no KeyError."""
    state = torch.load(small_run / "last.pt", weights_only=True)
    lacks = {name: value for name, value in state.items() if name != key}
    torch.save(state["model"] if key == "weights" else lacks, tmp_path / "last.pt")
    if key == "bytes":
        (tmp_path / "last.pt").write_bytes(bytes(range(256)) * 12)
    message = fail(main, "--resume", tmp_path, "--data-dir", tiny_data)
    assert str(tmp_path / "last.pt") in message
    assert key in (*re.findall(r"\w+", message), "weights", "bytes")
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_run_of_another_version_is_refused(fail, half_run, tiny_data):
    state = torch.load(half_run / "last.pt", weights_only=True)
    state["config"]["a_setting_of_tomorrow"] = 1
    torch.save(state, half_run / "last.pt")
    assert "a_setting_of_tomorrow" in fail(main, "--resume", half_run, "--data-dir", tiny_data)


# --- Ctrl-C -----------------------------------------------------------------------------------------


def test_ctrl_c_of_a_process(tiny_data, tmp_path):
    folder, epochs = tmp_path / "run", 50
    settings = ("--network", "quick", "--batch-size", 16, "--epochs", epochs)
    command = (sys.executable, "main.py", *settings, *MACHINE, "--data-dir", tiny_data, "--run-dir", folder)
    process = subprocess.Popen(
        [*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        before = ""
        for line in process.stderr:
            before += line
            if line.startswith("epoch   1/"):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, before + err
    assert "Traceback" not in err
    message = err.splitlines()[-1]
    assert f"--resume {folder}" in message
    assert out == "", "an interrupted run has no result"
    state = torch.load(folder / "last.pt", weights_only=True)
    epoch, step = map(int, re.search(r"epoch (\d+), step (\d+)", message).groups())
    assert (state["epoch"] + 1, state["step"]) == (epoch, step)
    assert 1 < epoch < epochs
    assert not list(folder.glob(".*tmp"))
    assert not (folder / "result.json").exists()
    assert [record["epoch"] for record in records_of(folder)] == list(range(1, state["epoch"] + 1))


def test_a_second_ctrl_c_ends_at_once(monkeypatch, tiny_data, tmp_path, capsys):
    def press_twice():
        press_ctrl_c()
        press_ctrl_c()

    interrupt_after(monkeypatch, *STEP, 2, press_twice)
    arguments = (*SMALL, *MACHINE, "--data-dir", tiny_data, "--run-dir", tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: train(*arguments))
    assert ended.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert not (tmp_path / "run" / "last.pt").exists()


def test_after_a_run_ctrl_c_is_answered_as_before(half_run, tiny_data):
    def handler(signum, frame):
        raise AssertionError

    signal.signal(signal.SIGINT, handler)
    go_on(half_run, tiny_data)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("count", [1, 2, 3])
def test_ctrl_c_stops_epochs_of_one_step_but_no_run_that_has_ended(tiny_data, tmp_path, count):
    folder = tmp_path / "run"
    arguments = (*SMALL, *MACHINE, "--epoch-steps", 1, "--data-dir", tiny_data, "--run-dir", folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) if count < 3 else nullcontext():
        interrupt_after(patch, *STEP, count, press_ctrl_c)
        train(*arguments)
    assert torch.load(folder / "last.pt", weights_only=True)["epoch"] == count
    assert (folder / "result.json").exists() == (count == 3)


def test_ctrl_c_before_training_is_one_line(monkeypatch, tiny_data, tmp_path, capsys):
    def interrupted_reading(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)  # the signal ends it

    monkeypatch.setattr(main, "load_pair", interrupted_reading)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: train(*SMALL, "--data-dir", tiny_data, "--run-dir", tmp_path / "run"))
    assert ended.value.code == 130
    assert capsys.readouterr().err.splitlines() == ["interrupted"]
    assert not (tmp_path / "run").exists()
