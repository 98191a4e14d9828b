"""Files are written to a temporary name and renamed: none that is half written ever bears its final name."""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from utils.cli import UserError

if sys.platform != "win32":  # which does not let a file that another process holds open be renamed
    import fcntl

WRITE_ERRORS = (OSError, RuntimeError)  # torch.save wraps what the file system says in the latter


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary file beside `path`, then rename it; raises UserError when that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except WRITE_ERRORS as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160]
        raise UserError(f"cannot write {path} ({reason}): free some space, or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: Path, value: object) -> None:
    """Write JSON for people to read: indented, a newline at the end."""
    write_atomically(path, lambda file: file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n"))


def add_to_json(path: Path, values: dict) -> None:
    """Put values into the object of a JSON file, which is made where it is missing."""
    known = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, known | values)


def checksum(path: Path, algorithm: str) -> str:
    """The checksum of a file's bytes, "md5" or "sha256", in hexadecimal; raises OSError when it cannot be read."""
    value = hashlib.new(algorithm)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            value.update(chunk)
    return value.hexdigest()


def make_folder(path: Path) -> None:
    """Create a folder and its parents; raises UserError when it can't be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to the folder {path} ({error.strerror}): choose another one") from None


@contextlib.contextmanager
def locked(folder: Path, taken: Callable[[], None]) -> Iterator[None]:
    """Let one process at a time write into a folder. While another one does, `taken` is called once, then we wait."""
    descriptor = None
    try:
        # Some file systems know no locks, and some folders may be written to but not listed: go on without.
        with contextlib.suppress(OSError):
            if sys.platform != "win32":
                descriptor = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    taken()
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
