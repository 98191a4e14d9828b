"""The official files of the data sets: paths below the data folder, checksums, addresses, and how they are fetched."""

import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from utils.cli import UserError, say
from utils.download import download
from utils.files import checksum

DEFAULT_DATA_DIR = Path("data")


@dataclass(frozen=True)
class DataFile:
    """One official file.

    Args:
        path: relative to the data folder, in torchvision's layout.
        md5: its checksum, in hexadecimal, as torchvision gives it where it knows the file.
        urls: addresses to try in turn; a file without one is used where it is, and never fetched.
        split: "train" or "test"; None: both.
        unpacked_md5: of what is packed in it, where that goes around by itself.
    """

    path: str
    md5: str
    urls: tuple[str, ...]
    split: str | None = None
    unpacked_md5: str | None = None


# torchvision's order: its own mirror first, for the original site has been empty or forbidden for years.
_MNIST_SITES = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
)
_SVHN_SITES = ("http://ufldl.stanford.edu/housenumbers/",)
_MNIST_M_URLS = (
    "https://drive.google.com/uc?export=download&id=0B_tExHiYS-0veklUZHFYT19KYjg&confirm=t",
    "https://cornell.box.com/shared/static/jado7quprg6hzzdubvwzh9umr75damwi",
)
_USPS_SITES = ("https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/multiclass/",)


def _file(folder: str, file_name: str, md5: str, sites: tuple[str, ...], unpacked_md5: str | None = None) -> DataFile:
    split = "test" if file_name.startswith(("t10k", "test", "usps.t.")) else "train"
    return DataFile(folder + file_name, md5, tuple(site + file_name for site in sites), split, unpacked_md5)


DATA_FILES: dict[str, tuple[DataFile, ...]] = {
    "svhn": (
        _file("", "train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", _SVHN_SITES),
        _file("", "test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", _SVHN_SITES),
    ),
    "mnist": (
        _file(
            "MNIST/raw/",
            "train-images-idx3-ubyte.gz",
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            _MNIST_SITES,
            "6bbc9ace898e44ae57da46a324031adb",
        ),
        _file(
            "MNIST/raw/",
            "train-labels-idx1-ubyte.gz",
            "d53e105ee54ea40749a09fcbcd1e9432",
            _MNIST_SITES,
            "a25bea736e30d166cdddb491f175f624",
        ),
        _file(
            "MNIST/raw/",
            "t10k-images-idx3-ubyte.gz",
            "9fb629c4189551a2d022fa330f9573f3",
            _MNIST_SITES,
            "2646ac647ad5339dbf082846283269ea",
        ),
        _file(
            "MNIST/raw/",
            "t10k-labels-idx1-ubyte.gz",
            "ec29112dd5afa0611ce80d1b7f02629c",
            _MNIST_SITES,
            "27ae3e4e09519cfbb04c329615203637",
        ),
    ),
    "usps": (
        _file("", "usps.bz2", "ec16c51db3855ca6c91edd34d0e9b197", _USPS_SITES),
        _file("", "usps.t.bz2", "8ea070ee2aca1ac39742fdd1ef5ed118", _USPS_SITES),
    ),
    "mnist-m": (
        DataFile("mnist_m.tar.gz", "859df31c91afe82e80e5012ba928f279", _MNIST_M_URLS),
        DataFile("mnist_m_test.npz", "4e49889adc16b51f81ee5afda6744e85", (), "test"),  # its test set as numpy arrays
    ),
}

LICENCES = {
    "svhn": "for non-commercial use only",
    "mnist": "commonly given as CC BY-SA 3.0",
    "usps": "for research",
    "mnist-m": "for non-commercial research and education",
}


def data_files(name: str, split: str | None = None) -> tuple[DataFile, ...]:
    """The files of a domain, or of its "train" or "test" split; none for a domain that is made here."""
    files = DATA_FILES.get(name, ())
    if split is None:
        return files
    return tuple(file for file in files if file.split in (split, None))


def fetch(names: Iterable[str], data_dir: Path, split: str | None = None) -> None:
    """Download what is missing for these domains, or one split of them, and verify it; says on stderr what it does.

    A file that is there is never replaced: if it is not the official one, a line on stderr says so. Domains
    without files, such as `synth`, need nothing.

    Raises:
        UserError: a file could not be had or stored.
    """
    for name in names:
        for file in data_files(name, split):
            if file.urls:
                fetch_file(name, file, data_dir)


def fetch_file(name: str, file: DataFile, data_dir: Path) -> str:
    """Have one file in the data folder; returns its state in a few words."""
    path = data_dir / file.path
    if _is_missing(file, data_dir):
        say(f"downloading {path}")
        urls = (*_own_mirror(file), *file.urls)
        download(urls, path, f"md5:{file.md5}", again=f"`{_command(name, data_dir)}`")
        return "downloaded, checksum right"
    try:
        if not path.exists():
            return "already there, unpacked"
        if checksum(path, "md5") == file.md5:
            return "already there, checksum right"
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): fix its permissions or use another --data-dir"
        ) from None
    say(
        f"{path} is not the official file (its md5 differs) and is left as it is: "
        f"to have the official one, move it away and run `{_command(name, data_dir)}`"
    )
    return "already there, not the official file"


def _is_missing(file: DataFile, data_dir: Path) -> bool:
    """Whether neither the file is there nor, for a .gz, what torchvision unpacks from it."""
    path = data_dir / file.path
    try:
        return not (path.exists() or (path.suffix == ".gz" and path.with_suffix("").exists()))
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): fix its permissions or use another --data-dir"
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
