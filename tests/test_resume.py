"""A run that is interrupted and goes on ends with the same bits as one that was left alone."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Killed, interrupt_after, kill, press_ctrl_c
from safetensors.torch import load_file

import main
import valid
from utils.cli import Interrupted, UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
MACHINE = ("--device", "cpu", "--precision", "fp32", "--no-download")

# Two recipes: one that draws at random wherever it can, batch-normed, with AdamW's three tensors a weight; and
# one with two phases. 64 images in batches of 16 make four steps an epoch.
SMALL = (
    "--network", "quick", "--image-size", 32, "--dropout", 0.3, "--augmentation", "affine", "--optimizer", "adamw",
    "--lr", 0.002, "--epochs", 3, "--batch-size", 16,
)  # fmt: skip
WARM = ("--recipe", "cnn-grl", "--warm-start-epochs", 2, "--epochs", 2, "--batch-size", 16)
# The teacher's weights, its mean prediction and its count of steps have to come back too.
TAUGHT = ("--recipe", "modern", "--epochs", 3, "--epoch-steps", 4, "--batch-size", 8, "--confidence", 0.1)
STEPS_AN_EPOCH = 4


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """No test reaches for the network."""

    def no_download(names, *arguments, **options):
        raise UserError(f"a test tried to download {list(names)}")

    monkeypatch.setattr(valid, "fetch", no_download)


def start(*arguments):
    """Run main.py with these arguments, in this process."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, arguments)])
        main.main()


def go_on(folder, tiny_data):
    start("--resume", folder, "--data-dir", tiny_data, "--device", "cpu", "--no-download")


def assert_same(found, expected, where=""):
    """Compare nested dicts and lists, tensors bit for bit."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


def what_is_left(folder):
    """Everything that a run leaves and that does not depend on the clock or on how it was started."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    state = torch.load(folder / "last.pt", weights_only=True)
    for record in (*records, result):
        record.pop("seconds")
        record.pop("images_per_second")
    for key in ("seconds", "train_seconds"):
        state.pop(key)
    for record in (result, state):
        record.pop("command", None)
    for key in ("commit", "seconds_to"):
        result.pop(key)
    return {"metrics": records, "result": result, "last.pt": state, "weights": load_file(folder / "model.safetensors")}


@pytest.fixture(scope="module")
def small_run(tiny_data, tmp_path_factory):
    """The folder of an uninterrupted run of the small recipe."""
    folder = tmp_path_factory.mktemp("small") / "run"
    start(*SMALL, *MACHINE, "--data-dir", tiny_data, "--run-dir", folder)
    return folder


@pytest.fixture(scope="module")
def warm_run(tiny_data, tmp_path_factory):
    """The folder of an uninterrupted run with a warm start."""
    folder = tmp_path_factory.mktemp("warm") / "run"
    start(*WARM, *MACHINE, "--data-dir", tiny_data, "--run-dir", folder)
    return folder


@pytest.fixture
def half_run(tiny_data, tmp_path):
    """The folder of a run of the small recipe that was interrupted in its second epoch."""
    folder = tmp_path / "half"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, "train_step", 6, press_ctrl_c)
        with pytest.raises(Interrupted):
            start(*SMALL, *MACHINE, "--data-dir", tiny_data, "--run-dir", folder)
    return folder


# --- the same bits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "count", "interruption", "error"),
    [
        pytest.param("save", 1, kill, Killed, id="killed between the first and the second epoch"),
        pytest.param("train_step", 7, kill, Killed, id="killed within the second epoch"),
        pytest.param("train_step", 1, press_ctrl_c, Interrupted, id="Ctrl-C in the first step"),
        pytest.param("train_step", 6, press_ctrl_c, Interrupted, id="Ctrl-C within the second epoch"),
        pytest.param("train_step", 8, press_ctrl_c, Interrupted, id="Ctrl-C in the last step of an epoch"),
        pytest.param("save", 2, press_ctrl_c, Interrupted, id="Ctrl-C between two epochs"),
    ],
)
def test_resumed_run_ends_with_the_same_bits(
    monkeypatch, small_run, tiny_data, tmp_path, method, count, interruption, error
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, method, count, interruption)
        with pytest.raises(error):
            start(*SMALL, *MACHINE, "--data-dir", tiny_data, "--run-dir", folder)
    assert not (folder / "result.json").exists()
    go_on(folder, tiny_data)
    assert_same(what_is_left(folder), what_is_left(small_run))


