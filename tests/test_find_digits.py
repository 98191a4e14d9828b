"""Finding digits in pictures, apart from any network: places, pieces, lines, frames; and the labels drawn on them."""

import numpy as np
import pytest
from compose import Composed, compose, f1, hits, overlap
from PIL import Image, ImageDraw

from data_loader import load_domain
from utils.boxes import reading_order
from utils.draw_digits import LEAST_SIDE, draw_digits, lay_out, side_by_side
from utils.find_digits import find_digits, frame

WHITE, GREY, BLACK = (255,) * 3, (128,) * 3, (0,) * 3


def boxes_of(picture):
    return sorted(candidate.box for candidate in find_digits(picture))


def draw_five(draw, x, y, ink, gap=0):
    """A 5 of 50×80 pixels; its bar hangs `gap` pixels away from its belly."""
    draw.line([(x + 12, y + 4), (x + 50, y + 4)], ink, 8)
    draw.line([(x + 12, y + 9 + gap), (x + 12, y + 40), (x + 44, y + 40), (x + 44, y + 76), (x, y + 76)], ink, 8)


def found_and_composed(pictures: list[Composed]) -> tuple[int, int, int]:
    """How many boxes were found where a digit is, how many in all, how many digits there are."""
    right = found = true = 0
    for composed in pictures:
        boxes = boxes_of(composed.picture)
        right += len(hits(boxes, composed.boxes))
        found += len(boxes)
        true += len(composed.boxes)
    return right, found, true


# --- where the digits are ---------------------------------------------------------------------------


def test_boxes_in_composed_pictures(large_optdigits):
    """Thirty pictures of scikit-learn's training digits: measured, nothing missed and nothing invented."""
    images, labels = large_optdigits
    pictures = [compose(images, labels, np.random.default_rng((7, i))) for i in range(30)]
    right, found, true = found_and_composed(pictures)
    print(f"boxes: recall {right / true:.4f}, precision {right / found:.4f} of {true}")
    assert right / true >= 0.98
    assert right / found >= 0.98


def test_boxes_of_real_handwriting(real_data):
    """Forty pictures of MNIST's training digits, thin, broken or bold: F1 0.99 was measured."""
    digits = load_domain("mnist", "train", real_data)
    images, labels = digits.images[:5000, 0].numpy(), digits.labels[:5000].numpy()
    right, found, true = found_and_composed([compose(images, labels, np.random.default_rng((8, i))) for i in range(40)])
    print(f"boxes: recall {right / true:.4f}, precision {right / found:.4f} of {true}")
    assert f1(right, found, true) >= 0.97


@pytest.mark.parametrize(("paper", "ink"), [(WHITE, BLACK), (BLACK, WHITE), ((120, 160, 90), (60, 30, 110))])
def test_places_in_either_polarity(paper, ink):
    picture = Image.new("RGB", (300, 200), paper)
    draw = ImageDraw.Draw(picture)
    draw_five(draw, 40, 50, ink)
    draw.line([(200, 30), (206, 150)], ink, 8)
    five, one = boxes_of(picture)
    assert overlap(five, (40, 50, 90, 130)) > 0.85
    assert overlap(one, (196, 30, 210, 150)) > 0.7


def test_light_that_falls_off():
    """The darkest ink on the bright side is brighter than the paper on the dark side."""
    light = np.linspace(1, 0.25, 400)[None, :, None]
    picture = Image.new("RGB", (400, 150), (240, 236, 220))
    draw = ImageDraw.Draw(picture)
    places = [(x, 30, x + 50, 110) for x in (40, 170, 310)]
    for x, y, _, _ in places:
        draw_five(draw, x, y, (90, 80, 70))
    pixels = (np.asarray(picture) * light).astype(np.uint8)
    assert pixels[0, -1].max() < (np.array((90, 80, 70)) * light[0, 60]).max()
    found = boxes_of(Image.fromarray(pixels))
    assert len(found) == 3
    assert all(overlap(a, b) > 0.85 for a, b in zip(found, places, strict=True))


def test_a_plate_on_a_wall():
    """Digits of the wall's own colour on a dark plate with a frame: they stand out from the plate alone."""
    wall = (200, 190, 180)
    picture = Image.new("RGB", (600, 400), wall)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((180, 120, 460, 280), (20, 40, 100))
    draw.rectangle((188, 128, 452, 272), outline=wall, width=4)
    places = [(x, 160, x + 50, 240) for x in (220, 300, 380)]
    for x, y, _, _ in places:
        draw_five(draw, x, y, wall)
    found = boxes_of(picture)
    assert len(found) == 3, found
    assert all(overlap(a, b) > 0.8 for a, b in zip(found, places, strict=True))


