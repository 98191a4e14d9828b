"""Picture files: found in folders, and written where they cover no other file."""

import hashlib
import itertools
import os
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils.cli import UserError
from utils.files import write_atomically
from utils.pictures import without_warnings

MADE_OF = "made of"  # the text in our PNG files that names, hashed, what was annotated


def mark_of(path: Path) -> str:
    """What we write into the annotated picture of `path`, to know it again among other files."""
    return hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]


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
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in known and file.is_file())
        except OSError as error:
            raise UserError(f"cannot read the folder {path} ({error.strerror}): make it readable") from None
        files = [file for file in files if mark_in(file) is None]  # not what an earlier run wrote
        if not files:
            raise UserError(f"there is no picture in the folder {path}: name one that has some")
        paths += files
    unique: dict[Path, Path] = {}
    for path in paths:
        unique.setdefault(path.resolve(), path)
    return list(unique.values())


def output_for(path: Path, folder: Path) -> Path:
    """NAME-annotated.png, or with a number where that file is not of the same picture."""
    for number in itertools.count(1):
        output = folder / f"{path.stem}-annotated{'' if number == 1 else f'-{number}'}.png"
        if not os.path.lexists(output) or mark_in(output) == mark_of(path):
            return output
    raise AssertionError("unreachable")


def save_picture(picture: Image.Image, output: Path, made_of: Path) -> None:
    """Write a PNG that says in itself which picture it was made of."""
    text = PngInfo()
    text.add_text(MADE_OF, mark_of(made_of))
    write_atomically(output, lambda file: picture.save(file, "PNG", pnginfo=text))
