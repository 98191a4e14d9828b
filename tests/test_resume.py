"""A run that is interrupted and goes on ends with the same bits as one that was left alone."""

import fcntl
import functools
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    go_on,
    interrupt_after,
    interrupted_run,
    kill,
    press_ctrl_c,
    records_of,
    result_of,
    state_of,
    train,
    weights_of,
)

import main
from methods.options import parse_arguments, resume_command
from methods.run import Run
from utils import machine
from utils.checkpoint import save_checkpoint
from utils.cli import Interrupted, UserError, run_script
from utils.distributed import ALONE

pytestmark = pytest.mark.usefixtures("no_fetch")
MACHINE = ("--device", "cpu", "--precision", "fp32", "--no-download")
# 64 images in batches of 16 make four steps an epoch. A recipe that draws at random wherever it can, batch-normed, with
# AdamW's three tensors a weight; one with two phases; one whose teacher, mean prediction and count have to come back.
SMALL, WARM, TAUGHT = (
    tuple(words.split())
    for words in (
        "--network small --dropout 0.3 --augmentation affine --optimizer adamw --lr 0.002 --epochs 3 --batch-size 16",
        "--recipe cnn-grl --warm-start-epochs 2 --epochs 2 --batch-size 16",
        "--recipe modern --epochs 3 --epoch-steps 4 --batch-size 8 --confidence 0.1",
    )
)
STEP, SAVE = (main, "step"), (Run, "save")  # functions after which runs are interrupted
CLOCKS = {"seconds", "train_seconds", "images_per_second", "seconds_to"}
STARTS = {"command", "commit", "resumed", "sessions"}


def comparable(value):
    """Nested dicts and lists with the bits of each tensor in its place, without times and how a run was started."""
    if isinstance(value, dict):
        return {key: comparable(inner) for key, inner in value.items() if key not in CLOCKS | STARTS}
    if isinstance(value, list | tuple):
        return [comparable(inner) for inner in value]
    return (value.dtype, value.shape, value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value


def what_is_left(folder):
    """Everything that a run leaves and that does not depend on the clock or on how it was started."""
    return comparable([read(folder) for read in (records_of, result_of, state_of, weights_of)])


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory):
    """The folder of an uninterrupted run with these settings; not to be changed."""

    @functools.cache
    def run(settings):
        folder = tmp_path_factory.mktemp("whole") / "run"
        train(*settings, *MACHINE, "--data-dir", tiny_data, "--run-dir", folder)
        return folder

    return run


