"""How every figure looks, and the figures that both a run's log and tools/figures.py have."""

import io
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from data_loader import DigitSet, Preprocessing
from utils.files import write_atomically

WIDTH = 8.5  # inches: a README shows a figure at about 850 pixels, so that a point is 1.4 of its pixels
DPI = 200  # twice what is shown, for screens of high resolution
COLOURS = 256  # of the PNG's palette; keeps each file small
COLUMNS = 12  # pictures in a row
GAP = 0.08  # between pictures, in pictures

# Okabe and Ito's colours, safe for colour-blind readers; a domain or a class has the same one in every figure.
SOURCE, TARGET = "#0072B2", "#D55E00"
REFERENCE = "#000000"
CLASSES = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73", "#B8A800"),
    *("#0072B2", "#D55E00", "#CC79A7", "#8C8C8C", "#7A3E9D"),
)
CAPTION = 130  # characters of a line below a figure
LONGEST_NAME = 9  # characters of a class below a picture
LEGIBLE = 15  # classes of a confusion matrix whose counts can still be read
# Opaque white, so that a figure reads alike on GitHub's white and on its dark page.
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.constrained_layout.w_pad": 0.09,
    "figure.constrained_layout.h_pad": 0.09,
}


def class_colours(count: int) -> list[str]:
    """A colour for each of so many classes; beyond ten from all around the circle of colours."""
    if count <= len(CLASSES):
        return list(CLASSES[:count])
    return [to_hex(hsv_to_rgb((i / count, 1, 0.55 + 0.3 * (i % 2))).tolist()) for i in range(count)]


def new_figure(height: float) -> Figure:
    """An empty figure of a README's width. Args: height: inches."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def without_frame(axes: Axes) -> None:
    """Leave the picture alone: no ticks, no frame; labels stay."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def rendered(figure: Figure, dpi: int = DPI) -> Image.Image:
    """The figure in pixels."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    return Image.open(drawn).convert("RGB")


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG with a palette."""
    picture = rendered(figure).quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    write_atomically(path, lambda file: picture.save(file, "PNG", optimize=True))


@dataclass(frozen=True)
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


def spread(chosen: Tensor, labels: Tensor, count: int, seed: int) -> Tensor:
    """`count` of the chosen images, drawn so that each class gets its turn, in the order of the classes.

    Shape: (N,) int64 indices, (M,) int64 labels of all images -> (at most count,) int64
    """
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))]
    counted = F.one_hot(labels[chosen], int(labels.max()) + 1).cumsum(0)
    turn = counted.gather(1, labels[chosen][:, None])[:, 0]  # an image is the how-manieth of its class
    chosen = chosen[turn.argsort(stable=True)[:count]]
    return chosen[labels[chosen].argsort(stable=True)]


def draw_confusion(axes: Axes, confusion: Tensor, title: str, classes: tuple[str, ...]) -> None:
    """Counts, coloured by their share of the true class's images. Shape: (K, K), rows the true class."""
    counts = confusion.numpy()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (true, predicted), count in np.ndenumerate(counts) if len(classes) <= LEGIBLE else ():
        colour = "#999999" if count == 0 else "white" if shares[true, predicted] > 0.6 else "black"
        axes.text(predicted, true, f"{count}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted", ylabel="true class")
    correct, total = counts.trace(), counts.sum()
    axes.set_title(f"{title}: {correct / total:.2%} ({correct:,} / {total:,})")
    axes.tick_params(length=0)


@matplotlib.rc_context(STYLE)
def confusion_figure(confusions: dict[str, Tensor], mark: str, classes: tuple[str, ...]) -> Figure:
    """How often test images of which class are predicted as which, by each network by name.

    Args:
        mark: what the images are.
    """
    figure = new_figure(5)
    panels = figure.subplots(1, len(confusions), squeeze=False)[0]
    for axes, (name, confusion) in zip(panels, confusions.items(), strict=True):
        draw_confusion(axes, confusion, name, classes)
    caption = (
        f"{mark} test images by what they are and what they are predicted as; the darker, the larger the share of "
        "the true class"
    )
    figure.supxlabel(textwrap.fill(caption, CAPTION), fontsize=9)
    return figure


@matplotlib.rc_context(STYLE)
def misclassified_figure(
    predictions: dict[str, Tensor], target: DigitSet, image_size: int, seed: int = 0
) -> tuple[Figure, dict[str, int]]:
    """Images that the first network misclassifies and the second one does not, and the other way; of one, its own.

    Returns the figure and the counts.

    Args:
        predictions: of each network, by name, for each image of `target`, int64 of shape (N,).
        image_size: height and width of the pictures, pixels.
    """
    labels, classes, names = target.labels, target.classes, list(predictions)
    right = [prediction == labels for prediction in predictions.values()]
    total = f"{{count:,}} of {len(target):,} {target.domain} test images"
    if len(names) == 1:
        groups = [("misclassified", ~right[0], 3, f"Misclassified by {names[0]}: {total}")]
    else:
        groups = [
            ("gained", right[1] & ~right[0], 2, f"Misclassified by {names[0]}, right by {names[1]}: {total}"),
            ("lost", right[0] & ~right[1], 1, f"Right by {names[0]}, misclassified by {names[1]}: {total}"),
        ]
    classes = tuple(name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…" for name in classes)
    true = "\ntrue " if max(map(len, classes)) < 5 else "\ntrue\n"
    rows, counts = [], {"total": len(target)}
    for name, mask, lines, heading in groups:
        chosen = mask.nonzero()[:, 0]
        counts[name] = len(chosen)
        heading = heading.format(count=counts[name])
        for part in spread(chosen, labels, lines * COLUMNS, seed).split(COLUMNS):
            captions = [
                " → ".join(classes[prediction[i]] for prediction in predictions.values()) + true + classes[label]
                for i, label in zip(part.tolist(), labels[part].tolist(), strict=True)
            ]
            pictures = target.images[part]
            if len(part):  # nothing to interpolate in nothing
                pictures = Preprocessing(image_size).resize(pictures)
            rows.append(Row(as_pictures(pictures / 255, 0, 1), captions, "", heading))
            heading = ""
    return gallery(rows, left=0.0), counts


@matplotlib.rc_context(STYLE)
def histograms_figure(f_s: Tensor, f_t: Tensor, source: str, target: str) -> Figure:
    """How three quantities of the features are spread in each domain: the two lie over each other where it adapted.

    The third is the position on the line through the domains' mean features, which is where they differ most plainly.

    Shape: (N, F), (M, F)
    """
    axis = f_t.mean(0) - f_s.mean(0)
    axis = axis / axis.norm().clamp_min(1e-9)
    panels = {
        "values of the features": (f_s.flatten(), f_t.flatten()),
        "length of a feature vector": (f_s.norm(dim=1), f_t.norm(dim=1)),
        "along the domains' difference": (f_s @ axis, f_t @ axis),
    }
    figure = new_figure(2.9)
    for axes, (title, values) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        edges = np.histogram_bin_edges(torch.cat(values).numpy(), 40)
        for part, colour, name in zip(values, (SOURCE, TARGET), (source, target), strict=True):
            weights = np.full(len(part), 1 / len(part))
            axes.hist(part.numpy(), edges, weights=weights, color=colour, alpha=0.5, label=name)
        axes.set_title(title)
        axes.set_ylabel("share")
    figure.axes[0].set_yscale("log")  # most are 0
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=2, frameon=False)
    return figure
