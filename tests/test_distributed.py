"""Several processes that train as one give the numbers of one, write once, and go on after an interruption."""

import copy
import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT, records_of, result_of, run_as_process, state_of, weights_of
from torch import nn

import main
from methods.networks import build_network
from utils.cli import UserError
from utils.distributed import JoinedBatchNorm, Processes, join, join_batch_norms

CPU = torch.device("cpu")
# Three recipes: batch norm, one domain after the other, augmentation and AdamW; reversal after a warm start, without
# batch norm; a teacher with aligned labels, class-wise reversal, two views.
MACHINE, BATCH_NORMED, WARM, TAUGHT = (
    words.split()
    for words in (
        "--device cpu --precision fp32 --no-download --threads 1",
        "--recipe system-a --network small --normalisation per-image --augmentation affine --dropout 0 --epochs 2 "
        "--batch-size 16",
        "--recipe cnn-grl --dropout 0 --warm-start-epochs 1 --epochs 1 --batch-size 16 --lr 0.05",
        "--recipe modern --optimizer sgd --lr 0.002 --confidence 0.1 --epochs 2 --epoch-steps 3 --batch-size 16",
    )
)
FROZEN = [*WARM, "--warm-start-epochs", "0"]  # convolutions, from the first step on

# Starts processes as torchrun does, but they are forks of one that has imported what takes seconds to import; and they
# draw no figures.
LAUNCHER = """
import itertools, json, os, signal, socket, sys
import torch, torch.utils.flop_counter, torchvision.utils
torch.set_num_threads(1)
import main
from watch.board import Board
Board.compare = Board.show_features = Board.show_predictions = lambda *_: None
for line in sys.stdin:
    job, children = json.loads(line), []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(job["processes"]):
        if child := os.fork():
            children.append(child)
            continue
        signal.alarm(100)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{job['folder']}/{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(job["folder"])
        if job["processes"] > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["processes"])}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
        sys.argv = ["main.py", *job["arguments"]]
        exec(job["code"])
        main.run_script(main.main)
        sys.exit()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""

# In double precision, where rounding is nothing, and on images without flat areas: there the values that a maximum is
# taken of are equal, and rounding decides to which pixel its gradient goes.
DOUBLE = """
from methods.modern import ModernObjective
pseudo_labels = ModernObjective.pseudo_labels
def of_uneven_images(self, x_t, weak_t):
    return pseudo_labels(self, x_t + torch.linspace(0, 1e-6, x_t[0].numel()).view_as(x_t[0]), weak_t)
ModernObjective.pseudo_labels = of_uneven_images
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
"""

STOPPED = """
step, numbers = main.step, itertools.count(1)
def stop_one_process(*arguments):
    if next(numbers) == 6 and os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGTERM)
    return step(*arguments)
main.step = stop_one_process
"""

# The threads of gloo go on only while their process waits for them: they still hold its last tensor when it ends.
IDLE_THREADS = """
import contextlib
any_process = main.Processes.any
def with_idle_threads(self, flag):
    cpus = sorted(os.sched_getaffinity(0))
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended since
            os.sched_setaffinity(int(thread), cpus[self.rank % len(cpus) :][:1])
            with open(f"/proc/self/task/{thread}/comm") as name:
                if "gloo" in name.read():
                    os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
    return any_process(self, flag)
main.Processes.any = with_idle_threads
"""

CLOCKS_THAT_DIFFER = """
import methods.options
class Clock(methods.options.datetime):
    @classmethod
    def now(cls):
        return cls(2030, 1, 1, 0, 0, 10 + rank)
methods.options.datetime = Clock
"""

JOINED = """
from utils.distributed import JoinedBatchNorm, join
def normalise():
    with join(torch.device("cpu")) as processes:
        given = torch.load("given.pt")
        layer = JoinedBatchNorm(4)
        layer.load_state_dict(given["state"])
        x = given["x"][processes.part(len(given["x"]))].requires_grad_()
        y = layer(x)
        (y * given["weights"][processes.part(len(given["x"]))]).sum().backward()
        found = {"y": y.detach(), "x.grad": x.grad, "state": layer.state_dict()}
        found["grads"] = [processes.mean_(value.grad.clone()) for value in layer.parameters()]
        torch.save(found, f"found{rank}.pt")
