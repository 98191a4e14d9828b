"""What every script does alike: one clear line for a user's mistake, and the exit codes.

Exit codes: 0 done, 1 failed (one line on stderr), 2 usage (argparse), 130 interrupted.
"""

import argparse
import contextlib
import errno
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from tqdm import tqdm


class UserError(Exception):
    """A mistake or a fault that the user can fix: one line that says what is wrong and how to fix it."""


class Interrupted(Exception):
    """Ctrl-C, after everything worth keeping was written; the message says where."""


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
    """Whether somebody has asked the process to stop."""

    made = False


@contextlib.contextmanager
def stop_on_ctrl_c() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C into a request to stop; a second one ends at once."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.made = True
        signal.signal(number, signal.default_int_handler)

    # torchrun passes Ctrl-C on to its processes as SIGTERM.
    signals = (signal.SIGINT, signal.SIGTERM) if started_by_torchrun() else (signal.SIGINT,)
    previous = {number: signal.signal(number, note) for number in signals}
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
            _discard_output()
            raise UserError(f"{error.strerror}: free some and run it again") from None
    except (UserError, Interrupted, KeyboardInterrupt, BrokenPipeError) as error:
        if isinstance(error, BrokenPipeError):  # `... | head` closed the pipe: nobody reads on
            _discard_output()
            raise SystemExit(1) from None
        interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
        text = " ".join(str(error).split()) or "interrupted"
        if interrupted and not is_first_process():
            raise SystemExit(130) from None
        print(text if interrupted else f"error: {text}", file=sys.stderr)
        raise SystemExit(130 if interrupted else 1) from None


def _discard_output() -> None:
    """Let what is still to be printed go nowhere, so that closing stdout can't fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
