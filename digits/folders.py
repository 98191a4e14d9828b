"""Folders of pictures as domains: a folder for each class, or pictures alone, which have no labels.

scans/cat/1.jpg, scans/dog/2.png          classes cat and dog; the last fifth of each is for testing
phone/train/…, phone/test/…               a split of one's own; train may hold pictures alone
phone/3.jpg                               no labels: trained on, not tested
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data_loader import UNLABELLED, DigitSet, Preprocessing
from utils.cli import UserError, listed, say_once
from utils.files import make_folder, write_atomically, write_json
from utils.pictures import NEEDS_HEIF, is_unknown_heif, open_picture, without_warnings

HELD_OUT = 5  # of so many pictures of a class one is for testing, where the folder has no split
VERSION = 1  # of decoded pictures: raise it whenever the pixels change

Pictures = dict[str, list[Path]]  # by class, in the order of their names; under NO_CLASS those without one
NO_CLASS = ""


def load_folder(name: str, split: str, data_dir: Path, form: Preprocessing) -> DigitSet:
    """One split of a folder domain, its pictures decoded once and kept below the data folder.

    Args:
        name: the path of the folder. split: "train" or "test", which may be empty.
        form: whose size, and grey or colour, the pictures get.

    Raises: UserError for a folder that is no domain.

    Shape: images (N, 1 or 3, S, S), read from disk as they are needed; labels all UNLABELLED where there are none
    """
    folder = Path(name)
    try:
        pictures = _split(folder, split)
    except OSError as error:
        raise UserError(f"cannot read the folder {error.filename} ({error.strerror}): make it readable") from None
    classes = tuple(sorted(pictures.keys() - {NO_CLASS}))
    paths = [(path, classes.index(label) if label else UNLABELLED) for label in pictures for path in pictures[label]]
    images, kept, md5 = _decoded(folder, split, [path for path, _ in paths], data_dir, form)
    labels = torch.tensor([paths[i][1] for i in kept], dtype=torch.int64)
    return DigitSet(name, split, images, labels, name, {split: md5}, classes)


def _split(folder: Path, split: str) -> Pictures:
    """The pictures of one split, of which those of "train" all have a class or none has."""
    inner = {path.name for path in _subfolders(folder)}
    test = next((part for part in ("test", "val") if part in inner), None)
    if "train" in inner and inner <= {"train", "test", "val"}:
        if test is None:
            return _split_by_rule(folder / "train", split)
        pictures = _scan(folder / ("train" if split == "train" else test))
        if split == "test" and NO_CLASS in pictures:
            raise UserError(f"{folder / test} has no folder for each class: a test needs labels")
        return pictures
    return _split_by_rule(folder, split)


def _split_by_rule(folder: Path, split: str) -> Pictures:
    """Of each class the last fifth, in the order of names, is for testing; without classes nothing is."""
    pictures = _scan(folder)
    if NO_CLASS in pictures:
        return pictures if split == "train" else {}
    if split == "test":
        say_once(f"{folder} has no folders train and test: the last fifth of each class, by name, is for testing")
    parts = {}
    for label, paths in pictures.items():
        border = len(paths) - len(paths) // HELD_OUT
        parts[label] = paths[:border] if split == "train" else paths[border:]
    return parts


def _scan(folder: Path) -> Pictures:
    """The pictures of a folder by class: each subfolder with a picture in it, however deep, is one."""
    others: list[Path] = []
    straight = _pictures(sorted(folder.iterdir()), others)
    pictures = {path.name: _pictures(sorted(path.rglob("*")), others) for path in _subfolders(folder)}
    if others:
        say_once(f"{folder}: left out {_counted(others, folder)}, not named like a picture")
        if any(map(is_unknown_heif, others)):
            say_once(f"{folder}: to have HEIC read, {NEEDS_HEIF}")
    empty = sorted(label for label, paths in pictures.items() if not paths)
    pictures = {label: paths for label, paths in pictures.items() if paths}
    if straight and pictures:
        raise UserError(
            f"{folder} has pictures straight in it ({straight[0].name}, …) and in folders ({listed([*pictures])}): "
            "put each into the folder of its class or, where there are no labels, all straight into it"
        )
    if empty and pictures:
        say_once(f"{folder}: left out, for want of pictures, the class{'es' * (len(empty) > 1)} {listed(empty)}")
    if not straight and not pictures:
        raise UserError(
            f"{folder} has no picture that can be opened: wanted is a folder of pictures for each class or, for a "
            "target without labels, pictures straight in it"
        )
    return {NO_CLASS: straight} if straight else pictures


def _hidden(path: Path) -> bool:
    return path.name.startswith((".", "__MACOSX"))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _hidden(path))


def _pictures(paths: list[Path], others: list[Path]) -> list[Path]:
    """Those files whose name says that Pillow opens them; other files, but for hidden ones, go to `others`."""
    known = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = [path for path in paths if path.is_file() and not _hidden(path)]
    others += [path for path in files if path.suffix.lower() not in known]
    return [path for path in files if path.suffix.lower() in known]


def _counted(paths: list[Path], folder: Path) -> str:
    return f"{len(paths):,} file{'s' * (len(paths) > 1)} ({listed([str(path.relative_to(folder)) for path in paths])})"


def _decoded(
    folder: Path, split: str, paths: list[Path], data_dir: Path, form: Preprocessing
) -> tuple[Tensor, list[int], str]:
    """The pictures as `form` resizes them, from the file that keeps them, which is made where it is not up to date.

    Shape: -> images (N, 1 or 3, S, S) uint8, the numbers of the N paths that can be opened, an md5 of the images
    """
    shape = (1 if form.grey else 3, form.image_size, form.image_size)
    where = hashlib.sha256(f"{folder.resolve()} {split} {shape}".encode()).hexdigest()[:12]
    kept = data_dir / "folders" / f"{folder.resolve().name}-{split}-{where}.bin"
    listing = [
        [str(path.relative_to(folder)), about.st_size, about.st_mtime_ns] for path in paths for about in [path.stat()]
    ]
    digest = hashlib.sha256(json.dumps([VERSION, listing]).encode()).hexdigest()
    about = _about(kept, digest)
    if about is None and paths:
        about = _decode(folder, paths, kept, form) | {"digest": digest}
        write_json(kept.with_suffix(".json"), about)
    if about is None:
        return torch.empty((0, *shape), dtype=torch.uint8), [], hashlib.md5().hexdigest()
    broken = set(about["broken"])
    if broken:
        say_once(f"{folder}: left out {_counted([paths[i] for i in sorted(broken)], folder)} that can't be opened")
    good = [i for i in range(len(paths)) if i not in broken]
    images = np.memmap(kept, np.uint8, "c", shape=(len(good), *shape))
    return torch.from_numpy(images), good, about["md5"]


def _about(kept: Path, digest: str) -> dict | None:
    """What is known of a file of decoded pictures; None where it is not there, or is of other pictures."""
    try:
        about = json.loads(kept.with_suffix(".json").read_text())
        return about if about["digest"] == digest and kept.stat().st_size == about["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _decode(folder: Path, paths: list[Path], kept: Path, form: Preprocessing) -> dict:
    """Decode pictures in parallel into a file, one after the other; which are broken, and what the file holds."""
    make_folder(kept.parent)
    value, broken = hashlib.md5(), []

    def write(part: Path) -> None:
        with part.open("wb") as file, without_warnings():
            for i, image in enumerate(tqdm(_opened(paths, form), str(folder), len(paths), leave=False, disable=None)):
                if image is None:
                    broken.append(i)
                else:
                    file.write(image)
                    value.update(image)
        if len(broken) == len(paths):
            raise UserError(f"none of the {len(paths):,} pictures of {folder} can be opened: save them as PNG or JPEG")

    write_atomically(kept, write)
    return {"broken": broken, "bytes": kept.stat().st_size, "md5": value.hexdigest()}


def _opened(paths: list[Path], form: Preprocessing) -> Iterator[bytes | None]:
    """Pictures as bytes, in order; None for one that can't be opened."""

    def opened(path: Path) -> bytes | None:
        try:
            picture = open_picture(path, 2 * form.image_size)
        except UserError:
            return None
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
        return form.resize(pixels).numpy().tobytes()

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield from pool.map(opened, paths)
    finally:
        pool.shutdown(cancel_futures=True)
