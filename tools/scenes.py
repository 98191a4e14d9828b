"""Pictures of digits at known places, to train the detector on: house numbers, handwriting, print; letters are none.

Everything in them can be downloaded: SVHN's 32 × 32 crops, which `tools.strips` puts together again, unlabelled MNIST,
photographs of BSDS500, and matplotlib's fonts. Scene i depends on (seed, i) alone.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch.utils.data import Dataset

from annotate.detector import CLASSES, LARGEST_HEIGHT, LEAST_HEIGHT, NONE, SHIFT, STRIDE, USUAL_BOX
from digits.synth import FACES
from tools.compose import cut_out
from tools.strips import SIDE as CROP
from tools.strips import Number, Strip, put_together

SIDE = 96  # pixels, both sides of a scene
KINDS = {"house numbers": 0.52, "handwriting": 0.17, "print": 0.13, "letters": 0.08, "nothing": 0.1}  # shares
OTHER_SIGNS = "ABCDEFGHJKMNPQRTUVWXYabdefghjkmnpqrtuvwxyE#&/()-.,:"  # that no digit is taken for: no I, O, S, Z, l, o
IGNORED = -1  # the class of places that teach nothing
Placed = tuple[float, float, float, float, int]  # a digit: its middle, width and height in pixels, and its class


@dataclass(frozen=True)
class Material:
    """What scenes are made of.

    Shape: crops (N, 32, 32, 3) uint8, handwriting (M, H, W) uint8 light on black, its labels (M,), photographs
    (H, W, 3) uint8 of at least 60 pixels a side
    """

    crops: np.ndarray
    numbers: Sequence[Number]
    handwriting: np.ndarray
    labels: np.ndarray
    photographs: Sequence[np.ndarray]


class Scenes(Dataset):
    """Endless scenes. Shape of each: image (3, 96, 96) uint8, classes (24, 24) int64, boxes (4, 24, 24) float32"""

    def __init__(self, material: Material, seed: int):
        self.material, self.seed = material, seed

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        image, digits, unknown = make_scene(self.material, np.random.default_rng((self.seed, index)))
        return np.ascontiguousarray(image.transpose(2, 0, 1)), *targets(digits, unknown)


def make_scene(material: Material, rng: np.random.Generator) -> tuple[np.ndarray, list[Placed], np.ndarray]:
    """A scene, its digits, and where there may be others that nobody has labelled.

    Shape: -> image (96, 96, 3) uint8, unknown (96, 96) bool
    """
    canvas = ground(material.photographs, rng)
    unknown = np.zeros((SIDE, SIDE), bool)
    kind = rng.choice(list(KINDS), p=list(KINDS.values()))
    digits: list[Placed] = []
    if kind == "house numbers":
        canvas, digits = hang_numbers(canvas, material, unknown, rng)
    elif kind == "handwriting":
        canvas, digits = write_by_hand(canvas, material, rng)
    elif kind != "nothing":
        canvas, digits = set_in_print(canvas, kind == "print", rng)
    return take(canvas, rng), digits, unknown


def height_of_digits(rng: np.random.Generator) -> float:
    """Pixels: mostly what the detector answers to, else less or more, which counts as none."""
    kind = rng.random()
    if kind < 0.76:
        return float(np.exp(rng.uniform(np.log(LEAST_HEIGHT), np.log(LARGEST_HEIGHT))))
    return float(rng.uniform(9, LEAST_HEIGHT) if kind < 0.88 else rng.uniform(LARGEST_HEIGHT, 70))


def ground(
    photographs: Sequence[np.ndarray], rng: np.random.Generator, size: tuple[int, int] = (SIDE, SIDE)
) -> np.ndarray:
    """A part of a photograph, or a smooth slope of colour or grey. Shape: -> (*size, 3) float32 in [0, 255]"""
    if rng.random() < 0.65:
        photograph = photographs[int(rng.integers(len(photographs)))]
        height, width = photograph.shape[:2]
        side = min(int(np.exp(rng.uniform(np.log(60), np.log(300)))), height, width)
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        part = photograph[top : top + side, left : left + side]
    else:
        slope = rng.uniform(0, 255, 3) + rng.uniform(-60, 60) * (rng.random((2, 2, 3)) - 0.5)
        if rng.random() < 0.5:
            slope = slope.mean(-1, keepdims=True).repeat(3, -1)
        part = slope.clip(0, 255).astype(np.uint8)
    return np.array(Image.fromarray(part).resize(size[::-1], Image.Resampling.BILINEAR), np.float32)


def window(
    canvas: np.ndarray, x: int, y: int, width: int, height: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Which pixels of a canvas something covers whose corner is at x, y, and which of its own they are."""
    rows, columns = canvas.shape[:2]
    x0, y0, x1, y1 = max(0, x), max(0, y), max(0, min(columns, x + width)), max(0, min(rows, y + height))
    return np.s_[y0:y1, x0:x1], np.s_[y0 - y : max(y0, y1) - y, x0 - x : max(x0, x1) - x]


