"""Kill training, downloads and reports at random moments, go on, and see that nothing is lost.

A training is killed (SIGKILL) again and again, at any moment or inside the writing of its checkpoint, its log or its
results, and resumed after each. At its end it must have left what an uninterrupted one leaves: the same bits of the
weights, each epoch and each TensorBoard step once. A download must end with the right file, and never show another one
under its name. A page that a report writes must be the old one or the new one.
"""

import argparse
import contextlib
import functools
import hashlib
import http.server
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from methods.run import read_state
from utils import machine
from utils.checkpoint import PREVIOUS
from utils.cli import UserError, run_script, say, script_parser
from utils.files import add_to_json

ROOT = Path(__file__).resolve().parent.parent
MACHINE = ["--device", "cpu", "--threads", "1", "--no-download"]
TRAINING = [
    *("main.py", "--source", "synth", "--target", "optdigits", "--epochs", "6", "--epoch-steps", "8"),
    *("--batch-size", "16", "--precision", "fp32", *MACHINE),
]
MOST_KILLS = 8  # of one training; then it goes on to its end
# Which file a training is about to write when it is killed; "": any moment.
MOMENTS = {"any moment": "", "checkpoint": ".last.pt.*.tmp", "log": "metrics.jsonl", "results": ".model.*.tmp"}
CLOCKS = ("seconds", "images_per_second", "command", "commit", "resumed", "sessions")  # in the names of what may differ
DOWNLOAD = """
import pathlib, sys, utils.download
utils.download.download([sys.argv[1]], pathlib.Path(sys.argv[2]), sys.argv[3])
"""
FILE_BYTES, BYTES_A_SECOND = 8_000_000, 4_000_000


class Fault(Exception):
    """Something that a kill has cost."""


def start(words: list[str], folder: Path = ROOT) -> subprocess.Popen:
    """A command in this Python, its output thrown away."""
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )


def kill_when(process: subprocess.Popen, due: Callable[[], bool], delay: float) -> bool:
    """Kill a process so many seconds after something is due; whether it still ran then."""
    while process.poll() is None and not due():
        time.sleep(0.0005)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay)
    ran = process.poll() is None
    process.kill()
    process.wait()
    return ran


