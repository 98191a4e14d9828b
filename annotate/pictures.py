"""Picture files: found in folders, and written where they cover no other file."""

import hashlib
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils.cli import UserError, listed, say
from utils.files import write_atomically
from utils.pictures import NEEDS_HEIF, is_unknown_heif, pages_in, without_warnings

MADE_OF = "made of"  # the text in our PNG files that names, hashed, what was annotated


@dataclass(frozen=True)
class Sheet:
    """A picture to annotate: a file, or a page of one that has several."""

    path: Path
    frame: int = 0
    page: int | None = None  # from 1, in a file of several

    def __str__(self) -> str:
        return str(self.path) if self.page is None else f"{self.path} page {self.page}"


def sheets_of(paths: list[Path]) -> list[Sheet]:
    """All pages of the files."""
    sheets = []
    for path in paths:
        frames = pages_in(path)
        several = len(frames) > 1
        sheets += [Sheet(path, frame, page if several else None) for page, frame in enumerate(frames, 1)]
    return sheets


def mark_of(sheet: Sheet) -> str:
    """What we write into an annotated picture, to know it again among other files."""
    page = "" if sheet.page is None else f" {sheet.page}"
    return hashlib.sha256(f"{sheet.path.resolve()}{page}".encode()).hexdigest()[:32]


def mark_in(path: Path) -> str | None:
    """What `mark_of` left in a file; None for a picture that this script did not write."""
    try:
        with without_warnings(), Image.open(path) as picture:
            return picture.info.get(MADE_OF)
    except Exception:  # whatever it is, it is not ours
        return None


def pictures_named(names: list[str], ours: Path) -> list[Path]:
    """The files that the names stand for, each once: paths, names in the folder `ours`, and what lies in folders."""
    paths = []
    for name in names:
        path = next((p for p in (Path(name), ours / name) if os.path.exists(p)), Path(name))
        if not path.is_dir():
            paths.append(path)
            continue
        try:
            known = Image.registered_extensions()
            there = sorted(file for file in path.iterdir() if file.is_file())
        except OSError as error:
            raise UserError(f"cannot read the folder {path} ({error.strerror}): make it readable") from None
        files = [file for file in there if file.suffix.lower() in known]
        files = [file for file in files if mark_in(file) is None]  # not what an earlier run wrote
        if unread := [str(file) for file in there if is_unknown_heif(file)]:
            say(f"skipped {listed(unread)}: {NEEDS_HEIF}")
        if not files:
            raise UserError(f"there is no picture in the folder {path}: name one that has some")
        paths += files
    unique: dict[Path, Path] = {}
    for path in paths:
        unique.setdefault(path.resolve(), path)
    return list(unique.values())


def output_for(sheet: Sheet, folder: Path) -> Path:
    """NAME-annotated.png or NAME-page2-annotated.png, with a number where that file is not of the same picture."""
    page = "" if sheet.page is None else f"-page{sheet.page}"
    for number in itertools.count(1):
        output = folder / f"{sheet.path.stem}{page}-annotated{'' if number == 1 else f'-{number}'}.png"
        if not os.path.lexists(output) or mark_in(output) == mark_of(sheet):
            return output
    raise AssertionError("unreachable")


def save_picture(picture: Image.Image, output: Path, made_of: Sheet) -> None:
    """Write a PNG that says in itself which picture it was made of."""
    text = PngInfo()
    text.add_text(MADE_OF, mark_of(made_of))
    write_atomically(output, lambda file: picture.save(file, "PNG", pnginfo=text))
