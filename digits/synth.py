"""Synth digits: numbers drawn with fonts, our own rendering of the paper's source domain SYN NUMBERS.

Ganin & Lempitsky (2015), "Unsupervised Domain Adaptation by Backpropagation", section 4: SYN NUMBERS are
about 500,000 images rendered from Windows fonts by varying the text (one-, two- and three-digit numbers), its
position, its orientation, the colours of the stroke and of the background, and the amount of blur.

Here the labelled digit stands near the centre of a 32 x 32 crop, and the number's other digits run out of the
picture as they do in SVHN. Beside what the paper names, the scale, slant and weight of the strokes vary; some
digits have an outline or a shadow; smooth texture, shapes, uneven light and noise surround them.

Note: the paper's fonts are not free, so we draw with those that matplotlib ships (DejaVu, STIX, Computer
Modern: 24 faces). The images are made on demand, as many as asked for; they are not the paper's own files.

Image i depends on (seed, i) alone, never on the range, the order or the number of workers. Other releases of
numpy, Pillow or matplotlib may draw a little differently.
"""

import ctypes
import functools
import gc
import math
import multiprocessing
import os
import signal
import string
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

from digits.cache import cached

VERSION = 1  # part of the cache's file name: raise it whenever the pixels change

SIZE = 32  # pixels, both sides of an image
CHUNK = 250  # images that a worker renders at a time; a single chunk starts no worker

# (font file, code point of its zero). STIXGeneral keeps sans-serif and typewriter digits among its
# mathematical symbols. matplotlib's other fonts have no digits, hollow ones, or old-style ones (cmmi10).
FACES = [
    *[(f"DejaVuSans{style}", 0x30) for style in ("", "-Bold", "-Oblique", "-BoldOblique")],
    *[(f"DejaVuSansMono{style}", 0x30) for style in ("", "-Bold", "-Oblique", "-BoldOblique")],
    *[(f"DejaVuSerif{style}", 0x30) for style in ("", "-Bold", "-Italic", "-BoldItalic")],
    *[(f"STIXGeneral{style}", 0x30) for style in ("", "Bol", "Italic", "BolIta")],
    *[("STIXGeneral", zero) for zero in (0x1D7E2, 0x1D7EC, 0x1D7F6)],
    *[(name, 0x30) for name in ("cmb10", "cmr10", "cmss10", "cmti10", "cmtt10")],
]
LETTERS_OF = {  # code points of A and a beside that of the zero
    0x30: (0x41, 0x61), 0x1D7E2: (0x1D5A0, 0x1D5BA), 0x1D7EC: (0x1D5D4, 0x1D5EE), 0x1D7F6: (0x1D670, 0x1D68A),
}  # fmt: skip
GLYPH_HEIGHT = 48  # pixels of a zero's height in a tile
GLYPH_MARGIN = 12  # pixels around it; also the range of a tile's distances
TILE = 88  # pixels, both sides of a tile
SHADOW = 3  # pixels, the farthest a shadow falls across or down
RAMP = np.linspace(-1, 1, SIZE, dtype=np.float32)  # from one edge of the image to the other


@dataclass(frozen=True)
class Alphabet:
    """The symbols that are drawn; `forms` of them in a row are of one class: a capital and a small letter."""

    classes: tuple[str, ...]
    forms: int

    def codes(self, zero: int) -> list[int]:
        """The symbols' code points in a face, given its zero's."""
        if self.forms == 1:
            return [zero + digit for digit in range(len(self.classes))]
        return [first + letter for letter in range(len(self.classes)) for first in LETTERS_OF[zero]]


DIGITS = Alphabet(tuple(string.digits), 1)
LETTERS = Alphabet(tuple(string.ascii_uppercase), 2)


