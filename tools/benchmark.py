"""Measure how fast training and testing are, against the machine's own ceiling and the usual way to write them.

Everything that is compared is measured in one process, in turn (A B C A B C …), so that a machine that slows down slows
all of them; the figures are medians, and beside each stand the slowest and the fastest round.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from data_loader import DigitSet, PairedLoader, spread_over
from digits.domains import Pair
from main import make_objective, set_up, step
from methods.recipes import RECIPES, Config, recipe_config
from methods.run import Run
from methods.schedules import learning_rate, reversal_weight
from tools.usual_way import UsualWay
from utils import machine
from utils.cli import UserError, run_script, say, script_parser
from utils.distributed import ALONE
from utils.files import write_json
from valid import evaluate
from watch.operations import operations, operations_of_step
from watch.watcher import LOG_EVERY_STEPS

ROOT = Path(__file__).resolve().parent.parent
IMAGES = 12_800  # random images of each domain: what they show makes no difference to the time
# `modern` has no usual way: its augmentation and its teacher are our own.
WITH_USUAL_WAY = tuple(name for name in RECIPES if not recipe_config(name).modern)
SECTIONS = ("speed", "start", "memory", "accuracy")
FULL_SIZES = {"svhn": (73_257, 26_032), "mnist": (60_000, 10_000)}


def random_digits(domain: str, shape: tuple[int, ...], seed: int) -> DigitSet:
    """Noise in the shape of a domain. Shape: -> images (IMAGES, *shape) uint8, labels (IMAGES,)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (IMAGES, *shape), generator=generator, dtype=torch.uint8)
    return DigitSet(domain, "train", images, torch.arange(IMAGES) % 10, domain, {})


@dataclasses.dataclass
class Job:
    """Something to measure: `run(steps)` does it and returns how much it did, in `unit`."""

    name: str
    unit: str
    run: Callable[[int], float]
    about: dict
    prepared: bool = True  # whether the device is prepared as by main.py; in the usual way it is left as it was


def prepare(device: torch.device, prepared: bool) -> None:
    """Set the device as main.py does, or as torch has it by itself."""
    if prepared:
        machine.prepare(device)
        return
    machine.keep_memory(device, False)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = False


def timed(job: Job, steps: int, device: torch.device) -> tuple[float, float]:
    """How much a job did in so many steps, and in how many seconds."""
    machine.synchronise(device)
    started = time.perf_counter()
    amount = job.run(steps)
    machine.synchronise(device)
    return amount, time.perf_counter() - started


