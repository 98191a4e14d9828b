"""Give every reader thousands of damaged files: each is read, or refused in one line, in time and within memory.

A file is damaged by cutting it, flipping bits, overwriting, repeating or dropping parts, huge numbers where a size may
stand, or something else altogether under its name; what is packed is damaged inside, too. Where a checksum guards the
content, what is read must be what was written.
"""

import argparse
import bz2
import contextlib
import gzip
import io
import json
import multiprocessing
import os
import random
import re
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat
from tqdm import tqdm

from data_loader import CLASS_NAMES, Preprocessing
from digits.domains import load_domain
from methods.classifier import load_classifier, usage
from methods.networks import build_network
from methods.recipes import Config
from methods.run import read_state
from tools.figure_data import ALWAYS, read_records
from utils import machine, pretrained
from utils.checkpoint import save_checkpoint, save_weights
from utils.cli import UserError, run_script, say, script_parser
from utils.files import add_to_json, checksum, make_folder
from utils.pictures import open_picture, pages_in

CPU = torch.device("cpu")
ABOUT = usage(Config(precision="fp32"), Preprocessing(32), CLASS_NAMES, {})  # beside the weights
SECONDS, MEGABYTES = 10.0, 1024  # that one file may take
HUGE = (2**31 - 1, 2**32 - 1, 2**30, 2**24, 0, 10**9)
OTHERS = (
    b"", b"\0", b"{}", b"[]", b"null", b'"text"', b"0 1:0\n", b"PK\x05\x06" + bytes(18), b"\x1f\x8b" + bytes(20),
    b"\x89PNG\r\n", b"<html>404</html>", bz2.compress(b""), gzip.compress(b""),
    b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R.",  # a pickle that would run a program
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """How a kind of file is made and read.

    Args:
        path: of the file that is damaged.
        write: makes it and its companions in a folder.
        read: reads it from there, and returns what it holds.
        packed: gzip or bz2, whose content is damaged, too.
        guarded: a checksum guards the content: what is read must be what was written.
    """

    path: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]
    packed: object = None
    guarded: bool = False


def damage(data: bytes, rng: random.Random) -> bytes:
    """Other bytes than these, mostly nearly the same."""
    kind = rng.randrange(8)
    if kind == 0 or not data:
        return rng.choice(OTHERS)
    at = rng.randrange(min(len(data), 64) if rng.random() < 0.5 else len(data))  # headers, half of the time
    length = rng.randrange(1, max(2, min(len(data) - at, 1 + int(2 ** rng.uniform(0, 10)))))
    changed = bytearray(data)
    if kind == 1:
        return data[:at]
    if kind == 2:
        for _ in range(rng.randrange(1, 9)):
            changed[min(at + rng.randrange(64), len(data) - 1)] ^= 1 << rng.randrange(8)
    elif kind == 3:
        changed[at : at + length] = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    elif kind == 4:
        del changed[at : at + length]
    elif kind == 5:
        changed[at:at] = changed[at : at + length] * rng.randrange(1, 4)
    elif kind == 6:
        changed[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(HUGE))
    else:
        number = str(rng.choice((-1, 0, 10**6, 10**12, 10**400, float("nan"), 1e-320))).encode()
        written = list(re.finditer(rb"\d+", data[:4096]))
        first, last = rng.choice(written).span() if written else (at, at + len(number))
        changed[first:last] = number
    return bytes(changed)


def damaged(reader: Reader, data: bytes, rng: random.Random) -> bytes:
    """The file, damaged outside or inside."""
    if reader.packed and rng.random() < 0.6:
        inside = damage(reader.packed.decompress(data), rng)  # type: ignore[attr-defined]
        return bytes(reader.packed.compress(inside))  # type: ignore[attr-defined]
    return damage(data, rng)