def hang_numbers(
    canvas: np.ndarray, material: Material, unknown: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, list[Placed]]:
    """Up to six house numbers on the ground, none on another."""
    digits: list[Placed] = []
    taken = np.zeros((SIDE, SIDE), bool)
    for attempt in range(int(rng.integers(1, 7))):
        strip = put_together(material.crops, material.numbers[int(rng.integers(len(material.numbers)))])
        scale_y = height_of_digits(rng) / CROP
        scale_x = scale_y * float(np.exp(rng.uniform(-0.3, 0.15)))
        width, height = max(4, round(strip.image.shape[1] * scale_x)), max(4, round(strip.image.shape[0] * scale_y))
        x, y = int(rng.integers(-width // 2, SIDE - width // 3)), int(rng.integers(-height // 3, SIDE - height // 2))
        around, _ = window(taken, x - 3, y - 3, width + 6, height + 6)
        if taken[around].any():
            continue
        here, placed = hang(canvas, strip, (x, y, width, height), attempt == 0, rng)
        taken[here] = True
        digits += placed
        for (middle, down, _, tall, _), side in ((placed[0], -1), (placed[-1], 1)):
            # What stands beside the outermost digits is cut by their crops, but for a narrow neighbour.
            across = tall * scale_x / scale_y
            left = middle + (0.3 if side > 0 else -0.6) * across
            here, _ = window(unknown, round(left), round(down - 0.4 * tall), round(0.3 * across), round(0.8 * tall))
            unknown[here] = True
    return canvas, digits


def hang(
    canvas: np.ndarray, strip: Strip, place: tuple[int, int, int, int], may_go_on: bool, rng: np.random.Generator
) -> tuple[tuple[slice, slice], list[Placed]]:
    """Paint a number onto the canvas, its edges soft, where the canvas may go on as the number's wall does.

    Args:
        place: x and y of its corner, width and height.

    Returns: the pixels that were painted, and its digits.
    """
    x, y, width, height = place
    scale_x, scale_y = width / strip.image.shape[1], height / strip.image.shape[0]
    image = np.asarray(Image.fromarray(strip.image).resize((width, height), Image.Resampling.BILINEAR), np.float32)
    margin = int(rng.integers(1, 9))
    soft = int(rng.integers(1, margin + 1))
    image = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), "edge")
    rows, columns = (np.minimum(np.arange(n) + 1, np.arange(n, 0, -1)) for n in image.shape[:2])
    cover = np.minimum(np.minimum(rows[:, None], columns) / soft, 1)[..., None].astype(np.float32)
    if may_go_on and rng.random() < 0.35:
        wall = np.concatenate((image[0], image[-1])).mean(0)
        canvas[:] = (0.15 * canvas + 0.85 * (wall + 0.4 * (canvas - canvas.mean((0, 1))))).clip(0, 255)
    here, own = window(canvas, x - margin, y - margin, *image.shape[1::-1])
    canvas[here] += cover[own] * (image[own] - canvas[here])
    digits: list[Placed] = []
    middles = [x + digit.x * scale_x for digit in strip.digits]
    for i, (middle, digit) in enumerate(zip(middles, strip.digits, strict=True)):
        gaps = [abs(middle - middles[j]) for j in (i - 1, i + 1) if 0 <= j < len(middles)]
        across = digit.height * scale_x
        box_width = max(min([*gaps, (0.4 if digit.label == 1 else 0.62) * across]), 0.3 * across)
        digits.append((middle, y + digit.y * scale_y, box_width, digit.height * scale_y, digit.label))
    return here, digits


