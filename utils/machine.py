"""What the machine is and can do: device, precision, versions, commit."""

import argparse
import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from utils.cli import UserError

IMPORTED = time.perf_counter()
DEVICES = ("auto", "cpu", "cuda", "mps")


def add_device_argument(parser: argparse._ActionsContainer) -> None:
    """Give an argument parser or group the flag `--device`."""
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="auto: CUDA, MPS or CPU (default: %(default)s)"
    )


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA, Apple's MPS or the CPU. Raises UserError when it isn't there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(key for key, available in there.items() if available)
    if not there[name]:
        raise UserError(
            f"--device {name}: this machine has none that torch {torch.__version__} can use; try --device cpu"
        )
    return torch.device(name)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware; elsewhere bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # Private names, for want of public ones; a torch without them gets fp32, which is always right.
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False


def choose_precision(name: str, device: torch.device) -> str:
    """ "fp32" or "bf16"; "auto" is bf16 where the hardware has it."""
    if name != "auto":
        return name
    return "bf16" if has_bf16(device) else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context in which forward passes run at `precision`."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def check_compiler(device: torch.device) -> None:
    """Raise UserError when torch.compile would find no C++ compiler for a CPU, or compile for each λ_p anew."""
    names = (os.environ.get("CXX") or "g++", "c++", "clang++")
    if device.type == "cpu" and not any(map(shutil.which, names)):
        raise UserError(f"--compile needs a C++ compiler on the CPU ({', '.join(names)}): install one, or leave it out")
    if torch.__version__ < "2.13":
        raise UserError(f"--compile needs torch 2.13, here is {torch.__version__}: update it, or leave --compile out")


def prepare(device: torch.device) -> None:
    """Have the device compute as fast as it can: on CUDA with TF32 products in fp32 and the fastest convolutions.

    Note: TF32 keeps 10 of 23 bits of a product's factors; sums stay in fp32.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    keep_memory(device)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given, before its time is taken."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def keep_memory(device: torch.device, keep: bool = True) -> None:
    """On a CPU, have the C library keep freed memory for the next step, where that is glibc; else nothing happens.

    By default it gives every large tensor back to the system, which has to clear its pages anew: with `dann` that is a
    fifth of a step on a CPU. `keep=False` is the state that a program reaches by itself.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # malloc.h
        mallopt(mmap_threshold, 32 * 2**20)
        mallopt(mmap_max, 0 if keep else 65536)
        mallopt(trim_threshold, 2**31 - 1 if keep else 64 * 2**20)


def describe(device: torch.device) -> str:
    """The device in words: "AMD EPYC, 2 cores" or "NVIDIA H100"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores" + (", MPS" if device.type == "mps" else "")


def seconds_since_start() -> float:
    """How long this process has been running; where the system does not tell, since torch was imported."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.perf_counter() - IMPORTED
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])  # field 22, starttime
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    import numpy

    # torch's is a class of its own, which a checkpoint must not hold
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": numpy.__version__}


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def commit() -> str:
    """The checked-out commit, with "+" when tracked files were changed; "unknown" outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+" if changed else "")


def script() -> list[str]:
    """The script or module that this process runs, in the words that a person would type after `python`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.origin == sys.argv[0]:
        return ["-m", spec.name]
    return [os.path.relpath(sys.argv[0])]


def command_line() -> str:
    """The command that started this process, as a person would type it."""
    return shlex.join(["python", *script(), *sys.argv[1:]])


def session(device: torch.device, precision: str, compiled: bool, processes: int) -> dict:
    """What a run, or the rest of one, was made with: command, machine and versions."""
    return {
        "command": command_line(),
        "device": device.type,
        "machine": describe(device),
        "precision": precision,
        "compile": compiled,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "commit": commit(),
        "versions": versions(),
    }


def header(device: torch.device, precision: str) -> str:
    """The line that tells what the numbers below it were made with."""
    return f"python {platform.python_version()}, torch {torch.__version__}, {describe(device)}, {precision}"
