"""Finding digits in pictures, apart from any network: places, pieces, lines, frames; and the labels drawn on them."""

from statistics import harmonic_mean

import numpy as np
import pytest
from compose import compose, hits, overlap
from PIL import Image, ImageDraw

from annotate.boxes import reading_order
from annotate.draw import LEAST_SIDE, draw_digits, lay_out, side_by_side
from annotate.find_digits import find_digits, frame
from digits.domains import load_domain

WHITE, GREY, BLACK = (255,) * 3, (128,) * 3, (0,) * 3


def boxes_of(picture):
    return sorted(candidate.box for candidate in find_digits(picture))


def page(width, height, paper=WHITE):
    return Image.new("RGB", (width, height), paper)


def fives(picture, lefts, top, ink=BLACK, gap=0):
    """The picture with a 5 of 50×80 pixels at each place, whose bar hangs `gap` pixels away from its belly."""
    draw, y = ImageDraw.Draw(picture), top
    for x in lefts:
        draw.line([(x + 12, y + 4), (x + 50, y + 4)], ink, 8)
        draw.line([(x + 12, y + 9 + gap), (x + 12, y + 40), (x + 44, y + 40), (x + 44, y + 76), (x, y + 76)], ink, 8)
    return picture


def check_fives(picture, lefts, top, least=0.8):
    """A five is found at each of the places, and nothing else."""
    found = boxes_of(picture)
    assert len(found) == len(lefts), found
    assert all(overlap(a, (x, top, x + 50, top + 80)) > least for a, x in zip(found, lefts, strict=True))


def recall_and_precision(images, labels, seed, count):
    """Of the boxes that are found in composed pictures."""
    right = found = true = 0
    for i in range(count):
        composed = compose(images, labels, np.random.default_rng((seed, i)))
        boxes = boxes_of(composed.picture)
        right += len(hits(boxes, composed.boxes))
        found += len(boxes)
        true += len(composed.boxes)
    print(f"boxes: recall {right / true:.4f}, precision {right / found:.4f} of {true}")
    return right / true, right / found


# --- where the digits are ---------------------------------------------------------------------------


def test_boxes_in_composed_pictures(large_optdigits):
    """Thirty pictures of scikit-learn's training digits: measured, nothing missed and nothing invented."""
    assert min(recall_and_precision(*large_optdigits, 7, 30)) >= 0.98


def test_boxes_of_real_handwriting(real_data):
    """Forty pictures of MNIST's training digits, thin, broken or bold: F1 0.99 was measured."""
    digits = load_domain("mnist", "train", real_data)
    found = recall_and_precision(digits.images[:5000, 0].numpy(), digits.labels[:5000].numpy(), 8, 40)
    assert harmonic_mean(found) >= 0.97


@pytest.mark.parametrize(("paper", "ink"), [(WHITE, BLACK), (BLACK, WHITE), ((120, 160, 90), (60, 30, 110))])
def test_places_in_either_polarity(paper, ink):
    picture = fives(page(300, 200, paper), [40], 50, ink)
    ImageDraw.Draw(picture).line([(200, 30), (206, 150)], ink, 8)
    five, one = boxes_of(picture)
    assert overlap(five, (40, 50, 90, 130)) > 0.85
    assert overlap(one, (196, 30, 210, 150)) > 0.7


def test_light_that_falls_off():
    """The darkest ink on the bright side is brighter than the paper on the dark side."""
    light, ink, lefts = np.linspace(1, 0.25, 400)[None, :, None], (90, 80, 70), (40, 170, 310)
    pixels = (np.asarray(fives(page(400, 150, (240, 236, 220)), lefts, 30, ink)) * light).astype(np.uint8)
    assert pixels[0, -1].max() < (np.array(ink) * light[0, 60]).max()
    check_fives(Image.fromarray(pixels), lefts, 30, 0.85)


