"""Two processes that train as one give the numbers of one, write once, and go on after an interruption."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from utils.cli import UserError
from utils.distributed import JoinedBatchNorm, Processes, join, join_batch_norms

ROOT = Path(__file__).resolve().parent.parent
MACHINE = ("--device", "cpu", "--precision", "fp32", "--no-download", "--threads", "1")
# Batch norm, one domain after the other, augmentation and AdamW; and reversal after a warm start, without batch norm.
BATCH_NORMED = (
    "--network", "quick", "--image-size", "32", "--normalisation", "per-image", "--separate-domains",
    "--augmentation", "affine", "--dropout", "0", "--epochs", "2", "--batch-size", "16",
)  # fmt: skip
WARM = (
    "--recipe", "cnn-grl", "--dropout", "0", "--warm-start-epochs", "1", "--epochs", "1", "--batch-size", "16",
    "--lr", "0.05",
)  # fmt: skip
# A teacher with aligned labels, class-wise reversal, two views.
TAUGHT = (
    "--recipe", "modern", "--optimizer", "sgd", "--lr", "0.002", "--confidence", "0.1", "--epochs", "2",
    "--epoch-steps", "3", "--batch-size", "16",
)  # fmt: skip

# In double precision, where rounding is nothing, and on images without flat areas: there the values that a maximum is
# taken of are equal, and rounding decides to which pixel its gradient goes.
DOUBLE = """
import sys, torch
sys.path.insert(0, {root!r})
import main
from utils.mean_teacher import MeanTeacher

label = MeanTeacher.label


def label_uneven(self, weak, strong, *moves):
    slope = torch.linspace(0, 1e-6, strong[0].numel()).view_as(strong[0])
    return label(self, weak, strong + slope, *moves)


MeanTeacher.label = label_uneven
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
main.run_script(main.main)
"""

STOPPED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import main
step, steps = main.Trainer.train_step, []
def stop_one_process(*arguments):
    steps.append(1)
    if len(steps) == 6 and os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGTERM)
    return step(*arguments)
main.Trainer.train_step = stop_one_process
main.run_script(main.main)
"""

# The threads of gloo go on only while their process waits for them: they still hold its last tensor when it ends.
IDLE_THREADS = """
import contextlib, os, sys
sys.path.insert(0, {root!r})
import main
any_process = main.distributed.Processes.any
def with_idle_threads(self, flag):
    cpus = sorted(os.sched_getaffinity(0))
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended since
            os.sched_setaffinity(int(thread), cpus[self.rank % len(cpus) :][:1])
            with open(f"/proc/self/task/{{thread}}/comm") as name:
                if "gloo" in name.read():
                    os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
    return any_process(self, flag)
main.distributed.Processes.any = with_idle_threads
main.run_script(main.main)
"""


def launch(processes: int, *arguments, script="main.py") -> subprocess.CompletedProcess:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(script), *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def train(processes: int, folder: Path, data: Path, *arguments, script="main.py") -> subprocess.CompletedProcess:
    return launch(processes, *arguments, *MACHINE, "--data-dir", data, "--run-dir", folder, script=script)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two(tiny_data, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The folder and the output of an uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("two") / "run"
    done = train(2, folder, tiny_data, *BATCH_NORMED)
    assert done.returncode == 0, done.stderr
    return folder, done


def assert_alike(one: Path, other: Path, rel=2e-4, rtol=2e-3, atol=2e-4) -> None:
    """The same losses in every epoch and the same weights; without bounds of its own to the rounding of fp32."""
    keys = ("epoch", "p", "lambda_p", "learning_rate", "loss_label", "loss_domain", "domain_accuracy")
    keys += ("loss_teacher", "teacher_share")
    for ours, theirs in zip(metrics(one), metrics(other), strict=True):
        for key in keys:
            close = ours[key] is None if theirs[key] is None else ours[key] == pytest.approx(theirs[key], rel=rel)
            assert close, (key, ours[key], theirs[key])
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=rtol, atol=atol, msg=name)


def test_two_processes_give_the_losses_of_one(two, tiny_data, tmp_path):
    done = train(1, tmp_path / "one", tiny_data, *BATCH_NORMED)
    assert done.returncode == 0, done.stderr
    assert_alike(two[0], tmp_path / "one")


