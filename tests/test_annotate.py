"""image_annotate.py: what it reads, prints and writes, which pictures it takes, and how well it reads."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compose import compose, f1, hits, overlap
from PIL import Image, ImageDraw

import image_annotate
import valid
from data_loader import load_domain
from image_annotate import IMAGES, read
from model import DANN
from utils.checkpoint import save_weights
from utils.config import recipe_config, to_dict
from utils.draw_digits import lay_out
from utils.find_digits import find_digits
from utils.pictures import mark_in, open_picture
from utils.pretrained import read_index

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = "synth-optdigits-quick"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reader():
    """The network that ships with the code."""
    return valid.load_reader(SHIPPED, CPU, allow_download=False)


@pytest.fixture(scope="module")
def ignorant(tmp_path_factory):
    """Weights of a network that has learned nothing."""
    path = tmp_path_factory.mktemp("ignorant") / "ignorant.safetensors"
    config = to_dict(recipe_config("quick")) | {"network": "quick", "precision": "fp32"}
    preprocessing = {"image_size": 32, "normalisation": "unit", "mean": [0.0, 0.0, 0.0]}
    torch.manual_seed(0)
    save_weights(path, DANN("quick", 0.0).state_dict(), {"config": config, "preprocessing": preprocessing})
    return path


@pytest.fixture
def annotate(monkeypatch, capsys, tmp_path):
    """Run image_annotate.py in this process; returns what it printed on stdout and on stderr."""

    def run(*arguments, weights=SHIPPED, out=tmp_path / "out"):
        common = ("--weights", weights, "--output-dir", out, "--device", "cpu", "--no-download")
        monkeypatch.setattr(sys, "argv", ["image_annotate.py", *map(str, (*arguments, *common))])
        capsys.readouterr()
        image_annotate.main()
        return capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def composed(large_optdigits):
    """A picture with three lines of handwriting."""
    for seed in range(100):
        picture = compose(*large_optdigits, np.random.default_rng((11, seed)))
        if len(picture.lines) == 3 and min(map(len, picture.lines)) > 1:
            return picture
    raise AssertionError("no seed gives three lines")


@pytest.fixture
def note(composed, tmp_path):
    composed.picture.save(tmp_path / "note.png")
    return tmp_path / "note.png"


@pytest.fixture
def tiny(large_optdigits, tmp_path):
    """A picture of 8×8 pixels: one handwritten digit, dark on light."""
    digit = load_domain("optdigits", "test", Path()).images[3, 0].numpy()
    Image.fromarray(255 - digit).save(tmp_path / "tiny.png")
    return tmp_path / "tiny.png"


def documents(said):
    return json.loads(said.out)


# --- what it says and writes ------------------------------------------------------------------------


def test_annotating_in_a_process(note, composed, tmp_path):
    """`python image_annotate.py -f note.png --json`, as a user starts it."""
    out = tmp_path / "out"
    command = [sys.executable, "image_annotate.py", "-f", note, "--weights", SHIPPED, "--output-dir", out, "--json"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--no-download", "--min-confidence", "0"],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (document,) = json.loads(done.stdout)
    assert list(document) == ["image", "lines", "digits"]
    assert document["image"] == str(note)
    assert [len(line) for line in document["lines"]] == [len(line) for line in composed.lines]
    assert "".join(document["lines"]) == "".join(str(digit["digit"]) for digit in document["digits"])
    for digit, place in zip(document["digits"], composed.boxes, strict=True):  # both in reading order
        assert list(digit) == ["digit", "confidence", "box"]
        assert overlap(digit["box"], place) > 0.6
        assert 0 <= digit["confidence"] <= 1
    right = sum(digit["digit"] == true for digit, true in zip(document["digits"], composed.digits, strict=True))
    assert right >= 0.5 * len(composed.digits), "the weights that ship read four of five"
    assert [path.name for path in out.iterdir()] == ["note-annotated.png"]
    assert f"wrote {out / 'note-annotated.png'}" in done.stderr


def test_lines_for_people(annotate, note, composed):
    said = annotate("-f", note, "--min-confidence", 0)
    (document,) = documents(annotate("-f", note, "--min-confidence", 0, "--json"))
    name, *rest = said.out.splitlines()
    count = len(composed.digits)
    assert name == str(note)
    for line, digit in zip(rest[:count], document["digits"], strict=True):
        x0, y0, x1, y1 = digit["box"]
        what, sure, *where = line.split()
        assert what == str(digit["digit"])
        assert float(sure.rstrip("%")) == pytest.approx(100 * digit["confidence"], abs=0.06)
        assert where == ["at", f"{x0},{y0}", "–", f"{x1},{y1}"]
    assert [line.split() for line in rest[count:]] == [["reads", number] for number in document["lines"]]


def test_the_annotated_picture(annotate, note, composed, tmp_path):
    """The picture is in it as it was, but for boxes and labels around the digits."""
    (document,) = documents(annotate("-f", note, "--min-confidence", 0, "--json"))
    page = np.asarray(Image.open(tmp_path / "out" / "note-annotated.png"))
    boxes = [tuple(digit["box"]) for digit in document["digits"]]
    texts = [f"{digit['digit']} {digit['confidence']:.0%}" for digit in document["digits"]]
    layout = lay_out(composed.picture.size, boxes, texts)
    scale, (across, down) = layout.scale, layout.margin
    picture = np.asarray(composed.picture).repeat(scale, 0).repeat(scale, 1)
    assert page.shape == (picture.shape[0] + 2 * down, picture.shape[1] + 2 * across, 3)
    coloured = (page == (255, 216, 77)).all(2)
    for x0, y0, x1, y1 in (tuple(scale * v for v in box) for box in boxes):
        stands = page[down + y0 : down + y1, across + x0 : across + x1]
        assert (stands == picture[y0:y1, x0:x1]).all(), "the box leaves the digit itself alone"
        assert coloured[down + y0 - 12 : down + y0, across + (x0 + x1) // 2].any(), "above it"
        assert coloured[down + (y0 + y1) // 2, across + x1 : across + x1 + 12].any(), "beside it"
    for x0, y0, x1, y1 in layout.labels:
        assert coloured[y0:y1, x0:x1].mean() > 0.3
        assert (page[y0:y1, x0:x1].max(2) < 60).mean() > 0.05, "text in black"


def test_the_same_every_time(annotate, note, tmp_path, reader):
    """Text and picture, byte for byte; and the network stays in eval mode."""
    first = annotate("-f", note, "--json")
    page = (tmp_path / "out" / "note-annotated.png").read_bytes()
    again = annotate("-f", note, "--json")
    assert first.out == again.out
    assert (tmp_path / "out" / "note-annotated.png").read_bytes() == page
    assert len(list((tmp_path / "out").iterdir())) == 1
    picture = open_picture(note)
    read(picture, find_digits(picture), reader, CPU, None)
    assert not reader.model.training


def test_one_preprocessing(monkeypatch, reader, note, tiny):
    """What the network sees comes out of the one preprocessing function, whose size and normalisation are its own."""
    seen = []
    original = reader.model.forward
    monkeypatch.setattr(reader.model, "forward", lambda x: seen.append(x) or original(x))
    for path in (note, tiny):
        picture = open_picture(path)
        seen.clear()
        read(picture, find_digits(picture), reader, CPU, 0)
        (x,) = seen
        assert x.shape[1:] == (3, reader.preprocess.image_size, reader.preprocess.image_size)
    image = 255 - np.asarray(Image.open(tiny))
    torch.testing.assert_close(x, reader.preprocess(torch.from_numpy(image)[None, None]), atol=1e-4, rtol=0)


def test_no_digit(annotate, tmp_path):
    """That is no mistake: it says so, and writes the picture."""
    for name, size in (("blank.png", (300, 200)), ("small.png", (28, 28))):
        Image.new("RGB", size, (200, 210, 190)).save(tmp_path / name)
        assert "no digit found" in annotate("-f", tmp_path / name).out
        said = annotate("-f", tmp_path / name, "--json")
        assert documents(said) == [{"image": str(tmp_path / name), "lines": [], "digits": []}]
        assert "no digit found" in said.err
        assert open_picture(tmp_path / "out" / f"{Path(name).stem}-annotated.png").size >= (400, 200)


def test_min_confidence(annotate, note, tiny):
    confidences = [
        digit["confidence"] for digit in documents(annotate("-f", note, "--min-confidence", 0, "--json"))[0]["digits"]
    ]
    assert min(confidences) < 0.97 < max(confidences)
    (document,) = documents(annotate("-f", note, "--min-confidence", 0.97, "--json"))
    kept = [digit["confidence"] for digit in document["digits"]]
    assert kept == [value for value in confidences if value >= 0.97]
    (document,) = documents(annotate("-f", note, "--json"))
    assert len(document["digits"]) == sum(value >= 0.5 for value in confidences)


def test_min_confidence_of_a_single_digit(annotate, tiny, note, ignorant):
    """The picture is one digit, so that there is nothing to drop unless one asks for it."""
    single, many = documents(annotate("-f", tiny, note, "--json", weights=ignorant))
    assert len(single["digits"]) == 1
    assert single["digits"][0]["confidence"] < 0.5
    assert many["digits"] == []
    assert documents(annotate("-f", tiny, "--json", "--min-confidence", 0.9, weights=ignorant))[0]["digits"] == []


@pytest.mark.parametrize("value", ["1.5", "-0.1", "nan", "much"])
def test_min_confidence_is_a_share(monkeypatch, capsys, value):
    monkeypatch.setattr(sys, "argv", ["image_annotate.py", "-f", "a.png", "--min-confidence", value])
    with pytest.raises(SystemExit) as ended:
        image_annotate.parse_arguments()
    assert ended.value.code == 2
    assert "--min-confidence" in capsys.readouterr().err


def test_compare(annotate, note, ignorant, tmp_path):
    """Both readings in the document, and two pictures beside each other."""
    (alone,) = documents(annotate("-f", note, "--json", "--min-confidence", 0))
    single = Image.open(tmp_path / "out" / "note-annotated.png").size
    (other,) = documents(annotate("-f", note, "--json", "--min-confidence", 0, weights=ignorant))
    (both,) = documents(annotate("-f", note, "--json", "--min-confidence", 0, "--compare", ignorant))
    compared = both.pop("compare")
    assert both == alone
    assert compared.pop("weights") == str(ignorant)
    assert compared == {key: other[key] for key in ("lines", "digits")}
    assert alone["lines"] != other["lines"]
    double = Image.open(tmp_path / "out" / "note-annotated.png").size
    assert double[0] * double[1] > 1.9 * single[0] * single[1]
    said = annotate("-f", note, "--compare", ignorant).out
    assert f"{note}, {SHIPPED}" in said
    assert f"{note}, {ignorant}" in said


def test_show(monkeypatch, annotate, tiny, tmp_path):
    """With a display a window is asked for, without one the file is named."""
    shown = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(image_annotate.ImageShow, "show", lambda page, title: shown.append(page.size) or True)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    said = annotate("-f", tiny, "--show")
    assert f"no display to show it on: open {tmp_path / 'out' / 'tiny-annotated.png'}" in said.err
    assert shown == []
    monkeypatch.setenv("DISPLAY", ":0")
    assert "no display" not in annotate("-f", tiny, "--show").err
    assert shown == [Image.open(tmp_path / "out" / "tiny-annotated.png").size]
    monkeypatch.setattr(image_annotate.ImageShow, "show", lambda page, title: False)
    assert "no display" in annotate("-f", tiny, "--show").err


# --- which pictures it takes ------------------------------------------------------------------------


def test_pictures_of_every_kind_are_read_alike(annotate, tmp_path):
    """Grey, palette, transparent, deep, for print, and turned by its camera: what looks the same is read the same."""
    canvas = Image.new("L", (120, 90), 255)
    draw = ImageDraw.Draw(canvas)
    draw.line([(20, 20), (50, 20), (30, 70)], 0, 6)
    draw.line([(90, 18), (88, 72)], 0, 6)
    grey = np.asarray(canvas)
    kinds = tmp_path / "kinds"
    kinds.mkdir()
    canvas.save(kinds / "grey.png")
    canvas.convert("1").save(kinds / "bits.tif")
    canvas.convert("RGB").save(kinds / "colour.bmp")
    canvas.convert("RGB").save(kinds / "colour.webp", lossless=True)
    canvas.convert("P").save(kinds / "palette.gif")
    canvas.convert("CMYK").save(kinds / "print.tif")
    Image.fromarray(grey.astype(np.uint16) * 257).save(kinds / "deep.png")
    Image.fromarray(grey.astype(np.int32) * 1000).save(kinds / "deeper.tif")
    Image.fromarray(grey.astype(np.float32) / 255).save(kinds / "float.tif")
    Image.fromarray(np.stack((grey // 9 * 0, 255 - grey), 2), "LA").save(kinds / "transparent-grey.png")
    Image.fromarray(np.concatenate((np.zeros((90, 120, 3), np.uint8), 255 - grey[..., None]), 2)).save(
        kinds / "transparent.png"
    )
    transparent = canvas.convert("P")
    transparent.info["transparency"] = 255
    transparent.save(kinds / "transparent-palette.png", transparency=255)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter to be seen upright
    canvas.transpose(Image.Transpose.ROTATE_90).save(kinds / "turned.png", exif=exif)
    found = documents(annotate("-f", kinds, "--json", "--min-confidence", 0))
    assert [Path(document["image"]).name for document in found] == sorted(path.name for path in kinds.iterdir())
    assert len(found) == 13
    assert len(found[0]["digits"]) == 2
    assert [document for document in found if document["digits"] != found[0]["digits"]] == []


def test_a_jpeg_from_a_camera(annotate, composed, tmp_path):
    """Large, turned by EXIF, dark on light: boxes are in pixels of the upright picture."""
    large = composed.picture.resize([side * 4 for side in composed.picture.size], Image.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    large.rotate(180).save(tmp_path / "photo.jpg", exif=exif, quality=90)
    (document,) = documents(annotate("-f", tmp_path / "photo.jpg", "--json", "--min-confidence", 0))
    boxes = [digit["box"] for digit in document["digits"]]
    matched = hits(boxes, [tuple(4 * v for v in box) for box in composed.boxes])
    assert len(matched) == len(boxes) == len(composed.boxes)


@pytest.mark.parametrize("invert", [False, True])
def test_polarity_does_not_matter(annotate, reader, large_optdigits, tmp_path, invert):
    """A small dark digit on light is read as its negative is."""
    images = load_domain("optdigits", "test", Path()).images[:30, 0].numpy()
    expected = valid.predict(reader.model, torch.from_numpy(images)[:, None], reader.preprocess, CPU, "fp32").argmax(1)
    read_as = []
    for image in images:
        picture = Image.fromarray(255 - image if invert else image).convert("RGB")
        read_as.append(read(picture, [], reader, CPU, None)[0][0].digit)
    assert read_as == expected.tolist()


def test_a_name_among_the_images_of_the_code(annotate, tmp_path, tiny, monkeypatch):
    (tmp_path / "images").mkdir()
    shutil.move(tiny, tmp_path / "images" / "a digit.png")
    monkeypatch.setattr(image_annotate, "IMAGES", tmp_path / "images")
    (document,) = documents(annotate("-f", "a digit.png", "--json"))
    assert document["image"] == str(tmp_path / "images" / "a digit.png")
    assert (tmp_path / "out" / "a digit-annotated.png").exists()


def test_a_folder(annotate, tiny, note, tmp_path):
    """All pictures in it, sorted, other files aside; what an earlier run wrote there is no picture to read."""
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    for name in ("b.png", "a.PNG", "c-annotated.png"):  # the last one is somebody's own
        shutil.copy(tiny, folder / name)
    shutil.copy(tiny, folder / "below" / "d.png")
    (folder / "notes.txt").write_text("no picture")
    names = []
    for _ in range(2):
        found = documents(annotate("-f", folder, folder / "b.png", note, "--json", out=folder))
        names.append([Path(document["image"]).name for document in found])
    assert names == [["a.PNG", "b.png", "c-annotated.png", "note.png"]] * 2
    written = {path.name for path in folder.iterdir() if mark_in(path)}
    assert written == {"a-annotated.png", "b-annotated.png", "c-annotated-annotated.png", "note-annotated.png"}
    assert (folder / "c-annotated.png").read_bytes() == tiny.read_bytes()


def test_an_input_is_never_written_over(annotate, tiny, note, tmp_path):
    """Not even one that is called as the output would be; nor is any other file."""
    mine = tmp_path / "tiny-annotated.png"
    shutil.copy(note, mine)
    (tmp_path / "note-annotated.png").write_text("a diary")
    before = {path: path.read_bytes() for path in (tiny, note, mine, tmp_path / "note-annotated.png")}
    annotate("-f", tiny, mine, note, out=tmp_path)
    assert {path: path.read_bytes() for path in before} == before
    written = {path.name for path in tmp_path.iterdir() if path.suffix == ".png" and mark_in(path)}
    assert written == {"tiny-annotated-2.png", "tiny-annotated-annotated.png", "note-annotated-2.png"}


def test_two_pictures_of_one_name(annotate, tiny, note, tmp_path):
    """Neither reading is lost, in one run or in two; a picture that is read again keeps its place."""
    for folder, source in (("one", tiny), ("two", note)):
        (tmp_path / folder).mkdir()
        shutil.copy(source, tmp_path / folder / "digits.png")
    one, two = tmp_path / "one" / "digits.png", tmp_path / "two" / "digits.png"
    annotate("-f", one, two)
    pages = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(pages) == {"digits-annotated.png", "digits-annotated-2.png"}
    for path in (two, one, two):
        annotate("-f", path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == pages


@pytest.mark.parametrize(
    ("name", "lines", "lengths"),
    [
        ("plate.jpg", ["190"], None),
        ("note.jpg", None, [7, 4, 3, 5]),
        ("blackboard.jpg", None, [5, 4]),
        ("shadow.jpg", None, [6]),
        ("five.png", None, [1]),
        ("four.png", ["4"], None),
        ("seven.png", None, [1]),
    ],
)
def test_pictures_of_our_own(reader, name, lines, lengths):
    """Every digit in images/ is found; the printed ones, which the weights know best, are read right."""
    assert {path.name for path in IMAGES.iterdir()} == {
        "plate.jpg", "note.jpg", "blackboard.jpg", "shadow.jpg", "five.png", "four.png", "seven.png",
    }  # fmt: skip
    assert (IMAGES / name).stat().st_size < 60_000
    picture = open_picture(IMAGES / name)
    found = read(picture, find_digits(picture), reader, CPU, 0)
    assert [len(line) for line in found] == (lengths or [len(line) for line in lines])
    if lines:
        assert image_annotate.as_numbers(found) == lines


# --- how well it reads ------------------------------------------------------------------------------


def singles(reader, images):
    """What is read in pictures that are one digit each, saved and opened again. Shape: (N, H, W) uint8 -> (N,)."""
    digits = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        (line,) = read(Image.open(file).convert("RGB"), [], reader, CPU, None)
        (digit,) = line
        digits.append(digit.digit)
    return torch.tensor(digits)


def test_single_digits_are_read_as_valid_reads_them(reader):
    """The 500 digits of 8×8 pixels that come with scikit-learn."""
    digits = load_domain("optdigits", "test", Path())
    accuracy = float((singles(reader, digits.images[:, 0].numpy()) == digits.labels).float().mean())
    tested = valid.evaluate(reader.model, digits, reader.preprocess, CPU, "fp32")
    print(f"single digits {accuracy:.2%}, valid.py {tested.accuracy:.2%}")
    assert abs(accuracy - tested.accuracy) <= 0.005


@pytest.fixture(scope="module")
def mnist_reader():
    """The shipped weights for SVHN -> MNIST."""
    readers = (valid.load_reader(name, CPU, allow_download=False) for name in read_index()["weights"])
    return next(found for found in readers if (found.config.source, found.config.target) == ("svhn", "mnist"))


def test_single_mnist_digits_are_read_as_valid_reads_them(real_data, mnist_reader):
    """A thousand pictures of 28×28 pixels."""
    digits = load_domain("mnist", "test", real_data)
    images, labels = digits.images[:1000], digits.labels[:1000]
    expected = valid.predict(mnist_reader.model, images, mnist_reader.preprocess, CPU, "fp32").argmax(1)
    accuracy = float((singles(mnist_reader, images[:, 0].numpy()) == labels).float().mean())
    tested = float((expected == labels).float().mean())
    print(f"single digits {accuracy:.2%}, valid.py {tested:.2%}")
    assert abs(accuracy - tested) <= 0.005


def test_composed_pictures_of_mnist_digits(real_data, mnist_reader):
    """Two hundred pictures of test digits: found (boxes overlap by half of their union) and read right, F1 >= 0.90."""
    digits = load_domain("mnist", "test", real_data)
    images, labels = digits.images[:, 0].numpy(), digits.labels.numpy()
    right = places = found = true = 0
    for i in range(200):
        composed = compose(images, labels, np.random.default_rng((0, i)))
        candidates = find_digits(composed.picture)
        lines = read(composed.picture, candidates, mnist_reader, CPU, None)
        digits_found = [digit for line in lines for digit in line]
        pairs = hits([digit.box for digit in digits_found], composed.boxes)
        right += sum(digits_found[a].digit == composed.digits[b] for a, b in pairs)
        places += len(pairs)
        found += len(digits_found)
        true += len(composed.digits)
    score = f1(right, found, true)
    print(
        f"found and read: F1 {score:.4f}, {right} right of {found} found and {true} there; "
        f"found: F1 {f1(places, found, true):.4f}"
    )
    assert score >= 0.90
