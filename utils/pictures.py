"""Pictures: opened upright whatever their format, page by page."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils.cli import UserError, say

with contextlib.suppress(ImportError):  # not in the requirements: few have HEIC pictures
    from pillow_heif import register_heif_opener

    register_heif_opener()

NEEDS_HEIF = "run `pip install pillow-heif`, or save it as JPEG"
ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
SUBFILE_TYPE = 254  # TIFF's tag whose lowest bit says: a small copy of another frame
LARGEST_PIXELS, LARGEST_SIDE = 80_000_000, 30_000


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Silence about damaged EXIF data and the like, and about many pixels, which `open_picture` refuses itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def pages_in(path: Path) -> list[int]:
    """The numbers of the frames that are pages: of a TIFF file all but small copies of others, else the first.

    Of an animation a line says so. What can't be opened has one, and `open_picture` says what is wrong with it.
    """
    try:
        with without_warnings(), Image.open(path) as file:
            frames = getattr(file, "n_frames", 1)
            if frames > 1 and file.format in ANIMATED:
                say(f"{path} has {frames} frames: the first one counts")
            if file.format != "TIFF":
                return [0]
            pages = []
            for frame in range(frames):
                file.seek(frame)
                pages += [frame] * (not file.getexif().get(SUBFILE_TYPE, 0) & 1)
            return pages or [0]
    except Exception:  # as many kinds as below
        return [0]


def open_picture(path: Path, least_side: int | None = None, page: int = 0) -> Image.Image:
    """Open a picture upright, in RGB, transparency on white.

    Args:
        least_side: pixels a side that are enough; a JPEG file of at least twice as many is opened in a fraction of
            the time. None: all of them.
        page: one of `pages_in`.

    Raises: UserError for what is no picture or is absurdly large.
    """
    try:
        with without_warnings(), Image.open(path) as file:
            if page:
                file.seek(page)
            width, height = file.size
            if width * height > LARGEST_PIXELS or max(width, height) > LARGEST_SIDE:
                most = f"{LARGEST_PIXELS:,} pixels and {LARGEST_SIDE:,} a side are the most"
                raise UserError(f"{path} has {width}×{height} pixels, {most}: make it smaller")
            if not width * height:
                raise UserError(f"{path} is empty ({width}×{height} pixels): save it again")
            if least_side:
                file.draft(None, (least_side, least_side))
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
        fix = NEEDS_HEIF if is_unknown_heif(path) else "save it as PNG or JPEG"
        raise UserError(f"{path} can't be read as a picture ({reason}): {fix}") from None


def is_unknown_heif(path: Path) -> bool:
    """Whether a file is named like the HEIC pictures of phones, which Pillow reads by another package alone."""
    return path.suffix.lower() in (".heic", ".heif") and path.suffix.lower() not in Image.registered_extensions()
