"""Write the pictures in images/, composed of rendered digits and of handwriting from scikit-learn's test digits.

python -m tools.make_images
"""

import functools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from sklearn.datasets import load_digits
from sklearn.utils import Bunch

from digits.readers import OPTDIGITS_TRAIN
from digits.synth import DIGITS, FACES, GLYPH_HEIGHT, glyphs, render_digit
from utils.cli import run_script, script_parser

ROOT = Path(__file__).resolve().parent.parent
SYNTH_SEED = 1  # not the seed of the training images
BOLD = FACES.index(("DejaVuSans-Bold", 0x30))


@functools.cache
def scans() -> Bunch:
    """scikit-learn's handwritten digits."""
    return load_digits()


def handwriting(rng: np.random.Generator, digit: int, height: int) -> np.ndarray:
    """A handwritten digit, enlarged to so many pixels, as ink coverage. Shape: -> (height, W) float32 in [0, 1]."""
    digits = scans()
    chosen = OPTDIGITS_TRAIN + rng.choice(np.flatnonzero(digits.target[OPTDIGITS_TRAIN:] == digit))
    pixels = digits.images[chosen] / 16
    used = np.flatnonzero(pixels.any(0))
    small = Image.fromarray(np.pad(pixels[:, used[0] : used[-1] + 1], 1).astype(np.float32))
    width = round(height * small.width / small.height)
    large = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
    return np.clip((large - 0.4) / 0.3, 0, 1)  # pens leave sharper edges than an enlargement


def print_digit(digit: int, height: int) -> np.ndarray:
    """A digit in bold type as ink coverage. Shape: -> (H, W) float32 in [0, 1]."""
    tiles, _ = glyphs(DIGITS)
    tile = tiles[BOLD][digit]
    scale = height / GLYPH_HEIGHT
    large = tile.resize([round(side * scale) for side in tile.size], Image.Resampling.BICUBIC)
    cover = np.clip(np.asarray(large) * scale + 0.5, 0, 1)
    used = np.flatnonzero(cover.any(0))
    return cover[:, used[0] : used[-1] + 1]


def write_line(page: np.ndarray, digits: list[np.ndarray], left: int, top: int, gap: int, colour: tuple) -> None:
    """Paint digits from left to right onto a page. Shape: page (H, W, 3) float32 in [0, 255], changed in place."""
    for cover in digits:
        height, width = cover.shape
        place = page[top : top + height, left : left + width]
        place += cover[..., None] * (np.array(colour, np.float32) - place)
        left += width + gap


def paper(rng: np.random.Generator, width: int, height: int, colour: tuple, unevenness: float) -> np.ndarray:
    """A sheet with soft stains. Shape: -> (height, width, 3) float32 in [0, 255]."""
    grid = Image.fromarray(rng.uniform(1 - unevenness, 1, (4, 5)).astype(np.float32))
    light = np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))
    return light[..., None] * np.array(colour, np.float32)


def save(rng: np.random.Generator, name: str, page: np.ndarray, noise: float = 4) -> None:
    """Save a page as a photograph: a little out of focus, with noise."""
    sharp = Image.fromarray(page.clip(0, 255).astype(np.uint8))
    pixels = np.asarray(sharp.filter(ImageFilter.GaussianBlur(0.8)), np.float32)
    pixels += rng.normal(0, noise, pixels.shape)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(ROOT / "images" / name, quality=80)


def plate(rng: np.random.Generator) -> None:
    """A house number: white on blue enamel, with a frame, on a wall of bricks."""
    wall = Image.new("RGB", (480, 340), (150, 140, 130))
    draw = ImageDraw.Draw(wall)
    for row, y in enumerate(range(-10, 340, 34)):
        for x in range(-(row % 2) * 45, 480, 90):
            shade = int(rng.integers(-14, 15))
            draw.rectangle((x, y, x + 85, y + 29), (150 + shade, 82 + shade, 62 + shade))
    draw.rounded_rectangle((84, 76, 402, 270), 16, (25, 45, 110))
    draw.rounded_rectangle((94, 86, 392, 260), 10, outline=(235, 235, 230), width=4)
    page = np.asarray(wall, np.float32).copy()
    write_line(page, [print_digit(digit, 84) for digit in (1, 9, 0)], 138, 96, 18, (240, 240, 235))
    save(rng, "plate.jpg", page * np.linspace(1.05, 0.75, 480, dtype=np.float32)[:, None])


def note(rng: np.random.Generator) -> None:
    """Several lines in blue ink on paper."""
    page = paper(rng, 660, 440, (250, 244, 226), 0.12)
    for row, number in enumerate(("2025081", "4711", "365", "90210")):
        digits = [handwriting(rng, int(digit), 66 + int(rng.integers(-6, 7))) for digit in number]
        write_line(page, digits, 36 + int(rng.integers(0, 30)), 26 + 100 * row, 14, (38, 48, 120))
    save(rng, "note.jpg", page)


def blackboard(rng: np.random.Generator) -> None:
    """Chalk on slate: light on dark."""
    page = paper(rng, 520, 260, (52, 66, 58), 0.3)
    for row, number in enumerate(("31415", "9265")):
        digits = [handwriting(rng, int(digit), 84) for digit in number]
        write_line(page, digits, 40 + 30 * row, 24 + 116 * row, 24, (226, 226, 214))
    save(rng, "blackboard.jpg", page, noise=7)


def shadow(rng: np.random.Generator) -> None:
    """A sheet half of which lies in a shadow with a soft edge."""
    page = paper(rng, 680, 200, (238, 232, 214), 0.25)
    digits = [handwriting(rng, int(digit), 96) for digit in "602214"]
    write_line(page, digits, 30, 50, 18, (52, 40, 40))
    down, across = np.mgrid[:200, :680]
    edge = np.clip((across - 220 - 0.8 * down) / 60, 0, 1).astype(np.float32)
    save(rng, "shadow.jpg", page * (1 - 0.55 * edge)[..., None])


def single_digits() -> None:
    """A handwritten seven, a tiny five and a rendered four."""
    digits = scans()
    images, labels = digits.images[OPTDIGITS_TRAIN:], digits.target[OPTDIGITS_TRAIN:]
    seven, five = (images[np.flatnonzero(labels == digit)[7]] * (255 / 16) for digit in (7, 5))
    ink = Image.fromarray((255 - seven).round().astype(np.uint8))
    ink.resize((128, 128), Image.Resampling.BICUBIC).save(ROOT / "images" / "seven.png")
    Image.fromarray(five.round().astype(np.uint8)).save(ROOT / "images" / "five.png")

    index = next(i for i in range(100) if render_digit(SYNTH_SEED, i)[1] == 4)
    number, _ = render_digit(SYNTH_SEED, index)
    Image.fromarray(number).save(ROOT / "images" / "four.png")


def main() -> None:
    script_parser(
        description="Write the pictures in images/.",
        epilog="examples:\n"
        "  python -m tools.make_images          the pictures to try image_annotate.py on\n"
        "  python -m tools.make_images --help",
    ).parse_args()
    single_digits()
    for number, picture in enumerate((plate, note, blackboard, shadow)):
        picture(np.random.default_rng((SYNTH_SEED, number)))


if __name__ == "__main__":
    run_script(main)