def digits(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def idx(values: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_mnist(folder: Path, pack: Callable[[bytes], bytes] = bytes, end: str = "") -> None:
    (folder / f"t10k-images-idx3-ubyte{end}").write_bytes(pack(idx(digits((12, 28, 28)))))
    (folder / f"t10k-labels-idx1-ubyte{end}").write_bytes(pack(idx(np.arange(12, dtype=np.uint8) % 10)))


def write_svhn(folder: Path) -> None:
    savemat(folder / "test_32x32.mat", {"X": digits((32, 32, 3, 12)), "y": (np.arange(12) % 10 + 1)[:, None]})


def write_usps(folder: Path) -> None:
    rows = (" ".join(f"{i + 1}:{v / 127.5 - 1:.3f}" for i, v in enumerate(row)) for row in digits((12, 256)))
    text = "".join(f"{label % 10 + 1} {row}\n" for label, row in enumerate(rows))
    (folder / "usps.t.bz2").write_bytes(bz2.compress(text.encode()))


def write_picture(folder: Path, kind: str, **options: object) -> None:
    picture = Image.fromarray(digits((60, 80, 3)).repeat(2, 1))
    picture.save(folder / f"picture.{kind.lower()}", kind, **options)


def read_picture(folder: Path) -> None:
    path = next(folder.glob("picture.*"))
    for page in pages_in(path):
        open_picture(path, page=page)


def state() -> dict:
    torch.manual_seed(0)
    names = ("config", "data", "steps_per_epoch", "dry_run", "sessions", "epoch", "step", "sums", "seconds")
    return {
        **{name: {} for name in names}, "records": [], "skipped": [],
        "use": ABOUT,
        "train_seconds": 1.0, "teacher": None, "optimizer": {}, "rng": [],
        "model": build_network("small").state_dict(),
    }  # fmt: skip


def write_weights(folder: Path) -> None:
    save_weights(folder / "model.safetensors", build_network("small").state_dict(), ABOUT)


def write_index(folder: Path) -> None:
    write_weights(folder)
    entry = {"file": "model.safetensors", "sha256": checksum(folder / "model.safetensors", "sha256"), "url": None}
    (folder / "index.json").write_text(json.dumps({"default": "small", "weights": {"small": entry}}))


def read_by_index(folder: Path) -> object:
    with patch.object(pretrained, "PRETRAINED", folder):
        return load_classifier(None, CPU, allow_download=False).model.state_dict()


def write_records(folder: Path) -> None:
    lines = (json.dumps({"epoch": i} | dict.fromkeys(ALWAYS[1:], 1 / i)) for i in range(1, 9))
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def of_domain(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        found = load_domain(name, "test", folder)
        return found.images, found.labels

    return read


READERS = {
    "idx images": Reader("t10k-images-idx3-ubyte", write_mnist, of_domain("mnist")),
    "idx labels": Reader("t10k-labels-idx1-ubyte", write_mnist, of_domain("mnist")),
    "idx.gz": Reader(
        "t10k-images-idx3-ubyte.gz", lambda folder: write_mnist(folder, gzip.compress, ".gz"), of_domain("mnist"), gzip
    ),
    "mat": Reader("test_32x32.mat", write_svhn, of_domain("svhn")),
    "libsvm bz2": Reader("usps.t.bz2", write_usps, of_domain("usps"), bz2),
    "mnist-m npz": Reader(
        "mnist_m_test.npz",
        lambda folder: np.savez_compressed(
            folder / "mnist_m_test.npz", images=digits((12, 32, 32, 3)), labels=np.arange(12) % 10
        ),
        of_domain("mnist-m"),
    ),
    "png": Reader("picture.png", lambda folder: write_picture(folder, "PNG"), read_picture),
    "jpeg": Reader("picture.jpeg", lambda folder: write_picture(folder, "JPEG"), read_picture),
    "tiff": Reader("picture.tiff", lambda folder: write_picture(folder, "TIFF", compression="tiff_lzw"), read_picture),
    "gif": Reader("picture.gif", lambda folder: write_picture(folder, "GIF"), read_picture),
    "webp": Reader("picture.webp", lambda folder: write_picture(folder, "WEBP"), read_picture),
    "bmp": Reader("picture.bmp", lambda folder: write_picture(folder, "BMP"), read_picture),
    "safetensors": Reader(
        "model.safetensors", write_weights,
        lambda folder: load_classifier(str(folder / "model.safetensors"), CPU, False),
    ),
    "weights by index.json": Reader("model.safetensors", write_index, read_by_index, guarded=True),
    "index.json": Reader("index.json", write_index, read_by_index, guarded=True),
    "last.pt": Reader(
        "last.pt", lambda folder: save_checkpoint(folder / "last.pt", state()), read_state, guarded=True
    ),
    "weights of last.pt": Reader(
        "last.pt", lambda folder: save_checkpoint(folder / "last.pt", state()),
        lambda folder: load_classifier(str(folder / "last.pt"), CPU, False),
    ),
    "metrics.jsonl": Reader(
        "metrics.jsonl", write_records, lambda folder: read_records(folder / "metrics.jsonl", "train again")
    ),
}  # fmt: skip


def same(a: object, b: object) -> bool:
    """Whether nested values hold the same bits."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def work(name: str, seed: int, numbers: range, answers: Connection) -> None:
    """Read damaged files, one after the other; send number and outcome of each."""
    reader = READERS[name]
    sys.stdout = sys.stderr = io.StringIO()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders in C write there
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        reader.write(folder)
        path = folder / reader.path
        data, expected = path.read_bytes(), reader.read(folder)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in numbers:
            path.write_bytes(damaged(reader, data, random.Random(f"{name} {seed} {number}")))
            answers.send((number, None, None))
            began, outcome = time.monotonic(), "read"
            try:
                value = reader.read(folder)
                if reader.guarded and not same(value, expected):
                    outcome = "wrong content is taken for right"
            except UserError as error:
                outcome = "refused" if str(error).strip() and len(str(error)) < 600 else f"no short line: {error}"
            except BaseException:
                outcome = traceback.format_exc()
            if (seconds := time.monotonic() - began) > SECONDS:
                outcome = f"{seconds:.1f} s"
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if memory - most > MEGABYTES * 1024:
                outcome, most = f"{(memory - most) / 1024:.0f} MB", memory
            answers.send((number, outcome, None if outcome in ("read", "refused") else path.read_bytes()))
    answers.close()


def fuzz(name: str, seed: int, count: int, keep: Path) -> tuple[Counter, int]:
    """The outcomes of so many damaged files, and how many of them are faults; those are kept in a folder."""
    outcomes: Counter[str] = Counter()
    faults, first = 0, 0
    context = multiprocessing.get_context("fork")
    while first < count:
        answers, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(name, seed, range(first, count), theirs), daemon=True)
        process.start()
        theirs.close()
        number, outcome, data = first, "no answer", None
        with contextlib.suppress(EOFError):
            while answers.poll(SECONDS + 5):
                number, outcome, data = answers.recv()
                if outcome is None:
                    outcome = "the process died"
                    continue
                first = number + 1
                if outcome in ("read", "refused"):
                    outcomes[outcome] += 1
                    continue
                faults += 1
                say(f"{name}, file {number}: {outcome}")
                make_folder(keep)
                (keep / f"{name.replace(' ', '-')}-{number}").write_bytes(data)
        process.kill()
        process.join()
        if first <= number and first < count:  # it hung or died over this one
            say(f"{name}, file {number}: {outcome if process.exitcode != -9 else f'no answer in {SECONDS:.0f} s'}")
            faults, first = faults + 1, number + 1
    return outcomes, faults


def main() -> None:
    parser = script_parser(
        description=__doc__,
        epilog="examples:\n"
        "  python -m tools.fuzz                       about two minutes\n"
        "  python -m tools.fuzz --files 100 --readers png last.pt\n"
        "  python -m tools.fuzz --record results/reliability.json",
    )
    parser.add_argument("--files", type=int, default=2000, metavar="N", help="for each reader (default: %(default)s)")
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=list(READERS), metavar="NAME",
                        help=f"any of: {', '.join(READERS)} (default: all)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), metavar="DIR",
                        help="where files go that show a fault (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="write the counts into this JSON file, under `damaged files`"
    )
    args: argparse.Namespace = parser.parse_args()
    counts, faults = {}, 0
    for name in tqdm(args.readers, "readers", disable=None):
        outcomes, found = fuzz(name, args.seed, args.files, args.keep)
        counts[name], faults = {**dict(outcomes), "faults": found}, faults + found
        print(f"{name:24s} {outcomes['refused']:6d} refused {outcomes['read']:6d} read {found:4d} faults", flush=True)
    if args.record:
        about = {"machine": machine.describe(torch.device("cpu")), "commit": machine.commit(), "seed": args.seed}
        about |= {"files_a_reader": args.files, "readers": counts}
        add_to_json(args.record, {"kind": "reliability", "damaged files": about})
    if faults:
        raise UserError(f"{faults} of the damaged files show a fault: they are in {args.keep}")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    run_script(main)