def test_run_with_a_teacher_ends_with_the_same_bits(monkeypatch, tiny_data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start(*TAUGHT, *MACHINE, "--data-dir", tiny_data, "--run-dir", whole)
    with monkeypatch.context() as patch:
        interrupt_after(patch, "train_step", 6, press_ctrl_c)
        with pytest.raises(Interrupted):
            start(*TAUGHT, *MACHINE, "--data-dir", tiny_data, "--run-dir", parts)
    go_on(parts, tiny_data)
    expected = what_is_left(whole)
    assert expected["last.pt"]["teacher"]["steps"] == 12
    assert expected["metrics"][-1]["loss_teacher"] > 0
    assert_same(what_is_left(parts), expected)


def test_run_interrupted_in_both_phases_ends_with_the_same_bits(monkeypatch, warm_run, tiny_data, tmp_path):
    """After 3 of 16 steps (warm start), 8 (its last step, before the momentum is forgotten), 10 and 14 (reversal)."""
    folder = tmp_path / "run"
    arguments = (*WARM, *MACHINE, "--data-dir", tiny_data, "--run-dir", folder)
    for steps in (3, 5, 2, 4):
        with monkeypatch.context() as patch:
            interrupt_after(patch, "train_step", steps, press_ctrl_c)
            with pytest.raises(Interrupted):
                start(*arguments)
        arguments = ("--resume", folder, "--data-dir", tiny_data)
    state = torch.load(folder / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (3, 2)
    start(*arguments)
    assert_same(what_is_left(folder), what_is_left(warm_run))


def test_run_killed_between_the_phases_ends_with_the_same_bits(monkeypatch, warm_run, tiny_data, tmp_path):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, "save", 2, kill)
        with pytest.raises(Killed):
            start(*WARM, *MACHINE, "--data-dir", tiny_data, "--run-dir", folder)
    go_on(folder, tiny_data)
    assert_same(what_is_left(folder), what_is_left(warm_run))


def test_warm_start_and_reversal_are_two_phases(warm_run):
    """What the two tests above compare with: no domain loss in the warm start, λ_p and p from zero after it."""
    records = [json.loads(line) for line in (warm_run / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss_domain"] is None for record in records] == [True, True, False, False]
    assert [record["p"] for record in records] == [0, 0, 0.5, 1]
    assert [record["lambda_p"] > 0 for record in records] == [False, False, True, True]


def test_random_draws_matter_in_these_runs(small_run, half_run, tiny_data):
    """With another generator state in its checkpoint the run ends elsewhere: the comparison can fail."""
    state = torch.load(half_run / "last.pt", weights_only=True)
    state["rng"] = [{"cpu": torch.Generator().manual_seed(99).get_state()}]
    torch.save(state, half_run / "last.pt")
    go_on(half_run, tiny_data)
    found, expected = (load_file(folder / "model.safetensors") for folder in (half_run, small_run))
    assert any(not torch.equal(found[key], expected[key]) for key in expected)


def test_one_record_an_epoch(small_run, half_run, tiny_data):
    go_on(half_run, tiny_data)
    for folder in (small_run, half_run):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


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


# --- a finished run ---------------------------------------------------------------------------------


def test_resuming_a_finished_run_repeats_its_result(small_run, tiny_data, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(small_run, folder)
    (folder / "result.json").unlink()
    capsys.readouterr()
    go_on(folder, tiny_data)
    assert_same(what_is_left(folder), what_is_left(small_run))
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    before = json.loads((small_run / "result.json").read_text())
    for key in ("source_correct", "target_correct", "source_accuracy", "target_accuracy", "seconds"):
        assert said[key] == before[key]


def test_the_result_keeps_the_command_that_started_the_run(half_run, tiny_data):
    """The table of results names the command of a run: `--resume` alone would tell nobody what was run."""
    go_on(half_run, tiny_data)
    command = json.loads((half_run / "result.json").read_text())["command"]
    assert "--network quick" in command, command


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
def test_other_settings_are_refused_and_named(half_run, tiny_data, arguments, told):
    before = {path: path.read_bytes() for path in half_run.iterdir() if path.is_file()}
    with pytest.raises(UserError) as refused:
        start("--resume", half_run, *arguments, "--data-dir", tiny_data)
    words = re.findall(r"[\w.-]+", str(refused.value).replace(str(half_run), ""))
    assert not [word for word in told if word not in words], str(refused.value)
    assert before == {path: path.read_bytes() for path in half_run.iterdir() if path.is_file()}


def test_the_same_settings_may_be_repeated(half_run, tiny_data):
    start("--resume", half_run, *SMALL, "--data-dir", tiny_data, "--device", "cpu")
    assert (half_run / "result.json").exists()


def test_other_data_are_refused(half_run, tiny_data, tmp_path):
    """With other images the rest of the run would be another experiment, and its steps others than were counted."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):  # 37 images in place of 64
        shutil.copy(data / "MNIST/raw" / name.replace("train", "t10k"), data / "MNIST/raw" / name)
    with pytest.raises(UserError, match="data"):
        start("--resume", half_run, "--data-dir", data, "--device", "cpu")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no-such-folder is no run .*python main\.py"):
        start("--resume", tmp_path / "no-such-folder")
    assert not (tmp_path / "no-such-folder").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty is no run"):
        start("--resume", tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_checkpoint_that_is_no_run_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="is no checkpoint of a run"):
        start("--resume", tmp_path)


@pytest.mark.parametrize("key", ["model", "optimizer", "step", "rng", "command", "dry_run"])
def test_a_checkpoint_that_lacks_something_is_refused(small_run, tiny_data, tmp_path, key):
    """Of an earlier version, say: one line that names the file, and no KeyError."""
    state = torch.load(small_run / "last.pt", weights_only=True)
    state.pop(key)
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        go_on(tmp_path, tiny_data)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_run_of_another_version_is_refused(half_run, tiny_data):
    state = torch.load(half_run / "last.pt", weights_only=True)
    state["config"]["a_setting_of_tomorrow"] = 1
    torch.save(state, half_run / "last.pt")
    with pytest.raises(UserError, match=r"another version .*a_setting_of_tomorrow"):
        go_on(half_run, tiny_data)


# --- Ctrl-C -----------------------------------------------------------------------------------------


def test_ctrl_c_of_a_process(tiny_data, tmp_path):
    folder = tmp_path / "run"
    epochs = 20
    settings = ("--network", "quick", "--image-size", 32, "--batch-size", 16, "--epochs", epochs)
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
    assert message.startswith("interrupted at epoch ")
    assert f"--resume {folder}" in message
    assert out == "", "an interrupted run has no result"
    state = torch.load(folder / "last.pt", weights_only=True)
    epoch, step = map(int, re.search(r"epoch (\d+), step (\d+)", message).groups())
    assert (state["epoch"] + 1, state["step"]) == (epoch, step)
    assert 1 < epoch < epochs
    assert not list(folder.glob(".*tmp"))
    assert not (folder / "result.json").exists()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == state["epoch"]

    go_on(folder, tiny_data)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, epochs + 1))
    assert json.loads((folder / "result.json").read_text())["epochs"] == epochs


def test_the_command_in_the_message_goes_on(monkeypatch, tiny_data, tmp_path):
    """Also when the data are not in the default folder, and for a run of few images."""
    folder = tmp_path / "a run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, "train_step", 2, press_ctrl_c)
        with pytest.raises(Interrupted) as interrupted:
            start(*SMALL, *MACHINE, "--data-dir", tiny_data, "--run-dir", folder, "--dry-run")
    command = shlex.split(re.search(r"`python main\.py (.*)`", str(interrupted.value))[1])
    start(*command)
    result = json.loads((folder / "result.json").read_text())
    assert result["dry_run"] is True, "a dry run stays one"
    assert result["epochs"] == 2


def test_a_second_ctrl_c_ends_at_once(monkeypatch, tiny_data, tmp_path, capsys):
    def press_twice():
        press_ctrl_c()
        press_ctrl_c()

    interrupt_after(monkeypatch, "train_step", 2, press_twice)
    arguments = (*SMALL, *MACHINE, "--data-dir", tiny_data, "--run-dir", tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: start(*arguments))
    assert ended.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_finished_run_answers_ctrl_c_as_before(half_run, tiny_data):
    def handler(signum, frame):
        raise AssertionError

    signal.signal(signal.SIGINT, handler)
    go_on(half_run, tiny_data)
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_before_training_is_one_line(monkeypatch, tiny_data, tmp_path, capsys):
    def interrupted_reading(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)  # the signal ends it

    monkeypatch.setattr(main, "load_pair", interrupted_reading)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: start(*SMALL, "--data-dir", tiny_data, "--run-dir", tmp_path / "run"))
    assert ended.value.code == 130
    assert capsys.readouterr().err.splitlines() == ["interrupted"]
    assert not (tmp_path / "run").exists()
