"""Random changes of training images: the same distribution for every domain, nothing that looks like one of them.

What is drawn and what is done with it are apart, so that several processes can draw for a whole batch and each change
its share, and so that a resumed run draws the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data_loader import Draws, Views, pick, standardise

# Bounds of angle (radians), shear, the two scales and the two shifts (of half the image's size).
AFFINE = (15 * torch.pi / 180, 0.15, 0.15, 0.15, 0.125, 0.125)
# Of the next two the scales count as natural logarithms: digits get up to 1.65 times narrower or wider, or 1.49 times.
STRONG = (15 * torch.pi / 180, 0.20, 0.50, 0.30, 0.050, 0.050)  # small shifts: digits that fill the image stay in it
MILD = (15 * torch.pi / 180, 0.15, 0.40, 0.20, 0.100, 0.100)
WEAK = tuple(0.3 * bound for bound in AFFINE)
BLUR = (0.4, 2.2)  # the least and the largest standard deviation, pixels; small pictures are no sharper when enlarged
ELASTIC = 0.12  # the largest deviation of the elastic displacements, of half the image's size

# Random erasing: how often, the least and the largest share of the area, how much longer than wide at most, and from
# which part of the image, around its middle, the centre comes.
ERASING, AREAS, RATIO, CENTRES = 0.7, (0.008, 0.1), 10.0, 0.5
# Neighbours: how often on each side, and how far their centre is at least and at most, of the image's size.
NEIGHBOURS, DISTANCES = 0.6, (0.5, 0.75)


@dataclass(frozen=True)
class View:
    """How images look in training (see `data_loader.View`): one of the augmentations that `draw` takes."""

    augmentation: str
    strong_share: float = 1.0

    def draw(self, count: int, size: int, generator: torch.Generator) -> Draws:
        """What `apply` needs for `count` images of `size` × `size` pixels."""
        return draw(self.augmentation, count, size, generator, self.strong_share)

    def apply(self, images: Tensor, index: Tensor, draws: Draws) -> Tensor:
        """Images of a set, changed as drawn. Shape: (N, C, S, S) uint8, (B,) -> (B, C, S, S)"""
        others = neighbours(images, draws)
        others = None if others is None else others.float().div_(255)
        return augment(pick(images, index).float().div_(255), draws, others)


def same_views(augmentation: str) -> Views:
    """One augmentation for both domains, in every step."""
    views: Sequence[View] = (View(augmentation), View(augmentation))
    return lambda epoch, step: views


def draw(augmentation: str, count: int, size: int, generator: torch.Generator, strong_share: float = 1.0) -> Draws:
    """What `augment` needs for `count` images of `size` × `size` pixels.

    Args:
        augmentation: "none"; "affine"; "weak", affine with narrow bounds, for a teacher; "mild", neighbours, affine
            with the bounds of MILD, and inversion; "strong", neighbours, affine with the bounds of STRONG, elastic,
            inversion, appearance and erasing.
        strong_share: of the images that "strong" changes, 0 to 1; the others get what is mild, and erasing.
    """
    if augmentation == "none":
        return {}
    if augmentation in ("affine", "weak"):
        return {"affine": affine_draws(count, generator, WEAK if augmentation == "weak" else AFFINE)}
    affine = affine_draws(count, generator, MILD)
    more = {}
    if augmentation == "strong":
        strong = torch.rand(count, device=generator.device, generator=generator) < strong_share
        affine = torch.where(strong[:, None], affine_draws(count, generator, STRONG), affine)
        more = {
            "elastic": elastic_draws(count, generator) * strong[:, None, None, None],
            "strong": strong,
            "erasing": torch.rand(count, 7, device=generator.device, generator=generator),
            **appearance_draws(count, size, generator),
        }
    affine[:, 2:4] = affine[:, 2:4].expm1()  # a scale of 1 + x, drawn as its logarithm
    inverted = torch.rand(count, device=generator.device, generator=generator) < 0.5
    return {"affine": affine, "inverted": inverted, **neighbour_draws(count, generator), **more}


def augment(x: Tensor, draws: Draws, others: Tensor | None = None) -> Tensor:
    """Change images as drawn; some changes leave the range. `others` are the `neighbours` of each, where it has some.

    Shape: (N, C, S, S) in [0, 1], (N, 2, C, S, S) in [0, 1] -> (N, C, S, S)
    """
    if not draws:
        return x
    if others is not None:
        x = add_neighbours(standardise(x), [standardise(other) for other in others.unbind(1)], draws["neighbours"])
    x = random_warp(x, draws["affine"], draws.get("elastic"))
    if "inverted" in draws:
        x = torch.where(draws["inverted"].view(-1, 1, 1, 1), -x, x)
    if "strong" in draws:
        x = torch.where(draws["strong"].view(-1, 1, 1, 1), random_appearance(x, draws), standardise(x))
        x = standardise(random_erasing(x, draws["erasing"]))
    return x


def neighbour_draws(count: int, generator: torch.Generator) -> Draws:
    """What `neighbours` and `add_neighbours` need for `count` images. Shape: images and sides first in each."""
    device = generator.device
    return {
        "others": torch.rand(count, 2, device=device, generator=generator),
        "neighbours": torch.rand(count, 2, 2, device=device, generator=generator),
    }


def neighbours(images: Tensor, draws: Draws) -> Tensor | None:
    """Two other images of a set for each that is changed, if any were drawn. Shape: (M, ...) -> (N, 2, ...)"""
    return pick(images, (draws["others"] * len(images)).long()) if "others" in draws else None


def add_neighbours(x: Tensor, others: list[Tensor], numbers: Tensor) -> Tensor:
    """Add another image on the left, and a third on the right, of some images, which get room for them on both sides.

    A mixture of images (mixup, Zhang et al., ICLR 2018) in which the label is that of the one in the middle. The room
    is filled with the image's edge pixels, and the edges of what is added become 0.

    Shape: (N, C, S, S), two of (N, C, S, S), (N, 2, 2) in [0, 1) -> (N, C, S, 2S)
    """
    size = x.shape[-1]
    margin = size // 2
    x = F.pad(x, (margin, margin, 0, 0), mode="replicate")
    pixel = torch.arange(x.shape[-1], device=x.device) - margin
    near, far = DISTANCES
    for other, (distance, there), side in zip(others, numbers.permute(1, 2, 0), (-1, 1), strict=True):
        shift = side * (size * (near + (far - near) * distance)).round().long()
        column = pixel - shift[:, None]
        seen = (column >= 0) & (column < size) & (there < NEIGHBOURS)[:, None]
        edge = torch.cat((other[..., 0, :], other[..., -1, :], other[..., 0], other[..., -1]), -1).mean((1, 2))
        index = column.clamp(0, size - 1)[:, None, None].expand(x.shape)
        x = x + seen[:, None, None] * (other - edge[:, None, None, None]).gather(3, index)
    return x


def affine_draws(count: int, generator: torch.Generator, bounds: tuple[float, ...] = AFFINE) -> Tensor:
    """What `random_warp` needs for so many images, each value uniform within ± its bound. Shape: -> (count, 6)."""
    draws = torch.empty(len(bounds), count, device=generator.device)
    for row, bound in zip(draws, bounds, strict=True):
        row.uniform_(-bound, bound, generator=generator)
    return draws.T


def elastic_draws(count: int, generator: torch.Generator) -> Tensor:
    """Displacements of 5 × 5 points, from none to large ones (Simard et al. 2003). Shape: -> (count, 2, 5, 5)."""
    device = generator.device
    amplitude = torch.rand(count, 1, 1, 1, device=device, generator=generator) * ELASTIC
    return amplitude * torch.randn(count, 2, 5, 5, device=device, generator=generator)


def random_warp(x: Tensor, affine: Tensor, elastic: Tensor | None = None) -> Tensor:
    """Rotate, scale (each axis for itself), shear, shift and bend each image as drawn; values stay within its range.

    With the bounds of AFFINE: ±15°, 0.85–1.15, ±0.15, ±2 of 32 pixels. Of an image that is wider than high the square
    in the middle is shown, and more of its sides where a scale makes room.

    Shape: (N, C, S, W), (N, 6), (N, 2, 5, 5) -> (N, C, S, S)
    """
    angle, shear, wide, high, right, down = affine.T
    cos, sin = angle.cos(), angle.sin()
    rows = [(1 + wide) * cos, shear - sin, right, sin + shear, (1 + high) * cos, down]
    theta = torch.stack(rows, 1).view(-1, 2, 3)
    size, width = x.shape[-2:]
    grid = F.affine_grid(theta, [len(x), x.shape[1], size, size], align_corners=False)
    if elastic is not None:
        smooth = F.interpolate(elastic, (size, size), mode="bicubic", align_corners=True)
        grid = grid + smooth.permute(0, 2, 3, 1)
    grid = grid * grid.new_tensor([size / width, 1.0])
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def appearance_draws(count: int, size: int, generator: torch.Generator) -> Draws:
    """What `random_appearance` needs for `count` images of `size` × `size` pixels. Shape: images first in each."""
    device = generator.device
    return {
        "numbers": torch.rand(count, 3, device=device, generator=generator),
        "background": torch.randn(count, 1, 4, 4, device=device, generator=generator),
        "noise": torch.randn(count, 1, size, size, device=device, generator=generator),
    }


def random_appearance(x: Tensor, draws: Draws) -> Tensor:
    """Blur or sharpen, and add a smooth background and noise.

    Amplitudes count in standard deviations of the image, which comes out with zero mean and unit variance.

    Shape: (N, C, S, S) -> (N, C, S, S)
    """
    size = x.shape[-1]
    sharpness, amplitude, grain = draws["numbers"].view(len(x), 3, 1, 1, 1).unbind(1)
    x = standardise(x)
    # −1 … 1: half of the images are blurred, as far as drawn, the others sharpened by up to what one pixel takes.
    sharpness = 2 * sharpness - 1
    near, far = BLUR
    softer = blur(x, torch.where(sharpness > 0, near * (far / near) ** sharpness, 1.0))
    x = torch.where(sharpness > 0, softer, x + sharpness * (softer - x))
    background = F.interpolate(draws["background"], (size, size), mode="bicubic", align_corners=False)
    x = x + (1.1 * amplitude - 0.3).clamp_min(0) * background + 0.2 * grain * draws["noise"]
    return standardise(x)


def random_erasing(x: Tensor, numbers: Tensor) -> Tensor:
    """Lay a rectangle or a bar over most images, as dark or as bright as the image gets, turned by any angle.

    After Zhong et al. (AAAI 2020), with smaller and longer shapes than theirs, nearer to the middle, and no noise.

    Shape: (N, C, S, S), (N, 7) in [0, 1) -> (N, C, S, S)
    """
    size = x.shape[-1]
    erase, left, top, large, long, turn, bright = numbers.view(len(x), 7, 1, 1, 1).unbind(1)
    area = size**2 * AREAS[0] * (AREAS[1] / AREAS[0]) ** large
    ratio = RATIO**long
    left, top = (0.5 + CENTRES * (centre - 0.5) for centre in (left, top))
    pixel = torch.arange(size, device=x.device)
    right, down = pixel - size * left, (pixel - size * top).mT
    cos, sin = (torch.pi * turn).cos(), (torch.pi * turn).sin()
    along, across = cos * right + sin * down, cos * down - sin * right
    erased = (along.abs() < (area * ratio).sqrt() / 2) & (across.abs() < (area / ratio).sqrt() / 2) & (erase < ERASING)
    extreme = torch.where(bright < 0.5, x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True))
    return torch.where(erased, extreme, x)


def blur(x: Tensor, deviation: Tensor) -> Tensor:
    """Gaussian blur; `deviation` is how far, in pixels, of each image. What lies outside does not count.

    Shape: (N, C, S, S), (N, 1, 1, 1) > 0 -> (N, C, S, S)
    """
    pixel = torch.arange(x.shape[-1], device=x.device)
    kernel = ((pixel[:, None] - pixel).square() / (-2 * deviation.square())).exp()
    kernel = kernel / kernel.sum(-1, keepdim=True)
    return kernel @ x @ kernel.mT
