"""The detector of image_annotate.py: what it is trained on and towards, how it is trained, and what it finds."""

import json
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import write_idx, write_svhn
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from annotate.boxes import intersection_over_union
from annotate.detector import LARGEST_HEIGHT, LEAST_HEIGHT, NONE, SHIFT, STRIDE, USUAL_BOX, Detector, detect, surest
from annotate.detector import load_detector as load
from digits.synth import render_digits
from tools import train_detector
from tools.scenes import IGNORED, SIDE, Material, Scenes, font_of, make_scene, targets
from tools.strips import numbers
from utils.cli import Interrupted, StopRequest, UserError

CPU = torch.device("cpu")
NOTHING_UNKNOWN = np.zeros((SIDE, SIDE), bool)


@pytest.fixture(scope="module")
def detector():
    """The one that ships with the code."""
    return load(CPU, allow_download=False)


@pytest.fixture(scope="module")
def material():
    """Rendered digits in place of SVHN's and MNIST's, and noise in place of photographs."""
    crops, labels = render_digits(0, 0, 60, workers=1, progress=False)
    rng = np.random.default_rng(0)
    found = numbers(torch.from_numpy(crops).permute(0, 3, 1, 2), torch.tensor(labels))
    handwriting = np.pad(rng.integers(100, 256, (20, 20, 14), dtype=np.uint8), ((0, 0), (4, 4), (7, 7)))
    return Material(crops, found, handwriting, np.arange(20) % 10, [rng.integers(0, 256, (120, 90, 3), dtype=np.uint8)])


# --- what it is trained on ---------------------------------------------------------------------------


def test_a_scene_depends_on_seed_and_number_alone(material):
    first, again, other = Scenes(material, 0), Scenes(material, 0), Scenes(material, 1)
    for i in (30, 2):
        for a, b in zip(first[i], again[i], strict=True):
            np.testing.assert_array_equal(a, b)
    assert (first[2][0] != first[30][0]).any()
    assert (first[2][0] != other[2][0]).any()


def test_scenes_have_digits_of_all_classes_sizes_and_places(material):
    placed = [digit for i in range(300) for digit in make_scene(material, np.random.default_rng(i))[1]]
    assert {label for *_, label in placed} == set(range(10))
    heights = np.array([height for *_, height, _ in placed])
    inside = (heights > LEAST_HEIGHT) & (heights < LARGEST_HEIGHT)
    assert 0.4 < inside.mean() < 0.95
    assert heights.min() < 12
    assert heights.max() > 45
    assert all(0.15 < width / height < 2.5 for _, _, width, height, _ in placed)


def test_a_target_is_at_the_middle_of_its_digit_and_says_where_its_edges_are():
    digits = [(30.7, 41.2, 12.0, 24.0, 7), (70.0, 70.0, 30.0, 60.0, 3), (60.0, 20.0, 8.0, LEAST_HEIGHT - 1, 5)]
    classes, boxes = targets(digits, NOTHING_UNKNOWN)
    rows, columns = np.nonzero((classes != NONE) & (classes != IGNORED))
    assert {*classes[rows, columns].tolist()} == {7}, "60 pixels are too many, and 16 too few"
    for row, column in zip(rows, columns, strict=True):
        x = (column + 0.5) * STRIDE + SHIFT * boxes[0, row, column]
        y = (row + 0.5) * STRIDE + SHIFT * boxes[1, row, column]
        width, height = (unit * np.exp(v) for unit, v in zip(USUAL_BOX, boxes[2:, row, column], strict=True))
        np.testing.assert_allclose((x, y, width, height), digits[0][:4], rtol=1e-5)
    assert classes[17, 17] == NONE, "the middle of what is too large"
    assert classes[5, 15] == IGNORED, "the middle of what is a little too small"
    unknown = NOTHING_UNKNOWN.copy()
    unknown[:, 48:] = True
    classes, _ = targets(digits[:1], unknown)
    assert (classes[:, 12:] == IGNORED).all()
    assert (classes[:, :5] == NONE).all()


