"""The domains by name, and what a run gets of two of them."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data_loader import CLASS_NAMES, UNLABELLED, DigitSet, Preprocessing, relabelled, spread_over
from digits.contract import checked
from digits.files import LICENCES, data_files, fetch
from digits.folders import load_folder
from digits.readers import (
    MNIST_M_IMAGES,
    OPTDIGITS_TRAIN,
    SYNTH_IMAGES,
    MissingData,
    Reading,
    read_mnist,
    read_mnist_m,
    read_optdigits,
    read_svhn,
    read_synth,
    read_usps,
    unpacked,
)
from utils.cli import UserError, listed, say
from utils.files import checksum


@dataclass(frozen=True)
class Domain:
    """One row of the table of domains.

    `read(data_dir, split)` reads its images, "train" or "test".
    """

    name: str
    title: str
    train_images: int
    test_images: int
    licence: str
    read: Callable[[Path, str], Reading]


_ROWS = (
    Domain("svhn", "SVHN", 73257, 26032, LICENCES["svhn"], read_svhn),
    Domain("mnist", "MNIST", 60000, 10000, LICENCES["mnist"], read_mnist),
    Domain("usps", "USPS", 7291, 2007, LICENCES["usps"], read_usps),
    Domain("mnist-m", "MNIST-M", MNIST_M_IMAGES["train"], MNIST_M_IMAGES["test"], LICENCES["mnist-m"], read_mnist_m),
    Domain("synth", "synth", SYNTH_IMAGES["train"], SYNTH_IMAGES["test"], "MIT, rendered here", read_synth),
    Domain("optdigits", "optdigits", OPTDIGITS_TRAIN, 500, "CC BY 4.0 (UCI)", read_optdigits),
)
COLOUR_32 = Preprocessing(32)  # the form of folders' pictures that most networks take
DOMAINS: dict[str, Domain] = {row.name: row for row in _ROWS}


def title(name: str) -> str:
    """How results name a domain; a folder by its path."""
    return DOMAINS[name].title if name in DOMAINS else name


def same_domain(a: str, b: str) -> bool:
    """Whether two names are of one domain, of folders by whatever path."""
    return a == b or (not {a, b} & DOMAINS.keys() and Path(a).resolve() == Path(b).resolve())


def check_name(name: str) -> None:
    """Raise UserError for a name that is neither a domain's nor a folder's."""
    if name not in DOMAINS and not Path(name).is_dir():
        raise UserError(
            f"{name} is neither a domain ({', '.join(DOMAINS)}) nor a folder: name one of these, or the folder of "
            "pictures as it can be found from here"
        )


def load_domain(name: str, split: str, data_dir: Path, form: Preprocessing = COLOUR_32) -> DigitSet:
    """Read one split, "train" or "test", of a domain, or of a folder of pictures.

    Args:
        form: as `load_folder` takes it; domains with a name have a size of their own.

    Raises: MissingData, or UserError for what is no domain, can't be read, or is malformed.
    """
    check_name(name)
    if name not in DOMAINS:
        return load_folder(name, split, data_dir, form)
    row = DOMAINS[name]
    reading = row.read(data_dir, split)
    checksums = {str(path.relative_to(data_dir)): checksum(path, "md5") for path in reading.files}
    official = all(
        _is_official(name, split, path, md5) for path, md5 in zip(reading.files, checksums.values(), strict=True)
    )
    images, labels = checked(name, split, reading.images, reading.labels, len(CLASS_NAMES))
    count, expected = len(images), row.train_images if split == "train" else row.test_images
    kind = "subset" if count < expected else "unofficial"
    mark = row.title if official and count == expected else f"{row.title} {kind}, {count:,}"
    return DigitSet(name, split, images, labels, mark, checksums)


def _is_official(name: str, split: str, path: Path, md5: str) -> bool:
    """Whether a file is one of the domain's official ones, or holds what is packed in one."""
    files = data_files(name, split)
    contents = {file.unpacked_md5 for file in files if file.unpacked_md5}
    if md5 in {file.md5 for file in files}:
        return True
    return bool(contents) and hashlib.md5(unpacked(path)).hexdigest() in contents


def load_or_fetch(name: str, split: str, data_dir: Path, download: bool, form: Preprocessing = COLOUR_32) -> DigitSet:
    """Read one split of a domain, fetching what is missing when `download` allows it."""
    try:
        return load_domain(name, split, data_dir, form)
    except MissingData:
        if not download:
            raise
    fetch([name], data_dir, split)
    return load_domain(name, split, data_dir)


