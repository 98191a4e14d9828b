"""What is around finding digits: their reading order, how they are framed, and the labels drawn on them."""

import numpy as np
import pytest
from PIL import Image

from annotate.boxes import overlap, reading_order
from annotate.classify import frame
from annotate.draw import LEAST_SIDE, draw_digits, lay_out, side_by_side
from digits.domains import load_domain

WHITE, GREY, BLACK = (255,) * 3, (128,) * 3, (0,) * 3


def page(width, height, paper=WHITE):
    return Image.new("RGB", (width, height), paper)


# --- reading order ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boxes", "lines"),
    [
        ([(100, 60, 120, 90), (10, 8, 30, 38), (60, 62, 80, 92), (50, 5, 70, 40), (20, 58, 40, 88)],
         [[1, 3], [4, 2, 0]]),
        ([(40 * i, 100 * row + 12 * i, 40 * i + 30, 100 * row + 12 * i + 50) for row in (0, 1) for i in range(12)],
         [list(range(12)), list(range(12, 24))]),
        ([(0, 0, 30, 60), (40, 22, 60, 56), (70, 5, 100, 70)], [[0, 1, 2]]),
        ([(0, 0, 30, 60), (40, 0, 70, 60), (80, 10, 92, 34)], [[2], [0, 1]]),
        ([], []),
    ],
    ids=["from the top and the left", "each slanting below where the next begins", "of several heights",
         "small ones apart", "none"],
)  # fmt: skip
def test_lines(boxes, lines):
    assert reading_order(boxes) == lines


# --- what the network gets --------------------------------------------------------------------------


def test_frame():
    ink = np.zeros((40, 10), np.float32)
    ink[:, 2] = 1
    by_box = frame(ink, 20 / 28, None)
    assert by_box.shape == (56, 56)
    assert (np.flatnonzero(by_box.any(1))[[0, -1]] == (8, 47)).all(), "20 of 28 pixels"
    assert np.flatnonzero(by_box.any(0)).tolist() == [25]
    by_mass = frame(ink, 20 / 28, 14.5 / 28)
    assert np.flatnonzero(by_mass.any(0)).tolist() in ([28], [29]), "the stroke itself is in the middle"
    assert frame(ink, 1.0, 0.5).shape == (40, 40)
    assert frame(ink, 1.0, 0.5).max() == 255


def test_frame_makes_of_mnist_digits_what_they_were(real_data):
    """MNIST's own rules: 20 pixels on the longer side, the centre of mass in the middle of pixel (14, 14)."""
    images = load_domain("mnist", "train", real_data).images[:200, 0].numpy()
    shifts = []
    for image in images:
        rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
        ink = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32) / 255
        again = frame(ink, 20 / 28, 14.5 / 28)
        assert again.shape == (28, 28)
        down, across = np.flatnonzero(again.any(1))[0] - rows[0], np.flatnonzero(again.any(0))[0] - columns[0]
        shifts.append(max(abs(down), abs(across)))
    assert max(shifts) <= 1
    assert shifts.count(0) > 100


# --- what is drawn ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [28, 64, 300, 1000, 4000])
def test_labels_lie_free(side):
    """No label covers a digit or another label, none is cut off, and each is legible."""
    high = max(6, side // 14)
    size = (side, max(3 * high, side // 2))
    boxes = [  # two lines of digits, close together
        (x, y, x + (high // 3 if i % 3 else high * 2 // 3), y + high)
        for y in (0, high + high // 2)
        for i, x in enumerate(range(0, side - high, high))
    ]
    if side == 28:
        size, boxes = (28, 28), [(0, 0, 28, 28)]
    layout = lay_out(size, boxes, ["7 100%"] * len(boxes))
    width, height = (s * layout.scale + 2 * m for s, m in zip(size, layout.margin, strict=True))
    assert len(layout.boxes) == len(boxes)
    for i, (label, place) in enumerate(zip(layout.labels, layout.boxes, strict=True)):
        assert 0 <= label[0] < label[2] <= width
        assert 0 <= label[1] < label[3] <= height
        assert not any(overlap(label, other) for other in (*layout.boxes, *layout.labels[:i]))
        assert max(place[1] - label[3], label[1] - place[3], 0) <= layout.font, "beside its own box"
        assert max(label[0] - place[2], place[0] - label[2]) < layout.font
    assert layout.font >= max(12, 0.0035 * max(width, height))
    assert max(size) * layout.scale >= LEAST_SIDE


@pytest.mark.parametrize("ground", [WHITE, GREY, BLACK, (255, 216, 77), (127, 209, 255)])
def test_boxes_show_on_any_background(ground):
    picture, mark = page(500, 300, ground), ([(200, 100, 250, 180)], ["5 98%"])
    drawn, bare = (np.asarray(draw_digits(picture, *m).convert("L"), np.int64) for m in (mark, ([], [])))
    assert bare.shape == (300, 500), "no margin where there is no label"
    y, x = (np.array(drawn.shape) - bare.shape) // 2
    inside, beside = drawn[y + 100 : y + 180, x + 200 : x + 250], drawn[y + 140, x + 250 : x + 262]
    assert (inside == bare[0, 0]).all(), "the box leaves the digit itself alone"
    assert beside.max() - beside.min() > 100
    (label,) = lay_out(picture.size, *mark).labels
    text = drawn[label[1] + 4 : label[3] - 4, label[0] + 4 : label[2] - 4]
    assert (text < 60).mean() > 0.05, "in black"
    assert (text > 150).mean() > 0.3, "on colour"


def test_an_enlarged_picture_is_not_blurred():
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    drawn = np.asarray(draw_digits(Image.fromarray(pixels), [], []))
    scale = len(drawn) // 28
    assert scale >= 10
    assert (drawn == pixels.repeat(scale, 0).repeat(scale, 1)).all()


def test_side_by_side():
    """Pages as they are, beside each other or, if they are wide, below each other, under titles of their own."""
    tall, wide = page(200, 300, (10, 0, 0)), page(600, 200, (10, 0, 0))
    both = side_by_side([tall, tall], ["one", "a title that is much longer than there is room for, and so cut short"])
    assert both.width > 400
    assert 300 < both.height < 400
    assert (np.asarray(both) == (10, 0, 0)).all(2).sum() == 2 * 200 * 300, "no title runs into a page"
    both = side_by_side([wide, wide], ["one", "two"])
    assert both.width == 600
    assert both.height > 400