def plain(value: object) -> object:
    """Nested values without those that depend on the clock or on how a run was started."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if not any(word in k for word in CLOCKS)}
    return [plain(v) for v in value] if isinstance(value, list) else value


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves that TensorBoard shows of a run: tag -> steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not any(word in tag for word in CLOCKS)]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def lines_of(folder: Path) -> list:
    """The records of metrics.jsonl; a line that a kill cut short is none."""
    file, records = folder / "metrics.jsonl", []
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def compare(folder: Path, whole: Path) -> None:
    """Raise Fault where a killed run has left something else than an uninterrupted one."""
    weights, expected = (load_file(path / "model.safetensors") for path in (folder, whole))
    differ = [key for key in expected if not torch.equal(weights[key], expected[key])]
    if differ:
        raise Fault(f"{len(differ)} tensors differ")
    for what, read in {"metrics.jsonl": lines_of, "result.json": _result, "TensorBoard": scalars}.items():
        if plain(read(folder)) != plain(read(whole)):
            raise Fault(f"{what} differs")
    if left := [path.name for path in folder.rglob("*.tmp")]:
        say(f"left behind: {', '.join(left)}")


def _result(folder: Path) -> dict:
    value: dict = json.loads((folder / "result.json").read_text())
    return value


def epochs_kept(folder: Path) -> int:
    """Epochs that a killed run goes on from."""
    try:
        return int(read_state(folder)["epoch"])
    except UserError:
        return 0


def soak_training(folder: Path, data_dir: Path, rng: random.Random, most: int, whole: Path, seconds: float) -> Counter:
    """Kill one training up to `most` times; the kills by moment. `seconds`: about what an uninterrupted one takes."""
    kills: Counter[str] = Counter()
    finished = 0
    while not (folder / "result.json").exists():
        resumes = any((folder / name).exists() for name in ("last.pt", PREVIOUS))
        words = ["main.py", "--resume", str(folder), *MACHINE] if resumes else [*TRAINING, "--run-dir", str(folder)]
        process = start([*words, "--data-dir", str(data_dir)])
        if kills.total() >= most:
            if process.wait():
                raise Fault(f"the training could not go on after {dict(kills)}")
            continue
        moment = rng.choice(list(MOMENTS))
        if pattern := MOMENTS[moment]:
            skip, seen = rng.randrange(4), [state_of(folder, pattern)]
            due: Callable[[], bool] = functools.partial(changed, folder, pattern, skip, seen)
            delay = rng.uniform(0, 0.02)
        else:
            due, delay = at_once, rng.uniform(0, seconds)
        if kill_when(process, due, delay):
            kills[moment] += 1
        elif process.returncode:
            raise Fault(f"the training ended with {process.returncode} after {dict(kills)}")
        kept, logged = epochs_kept(folder), len(lines_of(folder))
        if kept < finished or kept < logged - 1:
            raise Fault(f"{max(finished, logged - 1) - kept} finished epochs are lost")
        finished = kept
    compare(folder, whole)
    return kills


def at_once() -> bool:
    """For a kill whose moment is its delay alone."""
    return True


def state_of(folder: Path, pattern: str) -> tuple:
    """What can be seen of a file from outside."""
    with contextlib.suppress(OSError):
        return tuple((path.name, path.stat().st_size) for path in folder.glob(pattern))
    return ()


def changed(folder: Path, pattern: str, skip: int, seen: list) -> bool:
    """Whether a file has changed for the `skip`-th time since the first call."""
    if (now := state_of(folder, pattern)) != seen[-1]:
        seen.append(now)
    return len(seen) > skip + 1


def soak_download(folder: Path, rng: random.Random, kills: int) -> Counter:
    """Kill downloads of a file from a slow server."""
    content = rng.randbytes(FILE_BYTES)
    known = hashlib.sha256(content).hexdigest()
    done: Counter[str] = Counter()
    with served(content) as url:
        for number in itertools.count():
            if done.total() >= kills:
                break
            path = folder / f"download-{number}" / "file"
            while not path.exists():
                process = start(["-c", DOWNLOAD, url, str(path), f"sha256:{known}"])
                if kill_when(process, at_once, rng.uniform(0, 1.5 * FILE_BYTES / BYTES_A_SECOND)):
                    done["download"] += 1
                elif process.returncode:
                    raise Fault(f"the download ended with {process.returncode}")
            if hashlib.sha256(path.read_bytes()).hexdigest() != known:
                raise Fault("a download has left another file under the name of the one asked for")
    return done


@contextlib.contextmanager
def served(content: bytes) -> Iterator[str]:
    """An address on localhost that sends some bytes, not faster than BYTES_A_SECOND, and heeds ranges."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            first = int(self.headers.get("Range", "bytes=0-")[6:-1])
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(content) - first))
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            with contextlib.suppress(OSError):  # whoever asked was killed
                for at in range(first, len(content), 100_000):
                    self.wfile.write(content[at : at + 100_000])
                    time.sleep(100_000 / BYTES_A_SECOND)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/file"
    server.shutdown()


def soak_report(folder: Path, rng: random.Random, kills: int) -> Counter:
    """Kill `python -m tools.report` in a copy of the code, whose pages are out of date."""
    copy = folder / "code"
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    pages = [copy / "README.md", copy / "docs/results.md"]
    fresh = [page.read_text() for page in pages]
    stale = [text.replace(" (n = ", " (of ") for text in fresh]
    began = time.monotonic()
    if start(["-m", "tools.report"], copy).wait():
        raise Fault("the report can't be written")
    seconds, done = time.monotonic() - began, Counter[str]()
    while done.total() < kills:
        for page, text in zip(pages, stale, strict=True):
            page.write_text(text)
        process = start(["-m", "tools.report"], copy)
        done["report"] += kill_when(process, at_once, rng.uniform(0.5 * seconds, seconds))
        if any(page.read_text() not in both for page, both in zip(pages, zip(stale, fresh, strict=True), strict=True)):
            raise Fault("a page is neither the old one nor the new one")
    return done