def make_picture(material: Material, rng: np.random.Generator) -> tuple[np.ndarray, list[Placed]]:
    """A picture with one house number, as a camera takes it, and its digits. Shape: -> image (H, W, 3) uint8"""
    strip = put_together(material.crops, material.numbers[int(rng.integers(len(material.numbers)))])
    scale = float(np.exp(rng.uniform(np.log(12), np.log(90)))) / CROP
    width, height = (max(4, round(side * scale)) for side in strip.image.shape[1::-1])
    size = round(height * rng.uniform(1.3, 2.2)), round(width + height * rng.uniform(0.4, 2.5))
    canvas = ground(material.photographs, rng, size)
    x, y = int(rng.integers(0, size[1] - width + 1)), int(rng.integers(0, size[0] - height + 1))
    _, digits = hang(canvas, strip, (x, y, width, height), True, rng)
    return take(canvas, rng), digits


def write_by_hand(canvas: np.ndarray, material: Material, rng: np.random.Generator) -> tuple[np.ndarray, list[Placed]]:
    """Lines of handwritten digits in ink of any colour that stands out."""
    digits: list[Placed] = []
    cover = np.zeros((SIDE, SIDE), np.float32)
    size = height_of_digits(rng)
    y = rng.uniform(size / 2, max(size / 2 + 1, SIDE - size / 2))
    for _ in range(int(rng.integers(1, 4))):
        x = rng.uniform(-5, 25)
        while x < SIDE:
            i = int(rng.integers(len(material.handwriting)))
            digit = cut_out(material.handwriting[i])
            scale = size * rng.uniform(0.85, 1.15) / max(digit.height, 0.7 * digit.width)
            width, height = max(2, round(digit.width * scale)), max(2, round(digit.height * scale))
            ink = np.asarray(digit.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
            middle = y + rng.uniform(-0.1, 0.1) * size
            here, own = window(cover, round(x), round(middle - height / 2), width, height)
            cover[here] = np.maximum(cover[here], ink[own])
            digits.append((x + width / 2, middle, width, height, int(material.labels[i])))
            x += width + max(2, rng.uniform(0.08, 0.7) * size)
        y += size * rng.uniform(1.25, 1.6)
    if canvas.std() > 30:
        canvas = 0.4 * canvas + 0.6 * canvas.mean((0, 1))
    return canvas + cover[..., None] * (ink_on(canvas, rng) - canvas), digits


def set_in_print(canvas: np.ndarray, of_digits: bool, rng: np.random.Generator) -> tuple[np.ndarray, list[Placed]]:
    """Lines of printed digits, some between rules as in a table; or of letters and signs, which are none."""
    digits: list[Placed] = []
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    if canvas.std() > 30 and rng.random() < 0.6:
        picture = picture.filter(ImageFilter.GaussianBlur(6))
    size = height_of_digits(rng)
    face, zero = FACES[rng.integers(len(FACES))]
    font = font_of(face, max(6, round(size / 0.73)))
    brush, colour = ImageDraw.Draw(picture), tuple(int(v) for v in ink_on(np.asarray(picture), rng))
    ruled = of_digits and rng.random() < 0.4
    gap = float(rng.choice([0, 0.1, 0.6, 1.5]))
    y = rng.uniform(-size / 3, SIDE / 2)
    while y < SIDE:
        x = rng.uniform(-6, 30)
        while x < SIDE:
            label = int(rng.integers(CLASSES)) if of_digits else NONE
            sign = chr(zero + label) if of_digits else str(rng.choice(list(OTHER_SIGNS)))
            x0, y0, x1, y1 = brush.textbbox((x, y), sign, font)
            brush.text((x, y), sign, colour, font)
            if of_digits:
                digits.append(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0, label))
            step = font.getlength(sign) + gap * size * rng.random()
            if ruled and gap:
                brush.line((x + step - 0.1 * size, 0, x + step - 0.1 * size, SIDE), colour, int(rng.integers(1, 3)))
                step += 0.25 * size
            x += step
        if ruled:
            brush.line((0, y - 0.05 * size, SIDE, y - 0.05 * size), colour, int(rng.integers(1, 3)))
        y += size * rng.uniform(1.4, 2.2)
    return np.asarray(picture, np.float32), digits


