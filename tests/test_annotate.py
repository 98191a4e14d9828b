"""image_annotate.py: what it finds, prints and writes, which pictures it takes, and how well it classifies."""

import difflib
import io
import itertools
import json
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import run_as_process
from PIL import Image, ImageDraw

import image_annotate
from annotate.boxes import intersection_over_union
from annotate.classify import classify, is_single, shown
from annotate.detector import detect, load_detector
from annotate.draw import draw_digits
from annotate.pictures import mark_in
from data_loader import CLASS_NAMES, Preprocessing
from digits.domains import load_domain
from image_annotate import IMAGES
from methods.classifier import load_classifier, usage
from methods.networks import build_network
from methods.recipes import Config
from tools.compose import compose, hits
from utils.checkpoint import save_weights
from utils.cli import UserError
from utils.pictures import open_picture
from utils.pretrained import read_index

SHIPPED = "synth-optdigits-quick"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def classifier():
    """The small network that ships with the code."""
    return load_classifier(SHIPPED, CPU, allow_download=False)


@pytest.fixture(scope="module")
def detector():
    return load_detector(CPU, allow_download=False)


@pytest.fixture(scope="module")
def ignorant(tmp_path_factory):
    """Weights of a network that has learnt nothing."""
    path = tmp_path_factory.mktemp("ignorant") / "ignorant.safetensors"
    torch.manual_seed(0)
    about = usage(Config(precision="fp32"), Preprocessing(32), CLASS_NAMES, {})
    save_weights(path, build_network("small").state_dict(), about)
    return path


@pytest.fixture
def annotate(monkeypatch, capsys, tmp_path):
    """Run image_annotate.py in this process; returns what it printed on stdout and on stderr."""

    def run(*arguments, weights=SHIPPED, out=tmp_path / "out"):
        common = ("--weights", weights, "--output-dir", out, "--device", "cpu", "--no-download")
        monkeypatch.setattr(sys, "argv", ["image_annotate.py", "-f", *map(str, (*arguments, *common))])
        capsys.readouterr()
        image_annotate.main()
        return capsys.readouterr()

    return run


@pytest.fixture
def documents(annotate):
    """Run image_annotate.py --json in this process; returns its documents."""
    return lambda *arguments, **more: json.loads(annotate(*arguments, "--json", **more).out)


@pytest.fixture(scope="module")
def composed(large_optdigits, classifier, detector):
    """A picture with three lines of handwriting in which every digit is found."""

    def suits(picture):
        lines = classify(picture.picture, detect(picture.picture, detector), classifier, None)
        return len(lines) == 3 and min(map(len, lines)) > 1 and [*map(len, lines)] == [*map(len, picture.lines)]

    pictures = (compose(*large_optdigits, np.random.default_rng((11, seed))) for seed in range(100))
    return next(picture for picture in pictures if suits(picture))


@pytest.fixture
def note(composed, tmp_path):
    composed.picture.save(tmp_path / "note.png")
    return tmp_path / "note.png"


@pytest.fixture
def tiny(tmp_path):
    """A picture of 8×8 pixels: one handwritten digit, dark on light."""
    digit = load_domain("optdigits", "test", Path()).images[3, 0].numpy()
    Image.fromarray(255 - digit).save(tmp_path / "tiny.png")
    return tmp_path / "tiny.png"


# --- what it prints and writes ----------------------------------------------------------------------


def test_annotating_in_a_process(note, composed, tmp_path):
    out = tmp_path / "out"
    options = ("--weights", SHIPPED, "--output-dir", out, "--json", "--device", "cpu")
    done = run_as_process("image_annotate.py", "-f", note, "--no-download", *options)
    assert done.returncode == 0, done.stderr
    (document,) = json.loads(done.stdout)
    assert list(document) == ["image", "lines", "digits"]
    assert document["image"] == str(note)
    assert [len(line) for line in document["lines"]] == [len(line) for line in composed.lines]
    assert "".join(document["lines"]) == "".join(str(digit["digit"]) for digit in document["digits"])
    right = 0
    for digit, true, place in zip(document["digits"], composed.digits, composed.boxes, strict=True):
        assert list(digit) == ["digit", "confidence", "box"]
        assert intersection_over_union(digit["box"], place) > 0.6
        assert 0 <= digit["confidence"] <= 1
        right += digit["digit"] == true
    assert right >= 0.9 * len(composed.digits)
    assert [path.name for path in out.iterdir()] == ["note-annotated.png"]
    assert str(out / "note-annotated.png") in done.stderr