def test_losses_count_digits_the_worst_of_what_is_none_and_boxes(monkeypatch):
    """Written out by hand."""
    monkeypatch.setattr(train_detector, "HARDEST", (1, 2))
    torch.manual_seed(0)
    logits, boxes = torch.randn(1, 11, 2, 3), torch.randn(1, 4, 2, 3)
    classes = torch.tensor([[[4, NONE, NONE], [IGNORED, NONE, NONE]]])
    true = torch.randn(1, 4, 2, 3)
    losses = train_detector.losses_of(logits, boxes, classes, true)
    log = logits[0].log_softmax(0)
    none = sorted(-log[NONE][classes[0] == NONE])[-2:]
    assert losses["loss_digit"] == pytest.approx(float(-log[4, 0, 0]), rel=1e-5)
    assert losses["loss_none"] == pytest.approx(float(sum(none)) / 2, rel=1e-5)
    away = (boxes - true)[0, :, 0, 0].abs()
    assert losses["loss_box"] == pytest.approx(float(torch.where(away < 1, away**2 / 2, away - 0.5).sum()), rel=1e-5)


# --- how it is trained -------------------------------------------------------------------------------


@pytest.fixture
def small_training(tmp_path, monkeypatch):
    """Run tools.train_detector for six steps on a few images; returns its run folder's path."""
    rng = np.random.default_rng(0)
    images, labels = render_digits(0, 0, 40, workers=1, progress=False)
    (tmp_path / "data").mkdir()
    write_svhn(tmp_path / "data/train_32x32.mat", images, np.array(labels))
    digits = np.pad(rng.integers(100, 256, (40, 20, 14), dtype=np.uint8), ((0, 0), (4, 4), (7, 7)))
    write_idx(tmp_path / "data/MNIST/raw/train-images-idx3-ubyte.gz", digits)
    write_idx(tmp_path / "data/MNIST/raw/train-labels-idx1-ubyte.gz", (np.arange(40) % 10).astype(np.uint8))
    monkeypatch.setattr(train_detector, "HELD_OUT", 10)
    monkeypatch.setattr(train_detector, "LOG_EVERY_STEPS", 2)

    def run(*arguments):
        words = ["train_detector", "--data-dir", tmp_path / "data", "--device", "cpu", "--steps", 6, *arguments]
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        train_detector.main()

    run.photographs = tmp_path / "data/BSDS500/train"
    run.photographs.mkdir(parents=True)
    for i in range(60):
        Image.fromarray(rng.integers(0, 256, (80, 70, 3), dtype=np.uint8)).save(run.photographs / f"{i}.jpg")
    return run


def test_an_interrupted_training_ends_with_the_same_bits(small_training, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    small_training("--run-dir", whole, "--labels", "own")
    asked = iter([False, False, True])  # after the third step
    monkeypatch.setattr(StopRequest, "made", property(lambda request: next(asked, False)))
    with pytest.raises(Interrupted, match=f"--resume {parts}"):
        small_training("--run-dir", parts, "--labels", "own")
    small_training("--resume", parts)
    assert 0 < json.loads((parts / "result.json").read_text())["parameters"] < 1_250_000, "at most 5 MB"
    weights = load_file(parts / "detector.safetensors")
    for name, tensor in load_file(whole / "detector.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0)
    logged = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
              for folder in (whole, parts)]  # fmt: skip
    assert [line["step"] for line in logged[1]] == [2, 4, 6]
    for a, b in zip(*logged, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert list((parts / "tensorboard").iterdir())


def test_the_handwriting_has_the_labels_that_a_network_predicts(small_training, tmp_path, monkeypatch):
    """Scikit-learn's stands beside MNIST's; what the network is not sure of, such as noise, is not shown."""
    monkeypatch.setattr(train_detector, "OFTEN", 2)
    own = train_detector.material_of(tmp_path / "data", "own", CPU)
    assert own.handwriting.shape == (30 + 2 * 1297, 28, 28)
    assert own.labels[:30].tolist() == [i % 10 for i in range(30)]
    made = train_detector.material_of(tmp_path / "data", "synth-optdigits-quick", CPU)
    assert 1500 < len(made.labels) == len(made.handwriting) < len(own.labels)
    known = {image.tobytes(): label for image, label in zip(own.handwriting[30:], own.labels[30:], strict=True)}
    right = [known.get(image.tobytes()) == label for image, label in zip(made.handwriting, made.labels, strict=True)]
    assert 0.9 < np.mean(right) < 1


def test_what_is_missing_is_named(small_training, tmp_path):
    for path in small_training.photographs.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"no photographs in .*BSDS500"):
        small_training("--run-dir", tmp_path / "none", "--labels", "own")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "last.pt").touch()
    with pytest.raises(UserError, match="holds a run already"):
        small_training("--run-dir", tmp_path / "there")