def load_side_by_side(
    keys: list[tuple[str, str]], data_dir: Path, download: bool, form: Preprocessing = COLOUR_32
) -> dict[tuple[str, str], DigitSet]:
    """Read several (domain, split) at once, which takes less than half the time, then fetch those that are missing."""

    def read(key: tuple[str, str]) -> DigitSet | None:
        try:
            return load_domain(*key, data_dir)
        except MissingData:
            return None

    files = [key for key in keys if data_files(*key)]  # domains that are made here start processes: never in a thread
    with ThreadPoolExecutor() as pool:
        sets = dict(zip(files, pool.map(read, files), strict=True))
    return {key: sets.get(key) or load_or_fetch(*key, data_dir, download, form) for key in keys}


def load_test_sets(
    names: list[str], data_dir: Path, download: bool, form: Preprocessing = COLOUR_32
) -> tuple[list[DigitSet], dict[str, str]]:
    """The test sets that can be had, and for each other domain what is wrong and which command brings it."""
    sets, missing = [], {}
    for name in names:
        try:
            digits = load_or_fetch(name, "test", data_dir, download, form)
            if not len(digits):
                raise UserError(f"{name} has no pictures with labels to test on")
            sets.append(digits)
        except UserError as error:
            missing[name] = str(error)
            if not isinstance(error, MissingData):  # the network, most likely: it is not waited for again
                download = False
    return sets, missing


@dataclass(frozen=True)
class Pair:
    """What a run sees: labelled images, images of both domains, and the two test sets that only the log sees."""

    labelled: DigitSet
    source_images: Tensor
    target_images: Tensor
    source_test: DigitSet
    target_test: DigitSet
    marks: dict[str, str]  # how results name the four sets
    checksums: dict[str, str]  # file -> md5

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, those of both domains."""
        return self.labelled.classes

    @property
    def counts(self) -> list[int]:
        """How many images there are of each kind."""
        return [len(part) for part in (self.labelled, self.target_images, self.source_test, self.target_test)]


def load_pair(
    source: str,
    target: str,
    target_only: bool,
    data_dir: Path,
    download: bool,
    most: int | None,
    form: Preprocessing = COLOUR_32,
    common: bool = False,
) -> Pair:
    """Read both domains, fetching what is missing when `download` allows it.

    Args:
        target_only: whether the labelled images are the target's.
        most: images of each set that are kept, for dry runs; None: all.
        form: as `load_folder` takes it.
        common: leave out the classes that only one of the domains has.

    Raises: UserError for domains of different classes, and for one without labels that needs them.
    """
    keys = [(name, split) for name in (source, target) for split in ("train", "test")]
    sets = load_side_by_side(keys, data_dir, download, form)
    for digits in sets.values():
        if digits.mark != title(digits.domain):
            say(f"note: the {digits.split} file of {digits.domain} is not the official one; results say: {digits.mark}")
    classes = shared_classes(sets, source, target, common)
    sets = {key: relabelled(digits, classes, common) for key, digits in sets.items()}
    marks = {
        "source_mark": sets[source, "train"].mark,
        "target_mark": sets[target, "train"].mark,
        "source_test_mark": sets[source, "test"].mark,
        "target_test_mark": sets[target, "test"].mark,
    }
    checksums = {f"{digits.domain}/{file}": md5 for digits in sets.values() for file, md5 in digits.checksums.items()}
    if most:
        sets = {key: spread_over(digits, most) for key, digits in sets.items()}
    labelled = sets[target if target_only else source, "train"]
    if (labelled.labels == UNLABELLED).any():
        raise UserError(
            f"the pictures of {labelled.domain} have no labels, and it is their labels that are learnt: "
            "put each into the folder of its class"
        )
    return Pair(
        labelled=labelled,
        source_images=sets[source, "train"].images,
        target_images=sets[target, "train"].images,
        source_test=sets[source, "test"],
        target_test=sets[target, "test"],
        marks=marks,
        checksums=checksums,
    )


def shared_classes(sets: dict[tuple[str, str], DigitSet], source: str, target: str, common: bool) -> tuple[str, ...]:
    """The classes of a pair, in the source's order; raises UserError where they differ and may not."""
    own, other = (sets[name, "train"].classes or sets[name, "test"].classes for name in (source, target))
    if not own or not other or set(own) == set(other):
        return own or other
    shared = tuple(name for name in own if name in other)
    if not common or len(shared) < 2:
        alone = ((source, set(own) - set(other)), (target, set(other) - set(own)))
        differ = "; ".join(f"only {name} has {listed(sorted(names))}" for name, names in alone if names)
        fix = ", or leave others out by --common-classes" if len(shared) > 1 else ""
        raise UserError(f"the classes differ ({differ}): give the folders of a class the same name in both{fix}")
    say(f"note: only the classes that both domains have count: {listed(list(shared), 20)}")
    return shared