def test_what_is_drawn_and_printed_is_the_same_every_time(annotate, documents, note, composed, tmp_path):
    """The picture with boxes, digits and confidences, and a line for people each; text and file, byte for byte."""
    (document,) = documents(note)
    (path,) = (tmp_path / "out").iterdir()
    first = path.read_bytes()
    assert documents(note) == [document]
    name, *rest = annotate(note).out.splitlines()
    assert path.read_bytes() == first
    boxes = [tuple(digit["box"]) for digit in document["digits"]]
    texts = [f"{digit['digit']} {digit['confidence']:.0%}" for digit in document["digits"]]
    assert (np.asarray(Image.open(path)) == np.asarray(draw_digits(composed.picture, boxes, texts))).all()
    assert name == str(note)
    for line, digit, (x0, y0, x1, y1) in zip(rest[: len(boxes)], document["digits"], boxes, strict=True):
        what, sure, *where = line.split()
        assert what == str(digit["digit"])
        assert float(sure.rstrip("%")) == pytest.approx(100 * digit["confidence"], abs=0.06)
        assert where == ["at", f"{x0},{y0}", "–", f"{x1},{y1}"]
    assert [line.split()[1:] for line in rest[len(boxes) :]] == [[number] for number in document["lines"]]


def test_one_preprocessing(classifier, detector, note, tiny):
    """What the network sees comes out of the one preprocessing function, whose size and normalisation are its own."""
    seen = []
    hook = classifier.model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0]))
    found = detect(open_picture(note), detector)
    for path in (note, tiny):
        classify(open_picture(path), found, classifier, 0)
    hook.remove()
    image = torch.from_numpy(255 - np.asarray(Image.open(tiny)))[None, None]
    squares, _ = shown(open_picture(note), [digit.box for digit in found], classifier)
    expected = [classifier.preprocess(squares), classifier.preprocess(image)]
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_the_precision_is_that_of_training(monkeypatch, annotate, tiny, ignorant, has_bf16):
    """As in valid.py: bf16 weights are used in bf16 where the machine has it, fp32 weights in fp32."""
    used, forward = [], torch.nn.Linear.forward
    monkeypatch.setattr("utils.machine.has_bf16", lambda device: has_bf16)
    monkeypatch.setattr(
        torch.nn.Linear, "forward", lambda layer, x: used.append(torch.is_autocast_enabled("cpu")) or forward(layer, x)
    )
    for weights, expected in ((SHIPPED, has_bf16), (ignorant, False)):
        used.clear()
        annotate(tiny, weights=weights)
        assert set(used) == {expected}


def test_no_digit(annotate, tmp_path):
    """That is no mistake: it says so, and writes the picture."""
    for name, size in (("blank", (300, 200)), ("small", (28, 28))):
        path = tmp_path / f"{name}.png"
        Image.new("RGB", size, (200, 210, 190)).save(path)
        assert "no digit found" in annotate(path).out
        printed = annotate(path, "--json")
        assert json.loads(printed.out) == [{"image": str(path), "lines": [], "digits": []}]
        assert "no digit found" in printed.err
        assert open_picture(tmp_path / "out" / f"{name}-annotated.png").size >= (400, 200)


def test_min_confidence(annotate, tiny, note, ignorant):
    """A tiny picture is one digit, so that there is nothing to drop unless one asks for it."""

    def kept(path, *options, **more):
        (document,) = json.loads(annotate(path, "--json", *options, **more).out)
        return [digit["confidence"] for digit in document["digits"]]

    everything = kept(note, "--min-confidence", 0, weights=ignorant)
    assert min(everything) < 0.7 < 0.72 < max(everything)
    for options, least in (((), 0.7), (("--min-confidence", 0.72), 0.72)):
        assert kept(note, *options, weights=ignorant) == [value for value in everything if value >= least]
    assert [value < 0.5 for value in kept(tiny, weights=ignorant)] == [True]
    assert kept(tiny, "--min-confidence", 0.9, weights=ignorant) == []


