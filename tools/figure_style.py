"""How every figure looks: colours that a colour-blind reader can tell apart, sizes, and how it becomes a PNG."""

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from utils.files import write_atomically

WIDTH = 8.5  # inches: a README shows a figure at about 850 pixels, so that a point is 1.4 of its pixels
DPI = 200  # twice what is shown, for screens of high resolution
COLOURS = 256  # of the PNG's palette; keeps each file small

# Okabe and Ito's colours; a domain or a network has the same one in every figure.
SOURCE, TARGET = "#0072B2", "#D55E00"
BEFORE, AFTER = "#7F7F7F", "#007A5A"  # the network to compare with, and the run
REFERENCE = "#000000"
DIGITS = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73", "#B8A800"),
    *("#0072B2", "#D55E00", "#CC79A7", "#8C8C8C", "#7A3E9D"),
)
# Opaque white, so that a figure reads alike on GitHub's white and on its dark page.
STYLE = {
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


def new_figure(height: float) -> Figure:
    """An empty figure of a README's width. Args: height: inches."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def without_frame(axes: Axes) -> None:
    """Leave the picture alone: no ticks, no frame; labels stay."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG with a palette."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    picture = Image.open(drawn).convert("RGB").quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    write_atomically(path, lambda file: picture.save(file, "PNG", optimize=True))