@functools.cache
def glyphs(alphabet: Alphabet) -> tuple[list[list[Image.Image]], list[list[float]]]:
    """Every face's symbols as signed distance maps, and how far each advances the line.

    A distance map scales and turns smoothly, and adding to it makes every stroke bolder.

    Returns:
        tiles[face][symbol]: mode "F", (TILE, TILE), pixels from the glyph's edge, positive inside, clipped to
            +-GLYPH_MARGIN; the symbol's advance box is centred across, the height of the face's zero, or of the letter
            itself, down.
        advances[face][symbol]: heights of the zero; all digits of a face advance alike.
    """
    import matplotlib
    from scipy.ndimage import distance_transform_edt

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    oversample = 2  # a pixel is either inside or outside: smaller ones measure finer
    size = oversample * TILE
    tiles, advances = [], []
    for name, zero in FACES:
        path = str(folder / f"{name}.ttf")
        _, top, _, bottom = ImageFont.truetype(path, 1000).getbbox(chr(zero), anchor="ls")
        font = ImageFont.truetype(path, round(1000 * oversample * GLYPH_HEIGHT / (bottom - top)))
        _, top, _, bottom = font.getbbox(chr(zero), anchor="ls")
        height, face = bottom - top, []
        codes = alphabet.codes(zero)
        for code in codes:
            _, top, _, bottom = font.getbbox(chr(zero if alphabet.forms == 1 else code), anchor="ls")
            canvas = Image.new("L", (size, size))
            middle = (size / 2, (size - top - bottom) / 2)
            ImageDraw.Draw(canvas).text(middle, chr(code), 255, font, anchor="ms")
            inside = np.asarray(canvas) > 127
            distance = distance_transform_edt(inside) - distance_transform_edt(~inside)
            distance -= np.where(inside, 0.5, -0.5)  # from the pixel's edge, not the next pixel's centre
            distance = np.clip(distance / oversample, -GLYPH_MARGIN, GLYPH_MARGIN).astype(np.float32)
            face.append(Image.fromarray(distance).reduce(oversample))
        tiles.append(face)
        advances.append([font.getlength(chr(code)) / height for code in codes])
    return tiles, advances