def soak_memory(folder: Path, data_dir: Path) -> dict:
    """Resident memory and open files of a training of 50 epochs, after the fifth and at the end (Linux)."""
    words = [*TRAINING, "--epochs", "50", "--run-dir", str(folder), "--data-dir", str(data_dir)]
    process, seen = start(words), dict[int, tuple[float, int]]()
    about = Path(f"/proc/{process.pid}")
    while process.poll() is None:
        with contextlib.suppress(OSError, StopIteration):
            line = next(line for line in (about / "status").read_text().splitlines() if line.startswith("VmRSS"))
            seen[len(lines_of(folder))] = int(line.split()[1]) / 1024, len(list((about / "fd").iterdir()))
        time.sleep(0.05)
    (early, files), (late, files_late) = seen[5], seen[49]
    found = {"megabytes_after_5": round(early, 1), "megabytes_after_49": round(late, 1)}
    found |= {"files_after_5": files, "files_after_49": files_late}
    if process.returncode or late > 1.05 * early or files_late > files:
        raise Fault(f"50 epochs take more and more: {found}")
    return found


def main() -> None:
    parser = script_parser(
        description=__doc__,
        epilog="examples:\n"
        "  python -m tools.soak                                      about twenty minutes\n"
        "  python -m tools.soak --kills 5 --downloads 2 --reports 2\n"
        "  python -m tools.soak --record results/reliability.json",
    )
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="of trainings (default: %(default)s)")
    parser.add_argument("--downloads", type=int, default=20, metavar="N", help="killed ones (default: %(default)s)")
    parser.add_argument("--reports", type=int, default=10, metavar="N", help="killed ones (default: %(default)s)")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True,
                        help="look at the memory of 50 epochs, too (default: yes)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: %(default)s)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="write the counts into this JSON file, under `kills`"
    )
    args: argparse.Namespace = parser.parse_args()
    rng, data_dir = random.Random(args.seed), args.data_dir.resolve()
    kills: Counter[str] = Counter()
    trainings, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as name, tqdm(total=args.kills, desc="kills", disable=None) as bar:
        folder = Path(name)
        try:
            whole = folder / "whole"
            for _ in range(2):  # the first one may have to render the data
                shutil.rmtree(whole, ignore_errors=True)
                start_of = time.monotonic()
                if start([*TRAINING, "--run-dir", str(whole), "--data-dir", str(data_dir)]).wait():
                    raise Fault("the training does not even end when it is left alone")
            seconds = time.monotonic() - start_of
            while kills.total() < args.kills:
                trainings += 1
                left = min(MOST_KILLS, args.kills - kills.total())
                here = soak_training(folder / f"killed-{trainings}", data_dir, rng, left, whole, seconds)
                kills += here
                bar.update(here.total())
            memory = soak_memory(folder / "memory", data_dir) if args.memory else {}
            kills += soak_download(folder, rng, args.downloads) + soak_report(folder, rng, args.reports)
        except Fault as fault:
            raise UserError(f"{fault} (seed {args.seed}, after {kills.total()} kills)") from None
    record = {
        "kills": dict(kills), "kills_in_all": kills.total(), "trainings": trainings,
        "lost_epochs": 0, "differing_weights": 0,  # any other number has raised Fault
        "seconds": round(time.monotonic() - began), "seed": args.seed,
        "memory": memory, "machine": machine.describe(torch.device("cpu")), "commit": machine.commit(),
        "versions": machine.versions(),
    }  # fmt: skip
    for moment, count in kills.items():
        print(f"{count:4d} kills: {moment}")
    print(f"{kills.total()} kills, {trainings} trainings, nothing lost, no bit differs")
    if memory:
        print("  ".join(f"{name} {value}" for name, value in memory.items()))
    if args.record:
        add_to_json(args.record, {"kind": "reliability", "kills": record})
        print(f"wrote {args.record}")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    run_script(main)
