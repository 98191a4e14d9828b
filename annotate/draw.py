"""Draw boxes with labels around the digits of a picture so that they are legible at any size, on any background."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from annotate.boxes import Box, overlap

LEAST_SIDE = 400  # pixels: smaller pictures are enlarged
LEAST_FONT = 13  # pixels
LARGEST_FONT, SMALLEST_FONT = 0.035, 0.012  # shares of the picture's longer side, before any is made smaller for room
SHRINK = (1, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3)
INK, PAPER = "black", "white"
COLOURS = ("#ffd84d", "#7fd1ff")  # of the first network's predictions and of the second's


@dataclass(frozen=True)
class Layout:
    """Where everything stands on the page: pixels of the page, labels as boxes."""

    scale: int  # of the picture, which is enlarged without blurring
    font: int
    margin: tuple[int, int]  # left and right, above and below the picture
    boxes: list[Box]
    labels: list[Box]


def font_of(size: int) -> ImageFont.FreeTypeFont:
    """The font of labels, so many pixels high."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf"), size)


def place_labels(boxes: list[Box], sizes: list[tuple[int, int]], gap: int, page: tuple[int, int]) -> list[Box]:
    """A place for each label above or below its box, where it covers no other box or label; [] if there is none."""
    placed: list[Box] = []
    grown = [(x0 - gap, y0 - gap, x1 + gap, y1 + gap) for x0, y0, x1, y1 in boxes]
    for (x0, y0, x1, y1), (width, height) in zip(grown, sizes, strict=True):
        spots = [
            (x, y, x + width, y + height)
            for y, x in itertools.product((y0 - height, y1), ((x0 + x1 - width) // 2, x0, x1 - width))
        ]
        free = (
            spot
            for spot in spots
            if spot[0] >= 0 and spot[1] >= 0 and spot[2] <= page[0] and spot[3] <= page[1]
            and not any(overlap(spot, other) for other in (*grown, *placed))
        )  # fmt: skip
        spot = next(free, None)
        if spot is None:
            return []
        placed.append(spot)
    return placed


def lay_out(size: tuple[int, int], boxes: list[Box], texts: list[str], least_scale: int = 1) -> Layout:
    """The largest labels for which there is room, in a picture as large as they need.

    Args:
        size: width and height of the picture. boxes: in its pixels.
        least_scale: how much to enlarge it at least.
    """
    side = max(size)
    high = sorted(y1 - y0 for _, y0, _, y1 in boxes)[len(boxes) // 2] if boxes else side
    share = min(LARGEST_FONT, max(SMALLEST_FONT, 0.6 * high / side))  # not much larger than the digits themselves
    for shrink in SHRINK:
        scale = math.ceil(max(least_scale, LEAST_SIDE / side, LEAST_FONT / (shrink * share * side)))
        font_size = max(LEAST_FONT, round(shrink * share * scale * side))
        font, pad = font_of(font_size), max(2, font_size // 5)
        sizes = [(round(font.getlength(text)) + 2 * pad, font_size + 2 * pad) for text in texts]
        across, down = max((w for w, _ in sizes), default=0) // 2 + 2 * pad, font_size + 5 * pad
        margin = (across, down) if boxes else (0, 0)
        on_page = [
            (margin[0] + x0 * scale, margin[1] + y0 * scale, margin[0] + x1 * scale, margin[1] + y1 * scale)
            for x0, y0, x1, y1 in boxes
        ]
        page = (size[0] * scale + 2 * margin[0], size[1] * scale + 2 * margin[1])
        labels = place_labels(on_page, sizes, pad + 1, page)
        if labels or not boxes:
            break
    if not labels:  # so many digits, so close together: labels cover something, but each is there
        labels = [(x0, y0 - h, x0 + w, y0) for (x0, y0, _, _), (w, h) in zip(on_page, sizes, strict=True)]
    return Layout(scale, font_size, margin, on_page, labels)


def draw_digits(
    picture: Image.Image, boxes: list[Box], texts: list[str], colour: str = COLOURS[0], least_scale: int = 1
) -> Image.Image:
    """The picture, enlarged if it is small, with a box and a label around each digit, and a margin for the labels."""
    layout = lay_out(picture.size, boxes, texts, least_scale)
    enlarged = picture.resize([side * layout.scale for side in picture.size], Image.Resampling.NEAREST)
    page = Image.new("RGB", [side + 2 * m for side, m in zip(enlarged.size, layout.margin, strict=True)], PAPER)
    page.paste(enlarged, layout.margin)
    draw, font = ImageDraw.Draw(page), font_of(layout.font)
    line = max(1, layout.font // 9)
    for x0, y0, x1, y1 in layout.boxes:  # black, colour, black: one of them shows on any background
        for grow, fill, width in ((2 * line + 1, INK, line + 2), (2 * line, colour, line)):
            draw.rectangle((x0 - grow, y0 - grow, x1 - 1 + grow, y1 - 1 + grow), outline=fill, width=width)
    for (x0, y0, x1, y1), text in zip(layout.labels, texts, strict=True):
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=colour, outline=INK, width=line)
        draw.text(((x0 + x1) / 2, (y0 + y1) / 2), text, INK, font, anchor="mm")
    return page


def side_by_side(pages: list[Image.Image], titles: list[str]) -> Image.Image:
    """Pages beside each other, or below each other if they are wide, each under its title."""
    longest = max(max(page.size) for page in pages)
    size = max(LEAST_FONT, round(0.03 * longest))
    beside = all(page.width < 1.5 * page.height for page in pages)
    titled = []
    for page, title in zip(pages, titles, strict=True):
        font = font_of(size)
        room = page.width - size
        while len(title) > 4 and font.getlength(title) > room:
            title = title[: (len(title) - 1) // 2] + "…" + title[(len(title) - 1) // 2 + 2 :]
        strip = Image.new("RGB", (page.width, page.height + 2 * size), PAPER)
        strip.paste(page, (0, 2 * size))
        ImageDraw.Draw(strip).text((page.width / 2, size), title, INK, font, anchor="mm")
        titled.append(strip)
    gap = size
    width, height = (
        sum(sides) + gap * (len(pages) - 1) if stacked else max(sides)
        for sides, stacked in (([p.width for p in titled], beside), ([p.height for p in titled], not beside))
    )
    page, at = Image.new("RGB", (width, height), PAPER), 0
    for strip in titled:
        page.paste(strip, (at, 0) if beside else (0, at))
        at += (strip.width if beside else strip.height) + gap
    return page