def test_a_digit_in_a_frame():
    """As on a form: each digit stands in a box of its own, drawn with the same pen."""
    picture = Image.new("RGB", (400, 200), WHITE)
    draw = ImageDraw.Draw(picture)
    places = [(x, 60, x + 50, 140) for x in (60, 180, 300)]
    for x, y, _, _ in places:
        draw.rectangle((x - 25, y - 25, x + 75, y + 105), outline=BLACK, width=4)
        draw_five(draw, x, y, BLACK)
    found = boxes_of(picture)
    assert len(found) == 3, found
    assert all(overlap(a, b) > 0.8 for a, b in zip(found, places, strict=True))


@pytest.mark.parametrize("gap", [0, 3, 7])
def test_pieces_of_a_digit_are_joined(gap):
    picture = Image.new("RGB", (300, 200), WHITE)
    draw_five(ImageDraw.Draw(picture), 100, 50, BLACK, gap)
    (box,) = boxes_of(picture)
    assert overlap(box, (100, 50, 150, 130)) > 0.85


def test_neighbours_are_not_joined():
    """Digits side by side with little room, and a small number right above a large one."""
    picture = Image.new("RGB", (400, 260), WHITE)
    draw = ImageDraw.Draw(picture)
    for x in (40, 102, 164):
        draw_five(draw, x, 120, BLACK)
    for x in (50, 75, 100):
        draw.line([(x, 70), (x + 3, 104)], BLACK, 4)
    assert len(boxes_of(picture)) == 6


def test_what_is_no_digit():
    """A ruled line, a dash, a blot, specks of dust, a dot beside a digit and the shadow of a hand."""
    picture = Image.new("RGB", (500, 300), (235, 235, 230))
    draw = ImageDraw.Draw(picture)
    draw.polygon([(500, 60), (500, 300), (330, 300)], (150, 150, 145))
    draw.line([(0, 20), (500, 20)], BLACK, 3)
    draw.line([(40, 150), (90, 150)], BLACK, 8)
    draw.ellipse((220, 180, 270, 230), BLACK)
    for x, y in ((30, 60), (300, 110), (150, 260)):
        draw.rectangle((x, y, x + 3, y + 3), BLACK)
    draw.rectangle((190, 122, 197, 129), BLACK)
    draw_five(draw, 120, 50, BLACK)
    (box,) = boxes_of(picture)
    assert overlap(box, (120, 50, 170, 130)) > 0.85


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 2), (40, 40), (900, 700)])
def test_nothing_to_find(size):
    assert boxes_of(Image.new("RGB", size, (90, 140, 160))) == []


def test_noise_is_no_digit():
    noise = np.random.default_rng(0).normal(128, 20, (300, 400, 3)).clip(0, 255).astype(np.uint8)
    assert boxes_of(Image.fromarray(noise)) == []


def test_a_digit_cut_out_closely():
    """It touches the edges, and yet it is what the picture shows."""
    picture = Image.new("RGB", (60, 90), WHITE)
    draw_five(ImageDraw.Draw(picture), 5, 5, BLACK)
    (box,) = boxes_of(picture.crop((5, 5, 56, 85)))
    assert overlap(box, (0, 0, 51, 80)) > 0.9


@pytest.mark.parametrize("scale", [0.4, 1, 9])
def test_boxes_are_in_pixels_of_the_picture(scale):
    """Also of one so large that it is searched at another size."""
    picture = Image.new("RGB", (450, 300), WHITE)
    draw_five(ImageDraw.Draw(picture), 300, 100, BLACK)
    picture = picture.resize([round(side * scale) for side in picture.size], Image.BICUBIC)
    (box,) = boxes_of(picture)
    assert overlap(box, tuple(v * scale for v in (300, 100, 350, 180))) > 0.85


def test_the_same_every_time(large_optdigits):
    composed = compose(*large_optdigits, np.random.default_rng(3))
    first, again = (find_digits(composed.picture) for _ in range(2))
    assert [c.box for c in first] == [c.box for c in again]
    assert all((a.ink == b.ink).all() for a, b in zip(first, again, strict=True))


# --- reading order ----------------------------------------------------------------------------------


