"""Numbers out of SVHN's single digits: crops that follow each other in its files often show one number, and overlap.

A crop is a square around its digit, as high as the digit, scaled to 32 × 32 pixels; what is left of its width shows the
neighbours. Where the next crop continues this one, the place of its digit beside this one's is known, and the crops can
be put together again. So SVHN's format 2, which has no places, gives digits at known places beside each other.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Tensor

SIDE = 32  # pixels of a crop
HEIGHTS = (0.87, 0.93, 1.0, 1.07, 1.15)  # of the next digit, in heights of this one
ACROSS, DOWN = range(3, 14), range(-2, 3)  # of its centre from this one's, in pixels of half the size
LEAST_WIDTH, LEAST_HEIGHT = 0.15, 0.6  # of what two crops share, in sides of a crop
SAME = 0.9  # correlation of what both show, above which they show the same
LARGEST_DIFFERENCE = 0.03  # of its mean grey, from black at 0 to white at 1
UNEVEN = 0.25  # taken off the correlation for the logarithm of the height: most neighbours are of one height
LEAST_VARIANCE = 2e-4  # of it; plain grey continues any plain grey
LONGEST = 6  # digits of a number
SOFT = 8  # pixels from its edge over which a crop gives way to its neighbour


@dataclass(frozen=True)
class Digit:
    """A digit of a strip: the middle of its crop and its height, in pixels of the strip."""

    x: float
    y: float
    height: float
    label: int


Number = list[tuple[int, Digit]]  # digits with the numbers of their crops in the set


@dataclass(frozen=True)
class Strip:
    """A number put together. Shape: image (H, W, 3) uint8"""

    image: np.ndarray
    digits: list[Digit]


def continuations(images: Tensor) -> tuple[Tensor, Tensor]:
    """How well each next crop continues a crop, and where: shift across, down, and relative height.

    Looked for at half the size, then among the nearest places at full size.

    Shape: (N, 3, 32, 32) uint8 -> correlation (N − 1,), places (N − 1, 3) in pixels of a crop
    """
    grey = images.float().mean(1, keepdim=True) / 255
    small = F.avg_pool2d(grey, 2)
    score, coarse = _best(
        small[:-1], small[1:], [(float(x), float(y), h) for h in HEIGHTS for x in ACROSS for y in DOWN]
    )
    best, places = torch.full_like(score, -1), torch.zeros_like(coarse)
    for place in coarse.unique(dim=0):
        x, y, height = place.tolist()
        here = ((coarse == place).all(1) & (score > -1)).nonzero()[:, 0]
        near = [(2 * x + i, 2 * y + j, height) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        if len(here):
            best[here], places[here] = _best(grey[here], grey[here + 1], near)
    return best, places


def _best(a: Tensor, b: Tensor, places: list[tuple[float, float, float]]) -> tuple[Tensor, Tensor]:
    """The place of each crop b where it is most like crop a. Shape: two (N, 1, S, S) -> correlation (N,), (N, 3)"""
    size = a.shape[-1]
    best, found = torch.full((len(a),), -1.0), torch.zeros(len(a), 3)
    scaled: dict[int, Tensor] = {}
    for x, y, height in places:
        side = round(size * height)
        if side not in scaled:
            scaled[side] = F.interpolate(b, (side, side), mode="bilinear", antialias=True)[:, 0]
        left, top = (round(size / 2 + shift - side / 2) for shift in (x, y))
        right, bottom = min(size, left + side), min(size, top + side)
        if right - max(0, left) < LEAST_WIDTH * size or bottom - max(0, top) < LEAST_HEIGHT * size:
            continue
        here = a[:, 0, max(0, top) : bottom, max(0, left) : right].flatten(1)
        there = scaled[side][:, max(0, top) - top : bottom - top, max(0, left) - left : right - left].flatten(1)
        mean_h, mean_t = here.mean(1), there.mean(1)
        variances = (here.var(1, correction=0), there.var(1, correction=0))
        covariance = (here * there).mean(1) - mean_h * mean_t
        correlation = covariance / (variances[0] * variances[1]).clamp_min(1e-12).sqrt()
        unlike = (torch.minimum(*variances) < LEAST_VARIANCE) | ((mean_h - mean_t).abs() > LARGEST_DIFFERENCE)
        correlation = correlation - UNEVEN * abs(math.log(height))
        correlation[unlike] = -1
        better = correlation > best
        best, found[better] = torch.where(better, correlation, best), torch.tensor((x, y, height))
    return best, found


def numbers(images: Tensor, labels: Tensor) -> list[Number]:
    """The crops that belong together, each with its number in the set and its place, in pixels of the first crop.

    Shape: (N, 3, 32, 32) uint8, (N,)
    """
    correlation, places = continuations(images)
    found: list[Number] = []
    for i, label in enumerate(labels.tolist()):
        if i and correlation[i - 1] > SAME and len(found[-1]) < LONGEST:
            _, before = found[-1][-1]
            across, down, height = places[i - 1].tolist()
            scale = before.height / SIDE
            digit = Digit(before.x + scale * across, before.y + scale * down, before.height * height, label)
            found[-1].append((i, digit))
        else:
            found.append([(i, Digit(SIDE / 2, SIDE / 2, SIDE, label))])
    return found


def put_together(images: np.ndarray, number: Number) -> Strip:
    """A number from its crops, each of which fades towards its edges. Shape: images (N, 32, 32, 3) uint8"""
    digits = [digit for _, digit in number]
    left, top = (min(place - digit.height / 2 for place, digit in zip(along, digits, strict=True))
                 for along in ([d.x for d in digits], [d.y for d in digits]))  # fmt: skip
    width = round(max(d.x + d.height / 2 for d in digits) - left)
    height = round(max(d.y + d.height / 2 for d in digits) - top)
    total, weight = np.zeros((height, width, 3), np.float32), np.zeros((height, width, 1), np.float32)
    for i, digit in number:
        side = round(digit.height)
        crop = np.asarray(Image.fromarray(images[i]).resize((side, side), Image.Resampling.BILINEAR), np.float32)
        ramp = np.minimum(np.minimum(np.arange(side) + 1, np.arange(side, 0, -1)), SOFT) / SOFT
        share = (ramp[:, None] * ramp)[..., None].astype(np.float32)
        x, y = (max(0, round(middle - digit.height / 2 - start)) for middle, start in ((digit.x, left), (digit.y, top)))
        area = np.s_[y : y + side, x : x + side]
        seen = np.s_[: total[area].shape[0], : total[area].shape[1]]
        total[area] += (share * crop)[seen]
        weight[area] += share[seen]
    image = total / np.maximum(weight, 1e-6)
    if not weight.all():  # above or below a crop that stands lower or higher: what is nearest goes on
        rows, columns = distance_transform_edt(weight[..., 0] == 0, return_distances=False, return_indices=True)
        image = image[rows, columns]
    moved = [Digit(d.x - left, d.y - top, d.height, d.label) for d in digits]
    return Strip(image.round().clip(0, 255).astype(np.uint8), moved)