@pytest.mark.parametrize("value", ["1.5", "-0.1", "nan", "much"])
def test_min_confidence_is_a_share(monkeypatch, capsys, value):
    monkeypatch.setattr(sys, "argv", ["image_annotate.py", "-f", "a.png", "--min-confidence", value])
    with pytest.raises(SystemExit) as ended:
        image_annotate.parse_arguments()
    assert ended.value.code == 2
    assert "error: argument --min-confidence" in capsys.readouterr().err


def test_compare(annotate, documents, note, ignorant, tmp_path):
    """Both networks' predictions in the document, and two pictures beside each other; each classifies alone."""
    page = tmp_path / "out" / "note-annotated.png"
    documents(note)
    area = np.prod(Image.open(page).size)
    (both,) = documents(note, "--compare", ignorant, "--min-confidence", 0)
    assert np.prod(Image.open(page).size) > 1.9 * area
    (other_way,) = documents(note, "--compare", SHIPPED, "--min-confidence", 0, weights=ignorant)
    second, first = both.pop("compare"), other_way.pop("compare")
    assert (second.pop("weights"), first.pop("weights")) == (str(ignorant), SHIPPED)
    assert (both, other_way) == ({"image": str(note)} | first, {"image": str(note)} | second)
    assert first["lines"] != second["lines"]
    assert max(digit["confidence"] for digit in second["digits"]) < 0.5, "it has learnt nothing"
    printed = annotate(note, "--compare", ignorant).out
    assert f"{note}, {SHIPPED}" in printed
    assert f"{note}, {ignorant}" in printed


def test_show(monkeypatch, annotate, tiny, tmp_path):
    """With a display a window is asked for; without one, or where there is no viewer, the file is named."""
    page, show = tmp_path / "out" / "tiny-annotated.png", Mock()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(image_annotate.ImageShow, "show", show)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    for display, shows, windows in (("", True, 0), (":0", True, 1), (":0", False, 2)):
        monkeypatch.setenv("DISPLAY", display)
        show.return_value = shows
        assert (f"open {page}" in annotate(tiny, "--show").err) == (not display or not shows)
        assert [call.args[0].size for call in show.call_args_list] == [Image.open(page).size] * windows


# --- which pictures it takes ------------------------------------------------------------------------


def with_orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def test_pictures_of_every_kind_are_alike(documents, tmp_path):
    """Grey, palette, transparent, deep, for print, and turned by its camera: alike in look, alike in prediction."""
    canvas = Image.new("L", (120, 90), 255)
    for line in ([(20, 20), (50, 20), (30, 70)], [(90, 18), (88, 72)]):
        ImageDraw.Draw(canvas).line(line, 0, 6)
    grey = np.asarray(canvas)
    clear = canvas.convert("P")
    clear.info["transparency"] = 255
    colour, ink, black = canvas.convert("RGB"), 255 - grey[..., None], np.zeros((90, 120, 3), np.uint8)
    pictures = {
        "grey.png": (canvas, {}),
        "bits.tif": (canvas.convert("1"), {}),
        "colour.bmp": (colour, {}),
        "colour.webp": (colour, {"lossless": True}),
        "palette.gif": (canvas.convert("P"), {}),
        "print.tif": (canvas.convert("CMYK"), {}),
        "deep.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
        "deeper.tif": (Image.fromarray(grey.astype(np.int32) * 1000), {}),
        "float.tif": (Image.fromarray(grey.astype(np.float32) / 255), {}),
        "transparent-grey.png": (Image.fromarray(np.concatenate((black[..., :1], ink), 2), "LA"), {}),
        "transparent.png": (Image.fromarray(np.concatenate((black, ink), 2)), {}),
        "transparent-palette.png": (clear, {"transparency": 255}),
        # To be turned clockwise by a quarter to be seen upright.
        "turned.png": (canvas.transpose(Image.Transpose.ROTATE_90), {"exif": with_orientation(6)}),
    }
    (tmp_path / "kinds").mkdir()
    for name, (picture, options) in pictures.items():
        picture.save(tmp_path / "kinds" / name, **options)
    found = {Path(document["image"]).name: document["digits"] for document in documents(tmp_path / "kinds")}
    assert list(found) == sorted(pictures)
    assert len(found["grey.png"]) == 2
    assert [name for name in found if found[name] != found["grey.png"]] == []


