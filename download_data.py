"""Download and verify the data sets SVHN, MNIST and USPS; what is already there is not downloaded again."""

import argparse
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from utils.cli import UserError, run_script, script_parser
from utils.data_files import DATA_FILES, LICENCES, DataFile, data_files, md5_of
from utils.download import download

DEFAULT_DATA_DIR = Path("data")

EPILOG = """\
examples:
  python download_data.py                               all three; SVHN is the large one, 246 MB
  python download_data.py mnist usps --data-dir data    two of them, into a folder

A download that broke off is resumed when the command is run again.

environment:
  DANN_MIRROR    a mirror of your own that is tried first: a base URL with the files' relative
                 paths below it, e.g. http://mirror.example/digits holding MNIST/raw/*.gz
  HTTP_PROXY, HTTPS_PROXY, NO_PROXY    are heeded
"""


def fetch(names: Iterable[str], data_dir: Path, split: str | None = None) -> None:
    """Download what is missing for these domains, or one split of them, and verify it; says on stderr what it does.

    A file that is there is never replaced: if it is not the official one, a line on stderr says so. Domains
    without files, such as `synth`, need nothing.

    Raises:
        UserError: a file could not be had or stored.
    """
    for name in names:
        for file in data_files(name, split):
            _fetch_file(name, file, data_dir)


def missing_files(name: str, data_dir: Path) -> list[DataFile]:
    """The files of a domain that `fetch` would download; empty for a domain without files."""
    return [file for file in data_files(name) if _is_missing(file, data_dir)]


def _fetch_file(name: str, file: DataFile, data_dir: Path) -> str:
    """Have one file in the data folder; returns its state in a few words."""
    path = data_dir / file.path
    if _is_missing(file, data_dir):
        print(f"downloading {path}", file=sys.stderr, flush=True)
        urls = (*_own_mirror(file), *file.urls)
        download(urls, path, f"md5:{file.md5}", again=f"`{_command(name, data_dir)}`")
        return "downloaded, checksum right"
    try:
        if not path.exists():
            return "already there, unpacked"
        if md5_of(path) == file.md5:
            return "already there, checksum right"
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): mend its permissions or use another --data-dir"
        ) from None
    print(
        f"{path} is not the official file (its md5 differs) and is left as it is: "
        f"to replace it, delete it and run `{_command(name, data_dir)}`",
        file=sys.stderr,
    )
    return "already there, not the official file"


def _is_missing(file: DataFile, data_dir: Path) -> bool:
    """Whether neither the file is there nor, for a .gz, what torchvision unpacks from it."""
    path = data_dir / file.path
    try:
        return not (path.exists() or (path.suffix == ".gz" and path.with_suffix("").exists()))
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): mend its permissions or use another --data-dir"
        ) from None


def _own_mirror(file: DataFile) -> tuple[str, ...]:
    """The file's address below DANN_MIRROR, where that is set."""
    base = os.environ.get("DANN_MIRROR", "").strip()
    if not base:
        return ()
    if not base.startswith(("http://", "https://")):
        raise UserError(
            f"DANN_MIRROR is {base}: set it to a base URL that begins with http:// or https://, or unset it"
        )
    return (f"{base.rstrip('/')}/{file.path}",)


def _command(name: str, data_dir: Path) -> str:
    """The command that fetches a domain into this folder."""
    where = "" if data_dir == DEFAULT_DATA_DIR else f" --data-dir {shlex.quote(str(data_dir))}"
    return f"python download_data.py {name}{where}"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(
        description=__doc__,
        epilog=EPILOG,
    )
    domains = " ".join(DATA_FILES)
    parser.add_argument("names", nargs="*", metavar="domain", help=f"any of: {domains} (default: all of them)")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=DEFAULT_DATA_DIR,
        metavar="DIR",
        help="folder for the files (default: %(default)s)",
    )
    args = parser.parse_args(arguments)
    # Not `choices`: with nargs="*", argparse holds the empty list against them too.
    for name in args.names:
        if name not in DATA_FILES:
            parser.error(f"unknown domain {name!r} (choose from {domains})")
    return args


def main() -> None:
    args = parse_arguments()
    print(f"data folder: {args.data_dir}")
    for name in dict.fromkeys(args.names or DATA_FILES):
        for file in data_files(name):
            state = _fetch_file(name, file, args.data_dir)
            path = args.data_dir / file.path
            stored = path if path.exists() else path.with_suffix("")
            print(f"{name:<6} {file.path:<36} {stored.stat().st_size:>12,} bytes  {state}", flush=True)
        print(f"{name:<6} licence: {LICENCES[name]}", flush=True)


if __name__ == "__main__":
    run_script(main)