@functools.cache
def font_of(face: str, size: int) -> ImageFont.FreeTypeFont:
    """A font of matplotlib, so many pixels large."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")), size)


def ink_on(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A colour that stands out from the ground. Shape: -> (3,) in [0, 255]"""
    light = canvas.mean()
    ink = rng.uniform(0, 255, 3) if rng.random() < 0.6 else np.full(3, rng.choice([10.0, 245.0]))
    if abs(ink.mean() - light) < 70:
        ink += 90 if light < 128 else -90
    return ink.clip(0, 255)


def take(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The scene as a camera takes it: other colours and contrast, small and enlarged, out of focus, with noise."""
    if rng.random() < 0.2:
        canvas = canvas[..., ::-1]
    if rng.random() < 0.3:
        canvas = 255 - canvas
    if rng.random() < 0.15:
        canvas = canvas.mean(-1, keepdims=True).repeat(3, -1)
    mean = canvas.mean()
    canvas = (canvas - mean) * rng.uniform(0.4, 1.2) + mean + rng.uniform(-20, 20)
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    if (kind := rng.random()) < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.3)))
    elif kind < 0.6:
        share = rng.uniform(0.4, 0.9)
        small = picture.resize([round(side * share) for side in picture.size], Image.Resampling.BOX)
        picture = small.resize(picture.size, Image.Resampling.BILINEAR)
    image: np.ndarray = np.asarray(picture, np.float32)
    if rng.random() < 0.5:
        image = image + rng.normal(0, rng.uniform(1, 10), image.shape)
    return image.clip(0, 255).astype(np.uint8)


def targets(digits: list[Placed], unknown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the detector should answer: the digit at the answers nearest to its middle, nothing elsewhere.

    Around each digit some answers are free, and around those that are a little too small or too large.

    Shape: unknown (96, 96) bool -> classes (24, 24) int64, IGNORED where any answer will do, boxes (4, 24, 24) float32
    """
    count = SIDE // STRIDE
    place = (np.arange(count) + 0.5) * STRIDE
    classes, boxes = np.full((count, count), NONE), np.zeros((4, count, count), np.float32)
    classes[unknown[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]] = IGNORED
    nearest = np.full((count, count), np.inf)
    for x, y, width, height, label in digits:
        across, down = np.abs(place - x)[None], np.abs(place - y)[:, None]
        if 0.75 * LEAST_HEIGHT < height < 1.3 * LARGEST_HEIGHT:
            near = (across <= 0.3 * max(width, 8) + 2) & (down <= 0.25 * height + 1)
            classes[near & (classes == NONE)] = IGNORED
        if LEAST_HEIGHT <= height <= LARGEST_HEIGHT:
            away = np.maximum(across, down)
            hit = (away <= STRIDE / 2 + 0.1) & (away < nearest)
            nearest[hit], classes[hit] = away[hit], label
            rows, columns = np.nonzero(hit)
            boxes[0, rows, columns] = (x - place[columns]) / SHIFT
            boxes[1, rows, columns] = (y - place[rows]) / SHIFT
            boxes[2, rows, columns] = np.log(width / USUAL_BOX[0])
            boxes[3, rows, columns] = np.log(height / USUAL_BOX[1])
    return classes, boxes