def test_a_jpeg_from_a_camera(documents, composed, tmp_path):
    """Large, turned by EXIF, dark on light: boxes are in pixels of the upright picture."""
    large = composed.picture.resize([side * 4 for side in composed.picture.size], Image.BICUBIC)
    large.rotate(180).save(tmp_path / "photo.jpg", exif=with_orientation(3), quality=90)  # upside down
    boxes = [digit["box"] for digit in documents(tmp_path / "photo.jpg")[0]["digits"]]
    matched = hits(boxes, [tuple(4 * v for v in box) for box in composed.boxes])
    assert len(matched) == len(boxes) == len(composed.boxes)


def test_a_name_among_the_images_of_the_code(documents, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(image_annotate, "IMAGES", tmp_path)
    tiny.rename(tmp_path / "a digit.png")
    assert documents("a digit.png")[0]["image"] == str(tmp_path / "a digit.png")
    assert (tmp_path / "out" / "a digit-annotated.png").exists()


def test_a_folder(documents, tiny, note, tmp_path):
    """All pictures in it, sorted, other files aside; what an earlier run wrote there is no input."""
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    for name in ("b.png", "a.PNG", "c-annotated.png", "below/d.png"):  # the third is somebody's own
        shutil.copy(tiny, folder / name)
    (folder / "notes.txt").write_text("no picture")
    for _ in range(2):
        found = documents(folder, folder / "b.png", note, out=folder)
        assert [Path(document["image"]).name for document in found] == ["a.PNG", "b.png", "c-annotated.png", "note.png"]
    written = {path.name for path in folder.iterdir() if mark_in(path)}
    assert written == {"a-annotated.png", "b-annotated.png", "c-annotated-annotated.png", "note-annotated.png"}
    assert (folder / "c-annotated.png").read_bytes() == tiny.read_bytes()


def test_every_page_of_a_file(documents, tiny, note, tmp_path):
    """But not a small copy of another page, as scanners put beside it."""
    first, second = (Image.open(path).convert("L") for path in (note, tiny))
    copy = first.reduce(4)
    copy.encoderinfo = {"tiffinfo": {254: 1}}
    scan = tmp_path / "scan.tif"
    first.save(scan, save_all=True, append_images=[copy, second])
    for _ in range(2):
        found = documents(scan)
        assert [document["page"] for document in found] == [1, 2]
        assert {path.name for path in (tmp_path / "out").iterdir()} == {f"scan-page{i}-annotated.png" for i in (1, 2)}
    first.save(tmp_path / "grey.png")
    alone = documents(tmp_path / "grey.png", tiny)
    assert [document["lines"] for document in found] == [document["lines"] for document in alone]
    assert all("page" not in document for document in alone)


def test_of_an_animation_the_first_frame_counts_and_a_line_says_so(annotate, tiny, note, tmp_path):
    first, second = (Image.open(path).convert("L") for path in (tiny, note))
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second.resize(first.size)])
    printed = annotate(tmp_path / "moving.gif")
    assert "moving.gif has 2 frames: the first one counts" in printed.err


