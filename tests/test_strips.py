"""SVHN's crops put together again: what was one number before it was cut is one number after."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from digits.domains import load_domain
from digits.synth import render_digits
from tools.strips import SAME, continuations, numbers, put_together


def row_of_houses(rng: np.random.Generator) -> tuple[Image.Image, list[tuple[int, tuple[int, int, int, int]]]]:
    """A textured wall with a number of two to four digits, and each digit's label and box."""
    import matplotlib

    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/STIXGeneralBol.ttf", int(rng.integers(40, 90)))
    wall = Image.fromarray(rng.integers(90, 160, (8, 24, 3), dtype=np.uint8)).resize((480, 160), Image.BICUBIC)
    brush, x, y, digits = ImageDraw.Draw(wall), 60.0, 30, []
    for label in rng.integers(0, 10, rng.integers(2, 5)).tolist():
        brush.text((x, y), str(label), (240, 240, 230), font)
        digits.append((label, tuple(map(round, brush.textbbox((x, y), str(label), font)))))
        x += 0.85 * font.getlength(str(label))
    return wall.filter(ImageFilter.GaussianBlur(font.size / 16)), digits  # as sharp as most house numbers are


def crop_of(wall: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    """As SVHN was cut: the square around a box, as high as it."""
    x0, y0, x1, y1 = box
    half, middle = max(x1 - x0, y1 - y0) / 2, ((x0 + x1) / 2, (y0 + y1) / 2)
    square = tuple(round(value) for value in (middle[0] - half, middle[1] - half, middle[0] + half, middle[1] + half))
    return np.asarray(wall.crop(square).resize((32, 32), Image.BOX))


def test_numbers_are_put_together_from_their_digits():
    rng = np.random.default_rng(0)
    crops, labels, true = [], [], []
    for _ in range(25):
        wall, digits = row_of_houses(rng)
        true.append((len(labels), wall, digits))
        crops += [crop_of(wall, box) for _, box in digits]
        labels += [label for label, _ in digits]
    images = np.stack(crops)
    found = numbers(torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(labels))
    starts = {number[0][0]: number for number in found}
    whole = [entry for entry in true if len(starts.get(entry[0], [])) == len(entry[2])]
    assert len(whole) >= 22, "of 25 numbers"
    for start, wall, digits in whole:
        strip = put_together(images, starts[start])
        assert [digit.label for digit in strip.digits] == [label for label, _ in digits]
        scale = (digits[0][1][3] - digits[0][1][1]) / strip.digits[0].height
        places = [(x0 + x1) / 2 for _, (x0, _, x1, _) in digits]
        for digit, place in zip(strip.digits, places, strict=True):
            assert abs(scale * (digit.x - strip.digits[0].x) - (place - places[0])) < 0.15 * scale * digit.height
        x0 = round(places[0] - scale * strip.digits[0].x)
        y0 = round((digits[0][1][1] + digits[0][1][3]) / 2 - scale * strip.digits[0].y)
        size = (round(strip.image.shape[1] * scale), round(strip.image.shape[0] * scale))
        again = np.asarray(Image.fromarray(strip.image).resize(size), np.float32)
        before = np.asarray(wall.crop((x0, y0, x0 + size[0], y0 + size[1])), np.float32)
        assert np.corrcoef(again.ravel(), before.ravel())[0, 1] > 0.8


def test_digits_that_have_nothing_to_do_with_each_other_stay_apart():
    images, _ = render_digits(0, 0, 200, workers=1, progress=False)
    correlation, _ = continuations(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert (correlation > SAME).float().mean() < 0.03
    plain = torch.full((5, 3, 32, 32), 128, dtype=torch.uint8)
    assert (continuations(plain)[0] <= SAME).all()


def test_half_of_svhns_neighbours_belong_together(real_data):
    """The official training split has 73,257 digits in 33,402 pictures: 54 % of neighbours are of one picture."""
    svhn = load_domain("svhn", "train", real_data)
    correlation, places = continuations(svhn.images[:2000])
    assert 0.4 < (correlation > SAME).float().mean() < 0.54
    assert 10 < places[correlation > SAME][:, 0].mean() < 24, "pixels of a crop from digit to digit"