@pytest.fixture(scope="module")
def stopped_run(tiny_data, tmp_path_factory):
    """The folder of a run of the small recipe that was interrupted in its second epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    interrupted_run(*STEP, 6, press_ctrl_c, *SMALL, *MACHINE, "--data-dir", tiny_data, "--run-dir", folder)
    return folder


@pytest.fixture
def half_run(stopped_run, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(stopped_run, tmp_path / "half")


@pytest.mark.parametrize(
    ("settings", "function", "counts", "interruption", "at"),
    [
        pytest.param(SMALL, SAVE, [1], kill, (1, 0), id="killed between the first and the second epoch"),
        pytest.param(SMALL, STEP, [7], kill, (1, 0), id="killed within the second epoch"),
        pytest.param(SMALL, STEP, [1], press_ctrl_c, (0, 1), id="Ctrl-C in the first step"),
        pytest.param(SMALL, STEP, [6], press_ctrl_c, (1, 2), id="Ctrl-C within the second epoch"),
        pytest.param(SMALL, STEP, [8], press_ctrl_c, (2, 0), id="Ctrl-C in the last step of an epoch"),
        pytest.param(SMALL, SAVE, [2], press_ctrl_c, (2, 0), id="Ctrl-C between two epochs"),
        pytest.param(TAUGHT, STEP, [6], press_ctrl_c, (1, 2), id="Ctrl-C with a teacher"),
        # After 3 of 16 steps (warm start), 8 (its last step, before the momentum is forgotten), 10 and 14 (reversal).
        pytest.param(WARM, STEP, [3, 5, 2, 4], press_ctrl_c, (3, 2), id="Ctrl-C in both phases"),
        pytest.param(WARM, SAVE, [2], kill, (2, 0), id="killed between the phases"),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(
    whole, tiny_data, tmp_path, settings, function, counts, interruption, at
):
    folder = tmp_path / "run"
    arguments = (*settings, *MACHINE, "--data-dir", tiny_data, "--run-dir", folder)
    for count in counts:
        interrupted_run(*function, count, interruption, *arguments)
        arguments = ("--resume", folder, "--data-dir", tiny_data, "--device", "cpu", "--no-download")
    state = state_of(folder)
    assert (state["epoch"], state["step"]) == at
    assert not (folder / "result.json").exists()
    train(*arguments)
    assert what_is_left(folder) == what_is_left(whole(settings))


def test_these_runs_have_two_phases_and_a_teacher_that_starts_as_a_copy(whole):
    records = records_of(whole(WARM))
    assert ["loss_domain" in record for record in records] == [False, False, True, True]
    assert [record["p"] for record in records] == [0, 0, 0.5, 1]
    assert state_of(whole(TAUGHT))["teacher"]["average"]["n_averaged"] == 1 + 12
    assert records_of(whole(TAUGHT))[-1]["loss_teacher"] > 0


def test_random_draws_matter_in_these_runs(whole, half_run, tiny_data):
    """With another generator state in its checkpoint the run ends elsewhere: the comparison can fail."""
    state = state_of(half_run)
    state["rng"] = [{"cpu": torch.Generator().manual_seed(99).get_state()}]
    torch.save(state, half_run / "last.pt")
    go_on(half_run, tiny_data)
    expected = weights_of(whole(SMALL))
    assert any(not torch.equal(value, expected[name]) for name, value in weights_of(half_run).items())


def test_resuming_a_finished_run_repeats_its_result(whole, tiny_data, tmp_path, capsys):
    folder = shutil.copytree(whole(SMALL), tmp_path / "run")
    (folder / "result.json").unlink()
    capsys.readouterr()
    go_on(folder, tiny_data)
    assert what_is_left(folder) == what_is_left(whole(SMALL))
    said, before = json.loads(capsys.readouterr().out.splitlines()[-1]), result_of(whole(SMALL))
    for key in ("source_correct", "target_correct", "source_accuracy", "target_accuracy", "seconds"):
        assert said[key] == before[key]


def test_time_adds_up_over_interruptions(half_run, tiny_data):
    before = state_of(half_run)
    assert 0 < before["train_seconds"] <= before["seconds"]
    go_on(half_run, tiny_data, *SMALL)  # the same settings may be repeated
    after, result = state_of(half_run), result_of(half_run)
    assert after["seconds"] > before["seconds"]
    assert result["seconds"] == pytest.approx(after["seconds"], abs=0.01)
    images = 3 * 4 * 2 * 16  # epochs, steps, domains, a batch
    assert result["images_per_second"] == pytest.approx(images / after["train_seconds"], rel=0.01, abs=0.1)


def ended_by_ctrl_c(capsys, *arguments):
    """Train in this process, which Ctrl-C must end; returns what was said on stderr."""
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: train(*arguments))
    assert ended.value.code == 130
    said = capsys.readouterr()
    assert said.out == "", "an interrupted run has no result"
    assert "Traceback" not in said.err
    return said.err


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
        said = ended_by_ctrl_c(capsys, *SMALL, *options, "--dry-run", "--run-dir", folder)
    python, script, *words = shlex.split(re.search(r"`(.*)`$", said.strip())[1])
    assert (python, script) == ("python", "main.py")
    compiled.clear()
    threads.append(1)
    train(*words)
    assert compiled
    result = result_of(folder)
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


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--seed", 5), ["seed", "0", "5"]),
        (("--batch-size", 8, "--dropout", 0.1), ["batch_size", "16", "8", "dropout", "0.3", "0.1"]),
        (("--recipe", "paper"), ["recipe", "dann", "paper"]),
        (("--epochs", 9), ["epochs", "3", "9"]),
        (("--method", "source-only"), ["method", "dann", "source-only"]),
        (("--recipe", "modern", "--confidence", 0.9), ["confidence", "0.1", "0.9"]),
    ],
)
def test_other_settings_are_refused_and_named(fail, stopped_run, whole, tiny_data, arguments, told):
    folder = whole(TAUGHT) if "modern" in arguments else stopped_run
    before = files_of(folder)
    message = fail(main, "--resume", folder, *arguments, "--data-dir", tiny_data)
    words = re.findall(r"[\w.-]+", message.replace(str(folder), ""))
    assert not [word for word in told if word not in words], message
    assert files_of(folder) == before


@pytest.mark.parametrize("change", ["fewer images", "other bytes"])
def test_other_data_are_refused_and_nothing_is_lost(fail, stopped_run, tiny_data, tmp_path, change):
    """With other images the rest of the run would be another experiment, also where there are as many of them."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    if change == "fewer images":  # 37 in place of 64
        for name in ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz"):
            shutil.copy(data / f"MNIST/raw/t10k-{name}", data / f"MNIST/raw/train-{name}")
    else:
        file = data / "MNIST/raw/train-images-idx3-ubyte.gz"
        content = bytearray(gzip.decompress(file.read_bytes()))
        content[-1] ^= 1
        file.write_bytes(gzip.compress(content))
    before = files_of(stopped_run)
    message = fail(main, "--resume", stopped_run, "--data-dir", data, "--device", "cpu")
    assert str(stopped_run) in message
    assert "--data-dir" in message
    assert files_of(stopped_run) == before


