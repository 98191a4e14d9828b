"""Download a file so that its final name never holds anything but the bytes that its checksum names."""

import contextlib
import http.client
import os
import queue
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from utils.cli import NO_SPACE, Interrupted, UserError, say
from utils.files import checksum as checksum_of
from utils.files import locked

SILENCE_SECONDS = 25.0  # without one byte, over all addresses: a missing network is said within 30 s
TIMEOUT_SECONDS = 10.0  # of one address without an answer or the next byte; less where there are many
RETRIES = 3  # of an address whose connection broke off midway
PAUSE_SECONDS = 0.5  # before the first of them; twice as long before each later one
MOST_BYTES = 4 << 30  # of a file; who sends more does not send ours
CHUNK_BYTES = 1 << 18
USER_AGENT = "dann-pytorch/1.0"  # some sites refuse urllib's own name


class _Fault(Exception):
    """What one address did wrong, in a few words."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https, from https to https alone."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """See the base class."""
        if urlsplit(newurl).scheme not in (("https",) if req.type == "https" else ("http", "https")):
            raise urllib.error.URLError(f"it redirects to {urlsplit(newurl).scheme}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(urls: Sequence[str], path: Path, checksum: str, again: str = "the same command") -> None:
    """Make `path` hold the file with this checksum, from the first of the addresses that delivers it.

    The bytes are collected in `<path>.part`, which a later call resumes. A file with another checksum is
    removed and the next address tried. A `path` with the right checksum is left alone, any other is replaced.

    Args:
        urls: http or https addresses of the same file, tried in turn.
        path: the file's final name; its folder is made.
        checksum: `md5:…` or `sha256:…`, hexadecimal.
        again: the command that the messages ask the user to run again.

    Raises:
        UserError: no address delivered the file, or the disk did not take it.
        Interrupted: Ctrl-C; what came so far is kept.
    """
    try:
        with _file_faults(path, again):
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.parent, lambda: say(f"waiting for another download into {path.parent} to end")):
                # Looked at behind the lock: the process that held it may have fetched this very file.
                if not (path.exists() and _has_checksum(path, checksum)):
                    _try_addresses(urls, path, checksum, again)
    except KeyboardInterrupt:
        part = _part(path)
        kept = f"{_size(part):,} bytes are kept in {part}, " if _size(part) else ""
        raise Interrupted(f"interrupted: {kept}run {again} again{', it resumes' if kept else ''}") from None


def _try_addresses(urls: Sequence[str], path: Path, checksum: str, again: str) -> None:
    """Try the addresses in turn, and one that breaks off midway several times."""
    part = _part(path)
    faults: dict[str, str] = {}
    # After the last byte one address may stall, and each of them may then give no answer.
    seconds = min(TIMEOUT_SECONDS, SILENCE_SECONDS / (len(urls) + 1))
    for url in urls:
        host = urlsplit(url).netloc
        for attempt in range(1 + RETRIES):
            kept_bytes = _size(part)
            try:
                _receive(url, part, path.name, seconds)
            except _Fault as fault:
                faults[host] = str(fault)
                if _size(part) == kept_bytes:
                    break
                time.sleep(PAUSE_SECONDS * 2**attempt)
                continue
            if _has_checksum(part, checksum):
                os.replace(part, path)
                return
            part.unlink()
            faults[host] = "sent a file with another checksum"
            if not kept_bytes:
                break
            # Else the bytes kept from before may be the wrong ones: this address again, from the start.

    reasons = "; ".join(f"{host}: {text}" for host, text in faults.items())
    if kept_bytes := _size(part):
        fix = f"{kept_bytes:,} bytes are kept in {part}, run {again} again, it resumes"
    else:
        fix = f"check the network and run {again} again, or copy the file to {path} by hand"
    raise UserError(f"cannot download {path.name} ({reasons}): {fix}")


def _receive(url: str, part: Path, title: str, seconds: float) -> None:
    """Add to the partial file what it lacks; raises _Fault, with the bytes so far kept."""
    offset = _size(part)
    headers = {"User-Agent": USER_AGENT} | ({"Range": f"bytes={offset}-"} if offset else {})
    try:
        response = _open(url, headers, seconds)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and offset:
            return  # nothing lies beyond the bytes we have: they are the file, or wrong, as the checksum shows
        raise _Fault(f"HTTP {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _Fault(_reason(error)) from None

    with response:
        start = offset if response.status == 206 else 0  # else the server ignores ranges
        end = None if response.length is None else start + response.length
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(desc=title, total=end, initial=start, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while chunk := _read(response):
                file.write(chunk)
                file.flush()  # so that a process that is killed keeps them too
                bar.update(len(chunk))
                if file.tell() > MOST_BYTES:
                    part.unlink()
                    raise _Fault(f"it sent more than {MOST_BYTES:,} bytes")
    if end is not None and _size(part) < end:
        raise _Fault("the connection broke off")


def _open(url: str, headers: dict[str, str], seconds: float) -> http.client.HTTPResponse:
    """Send the request; all of it, redirects too, may take this many seconds.

    In a thread, because looking up a name heeds no timeout and a socket's timeout begins anew at each byte.
    """
    answers: queue.SimpleQueue[http.client.HTTPResponse | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            opener = urllib.request.build_opener(_Redirects)
            answers.put(opener.open(urllib.request.Request(url, headers=headers), timeout=seconds))
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


def _read(response: http.client.HTTPResponse) -> bytes:
    """What has arrived, b"" at the end; network errors leave as _Fault, so that an OSError is the disk's."""
    try:
        return response.read1(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _Fault(_reason(error)) from None


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
        if error.errno in NO_SPACE:
            with contextlib.suppress(OSError):
                _part(path).unlink()
            raise UserError(f"no space left for {path}: free some and run {again} again") from None
        raise UserError(
            f"cannot use {path} ({error.strerror}): fix its folder's permissions or choose another folder"
        ) from None


def _has_checksum(path: Path, checksum: str) -> bool:
    algorithm, _, expected = checksum.partition(":")
    return checksum_of(path, algorithm) == expected.lower()


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