def test_digits_on_a_plate_and_in_frames():
    """Of the wall's own colour on a dark plate with a frame; and, as on a form, each in a box of the same pen."""
    wall, lefts = page(600, 400, (200, 190, 180)), (220, 300, 380)
    ImageDraw.Draw(wall).rectangle((180, 120, 460, 280), (20, 40, 100))
    ImageDraw.Draw(wall).rectangle((188, 128, 452, 272), outline=(200, 190, 180), width=4)
    check_fives(fives(wall, lefts, 160, (200, 190, 180)), lefts, 160)
    form, lefts = page(400, 200), (60, 180, 300)
    for x in lefts:
        ImageDraw.Draw(form).rectangle((x - 25, 35, x + 75, 165), outline=BLACK, width=4)
    check_fives(fives(form, lefts, 60), lefts, 60)


@pytest.mark.parametrize("gap", [0, 3, 7])
def test_pieces_of_a_digit_are_joined(gap):
    check_fives(fives(page(300, 200), [100], 50, gap=gap), [100], 50, 0.85)


def test_neighbours_are_not_joined():
    """Digits side by side with little room, and a small number right above a large one."""
    picture = fives(page(400, 260), (40, 102, 164), 120)
    for x in (50, 75, 100):
        ImageDraw.Draw(picture).line([(x, 70), (x + 3, 104)], BLACK, 4)
    assert len(boxes_of(picture)) == 6


def test_what_is_no_digit():
    """The shadow of a hand, a ruled line, a dash, a blot, a dot beside a digit and specks of dust."""
    picture = page(500, 300, (235, 235, 230))
    draw = ImageDraw.Draw(picture)
    draw.polygon([(500, 60), (500, 300), (330, 300)], (150, 150, 145))
    draw.line([(0, 20), (500, 20)], BLACK, 3)
    draw.line([(40, 150), (90, 150)], BLACK, 8)
    draw.ellipse((220, 180, 270, 230), BLACK)
    draw.rectangle((190, 122, 197, 129), BLACK)
    for x, y in ((30, 60), (300, 110), (150, 260)):
        draw.rectangle((x, y, x + 3, y + 3), BLACK)
    check_fives(fives(picture, [120], 50), [120], 50, 0.85)


def test_nothing_to_find():
    sizes = ((1, 1), (1, 5000), (5000, 1), (2, 2), (40, 40), (900, 700))
    noise = np.random.default_rng(0).normal(128, 20, (300, 400, 3)).clip(0, 255).astype(np.uint8)
    for picture in (*(page(*size, (90, 140, 160)) for size in sizes), Image.fromarray(noise)):
        assert boxes_of(picture) == [], picture.size


def test_a_digit_cut_out_closely():
    """It touches the edges, and yet it is what the picture shows."""
    (box,) = boxes_of(fives(page(60, 90), [5], 5).crop((5, 5, 56, 85)))
    assert overlap(box, (0, 0, 51, 80)) > 0.9


@pytest.mark.parametrize("scale", [0.4, 1, 9])
def test_boxes_are_in_pixels_of_the_picture(scale):
    """Also of one so large that it is searched at another size."""
    picture = fives(page(450, 300), [300], 100).resize((round(450 * scale), round(300 * scale)), Image.BICUBIC)
    (box,) = boxes_of(picture)
    assert overlap(box, tuple(v * scale for v in (300, 100, 350, 180))) > 0.85


# --- reading order ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boxes", "lines"),
    [
        ([(100, 60, 120, 90), (10, 8, 30, 38), (60, 62, 80, 92), (50, 5, 70, 40), (20, 58, 40, 88)],
         [[1, 3], [4, 2, 0]]),
        ([(40 * i, 100 * row + 12 * i, 40 * i + 30, 100 * row + 12 * i + 50) for row in (0, 1) for i in range(12)],
         [list(range(12)), list(range(12, 24))]),
        ([(0, 0, 30, 60), (40, 25, 60, 55), (70, 5, 100, 70)], [[0, 1, 2]]),
        ([], []),
    ],
    ids=["from the top and the left", "each slanting below where the next begins", "of several heights", "none"],
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
