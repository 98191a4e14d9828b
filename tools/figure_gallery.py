"""Pictures of digits in rows: what the networks see, and what they read in it."""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from data_loader import DigitSet, PairedLoader, Preprocessing, limit
from model import CLASSES
from tools.figure_data import Domains, Network
from tools.figure_style import WIDTH

COLUMNS = 12  # pictures in a row
GAP = 0.08  # between pictures, in pictures


@dataclasses.dataclass(frozen=True)
class Row:
    """Pictures (N, H, W, 3) in [0, 1], a text under each, a text to the left, and a heading above the row."""

    pictures: np.ndarray
    captions: list[str] | None = None
    left: str = ""
    heading: str = ""


def gallery(rows: list[Row], left: float) -> Figure:
    """Rows of pictures; everything is placed in units of a picture. Args: left: room for the texts to the left."""
    margin, heading_height, line_height = 0.15, 0.55, 0.25
    lines = [max((caption.count("\n") + 1 for caption in row.captions or []), default=0) for row in rows]
    heights = [
        heading_height * bool(row.heading) + 1 + GAP + line_height * count + 0.1 * bool(count)
        for row, count in zip(rows, lines, strict=True)
    ]
    width, height = COLUMNS + left + 2 * margin, sum(heights) + 2 * margin
    figure = Figure(figsize=(WIDTH, WIDTH * height / width))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-left - margin, COLUMNS + margin), ylim=(-height + margin, margin))
    axes.set_axis_off()
    y = 0.0
    for row, high in zip(rows, heights, strict=True):
        top = y
        if row.heading:
            axes.text(-left, top - 0.22, row.heading, ha="left", va="center", fontsize=10)
            top -= heading_height
        axes.text(-left, top - 0.5, row.left, ha="left", va="center", linespacing=1.3)
        for i, picture in enumerate(row.pictures):
            axes.imshow(picture, extent=(i + GAP / 2, i + 1 - GAP / 2, top - 1 + GAP, top), aspect="auto")
            if row.captions:
                axes.text(i + 0.5, top - 1, row.captions[i], ha="center", va="top", linespacing=1.2)
        y -= high
    axes.set(xlim=(-left - margin, COLUMNS + margin), ylim=(-height + margin, margin))  # imshow has changed them
    return figure


def as_pictures(x: Tensor, low: float, high: float) -> np.ndarray:
    """Values from `low` to `high` as colours. Shape: (N, 1 or 3, H, W) -> (N, H, W, 3) in [0, 1]"""
    values = x.float().cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    return np.clip((values - low) / max(high - low, 1e-6), 0, 1)


def samples_figure(network: Network, domains: Domains) -> Figure:
    """Images of both domains as they are, and below each what the network gets of it in a training step."""
    config, preprocess = network.config, network.reader.preprocess
    source, target = limit(domains.source_train, 1000), limit(domains.target_train, 1000)
    count = min(COLUMNS, len(source), len(target))

    def batch(prepare: Preprocessing, augmentation: str) -> tuple[Tensor, Tensor, Tensor]:
        """The first batch of the loader that trains; its order depends on the seed alone."""
        return next(PairedLoader(source, target.images, count, config.seed, prepare, augmentation, steps=1).epoch(0))

    raw_s, y_s, _ = batch(Preprocessing(source.images.shape[-1]), "none")
    _, _, raw_t = batch(Preprocessing(target.images.shape[-1]), "none")
    x_s, _, x_t = batch(preprocess, config.augmentation)
    values = torch.cat((x_s, x_t)).flatten().numpy()
    scale = tuple(np.percentile(values, (0.5, 99.5)))  # one for both domains
    return gallery(
        [
            Row(as_pictures(raw_s, 0, 1), None, "as it is", f"Source, {source.domain}, with labels"),
            Row(as_pictures(x_s, *scale), [str(digit) for digit in y_s.tolist()], "in training"),
            Row(as_pictures(raw_t, 0, 1), None, "as it is", f"Target, {target.domain}, no labels"),
            Row(as_pictures(x_t, *scale), ["?"] * count, "in training"),
        ],
        left=1.5,
    )


def spread(chosen: Tensor, digits: Tensor, count: int, seed: int) -> Tensor:
    """`count` of the chosen images, drawn so that each digit gets its turn, in the order of the digits.

    Shape: (N,) int64 indices, (M,) int64 labels of all images -> (at most count,) int64
    """
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))]
    counted = F.one_hot(digits[chosen], CLASSES).cumsum(0)
    turn = counted.gather(1, digits[chosen][:, None])[:, 0]  # an image is the how-manieth of its digit
    chosen = chosen[turn.argsort(stable=True)[:count]]
    return chosen[digits[chosen].argsort(stable=True)]


def misread_figure(networks: list[Network], target: DigitSet, seed: int = 0) -> tuple[Figure, dict]:
    """Digits of the target's test set that the first network misreads and the second one reads, and the other way.

    Of a single network: digits that it misreads. Returns the figure and the counts.
    """
    readings = [network.read(target.images) for network in networks]
    digits = target.labels
    right = [reading == digits for reading in readings]
    names = [network.label for network in networks]
    total = f"{{count:,}} of {len(target):,} {target.domain} test digits"
    if len(networks) == 1:
        groups = [("misread", ~right[0], 3, f"Misread by {names[0]}: {total}")]
    else:
        groups = [
            ("gained", right[1] & ~right[0], 2, f"Misread by {names[0]}, read by {names[1]}: {total}"),
            ("lost", right[0] & ~right[1], 1, f"Read by {names[0]}, misread by {names[1]}: {total}"),
        ]
    rows, counts = [], {"total": len(target)}
    for name, mask, lines, heading in groups:
        chosen = mask.nonzero()[:, 0]
        counts[name] = len(chosen)
        heading = heading.format(count=counts[name])
        for part in spread(chosen, digits, lines * COLUMNS, seed).split(COLUMNS):
            captions = [
                " → ".join(str(int(reading[i])) for reading in readings) + f"\ntrue {digits[i]}" for i in part.tolist()
            ]
            pictures = target.images[part]
            if len(part):  # nothing to interpolate in nothing
                pictures = Preprocessing(networks[-1].reader.preprocess.image_size).resize(pictures)
            rows.append(Row(as_pictures(pictures / 255, 0, 1), captions, "", heading))
            heading = ""
    return gallery(rows, left=0.0), counts