@pytest.mark.parametrize("part", ["model", "optimizer", "rng", "sums"])
def test_a_checkpoint_of_a_version_that_keeps_things_otherwise(fail, tiny_data, half_run, part):
    state = state_of(half_run)
    save_checkpoint(half_run / "last.pt", state | {part: ["something else"]})
    message = fail(main, "--resume", half_run, "--data-dir", tiny_data, *MACHINE[-1:])
    assert f"{half_run / 'last.pt'} was made by another version" in message


def test_a_folder_that_is_no_run_is_refused(fail, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("no-such-folder", "empty"):
        message = fail(main, "--resume", tmp_path / name)
        assert name in message
        assert "python main.py" in message
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


@pytest.mark.parametrize("key", ["model", "optimizer", "step", "rng", "sessions", "data", "dry_run"])
def test_a_checkpoint_that_lacks_something_is_refused(fail, stopped_run, tiny_data, tmp_path, key):
    """Of an earlier version, say: one line that names the file, and no KeyError."""
    state = state_of(stopped_run)
    del state[key]
    torch.save(state, tmp_path / "last.pt")
    message = fail(main, "--resume", tmp_path, "--data-dir", tiny_data)
    assert str(tmp_path / "last.pt") in message
    assert key in re.findall(r"\w+", message)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_file_that_is_no_checkpoint_of_this_version_is_refused(fail, stopped_run, tiny_data, tmp_path):
    """Weights alone, bytes, and a setting of tomorrow."""
    file, state = tmp_path / "last.pt", state_of(stopped_run)
    torch.save(state["model"], file)
    assert str(file) in fail(main, "--resume", tmp_path, "--data-dir", tiny_data)
    file.write_bytes(bytes(range(256)) * 12)
    assert str(file) in fail(main, "--resume", tmp_path, "--data-dir", tiny_data)
    state["config"]["a_setting_of_tomorrow"] = 1
    torch.save(state, file)
    assert "a_setting_of_tomorrow" in fail(main, "--resume", tmp_path, "--data-dir", tiny_data)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("damage", ["cut short", "a bit is wrong", "something else", "gone"])
def test_a_damaged_checkpoint_costs_only_what_came_after_the_one_before(half_run, tiny_data, capsys, tmp_path, damage):
    """The run ends with the same bits all the same."""
    other = shutil.copytree(half_run, tmp_path / "other")
    go_on(other, tiny_data)
    last = half_run / "last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    changed = {"cut short": content[:-900], "a bit is wrong": content, "something else": b"nothing"}
    if damage == "gone":
        last.unlink()
    else:
        last.write_bytes(changed[damage])
    capsys.readouterr()
    go_on(half_run, tiny_data)
    said = capsys.readouterr().err
    assert f"{last} is {'missing' if damage == 'gone' else 'damaged'}: going on from {half_run / 'previous.pt'}" in said
    ended, expected = weights_of(half_run), weights_of(other)
    assert all(torch.equal(ended[name], expected[name]) for name in expected)
    assert [record["epoch"] for record in records_of(half_run)] == [1, 2, 3][: len(records_of(other))]


def test_a_checkpoint_that_was_not_written_well_takes_no_place(monkeypatch, half_run):
    """As on a disk that loses bytes: what is there stays, and the run ends in one line."""
    before = {path: path.read_bytes() for path in half_run.glob("*.pt")}
    assert {path.name for path in before} == {"last.pt", "previous.pt"}
    monkeypatch.setattr(torch, "save", lambda state, file: Path(file).write_bytes(before[half_run / "last.pt"][:-900]))
    with pytest.raises(UserError, match="not a checkpoint"):
        save_checkpoint(half_run / "last.pt", {})
    assert {
        path: path.read_bytes() for path in half_run.iterdir() if path.suffix != ".json" and path in before
    } == before
    assert not list(half_run.glob(".*tmp"))


def start_run(folder, tiny_data, epochs=50, **options) -> subprocess.Popen:
    """A run in a process of its own that is in its second epoch, or later."""
    settings = ("--network", "small", "--batch-size", 16, "--epochs", epochs)
    command = (sys.executable, "main.py", *settings, *MACHINE, "--data-dir", tiny_data, "--run-dir", folder)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, text=True, **pipes)
    for _ in range(600):
        if (folder / "last.pt").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    return process


