"""What every script does alike: one clear line for a user's mistake, and the exit codes.

Exit codes: 0 done, 1 failed (one line on stderr), 2 usage (argparse), 130 interrupted by Ctrl-C, 143 by SIGTERM, 129 by
SIGHUP.
"""

import argparse
import contextlib
import errno
import functools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from tqdm import tqdm


class UserError(Exception):
    """A mistake or a fault that the user can fix: one line that says what is wrong and how to fix it."""


INTERRUPTED = 128 + signal.SIGINT  # exit code, as shells give it
HANG_UP = getattr(signal, "SIGHUP", None)  # not on Windows


class Interrupted(Exception):
    """Ctrl-C or another request to stop, after everything worth keeping was written; the message says where."""

    def __init__(self, message: str, exit_code: int = INTERRUPTED):
        super().__init__(message)
        self.exit_code = exit_code


def script_parser(description: str, epilog: str) -> argparse.ArgumentParser:
    """An argument parser as every script has it: examples keep their lines, and no flag may be abbreviated."""
    return argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def is_first_process() -> bool:
    """Whether this is the one of several processes (`torchrun`) that speaks for all, or a lone one."""
    return os.environ.get("RANK", "0") == "0"


def started_by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def say(text: str = "") -> None:
    """Print a line for people: stderr, so that stdout ends with the result alone. Of several processes one speaks."""
    if is_first_process():
        tqdm.write(text, sys.stderr)  # above a progress bar, where there is one


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names with commas, of many the first ones."""
    return ", ".join(names[:most]) + f", … ({len(names)} in all)" * (len(names) > most)


say_once = functools.cache(say)


class StopRequest:
    """Whether somebody has asked the process to stop, and with which exit code it then ends."""

    made = False
    exit_code = INTERRUPTED


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into a request to stop; a second one ends at once.

    Schedulers send SIGTERM before they kill. A terminal that goes away sends SIGHUP; it is written to no more.
    """
    request, terminals = StopRequest(), [file.fileno() for file in (sys.stdout, sys.stderr) if file.isatty()]

    def note(number: int, frame: FrameType | None) -> None:
        request.made = True
        if not started_by_torchrun():  # which passes Ctrl-C on to its processes as SIGTERM
            request.exit_code = 128 + number
        if number == HANG_UP:
            _discard_output(*terminals)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    signals = [number for number in (signal.SIGINT, signal.SIGTERM, HANG_UP) if number is not None]
    heeded = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]  # as by nohup
    previous = {number: signal.signal(number, note) for number in heeded}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main function and turn what the user can fix into one line and an exit code."""
    try:
        try:
            main()
            sys.stdout.flush()
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            _discard_output(sys.stdout.fileno())
            raise UserError(f"{error.strerror}: free some and run it again") from None
        except (MemoryError, RuntimeError) as error:  # torch's are of the latter kind
            if not (isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error))):
                raise
            raise UserError("out of memory: end other programs, or train with a smaller --batch-size") from None
    except (UserError, Interrupted, KeyboardInterrupt, BrokenPipeError) as error:
        if isinstance(error, BrokenPipeError):  # `... | head` closed the pipe: nobody reads on
            _discard_output(sys.stdout.fileno())
            raise SystemExit(1) from None
        interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
        code = getattr(error, "exit_code", INTERRUPTED) if interrupted else 1
        text = " ".join(str(error).split()) or "interrupted"
        if is_first_process() or not interrupted:
            print(text if interrupted else f"error: {text}", file=sys.stderr)
        raise SystemExit(code) from None


def _discard_output(*files: int) -> None:
    """Let what is still to be printed go nowhere, so that closing these files can't fail once more."""
    for file in files:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file)
