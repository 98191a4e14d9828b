"""Compose pictures of several digits with known places, as a camera or a scanner might have taken them."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from annotate.boxes import Box, intersection_over_union


@dataclass(frozen=True)
class Composed:
    """A picture and what stands in it, line by line from left to right: digits and their boxes (x0, y0, x1, y1)."""

    picture: Image.Image
    lines: list[list[int]]
    boxes: list[tuple[int, int, int, int]]

    @property
    def digits(self) -> list[int]:
        return [digit for line in self.lines for digit in line]


def cut_out(image: np.ndarray) -> Image.Image:
    """A digit as ink coverage, light on dark, without the empty rows and columns around it. Shape: (H, W) uint8."""
    ink = image > 64
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return Image.fromarray(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def compose(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Composed:
    """A picture of 3–12 of the given digits in 1–3 lines, each 24–120 pixels on its longer side; none overlap.

    Dark on light or light on dark, in uneven light, out of focus by up to a pixel, with noise, saved as JPEG.

    Shape: images (N, H, W) uint8, light digits on black; labels (N,)
    """
    count = int(rng.integers(3, 13))
    lines = np.array_split(rng.permutation(len(images))[:count], rng.integers(1, 4))
    cover, boxes, y = np.zeros((1000, 3000), np.float32), [], int(rng.integers(10, 60))
    for line in lines:
        size = rng.uniform(28, 105)
        x, bottom = int(rng.integers(10, 80)), y
        for index in line:
            digit = cut_out(images[index])
            scale = np.clip(size * rng.uniform(0.87, 1.14), 24, 120) / max(digit.size)
            width, height = (max(2, round(side * scale)) for side in digit.size)
            top = y + int(rng.uniform(0, 0.2) * size)
            pixels = np.asarray(digit.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
            cover[top : top + height, x : x + width] = pixels
            boxes.append((x, top, x + width, top + height))
            x += width + max(4, int(rng.uniform(0.12, 0.7) * size))
            bottom = max(bottom, top + height)
        y = bottom + max(6, int(rng.uniform(0.2, 0.7) * size))
    right, bottom = (max(box[side] for box in boxes) + int(rng.integers(10, 60)) for side in (2, 3))
    picture = photograph(cover[:bottom, :right], rng)
    return Composed(picture, [[int(labels[i]) for i in line] for line in lines], boxes)


def photograph(cover: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Ink on paper, or chalk on slate, as a camera takes it. Shape: (H, W) in [0, 1]."""
    height, width = cover.shape
    paper, ink = rng.uniform(0.7, 0.98, 3), rng.uniform(0.02, 0.35, 3)
    if rng.random() < 0.5:
        paper, ink = ink, paper
    page = paper + cover[..., None] * (ink - paper)
    corners = Image.fromarray(rng.uniform(0.45, 1, (2, 2)).astype(np.float32))
    light = np.asarray(corners.resize((width, height), Image.Resampling.BILINEAR))[..., None]
    blurred = Image.fromarray((255 * page * light).astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0, 1)))
    noisy = np.asarray(blurred, np.float32) + rng.normal(0, rng.uniform(1, 10), (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=int(rng.integers(40, 95)))
    return Image.open(file).convert("RGB")


def hits(found: list[Box], true: list[Box], least: float = 0.5) -> list[tuple[int, int]]:
    """Pairs (i, j): found[i] is the box for true[j]. Their overlap is at least `least`; each box is used once."""
    pairs = sorted(
        ((intersection_over_union(a, b), i, j) for i, a in enumerate(found) for j, b in enumerate(true)), reverse=True
    )
    matched: dict[int, int] = {}
    for share, i, j in pairs:
        if share >= least and i not in matched and j not in matched.values():
            matched[i] = j
    return sorted(matched.items())
