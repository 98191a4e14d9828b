"""Letters as a folder domain: a capital and a small letter under one name, drawn as the digits are."""

import sys

import numpy as np
import pytest
from PIL import Image

from digits.domains import load_domain
from digits.synth import DIGITS, FACES, LETTERS, glyphs, render_digit
from tools import render_letters


def test_every_face_has_every_letter():
    """Each is drawn, none like another of its face, but for those that a typeface draws alike."""
    tiles, advances = glyphs(LETTERS)
    assert len(tiles) == len(advances) == len(FACES)
    alike = set()
    for face in tiles:
        pictures = [np.asarray(tile) > 0 for tile in face]
        assert len(pictures) == 52
        assert all(40 < picture.sum() < 0.6 * picture.size for picture in pictures)
        names = [name for letter in LETTERS.classes for name in (letter, letter.lower())]
        alike |= {
            a + b for i, a in enumerate(names) for j, b in enumerate(names[:i]) if (pictures[i] == pictures[j]).all()
        }
    assert alike <= {"lI", "Il"}, alike


def test_a_letter_is_its_class_in_either_form():
    images, labels = zip(*(render_digit(0, i, LETTERS) for i in range(600)), strict=True)
    assert set(labels) == set(range(26))
    assert all(image.shape == (32, 32, 3) and image.std() > 2 for image in images)
    assert len(DIGITS.classes) == 10


def test_the_command_writes_a_folder_that_is_a_domain(monkeypatch, fail, capsys, tmp_path):
    folder = tmp_path / "letters"
    words = [str(folder), "--train", "300", "--test", "60"]
    monkeypatch.setattr(sys, "argv", ["render_letters", *words])
    render_letters.main()
    train, test = (load_domain(str(folder), split, tmp_path) for split in ("train", "test"))
    assert (len(train), len(test), train.classes) == (300, 60, LETTERS.classes)
    image, label = render_digit(0, 7, LETTERS)
    written = folder / "train" / LETTERS.classes[label] / "00007.png"
    assert np.array_equal(np.asarray(Image.open(written)), image)
    with pytest.MonkeyPatch.context():
        assert "there already" in fail(render_letters, *words)