@pytest.mark.parametrize("settings", [WARM, TAUGHT], ids=["warm start", "teacher"])
def test_two_processes_adapt_like_one(settings, tiny_data, tmp_path):
    script = tmp_path / "double.py"
    script.write_text(DOUBLE.format(root=str(ROOT)))
    for processes in (1, 2):
        done = train(processes, tmp_path / str(processes), tiny_data, *settings, script=script)
        assert done.returncode == 0, done.stderr
    assert_alike(tmp_path / "2", tmp_path / "1", rel=1e-9, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sets the scheduling of threads as Linux does")
def test_processes_end_in_order_though_the_threads_of_gloo_lag(tiny_data, tmp_path):
    script = tmp_path / "idle_threads.py"
    script.write_text(IDLE_THREADS.format(root=str(ROOT)))
    for attempt in range(2):  # the fault that this would find shows up in two of three
        done = train(2, tmp_path / str(attempt), tiny_data, *BATCH_NORMED, "--dry-run", script=script)
        assert done.returncode == 0, done.stderr


def test_one_process_writes_and_speaks_and_the_result_says_how_many(two):
    folder, done = two
    assert [record["epoch"] for record in metrics(folder)] == [1, 2]
    assert len(list((folder / "tensorboard").glob("*tfevents*"))) == 1
    result = json.loads((folder / "result.json").read_text())
    assert result["processes"] == 2
    assert json.loads(done.stdout.splitlines()[-1])["processes"] == 2
    assert done.stdout.count("correct / total") == 1
    assert done.stderr.count("parameters:") == 1
    assert "1 threads in each of 2 processes" in done.stderr
    assert done.stderr.count("epoch   2/2") == 1


def test_interrupted_and_resumed_two_process_run_ends_with_the_same_bits(two, tiny_data, tmp_path):
    """One of the two processes is told to stop within the second epoch; both do, at the same step."""
    script, folder = tmp_path / "stopped.py", tmp_path / "run"
    script.write_text(STOPPED.format(root=str(ROOT)))
    done = train(2, folder, tiny_data, *BATCH_NORMED, script=script)
    assert done.returncode != 0
    assert f"torchrun --nproc_per_node=2 {os.path.relpath(script, ROOT)} --resume {folder}" in done.stderr
    assert not (folder / "result.json").exists()
    state = torch.load(folder / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 2)

    refused = launch(1, "--resume", folder, "--data-dir", tiny_data, "--no-download", "--device", "cpu")
    assert refused.returncode == 1
    assert "was trained by 2 processes, not 1" in refused.stderr
    assert "Traceback" not in refused.stderr

    options = ("--data-dir", tiny_data, "--no-download", "--device", "cpu", "--threads", "1")
    done = launch(2, "--resume", folder, *options)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "result.json").read_text())["processes"] == 2
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, two[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [r["loss_label"] for r in metrics(folder)] == [r["loss_label"] for r in metrics(two[0])]


def test_batch_that_cannot_be_split_is_refused(tiny_data, tmp_path):
    done = train(2, tmp_path / "run", tiny_data, *BATCH_NORMED[:-1], "15")
    assert done.returncode == 1
    assert "error: --batch-size 15 can't be split between 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_lone_process_needs_nobody():
    with join(torch.device("cpu")) as processes:
        assert processes == Processes(0, 1)
        assert processes.writes
        assert processes.share(10) == slice(0, 10)
        assert processes.any(True) is True
        assert processes.any(False) is False
        assert processes.gather("state") == ["state"]
        assert processes.first_alone(lambda: 3) == 3
        values = torch.ones(3)
        assert processes.mean_(values) is values


def test_shares_are_the_batch():
    parts = [list(range(12))[Processes(rank, 3).share(12)] for rank in range(3)]
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_processes_that_share_no_device_are_refused(monkeypatch):
    for key, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match="--device cpu"), join(torch.device("mps")):
        pass


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for key, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="this machine has 1 GPUs"), join(torch.device("cuda")):
        pass


def test_joined_batch_norm_of_one_process_is_batch_norm(tmp_path):
    """In a group of one the joined statistics are the ordinary ones: outputs, gradients, running values, eval mode."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.LazyLinear(4), nn.BatchNorm1d(4))
    x = torch.randn(6, 3, 8, 8) * 3 + 1
    plain(x)
    joined = copy.deepcopy(plain)
    join_batch_norms(joined)
    assert sum(isinstance(layer, JoinedBatchNorm) for layer in joined) == 2
    assert joined.state_dict().keys() == plain.state_dict().keys()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for model in (plain, joined):
            model.zero_grad()
            model(x).square().sum().add(model(x)[0].sum()).backward()
        for (name, ours), theirs in zip(joined.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)
        torch.testing.assert_close(joined.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(joined.eval()(x), plain.eval()(x))
    finally:
        torch.distributed.destroy_process_group()
