"""The official files of the data sets: paths below the data folder, checksums, addresses."""

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DataFile:
    """One official file.

    Args:
        path: relative to the data folder, in torchvision's layout.
        md5: the checksum that torchvision gives for it, in hexadecimal.
        urls: addresses to try in turn.
    """

    path: str
    md5: str
    urls: tuple[str, ...]


# torchvision's order: its own mirror first, for the original site has been empty or forbidden for years.
_MNIST_SITES = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
)
_SVHN_SITES = ("http://ufldl.stanford.edu/housenumbers/",)
_USPS_SITES = ("https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/multiclass/",)


def _file(folder: str, file_name: str, md5: str, sites: tuple[str, ...]) -> DataFile:
    return DataFile(folder + file_name, md5, tuple(site + file_name for site in sites))


DATA_FILES: dict[str, tuple[DataFile, ...]] = {
    "svhn": (
        _file("", "train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", _SVHN_SITES),
        _file("", "test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", _SVHN_SITES),
    ),
    "mnist": (
        _file("MNIST/raw/", "train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873", _MNIST_SITES),
        _file("MNIST/raw/", "train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432", _MNIST_SITES),
        _file("MNIST/raw/", "t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3", _MNIST_SITES),
        _file("MNIST/raw/", "t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c", _MNIST_SITES),
    ),
    "usps": (
        _file("", "usps.bz2", "ec16c51db3855ca6c91edd34d0e9b197", _USPS_SITES),
        _file("", "usps.t.bz2", "8ea070ee2aca1ac39742fdd1ef5ed118", _USPS_SITES),
    ),
}

LICENCES = {
    "svhn": "for non-commercial use only",
    "mnist": "commonly given as CC BY-SA 3.0",
    "usps": "for research",
}


def data_files(name: str, split: str | None = None) -> tuple[DataFile, ...]:
    """The files of a domain, or of its "train" or "test" split; none for a domain that is made here."""
    files = DATA_FILES.get(name, ())
    if split is None:
        return files
    return tuple(file for file in files if _is_test(file) == (split == "test"))


def _is_test(file: DataFile) -> bool:
    return Path(file.path).name.startswith(("t10k", "test", "usps.t."))


def md5_of(path: Path) -> str:
    """The md5 of a file's bytes, in hexadecimal; raises OSError when it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
