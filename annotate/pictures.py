"""Picture files: opened upright whatever their format, found in folders, written where they cover no other file."""

import contextlib
import hashlib
import itertools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from utils.cli import UserError
from utils.files import write_atomically

LARGEST_PIXELS, LARGEST_SIDE = 80_000_000, 30_000
MADE_OF = "made of"  # the text in our PNG files that names, hashed, what was annotated


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Silence about damaged EXIF data and the like, and about many pixels, which `open_picture` refuses itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_picture(path: Path) -> Image.Image:
    """Open a picture upright, in RGB, transparency on white; raises UserError for what is none or is absurdly large."""
    try:
        with without_warnings(), Image.open(path) as file:
            width, height = file.size
            if width * height > LARGEST_PIXELS or max(width, height) > LARGEST_SIDE:
                most = f"{LARGEST_PIXELS:,} pixels and {LARGEST_SIDE:,} a side are the most"
                raise UserError(f"{path} has {width}×{height} pixels, {most}: make it smaller")
            if not width * height:
                raise UserError(f"{path} is empty ({width}×{height} pixels): save it again")
            picture: Image.Image = ImageOps.exif_transpose(file)
            if picture.mode[0] in "IF":  # deep grey: Pillow would clip it at 255
                values = np.nan_to_num(np.asarray(picture, dtype=np.float32)).clip(0)
                picture = Image.fromarray((values / max(1e-9, values.max()) * 255).astype(np.uint8))
            if not picture.has_transparency_data:
                return picture.convert("RGB")
            white = Image.new("RGBA", picture.size, "white")
            return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"there is no picture {path}: name a file, a folder, or a picture in images/") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path} has more than {LARGEST_PIXELS:,} pixels: make it smaller") from None
    # Image.open and the decoders raise many kinds for damaged bytes: SyntaxError, struct.error, ValueError, ….
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path} can't be read as a picture ({reason}): save it as PNG or JPEG") from None


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