def _luma(colour: np.ndarray) -> np.ndarray:
    """Brightness of RGB colours (ITU-R BT.601). Shape: (3, ...) -> (...)."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _contrasting_colour(rng: np.random.Generator, luma: np.ndarray, gap: float) -> np.ndarray:
    """A random colour (3,) in [0, 1], `gap` or more from `luma` in luma, or as far as 32 draws got."""
    colours = rng.random((3, 32), dtype=np.float32)
    gaps = np.abs(_luma(colours) - luma)
    return colours[:, np.argmax(np.minimum(gaps, gap))]


def _draw_background(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """What lies behind the digits: smooth variation around a colour, shapes on top.

    Shape: (3,) -> (3, SIZE, SIZE), float32 in [0, 1].
    """
    cells = rng.integers(1, 7)  # 1: plain, 2: a gradient, more: a smooth texture
    grid = colour + rng.uniform(0, 0.5) * (rng.random((cells, cells, 3)) - 0.5)
    texture = Image.fromarray((255 * np.clip(grid, 0, 1)).astype(np.uint8))
    shapes = rng.integers(1, 6) if rng.random() < 0.6 else 0
    size = 2 * SIZE if shapes else SIZE  # shapes are drawn at twice the size, to be smoothed
    canvas = texture.resize((size, size), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(canvas)
    strength = rng.uniform(0.2, 0.8)  # of the shapes against the background's colour
    for _ in range(shapes):
        x0, y0, x1, y1 = rng.integers(-size // 4, size + size // 4, 4).tolist()
        mixed = colour + strength * (rng.random(3) - colour)
        fill = tuple((255 * mixed).astype(int).tolist())
        box = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
        width = int(rng.integers(1, 9))
        match rng.integers(5):
            case 0 | 1:
                draw.line((x0, y0, x1, y1), fill, width)
            case 2:
                draw.rectangle(box, fill)
            case 3:
                draw.ellipse(box, fill)
            case 4:
                draw.ellipse(box, outline=fill, width=width)
    pixels = np.asarray(canvas.reduce(size // SIZE)).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels, np.float32) / 255


def _draw_text(rng: np.random.Generator, symbol: int, alphabet: Alphabet) -> np.ndarray:
    """A text of one to three symbols with `symbol` near the centre, as distances from the strokes' edges.

    Shape: -> (SIZE + 2 SHADOW, SIZE + 2 SHADOW), float32 in pixels of the image, positive inside a stroke.
    """
    tiles, advances = glyphs(alphabet)
    face = rng.integers(len(FACES))
    length = rng.integers(1, 4)
    text = rng.integers(len(alphabet.classes) * alphabet.forms, size=length)
    centre = rng.integers(length)
    text[centre] = symbol
    advance = max(advances[face][each] for each in text)
    step = GLYPH_HEIGHT * (advance + rng.uniform(0, 0.25))  # pixels of a tile

    # The affine map back from the image to the tile of the centre's digit: unturn, unslant, unscale.
    height = rng.uniform(17, 27)  # pixels of the image
    aspect = math.exp(rng.uniform(-0.25, 0.25))  # of widths to heights
    angle = math.radians(rng.uniform(-20, 20))
    slant = rng.uniform(-0.25, 0.25)
    x, y = rng.uniform(-3, 3, 2) + (SIZE / 2 + SHADOW)
    sin, cos = math.sin(angle), math.cos(angle)
    scale_y = GLYPH_HEIGHT / height
    scale_x = scale_y / aspect
    a, b = scale_x * (cos + slant * sin), scale_x * (sin - slant * cos)
    c, d = -scale_y * sin, scale_y * cos

    side = SIZE + 2 * SHADOW
    distance = np.full((side, side), -GLYPH_MARGIN, np.float32)
    for place, each in enumerate(text):
        e = TILE / 2 - a * x - b * y - step * (place - centre)
        f = TILE / 2 - c * x - d * y
        moved = tiles[face][each].transform(
            (side, side),
            Image.Transform.AFFINE,
            (a, b, e, c, d, f),
            Image.Resampling.BILINEAR,
            fillcolor=-GLYPH_MARGIN,
        )
        np.maximum(distance, moved, out=distance)
    return distance / math.sqrt(scale_x * scale_y)


def render_digit(seed: int, index: int, alphabet: Alphabet = DIGITS) -> tuple[np.ndarray, int]:
    """Render image `index` of the endless sequence that `seed` names.

    Args:
        seed, index: integers from 0.

    Returns:
        image (32, 32, 3): uint8, RGB; label: the class of the symbol in the centre, all equally likely.
    """
    rng = np.random.default_rng((seed, index))
    symbol = int(rng.integers(len(alphabet.classes) * alphabet.forms))
    colour_ground = rng.random(3, dtype=np.float32)
    luma_ground = _luma(colour_ground)
    gap = rng.uniform(0.2, 0.5)
    colour = _contrasting_colour(rng, luma_ground, gap + 0.1)
    luma = _luma(colour)

    image = _draw_background(rng, colour_ground)
    # Whatever was drawn, no part of the background comes closer to the stroke's luma than `gap` allows.
    side = 1.0 if luma > luma_ground else -1.0
    missing = np.maximum(0, 0.7 * gap - side * (luma - _luma(image)))
    image = np.clip(image - side * missing, 0, 1)

    distance = _draw_text(rng, symbol, alphabet) + rng.uniform(-0.1, 0.5)  # pixels added to every stroke's edge

    def paint(colour: np.ndarray, grow: float, dx: int = 0, dy: int = 0, opacity: float = 1.0) -> None:
        window = distance[SHADOW - dy : SHADOW - dy + SIZE, SHADOW - dx : SHADOW - dx + SIZE]
        cover = opacity * np.clip(window + (grow + 0.5), 0, 1)
        image[:] += cover * (colour[:, None, None] - image)

    if rng.random() < 0.2:
        dx, dy = rng.integers(-SHADOW, SHADOW + 1, 2)
        dark = 0.3 * rng.random(3, dtype=np.float32)
        paint(dark, rng.uniform(0, 0.5), dx, dy, opacity=rng.uniform(0.2, 0.7))
    if rng.random() < 0.25:
        paint(rng.random(3, dtype=np.float32), rng.uniform(0.5, 2.0))
    paint(colour, 0.0)

    grey = _luma(image)
    image = grey + math.sqrt(rng.random()) * (image - grey)
    across, down = rng.uniform(-0.2, 0.2, 2).tolist()  # light falls off to one side
    image *= rng.uniform(0.75, 1.1) + across * RAMP + down * RAMP[:, None]
    image = np.ascontiguousarray((255 * np.minimum(image, 1)).astype(np.uint8).transpose(1, 2, 0))
    blur = rng.uniform(0, 1.5)  # pixels, the standard deviation
    if blur > 0.4:  # less than that shows nothing
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(blur)))
    noise = rng.random((SIZE, SIZE, 3), dtype=np.float32) - 0.5
    image = image + rng.uniform(0, 40) * noise + 0.5
    return np.clip(image, 0, 255).astype(np.uint8), symbol // alphabet.forms


def _render_range(alphabet: Alphabet, seed: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    labels = np.empty(count, np.int64)
    for i in range(count):
        images[i], labels[i] = render_digit(seed, start + i, alphabet)
    return images, labels


def _start_worker() -> None:
    gc.freeze()  # else a collection here could free what the parent holds on its GPU
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a killed parent leaves no worker waiting


def _render_chunks(
    alphabet: Alphabet, seed: int, starts: Sequence[int], counts: Sequence[int], workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    # Workers are forked: spawn and forkserver would import the caller's script again, torch and all, and
    # break where it has no `if __name__ == "__main__"`. Fork is safe beside torch's threads since a worker
    # calls only numpy and Pillow, takes no lock that another thread may hold, and leaves by os._exit. Off
    # Linux it is missing, or unsafe in the system's own libraries: one process must do.
    render = functools.partial(_render_range, alphabet, seed)
    if min(workers, len(starts)) < 2 or sys.platform != "linux":
        yield from map(render, starts, counts)
        return
    glyphs(alphabet)  # measured once, here: the workers inherit the tiles
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(min(workers, len(starts)), context, _start_worker)
    try:
        yield from pool.map(render, starts, counts)
    finally:
        pool.shutdown(cancel_futures=True)


def render_digits(
    seed: int, start: int, count: int, workers: int | None = None, progress: bool = True, alphabet: Alphabet = DIGITS
) -> tuple[np.ndarray, np.ndarray]:
    """Render the images start .. start + count - 1 of a seed, in parallel where that pays.

    Args:
        workers: processes; None for one a core that this process may use. Off Linux it is always one.
        progress: show a bar on stderr, if that is a terminal.

    Returns:
        images (count, 32, 32, 3): uint8; labels (count,): int64.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    starts = range(start, start + count, CHUNK)
    counts = [min(CHUNK, start + count - first) for first in starts]
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    labels = np.empty(count, np.int64)
    done = 0
    with tqdm(total=count, desc="rendering", unit="img", disable=None if progress else True) as bar:
        for chunk_images, chunk_labels in _render_chunks(alphabet, seed, starts, counts, workers):
            chunk = slice(done, done + len(chunk_labels))
            images[chunk], labels[chunk] = chunk_images, chunk_labels
            done = chunk.stop
            bar.update(len(chunk_labels))
    return images, labels


def load_synth_digits(
    seed: int, start: int, count: int, cache_dirs: Sequence[Path], progress: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """The images of `render_digits`, from a cache file where there is one, else rendered and cached.

    Args:
        cache_dirs: folders whose subfolder `synth` holds cache files, as `digits.cache.cached` takes them.

    Returns:
        images (count, 32, 32, 3): uint8; labels (count,): int64, 0..9.
    """
    name = f"synth/synth_digits_v{VERSION}_seed{seed}_{start}_{count}.npz"
    return cached(name, count, cache_dirs, lambda: render_digits(seed, start, count, progress=progress))