# --- what it finds -----------------------------------------------------------------------------------


def test_of_boxes_that_show_the_same_the_surest_stays():
    boxes = np.array(
        [(0, 0, 10, 20), (1, 1, 11, 21), (30, 0, 40, 20), (2, 2, 6, 10), (9, 0, 19, 20), (5, 5, 5, 9)], float
    )
    assert surest(boxes[:3], np.array([0.8, 0.9, 0.5])) == [1, 2], "a tenth of a shift"
    assert surest(boxes[[0, 3]], np.array([0.8, 0.9])) == [1], "what lies within another one"
    assert surest(boxes[[0, 4]], np.array([0.8, 0.7])) == [0, 1], "neighbours that touch"
    assert surest(boxes[5:], np.array([0.9])) == [], "no pixel"


def written(text, height, size=(360, 160), paper=(200, 190, 170), ink=(30, 30, 60)):
    """A picture with printed digits at 40, 40, so many pixels high, and the box of each."""
    picture = Image.new("RGB", size, paper)
    font, brush, x, boxes = font_of("DejaVuSans", round(height / 0.73)), ImageDraw.Draw(picture), 40.0, []
    for sign in text:
        brush.text((x, 30), sign, ink, font)
        boxes.append(tuple(map(round, brush.textbbox((x, 30), sign, font))))
        x += 1.1 * font.getlength(sign)
    return picture, boxes


@pytest.mark.parametrize("height", [14, 22, 40, 80])
@pytest.mark.parametrize("inverted", [False, True])
def test_printed_digits_of_any_size_and_polarity_are_found(detector, height, inverted):
    colours = {"paper": (30, 30, 60), "ink": (200, 190, 170)} if inverted else {}
    picture, boxes = written("3852", height, **colours)
    found = sorted(detect(picture, detector, 0.5), key=lambda digit: digit.box)
    assert [int(np.argmax(digit.probabilities)) for digit in found] == [3, 8, 5, 2]
    assert all(intersection_over_union(digit.box, box) >= 0.3 for digit, box in zip(found, boxes, strict=True))
    assert all(a.box[0] < b.box[0] for a, b in pairwise(found))


def test_letters_lines_and_plain_walls_are_no_digits(detector):
    assert detect(Image.new("RGB", (300, 200), (120, 90, 60)), detector, 0.5) == []
    assert detect(written("ABCEFH", 30)[0], detector, 0.6) == []
    grid = Image.new("RGB", (200, 200), "white")
    for x in range(10, 200, 30):
        ImageDraw.Draw(grid).line((x, 0, x, 200), "black", 2)
        ImageDraw.Draw(grid).line((0, x, 200, x), "black", 2)
    assert detect(grid, detector, 0.8) == []


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (40, 9)])
def test_pictures_with_no_room_for_digits(detector, size):
    assert detect(Image.new("RGB", size), detector, 0.5) == []


def test_what_it_answers_fits_the_picture_it_was_asked_about():
    torch.manual_seed(0)
    logits, boxes = Detector().eval()(torch.zeros(2, 3, 64, 36, dtype=torch.uint8))
    assert logits.shape == (2, 11, 16, 9)
    assert boxes.shape == (2, 4, 16, 9)