def test_lines_from_the_top_and_from_the_left():
    boxes = [(100, 60, 120, 90), (10, 8, 30, 38), (60, 62, 80, 92), (50, 5, 70, 40), (20, 58, 40, 88)]
    assert reading_order(boxes) == [[1, 3], [4, 2, 0]]


def test_lines_that_slant():
    """Each line ends lower than the next one begins."""
    boxes = [(40 * i, 100 * row + 12 * i, 40 * i + 30, 100 * row + 12 * i + 50) for row in (0, 1) for i in range(12)]
    assert reading_order(boxes) == [list(range(12)), list(range(12, 24))]


def test_digits_of_several_heights_in_a_line():
    assert reading_order([(0, 0, 30, 60), (40, 25, 60, 55), (70, 5, 100, 70)]) == [[0, 1, 2]]


def test_no_lines():
    assert reading_order([]) == []


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
        again_rows, again_columns = np.flatnonzero(again.any(1)), np.flatnonzero(again.any(0))
        shifts.append(max(abs(int(again_rows[0] - rows[0])), abs(int(again_columns[0] - columns[0]))))
    assert np.mean(np.array(shifts) <= 1) == 1
    assert np.mean(np.array(shifts) == 0) > 0.5


# --- what is drawn ----------------------------------------------------------------------------------


def crowded(side: int) -> tuple[tuple[int, int], list]:
    """Two lines of digits, close together, in a picture whose longer side is given."""
    size = max(6, side // 14)
    boxes = [
        (x, y, x + (size // 3 if i % 3 else size * 2 // 3), y + size)
        for y in (0, size + size // 2)
        for i, x in enumerate(range(0, side - size, size))
    ]
    return (side, max(3 * size, side // 2)), boxes


@pytest.mark.parametrize("side", [28, 64, 300, 1000, 4000])
def test_labels_lie_free(side):
    """No label covers a digit or another label, none is cut off, and each can be read."""
    size, boxes = crowded(side) if side > 28 else ((28, 28), [(0, 0, 28, 28)])
    layout = lay_out(size, boxes, ["7 100%"] * len(boxes))
    width, height = (s * layout.scale + 2 * m for s, m in zip(size, layout.margin, strict=True))
    assert len(layout.labels) == len(boxes)
    for i, label in enumerate(layout.labels):
        assert 0 <= label[0] < label[2] <= width
        assert 0 <= label[1] < label[3] <= height
        assert not any(overlap(label, other) for other in (*layout.boxes, *layout.labels[:i]))
        place = layout.boxes[i]
        assert max(place[1] - label[3], label[1] - place[3], 0) <= layout.font, "beside its own box"
        assert label[0] < place[2] + layout.font
        assert place[0] < label[2] + layout.font
    assert layout.font >= max(12, 0.0035 * max(width, height))
    assert max(size) * layout.scale >= LEAST_SIDE


@pytest.mark.parametrize("ground", [WHITE, GREY, BLACK, (255, 216, 77), (127, 209, 255)])
def test_boxes_show_on_any_background(ground):
    picture = Image.new("RGB", (500, 300), ground)
    page = np.asarray(draw_digits(picture, [(200, 100, 250, 180)], ["5 98%"]).convert("L"), np.int64)
    bare = np.asarray(draw_digits(picture, [], []).convert("L"), np.int64)
    assert bare.shape == (300, 500), "no margin where there is no label"
    row = page[page.shape[0] // 2 - 10]
    assert row.max() - row.min() > 100
    y, x = (np.array(page.shape) - bare.shape) // 2
    inside = page[y + 100 : y + 180, x + 200 : x + 250]
    assert (inside == bare[0, 0]).all(), "the box leaves the digit itself alone"


def test_an_enlarged_picture_is_not_blurred():
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    page = np.asarray(draw_digits(Image.fromarray(pixels), [], []))
    scale = len(page) // 28
    assert scale >= 10
    assert (page == pixels.repeat(scale, 0).repeat(scale, 1)).all()


def test_side_by_side():
    """Pages as they are, beside each other or, if they are wide, below each other, under titles of their own."""
    tall, wide = Image.new("RGB", (200, 300), (10, 0, 0)), Image.new("RGB", (600, 200), (10, 0, 0))
    both = side_by_side([tall, tall], ["one", "a title that is much longer than there is room for, and so cut short"])
    assert both.width > 400
    assert 300 < both.height < 400
    assert (np.asarray(both) == (10, 0, 0)).all(2).sum() == 2 * 200 * 300, "no title runs into a page"
    both = side_by_side([wide, wide], ["one", "two"])
    assert both.width == 600
    assert both.height > 400