def test_pictures_of_phones_that_cannot_be_read_are_named(monkeypatch, annotate, tiny, tmp_path):
    """HEIC takes a package that few need; without it no file of a folder is left out in silence."""
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(tiny, folder / "a.png")
    (folder / "b.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    known = {end: kind for end, kind in Image.registered_extensions().items() if end not in (".heic", ".heif")}
    monkeypatch.setattr(Image, "registered_extensions", lambda: known)
    printed = annotate(folder)
    assert f"skipped {folder / 'b.HEIC'}: run `pip install pillow-heif`" in printed.err
    assert (tmp_path / "out" / "a-annotated.png").exists()
    with pytest.raises(UserError, match="pip install pillow-heif"):
        annotate(folder / "b.HEIC")


def test_pictures_of_phones_that_can_be_read(annotate, tiny, tmp_path):
    pytest.importorskip("pillow_heif")
    Image.open(tiny).convert("RGB").resize((32, 32)).save(tmp_path / "a.heic", quality=95)
    assert "a.heic" in annotate(tmp_path / "a.heic").out


def test_no_file_is_written_over(annotate, tiny, note, tmp_path):
    """No other picture's page, in one run or in two, and no input or other file that is called as a page would be."""
    out = tmp_path / "out"
    one, two, mine = tmp_path / "one" / "digits.png", tmp_path / "two" / "digits.png", out / "digits-annotated-2.png"
    for path, source in ((one, tiny), (two, note), (mine, note)):
        path.parent.mkdir()
        shutil.copy(source, path)
    (out / "digits-annotated.png").write_text("a diary")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    annotate(one, two, mine)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    pages = ("digits-annotated-3.png", "digits-annotated-4.png", "digits-annotated-2-annotated.png")
    assert after.keys() - before.keys() == {out / name for name in pages}
    assert after.items() >= before.items()
    for path in (two, one, two, mine):  # a picture that is annotated again keeps its place
        annotate(path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == after


def test_pictures_of_our_own(detector):
    """With the default weights: print comes out right, and most of the handwriting, enlarged from 8×8 pixels."""
    classifier, right = load_classifier(None, CPU, allow_download=False), {}
    true = {
        "plate.jpg": "190", "four.png": "4", "five.png": "5", "seven.png": "7", "shadow.jpg": "602214",
        "blackboard.jpg": "31415 9265", "note.jpg": "2025081 4711 365 90210",
    }  # fmt: skip
    for path in IMAGES.iterdir():
        picture = open_picture(path)
        candidates = [] if is_single(picture, classifier) else detect(picture, detector)
        found = " ".join(image_annotate.as_numbers(classify(picture, candidates, classifier, None)))
        common = difflib.SequenceMatcher(None, found, true[path.name], autojunk=False).get_matching_blocks()
        right[path.name] = sum(len(found[a : a + n].replace(" ", "")) for a, _, n in common)
        assert path.stat().st_size < 60_000
    print(right)
    assert {name: right.pop(name) for name in ("plate.jpg", "four.png", "five.png", "seven.png")} == {
        "plate.jpg": 3, "four.png": 1, "five.png": 1, "seven.png": 1,
    }  # fmt: skip
    assert sum(right.values()) >= 26, "of 34"


# --- how well it classifies -------------------------------------------------------------------------


def check_singles(classifier, images, shown, differ):
    """Pictures of one digit each, saved and opened again, are predicted as valid.py predicts `images`."""
    expected = classifier.probabilities(images).argmax(1).tolist()
    for image, digit in zip(shown[:, 0].numpy(), expected, strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        ((found,),) = classify(Image.open(file).convert("RGB"), [], classifier, None)
        differ -= int(found.name) != digit
    assert differ >= 0, "of a batch and of a single image the last bits may differ, but not of so many"


@pytest.mark.parametrize("invert", [False, True])
def test_single_digits_are_predicted_as_by_valid_in_either_polarity(classifier, invert):
    images = load_domain("optdigits", "test", Path()).images
    check_singles(classifier, images, 255 - images if invert else images, differ=2)


@pytest.fixture(scope="module")
def mnist_classifier():
    """The shipped weights for SVHN -> MNIST."""
    classifiers = (load_classifier(name, CPU, allow_download=False) for name in read_index()["weights"])
    return next(found for found in classifiers if (found.source, found.target) == ("svhn", "mnist"))


def test_single_mnist_digits_are_predicted_as_by_valid(real_data, mnist_classifier):
    images = load_domain("mnist", "test", real_data).images[:1000]
    check_singles(mnist_classifier, images, images, differ=5)


def test_composed_pictures_of_mnist_digits(real_data, detector, mnist_classifier):
    """Fifty pictures of test digits: found (boxes overlap by half of their union) and right, F1 at least 0.95."""
    test = load_domain("mnist", "test", real_data)
    right = found = true = 0
    for i in range(50):
        composed = compose(test.images[:, 0].numpy(), test.labels.numpy(), np.random.default_rng((0, i)))
        lines = classify(composed.picture, detect(composed.picture, detector), mnist_classifier, None)
        digits = list(itertools.chain(*lines))
        pairs = hits([digit.box for digit in digits], composed.boxes)
        right += sum(int(digits[a].name) == composed.digits[b] for a, b in pairs)
        found += len(digits)
        true += len(composed.digits)
    f1 = 2 * right / (found + true)
    print(f"F1 {f1:.4f}, {right} right of {found} found and {true} there")
    assert f1 >= 0.95