main.main = normalise
"""


@pytest.fixture(scope="module")
def launch(tiny_data, tmp_path_factory):
    """Run main.py in several processes, after some code in each, which must end alike; returns what they said."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip

    def run(processes, *arguments, code="", folder=None, ends=0):
        folder = folder or tmp_path_factory.mktemp("launched")
        arguments = [*map(str, (*arguments, *MACHINE, "--data-dir", tiny_data))]
        job = {"processes": processes, "arguments": arguments, "code": code, "folder": str(folder)}
        print(json.dumps(job), file=launcher.stdin, flush=True)
        codes = json.loads(launcher.stdout.readline())
        said = "".join((folder / f"{rank}.err").read_text() for rank in range(processes))
        assert codes == [ends] * processes, said
        return said

    yield run
    launcher.stdin.close()
    launcher.stdout.close()
    assert launcher.wait(timeout=30) == 0


@pytest.fixture(scope="module")
def two(tiny_data, tmp_path_factory):
    """The folder and the output of an uninterrupted run of two processes, which torchrun has started."""
    folder = tmp_path_factory.mktemp("two") / "run"
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main.py", *BATCH_NORMED, *MACHINE)
    done = run_as_process(*words, "--data-dir", tiny_data, "--run-dir", folder, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done


def assert_alike(one, other, rel, rtol, atol):
    """The same losses in every epoch and the same weights."""
    keys = {"epoch", "p", "lambda_p", "learning_rate", "loss_label", "loss_domain", "domain_accuracy"}
    keys |= {"loss_teacher", "teacher_share"}
    for ours, theirs in zip(records_of(one), records_of(other), strict=True):
        assert ours.keys() == theirs.keys()
        for key in keys & ours.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=rel), key
    torch.testing.assert_close(weights_of(one), weights_of(other), rtol=rtol, atol=atol)


def test_two_processes_give_the_losses_of_one(two, launch, tmp_path):
    launch(1, *BATCH_NORMED, "--run-dir", tmp_path / "one")
    assert_alike(two[0], tmp_path / "one", rel=2e-4, rtol=2e-3, atol=2e-4)  # the rounding of fp32


