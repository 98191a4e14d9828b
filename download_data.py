"""Download and verify the data sets SVHN, MNIST, USPS and MNIST-M; what is already there is not downloaded again."""

import argparse
from pathlib import Path

from digits.files import DATA_FILES, DEFAULT_DATA_DIR, LICENCES, data_files, fetch_file
from utils.cli import run_script, script_parser

EPILOG = """\
examples:
  python download_data.py                               all of them; SVHN is the large one, 246 MB
  python download_data.py mnist usps --data-dir data    two of them, into a folder

A download that broke off is resumed when the command is run again.

environment:
  DANN_MIRROR    a mirror of your own that is tried first: a base URL with the files' relative
                 paths below it, e.g. http://mirror.example/digits holding MNIST/raw/*.gz
  HTTP_PROXY, HTTPS_PROXY, NO_PROXY    are heeded
"""


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
        for file in (file for file in data_files(name) if file.urls):
            state = fetch_file(name, file, args.data_dir)
            path = args.data_dir / file.path
            stored = path if path.exists() else path.with_suffix("")
            print(f"{name:<6} {file.path:<36} {stored.stat().st_size:>12,} bytes  {state}", flush=True)
        print(f"{name:<6} licence: {LICENCES[name]}", flush=True)


if __name__ == "__main__":
    run_script(main)