def test_one_process_at_a_time_trains_in_a_folder(fail, half_run, tiny_data):
    """The second is refused before it has changed anything; what a killed one left half written goes."""
    (half_run / ".last.pt.1.tmp").touch()
    before = files_of(half_run)
    descriptor = os.open(half_run, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert "another process trains in" in fail(main, "--resume", half_run, "--data-dir", tiny_data, "--device", "cpu")
    assert files_of(half_run) == before
    os.close(descriptor)
    go_on(half_run, tiny_data)
    assert not list(half_run.glob(".*.tmp"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_process_that_is_told_to_stop(tiny_data, tmp_path, number, code):
    """By Ctrl-C, by a scheduler, or because its terminal goes away."""
    folder, epochs = tmp_path / "run", 50
    process = start_run(folder, tiny_data, epochs)
    try:
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert out == "", "an interrupted run has no result"
    message = err.splitlines()[-1]
    assert f"--resume {folder}" in message
    state = state_of(folder)
    epoch, step = map(int, re.search(r"epoch (\d+), step (\d+)", message).groups())
    assert (state["epoch"] + 1, state["step"]) == (epoch, step)
    assert 1 < epoch < epochs
    assert not list(folder.glob(".*tmp"))
    assert not (folder / "result.json").exists()
    assert [record["epoch"] for record in records_of(folder)] == list(range(1, epoch))


def test_a_terminal_that_goes_away_leaves_a_checkpoint(tiny_data, tmp_path):
    """The run is the leader of the terminal's session, as in a window that is closed; nobody reads what it says."""
    ours, terminal = os.openpty()
    options = {"stdin": terminal, "stdout": terminal, "stderr": terminal, "start_new_session": True}
    folder = tmp_path / "run"
    process = start_run(folder, tiny_data, **options, preexec_fn=lambda: fcntl.ioctl(terminal, termios.TIOCSCTTY, 0))
    try:
        os.close(terminal)
        before = state_of(folder)
        os.close(ours)
        assert process.wait(timeout=120) == 129
    finally:
        process.kill()
    state = state_of(folder)
    assert (state["epoch"], state["step"]) >= (before["epoch"], before["step"])
    assert [record["epoch"] for record in records_of(folder)] == list(range(1, state["epoch"] + 1))


def test_a_run_whose_terminal_does_not_count_goes_on(tiny_data, tmp_path):
    """`nohup python main.py`: SIGHUP is ignored before it starts."""
    ignored = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process = start_run(tmp_path / "run", tiny_data, 6, **ignored)
    try:
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0
    assert result_of(tmp_path / "run")["epochs"] == 6


@pytest.mark.parametrize(("function", "count", "presses"), [("load_pair", 1, 1), ("step", 2, 2)])
def test_ctrl_c_before_training_and_a_second_one_end_at_once(
    monkeypatch, tiny_data, tmp_path, capsys, function, count, presses
):
    interrupt_after(monkeypatch, main, function, count, lambda: [press_ctrl_c() for _ in range(presses)])
    said = ended_by_ctrl_c(capsys, *SMALL, *MACHINE, "--data-dir", tiny_data, "--run-dir", tmp_path / "run")
    assert said.splitlines()[-1] == "interrupted"
    assert (tmp_path / "run").exists() == (function == "step")
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
    assert state_of(folder)["epoch"] == count
    assert (folder / "result.json").exists() == (count == 3)