@pytest.mark.parametrize("settings", [WARM, FROZEN, TAUGHT], ids=["warm start", "frozen from the start", "teacher"])
def test_two_processes_adapt_like_one(settings, launch, tmp_path):
    for processes in (1, 2):
        launch(processes, *settings, "--run-dir", tmp_path / str(processes), code=DOUBLE)
    assert_alike(tmp_path / "2", tmp_path / "1", rel=1e-9, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sets the scheduling of threads as Linux does")
def test_processes_end_in_order_though_the_threads_of_gloo_lag(launch, tmp_path):
    for attempt in range(2):  # the fault that this would find shows up in two of three
        launch(2, *BATCH_NORMED, "--dry-run", "--run-dir", tmp_path / str(attempt), code=IDLE_THREADS)


def test_one_process_writes_and_speaks_and_the_result_says_how_many(two):
    folder, done = two
    assert [record["epoch"] for record in records_of(folder)] == [1, 2]
    assert len(list((folder / "tensorboard").glob("*tfevents*"))) == 1
    result = result_of(folder)
    assert (result["processes"], result["threads"]) == (2, 1)
    assert json.loads(done.stdout.splitlines()[-1])["processes"] == 2
    assert done.stdout.count("correct / total") == 1
    for words in ("parameters:", "1 thread in each of 2 processes", "epoch   2/2"):
        assert done.stderr.count(words) == 1


def test_an_interrupted_run_of_two_processes_goes_on_to_the_same_bits(two, launch, tmp_path):
    """One of the two processes is told to stop within the second epoch; both do, at the same step."""
    folder = tmp_path / "run"
    command = "torchrun --nproc_per_node=2 main.py --resume"
    assert f"{command} {folder}" in launch(2, *BATCH_NORMED, "--run-dir", folder, code=STOPPED, ends=130)
    assert not (folder / "result.json").exists()
    state = state_of(folder)
    assert (state["epoch"], state["step"]) == (1, 2)

    said = launch(1, "--resume", folder, ends=1)
    assert f"`{command}" in said
    assert "Traceback" not in said

    launch(2, "--resume", folder)
    torch.testing.assert_close(weights_of(folder), weights_of(two[0]), rtol=0, atol=0)
    assert [r["loss_label"] for r in records_of(folder)] == [r["loss_label"] for r in records_of(two[0])]


def test_processes_whose_clocks_differ_share_a_folder(launch, tmp_path):
    """Without --run-dir its name has the time: that of the process that writes."""
    launch(2, *BATCH_NORMED, "--dry-run", code=CLOCKS_THAT_DIFFER, folder=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("20300101-000010")
    assert (folder / "result.json").exists()


def test_a_batch_that_cannot_be_split_is_refused(monkeypatch, fail, tiny_data, tmp_path):
    monkeypatch.setattr(main.distributed, "join", lambda device: nullcontext(Processes(0, 2)))
    arguments = (*BATCH_NORMED[:-1], "15", "--data-dir", tiny_data, "--run-dir", tmp_path / "run", "--device", "cpu")
    assert "--batch-size 15" in fail(main, *arguments)
    assert not (tmp_path / "run").exists()


def test_a_lone_process_needs_nobody():
    with join(CPU) as processes:
        assert processes == Processes(0, 1)
        assert processes.writes
        assert processes.part(10) == slice(0, 10)
        assert (processes.any(True), processes.any(False)) == (True, False)
        assert processes.gather("state") == ["state"]
        assert processes.from_first("name") == "name"
        assert processes.first_alone(lambda: 3) == 3
        assert processes.mean_(torch.ones(3)).tolist() == [1, 1, 1]


def test_parts_are_the_batch():
    assert [list(range(6))[Processes(rank, 3).part(6)] for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(("device", "told"), [("mps", "--device cpu"), ("cuda", "1 GPU")])
def test_processes_that_can_share_no_device_are_refused(monkeypatch, device, told):
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=told), join(torch.device(device)):
        pass


@pytest.mark.parametrize(
    ("mean", "deviation", "tolerance"),
    [(1.0, 3.0, 1e-5), (1e4, 1e-2, 0.15)],  # fp32 rounds the latter's means by up to a tenth of the deviation
    ids=["ordinary", "large mean, tiny variance"],
)
def test_joined_batch_norm_is_that_of_the_joined_batch(launch, tmp_path, mean, deviation, tolerance):
    """Against torch's in float64: outputs, gradients, running values."""
    torch.manual_seed(0)
    x, weights = torch.randn(2, 12, 4, 5, 5)
    x = x * deviation + mean
    layer = nn.BatchNorm2d(4)
    nn.init.uniform_(layer.weight, 0.5, 1)
    nn.init.uniform_(layer.bias, -1, 1)
    torch.save({"x": x, "weights": weights, "state": layer.state_dict()}, tmp_path / "given.pt")
    launch(2, code=JOINED, folder=tmp_path)

    layer, x = layer.double(), x.double().requires_grad_()
    y = layer(x)
    (y * weights).sum().backward()
    found = [torch.load(tmp_path / f"found{rank}.pt") for rank in range(2)]
    for key, expected in (("y", y), ("x.grad", x.grad * deviation)):
        ours = torch.cat([part[key] for part in found]).double() * (deviation if key == "x.grad" else 1)
        torch.testing.assert_close(ours, expected.detach(), rtol=0, atol=tolerance)
    for part in found:
        for ours, parameter in zip(part["grads"], layer.parameters(), strict=True):
            torch.testing.assert_close(2 * ours.double(), parameter.grad, rtol=tolerance, atol=100 * tolerance)
        for name, value in layer.state_dict().items():
            torch.testing.assert_close(part["state"][name].to(value), value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("device", "kind"), [("cpu", JoinedBatchNorm), ("cuda", nn.SyncBatchNorm)])
def test_every_batch_norm_is_joined_and_keeps_what_it_had(device, kind):
    model = build_network("small")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            nn.init.uniform_(module.weight)
    joined = copy.deepcopy(model)
    join_batch_norms(joined, torch.device(device))
    kinds = [type(module) for module in joined.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert kinds == [kind] * 4
    torch.testing.assert_close(joined.state_dict(), model.state_dict(), rtol=0, atol=0)
    x = torch.rand(6, 3, 32, 32)
    torch.testing.assert_close(joined.eval()(x), model.eval()(x))
