"""Download a file so that its final name never holds anything but the bytes that its checksum names."""

import contextlib
import errno
import hashlib
import http.client
import os
import queue
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from utils.cli import Interrupted, UserError

try:
    import fcntl
except ImportError:  # Windows, which does not let a file that another process holds open be renamed
    fcntl = None

SILENCE_SECONDS = 25.0  # without one byte, over all addresses: a missing network is said within 30 s
RETRIES = 3  # of an address whose connection broke off midway
CHUNK_BYTES = 1 << 18
USER_AGENT = "dann-pytorch/1.0"  # some sites refuse urllib's own name


class _Fault(Exception):
    """What one address did wrong, in a few words, and how many bytes it sent before."""

    def __init__(self, text: str, received_bytes: int = 0):
        super().__init__(text)
        self.received_bytes = received_bytes


class _Patience:
    """The seconds that may still pass without a byte; every byte fills them up again."""

    def __init__(self):
        self.heard()

    def heard(self) -> None:
        self.since = time.monotonic()

    def left_seconds(self) -> float:
        return max(0.1, self.since + SILENCE_SECONDS - time.monotonic())


def download(
    urls: Sequence[str],
    path: Path,
    checksum: str,
    timeout_seconds: float = 10.0,
    progress: bool = True,
    again: str = "the same command",
) -> None:
    """Make `path` hold the file with this checksum, from the first of the addresses that delivers it.

    The bytes are collected in `<path>.part`, which a later call resumes. A file with another checksum is
    removed and the next address tried. A `path` with the right checksum is left alone, any other is replaced.

    Args:
        urls: addresses of the same file, tried in turn.
        path: the file's final name; its folder is made.
        checksum: `md5:…` or `sha256:…`, hexadecimal.
        timeout_seconds: the longest wait for an answer or the next byte; less where many addresses are left.
        progress: show a progress bar, where stderr is a terminal.
        again: the command that the messages tell the user to run again.

    Raises:
        UserError: no address delivered the file, or the disk did not take it.
        Interrupted: Ctrl-C; what came so far is kept.
    """
    part = _part(path)
    try:
        with _file_faults(path, again):
            path.parent.mkdir(parents=True, exist_ok=True)
        with _folder_lock(path.parent):
            # Looked at behind the lock: the process that held it may have fetched this very file.
            with _file_faults(path, again):
                if path.exists() and _has_checksum(path, checksum):
                    return
            _try_addresses(urls, path, checksum, timeout_seconds, progress, again)
    except KeyboardInterrupt:
        kept = f"{_size(part):,} bytes are kept in {part}, " if _size(part) else ""
        raise Interrupted(f"interrupted: {kept}run {again} again{', it resumes' if kept else ''}") from None


def _try_addresses(urls, path: Path, checksum: str, timeout_seconds, progress, again) -> None:
    """Try the addresses in turn, and one that breaks off midway several times."""
    part = _part(path)
    faults = {}
    patience = _Patience()
    for number, url in enumerate(urls):
        host = url.partition("://")[2].partition("/")[0]
        for _ in range(1 + RETRIES):
            # Each address left gets its share of the patience, or the last one would never be tried.
            seconds = min(timeout_seconds, patience.left_seconds() / (len(urls) - number))
            kept_bytes = _size(part)
            try:
                _receive(url, path, seconds, patience, progress, again)
            except _Fault as fault:
                faults[host] = str(fault)
                if fault.received_bytes:
                    continue
                break
            with _file_faults(path, again):
                if _has_checksum(part, checksum):
                    os.replace(part, path)
                    return
                part.unlink(missing_ok=True)
            faults[host] = "sent a file with another checksum"
            if not kept_bytes:
                break
            # Else the bytes kept from before may be the wrong ones: this address again, from the start.

    said = "; ".join(f"{host}: {text}" for host, text in faults.items())
    if kept_bytes := _size(part):
        mend = f"{kept_bytes:,} bytes are kept in {part}, run {again} again, it resumes"
    else:
        mend = f"check the network and run {again} again, or copy the file to {path} by hand"
    raise UserError(f"cannot download {path.name} ({said}): {mend}")


def _receive(url: str, path: Path, seconds: float, patience: _Patience, progress: bool, again: str) -> None:
    """Add to the partial file what it lacks; raises _Fault, with the bytes so far kept."""
    part = _part(path)
    offset = _size(part)
    headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        response = _open(url, headers, seconds)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and offset:
            return  # nothing lies beyond the bytes we have: the file or wrong ones, as the checksum tells
        raise _Fault(f"HTTP {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _Fault(_reason(error)) from None

    with response:
        resumes = response.status == 206
        if resumes and not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            raise _Fault("sent another range of the file than was asked for")
        start = offset if resumes else 0
        length = response.length  # None where the server does not say
        received = 0
        with (
            _file_faults(path, again),
            part.open("ab" if resumes else "wb") as file,
            tqdm(
                desc=path.name, total=None if length is None else start + length, initial=start,
                unit="B", unit_scale=True, disable=None if progress else True,
            ) as bar,
        ):  # fmt: skip
            while chunk := _read(response, received):
                file.write(chunk)
                file.flush()  # so that a process that is killed keeps them too
                received += len(chunk)
                patience.heard()
                bar.update(len(chunk))
        if length is not None and received < length:
            raise _Fault("the connection broke off", received)


def _open(url: str, headers: dict[str, str], seconds: float) -> http.client.HTTPResponse:
    """Send the request; all of it, redirects too, may take this many seconds.

    In a thread, because looking up a name heeds no timeout and a socket's timeout begins anew at each byte.
    """
    answers = queue.SimpleQueue()

    def ask() -> None:
        try:
            if urlsplit(url).scheme not in ("http", "https"):
                raise ValueError("not an http or https address")
            request = urllib.request.Request(url, headers=headers)
            answers.put(urllib.request.urlopen(request, timeout=seconds))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _read(response: http.client.HTTPResponse, received_bytes: int) -> bytes:
    """What has arrived, b"" at the end; network errors leave as _Fault, so that an OSError is the disk's."""
    try:
        return response.read1(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _Fault(_reason(error), received_bytes) from None


def _reason(error: BaseException) -> str:
    """What a network error means, in a few words."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return _reason(error.reason)
    if isinstance(error, TimeoutError):
        return "no answer"
    if isinstance(error, socket.gaierror):
        return "name not found"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection broke off"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


@contextlib.contextmanager
def _file_faults(path: Path, again: str) -> Iterator[None]:
    """Turn what the file system refuses into a UserError; when it is full, remove the partial file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            with contextlib.suppress(OSError):
                _part(path).unlink()
            raise UserError(f"no space left for {path}: free some and run {again} again") from None
        raise UserError(
            f"cannot use {path} ({error.strerror}): mend its folder's permissions or choose another folder"
        ) from None


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Let one process at a time download into a folder: two that append to one .part would spoil it."""
    descriptor = None
    try:
        # Some file systems know no locks, and some folders may be written but not read: go on without.
        with contextlib.suppress(OSError):
            if fcntl is not None:
                descriptor = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    print(f"waiting for another download into {folder} to end", file=sys.stderr)
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _has_checksum(path: Path, checksum: str) -> bool:
    algorithm, _, expected = checksum.partition(":")
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest() == expected.lower()


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