def measure(jobs: list[Job], rounds: int, turn_seconds: float, device: torch.device) -> list[dict]:
    """All jobs in turn, `rounds` times after one that isn't counted; rates in units a second.

    A turn has as many steps as fill its seconds. Half as many come before it and aren't counted: they use up what the
    loaders' workers have prepared while others had their turn, and bring the memory to where it stays.
    """
    rates: dict[str, list[float]] = {job.name: [] for job in jobs}
    steps: dict[str, int] = {}
    for number in range(rounds + 1):
        for job in jobs:
            prepare(device, job.prepared)
            if not number:
                timed(job, 1, device)
                steps[job.name] = max(2, round(2 * turn_seconds / timed(job, 2, device)[1]))
                continue
            timed(job, steps[job.name] // 2, device)
            amount, seconds = timed(job, steps[job.name], device)
            rates[job.name].append(amount / seconds)
        say(f"round {number} of {rounds} done" + (" (warm-up, not counted)" if not number else ""))
    records = []
    for job in jobs:
        values = rates[job.name]
        rate = {"median": statistics.median(values), "slowest": min(values), "fastest": max(values)}
        records.append({"name": job.name, "unit": job.unit, **rate, "steps_a_turn": steps[job.name], **job.about})
        say(f"{job.name:44} {rate['median']:10,.1f} {job.unit}  ({min(values):,.1f} … {max(values):,.1f})")
    return records


def ceiling_jobs(device: torch.device, precisions: list[str]) -> list[Job]:
    """Large matrix products at each precision, and a copy from memory to memory.

    None of bf16 unless it is asked for: a CPU without the instructions takes minutes for one.
    """
    size = 8192 if device.type == "cuda" else 2048
    jobs = []
    for precision in precisions:
        kind = torch.bfloat16 if precision == "bf16" else torch.float32
        a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
        times = 4 if precision == "bf16" else 2

        def product(steps: int, a: Tensor = a, b: Tensor = b, times: int = times) -> float:
            for _ in range(steps * times):
                a @ b
            return steps * times * 2 * size**3 / 1e9

        jobs.append(Job(f"matrix product {precision}", "GFLOP/s", product, {"precision": precision, "size": size}))
    x = torch.zeros(2**26, device=device)
    y = torch.zeros_like(x)

    def copy(steps: int) -> float:
        for _ in range(steps):
            y.copy_(x)
        return steps * 2 * x.nbytes / 1e9

    return [*jobs, Job("copy, read and written", "GB/s", copy, {"bytes": x.nbytes})]


def train(
    run: Run, config: Config, loader: PairedLoader, objective: nn.Module, device: torch.device, steps: int
) -> float:
    """So many steps of an epoch as `main.train` does them; returns how many images they saw.

    Its tests and checkpoints, which come between epochs, are left out, and so is what it writes into the log.
    """
    run.step, loader.steps = 0, steps
    run.model.train()
    for x_s, y_s, x_t in loader.epoch(run.epoch):
        p = run.step / (config.epochs * steps)
        lambda_p, mu_p = reversal_weight(config, p), learning_rate(config, p, run.step)
        with machine.autocast(device, config.precision):
            losses, others = objective(x_s, y_s, x_t, lambda_p)
        step(run, config, losses, mu_p)
        values = ALONE.means(losses | others)
        if device.type == "cpu" or run.step % LOG_EVERY_STEPS == 0:  # when a watcher looks, which waits for the device
            run.check_losses({name: value.item() for name, value in values.items()})
        run.count_step(values)
    return steps * 2 * config.batch_size


def recipe_jobs(config: Config, source: DigitSet, target: DigitSet, device: torch.device, compiled: bool) -> list[Job]:
    """Training by the objective, the step and the loader of main.py, and inference by the very function of valid.py."""
    pair = Pair(source, source.images, target.images, source, target, {}, {})
    run, loader, classifier = set_up(config, pair, Path("unused"), False, compiled, device, ALONE)
    run.epoch = config.warm_start_epochs
    objective = make_objective(run, config, loader.labels_s)
    if compiled:
        objective.compile()
    images = spread_over(source, 2000)

    def inference(steps: int) -> float:
        for _ in range(steps):
            evaluate(classifier, images)
        return steps * len(images)

    name = f"{config.recipe} {config.precision}" + (", compiled" if compiled else "")
    about = {"recipe": config.recipe, "precision": config.precision, "compiled": compiled, "way": "this project"}
    about |= {"parameters": sum(w.numel() for w in run.model.parameters()), "batch_size": config.batch_size}
    parts = operations(config)
    counts = {
        "training": operations_of_step(config) / (2 * config.batch_size),
        "inference": parts["extractor"] + parts["classifier"],
    }
    jobs: dict[str, Callable[[int], float]] = {
        "training": lambda steps: train(run, config, loader, objective, device, steps),
        "inference": inference,
    }
    return [
        Job(f"{kind} {name}", "images/s", do, {"kind": kind, "operations_per_image": counts[kind], **about})
        for kind, do in jobs.items()
        if not (compiled and kind == "inference")
    ]


def usual_jobs(config: Config, source: DigitSet, target: DigitSet, device: torch.device) -> list[Job]:
    """The same network, batch, device and optimiser in the way such scripts are usually written."""
    usual = UsualWay(config, source, target, device)
    about = {"recipe": config.recipe, "precision": "fp32", "compiled": False, "way": "usual"}
    about |= {"batch_size": config.batch_size}
    jobs: dict[str, Callable[[int], float]] = {
        "training": usual.train,
        "inference": lambda steps: usual.test(4 * steps),
    }
    return [
        Job(f"{kind} {config.recipe} fp32, the usual way", "images/s", run, {"kind": kind, **about}, False)
        for kind, run in jobs.items()
    ]


def speed(args: argparse.Namespace, device: torch.device) -> dict:
    """Rates of everything, in turn, and the share of the ceiling that training reaches."""
    jobs = ceiling_jobs(device, args.precisions)
    sets = (random_digits("svhn", (3, 32, 32), 1), random_digits("mnist", (1, 28, 28), 2))
    for recipe in args.recipes:
        config = recipe_config(recipe)
        for precision in args.precisions:
            own = dataclasses.replace(config, precision=precision)
            jobs += recipe_jobs(own, *sets, device, False)
            if args.compile:
                jobs += recipe_jobs(own, *sets, device, True)
        jobs += usual_jobs(config, *sets, device)
    records = measure(jobs, args.rounds, args.seconds, device)
    ceilings = {r["precision"]: r["median"] for r in records if r["name"].startswith("matrix product")}
    usual = {(r["recipe"], r["kind"]): r["median"] for r in records if r.get("way") == "usual"}
    for record in records:
        if record.get("way") == "this project":
            record["times_the_usual_way"] = record["median"] / usual[record["recipe"], record["kind"]]
            gflops = record["median"] * record["operations_per_image"] / 1e9
            record["gflop_per_second"] = gflops
            record["share_of_ceiling"] = gflops / ceilings[record["precision"]]
    out = {"rounds": args.rounds, "seconds_a_turn": args.seconds, "rates": records}
    if device.type == "cuda":
        out["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return out


@contextlib.contextmanager
def running(arguments: list[str]) -> Iterator[tuple[subprocess.Popen, IO[str]]]:
    """A script of ours in a process of its own with what it prints, killed at the end if it still runs."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield process, process.stdout
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def seconds_until(arguments: list[str], pattern: str) -> tuple[float, str]:
    """Time from the start of a script to the first line that matches, and that line."""
    started = time.perf_counter()
    lines = []
    with running(arguments) as (_, printed):
        for line in printed:
            lines.append(line.strip())
            if re.search(pattern, line):
                return time.perf_counter() - started, line.strip()
    raise UserError(f"`python {shlex.join(arguments)}` ended without a line like {pattern!r}: {' / '.join(lines[-3:])}")


def start(args: argparse.Namespace, device: torch.device) -> dict:
    """From `python main.py` to the end of its first step, and from `python valid.py` to its table; warm files."""
    out: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        options = ["--data-dir", str(args.data_dir), "--no-download", "--device", device.type]
        train = ["main.py", *options, "--run-dir", f"{folder}/run"]
        test = ["valid.py", *options, "--domains", "mnist"]
        scripts = {"main.py to its first step": (train, r"^first step "), "valid.py to its table": (test, r"^MNIST ")}
        for name, (arguments, pattern) in scripts.items():
            values = [seconds_until(arguments, pattern)[0] for _ in range(args.rounds + 1)][1:]
            out[name] = {"median": statistics.median(values), "slowest": max(values), "fastest": min(values)}
            say(f"{name:44} {out[name]['median']:10.1f} s  ({min(values):.1f} … {max(values):.1f})")
    for name, module in (("importing torch", "torch"), ("importing main.py and all it needs", "main")):
        code = f"import {module}; print('there')"
        values = [seconds_until(["-c", code], "^there")[0] for _ in range(args.rounds + 1)][1:]
        out["of it"] = out.get("of it", {}) | {name: statistics.median(values)}
    return out


def write_full_size_data(folder: Path) -> None:
    """Noise in the official formats and sizes of SVHN and MNIST."""
    import gzip

    import numpy as np
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    for name, count in zip(("train", "test"), FULL_SIZES["svhn"], strict=True):
        images = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        savemat(folder / f"{name}_32x32.mat", {"X": images, "y": rng.integers(1, 11, (count, 1)).astype(np.uint8)})
    (folder / "MNIST/raw").mkdir(parents=True)
    for name, count in zip(("train", "t10k"), FULL_SIZES["mnist"], strict=True):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            header = bytes((0, 0, 8, len(shape))) + b"".join(size.to_bytes(4, "big") for size in shape)
            body = rng.integers(0, 256 if len(shape) > 1 else 10, shape, dtype=np.uint8).tobytes()
            with gzip.open(folder / f"MNIST/raw/{name}-{kind}-ubyte.gz", "wb", compresslevel=1) as file:
                file.write(header + body)


def peak_memory(pid: int) -> int:
    """Peak resident memory of a running process since its start, bytes; 0 when it has just ended. Linux only."""
    # Not getrusage: what it tells of a child includes the memory of its parent.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0


def memory(args: argparse.Namespace, device: torch.device) -> dict:
    """Peak memory of `python main.py` on sets of full size, from its start to some seconds of training."""
    if not Path("/proc/self/status").exists():
        raise UserError("peak memory is measured on Linux alone: leave `memory` out of --sections")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        write_full_size_data(data)
        arguments = ["main.py", "--data-dir", str(data), "--no-download", "--device", device.type]
        arguments += ["--run-dir", f"{folder}/run"]
        with running(arguments) as (process, printed):
            for line in printed:
                if line.startswith("first step "):
                    break
            else:
                raise UserError("`python main.py` ended before its first step on data of full size")
            time.sleep(20)
            process.send_signal(signal.SIGINT)  # it writes its checkpoint, which takes memory too
            peak = 0
            while process.poll() is None:
                peak = max(peak, peak_memory(process.pid))
                time.sleep(0.02)
    if process.returncode != 130:
        raise UserError(f"`python main.py` ended with code {process.returncode} on data of full size")
    say(f"{'peak memory of main.py, full-size sets':44} {peak / 1e9:10.2f} GB")
    return {"peak_bytes": peak, "images": {name: sum(counts) for name, counts in FULL_SIZES.items()}}


def accuracy(args: argparse.Namespace, device: torch.device) -> dict:
    """Seconds from the first step until the test on the target reaches an accuracy, after an epoch of `quick`."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["main.py", "--recipe", "quick", "--device", device.type, "--run-dir", f"{folder}/run"]
        with running(arguments) as (process, printed):
            lines = printed.read().splitlines()
            if process.wait():
                raise UserError(f"`python {shlex.join(arguments)}` failed: {lines[-1] if lines else ''}")
        records = [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]
    reached = next((r["seconds"] for r in records if r["target_accuracy"] >= args.target_accuracy), None)
    text = "never" if reached is None else f"{reached:.1f} s"
    say(f"quick reaches {args.target_accuracy:.0%} on its target after {text}")
    return {"recipe": "quick", "target_accuracy": args.target_accuracy, "seconds": reached}


def parse_arguments() -> argparse.Namespace:
    parser = script_parser(
        description="Measure images per second, start, memory and time to an accuracy on this machine.",
        epilog="examples:\n"
        "  python -m tools.benchmark --recipes quick --rounds 3\n"
        "  python -m tools.benchmark --json results/benchmark/NAME.json",
    )
    option = parser.add_argument
    option("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to measure (default: all)")
    option("--recipes", nargs="+", choices=WITH_USUAL_WAY, default=list(WITH_USUAL_WAY), help="(default: all)")
    option(
        "--precisions", nargs="+", choices=("fp32", "bf16"), help="(default: fp32, and bf16 where the device has it)"
    )
    option("--compile", action="store_true", help="measure the compiled step too")
    option("--rounds", type=int, default=3, metavar="N", help="rounds, after one to warm up (default: %(default)s)")
    option("--seconds", type=float, default=4, metavar="X", help="of each job in a round (default: %(default)s)")
    option("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    option("--target-accuracy", type=float, default=0.7, metavar="X", help="in [0, 1] (default: %(default)s)")
    option("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="for `start` (default: %(default)s)")
    option("--json", type=Path, metavar="FILE", help="write the figures there")
    machine.add_device_argument(parser)
    args = parser.parse_args()
    for name in ("rounds", "seconds", "threads"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} must be above 0, not {value}")
    args.data_dir = args.data_dir.resolve()
    return args


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = machine.choose_device(args.device)
    args.precisions = args.precisions or (["fp32", "bf16"] if machine.has_bf16(device) else ["fp32"])
    say(f"{machine.header(device, ' and '.join(args.precisions))}, {torch.get_num_threads()} threads")
    record = {
        "kind": "benchmark",
        "machine": machine.describe(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "command": machine.command_line(),
        "commit": machine.commit(),
        "versions": machine.versions(),
    }
    sections = {"speed": speed, "start": start, "memory": memory, "accuracy": accuracy}
    for name in args.sections:
        record[name] = sections[name](args, device)
        if args.json:
            write_json(args.json, record)
    print(json.dumps(record))


if __name__ == "__main__":
    run_script(main)
