"""Folders of pictures as domains: from two of them to an adapted network, by commands alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import go_on, interrupt_after, records_of, result_of, run_as_process, state_of, train, weights_of
from PIL import Image, ImageDraw

import image_annotate
import main
import valid
from data_loader import UNLABELLED, Preprocessing
from digits import folders
from digits.domains import load_domain, load_pair
from digits.folders import load_folder
from methods.run import Run
from utils.cli import UserError, say_once
from utils.pictures import open_picture

FORM = Preprocessing(32)
ENDINGS = ("png", "jpg", "webp", "gif", "bmp", "tiff")


@pytest.fixture(autouse=True)
def _anew(monkeypatch, tmp_path):
    """Every test in a folder of its own, and what is said once is said again."""
    say_once.cache_clear()
    monkeypatch.chdir(tmp_path)


def draw(path: Path, label: int, seed: int) -> None:
    """A disc, a bar or a frame, each in as many shades as there are labels beyond three; of some size and shape."""
    rng = np.random.default_rng((label, seed))
    width, height = rng.integers(20, 90, 2).tolist()
    picture = Image.new("RGB", (width, height), tuple(rng.integers(0, 60, 3).tolist()))
    brush, box = ImageDraw.Draw(picture), (width // 5, height // 5, 4 * width // 5, 4 * height // 5)
    shade = (255, 255 - 13 * label, 40)
    (brush.ellipse, brush.rectangle, brush.line)[label % 3](box, fill=shade)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def fill(folder: Path, classes: list[str], count: int, seed: int = 0) -> Path:
    for label, name in enumerate(classes):
        for i in range(count):
            draw(folder / name / f"{i:02d}.{ENDINGS[i % len(ENDINGS)]}", label, seed + i)
    return folder


SMALL = ("--batch-size", "8", "--epochs", "2", "--device", "cpu", "--no-download", "--data-dir", "kept")


@pytest.mark.parametrize("count", [3, 17])
def test_two_folders_in_and_an_adapted_network_out(monkeypatch, capsys, tmp_path, count):
    """The source has a broken picture, an empty class and another file; the target has labels for its test alone."""
    classes = [f"kind {i:02d}" for i in range(count)]
    source, target = fill(tmp_path / "scans", classes, 7), tmp_path / "phone"
    fill(target / "test", classes, 2, seed=100)
    for i in range(40):
        draw(target / "train" / f"{i}.png", i % count, 200 + i)
    (source / classes[0] / "0 broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (source / "empty").mkdir()
    (source / "notes.txt").write_text("nothing")

    train("--source", "scans", "--target", "phone/", *SMALL, "--run-dir", "runs/whole")
    said = capsys.readouterr().err
    for part in (
        "0 broken.jpg",
        "notes.txt",
        "class empty",
        "the last fifth of each class",
        f"labels of scans: {6 * count} im",
    ):
        assert said.count(part) == 1, part
    result = result_of(Path("runs/whole"))
    assert (result["source_total"], result["target_total"]) == (count, 2 * count)
    assert (result["source_mark"], result["target_test_mark"]) == ("scans", "phone")

    # An interrupted run ends with the same bits.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main.StopRequest, "made", True)  # as if Ctrl-C were pressed at once
        with pytest.raises(main.Interrupted, match="--resume"):
            train("--source", "scans", "--target", "phone/", *SMALL, "--run-dir", "runs/parts")
    assert state_of(Path("runs/parts"))["step"] == 1
    go_on(Path("runs/parts"), "kept")
    whole, parts = (weights_of(Path("runs") / name) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)

    run = lambda script, *words: (monkeypatch.setattr("sys.argv", ["x", *map(str, words)]), script.main())  # noqa: E731
    capsys.readouterr()
    run(valid, "--weights", "runs/whole", "--domains", "./scans", "phone", "--data-dir", "kept", "--confusion")
    printed = capsys.readouterr().out.splitlines()
    tested = json.loads(printed[-1])["domains"]
    assert tested["phone"]["correct"] == result["target_correct"]
    assert tested["./scans"]["correct"] == result["source_correct"]
    assert sum(line.split()[:2] == classes[-1].split() for line in printed) == 2, "a row in each confusion matrix"

    run(valid, "--weights", "runs/whole", "--data-dir", "kept", "--export", "torch")
    assert Path("runs/exported/whole.pt2").is_file()
    capsys.readouterr()

    picture = target / "train" / "5.png"
    run(image_annotate, "-f", picture, "--weights", "runs/whole", "--device", "cpu", "--json", "--output-dir", "out")
    (document,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    (found,) = document["digits"]
    assert found["class"] in classes
    assert found["box"] == [0, 0, *Image.open(picture).size]
    run(image_annotate, "-f", picture, "--weights", "runs/whole", "--device", "cpu", "--output-dir", "out")
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert lines == [[str(picture)], found["class"].split()]
    assert Image.open("out/5-annotated.png").size >= Image.open(picture).size


def test_a_target_without_labels_is_trained_on_and_not_tested(capsys, tmp_path):
    fill(tmp_path / "scans", ["a", "b"], 10)
    for i in range(30):
        draw(tmp_path / "phone" / f"{i}.jpg", i % 2, 50 + i)
    train("--source", "scans", "--target", "phone", *SMALL, "--run-dir", "run")
    said = capsys.readouterr()
    assert "not tested: no labels" in said.out
    assert said.err.count("target no test") == 2
    assert "Warning" not in said.err
    result = result_of(Path("run"))
    assert (result["target_accuracy"], result["target_total"]) == (None, 0)
    assert all(record["target_accuracy"] is None for record in records_of(Path("run")))
    assert json.loads(Path("run/metrics.jsonl").read_text().splitlines()[0])["class_ami"] <= 1


def test_pictures_that_are_removed_while_they_are_trained_on(monkeypatch, tmp_path):
    """The run has them in memory, or mapped, and ends as it would have."""
    for name in ("scans", "phone"):
        fill(tmp_path / name, ["a", "b"], 10)
    words = ("--source", "scans", "--target", "phone", *SMALL)
    train(*words, "--run-dir", "left")
    remove = lambda: [shutil.rmtree(name) for name in ("scans", "phone", "kept")]  # noqa: E731
    interrupt_after(monkeypatch, Run, "count_step", 1, remove)
    train(*words, "--run-dir", "removed")
    assert not Path("kept").exists()
    left, removed = (weights_of(Path(name)) for name in ("left", "removed"))
    assert all(torch.equal(left[name], removed[name]) for name in left)
    assert result_of(Path("removed"))["target_correct"] == result_of(Path("left"))["target_correct"]


@pytest.mark.parametrize("pretrained", [False, True])
def test_a_network_of_torchvision_trains_on_folders(monkeypatch, tmp_path, pretrained):
    """From new weights, and from those in torch's cache."""
    for name in ("scans", "phone"):
        fill(tmp_path / name, ["a", "b", "c"], 5)
    words = ["--network", "torchvision:resnet18@32", *SMALL, "--precision", "fp32", *["--pretrained"] * pretrained]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs = torchvision.models.resnet18()
    theirs.conv1.weight.data.fill_(0.5)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(theirs.state_dict(), tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    train("--source", "scans", "--target", "phone", *words, "--run-dir", "run")
    assert result_of(Path("run"))["target_total"] == 3
    weights = weights_of(Path("run"))
    assert weights["classifier.layers.0.weight"].shape == (3, 512)
    first = next(value for name, value in weights.items() if name.endswith("conv1.weight"))
    assert (first.mean().item() > 0.4) is pretrained


# ---- what lies in a folder


def test_pictures_are_resized_as_everywhere_upright_and_kept(tmp_path):
    fill(tmp_path / "one", ["x", "y"], 5)
    turned = Image.open(tmp_path / "one" / "x" / "00.png").transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by 90 degrees clockwise
    turned.save(tmp_path / "one" / "x" / "00.png", exif=exif)
    digits = load_folder("one", "train", tmp_path, FORM)
    paths = [path for label in "xy" for path in sorted((tmp_path / "one" / label).iterdir())[:4]]
    for image, path in zip(digits.images, paths, strict=True):
        pixels = torch.from_numpy(np.array(open_picture(path))).permute(2, 0, 1)[None]
        assert torch.equal(image[None], FORM.resize(pixels)), path
    assert digits.labels.tolist() == [0] * 4 + [1] * 4
    assert digits.classes == ("x", "y")
    grey = load_folder("one", "train", tmp_path, Preprocessing(64, grey=True))
    assert grey.images.shape == (8, 1, 64, 64)


def test_decoded_pictures_are_used_again_until_one_changes(monkeypatch, tmp_path):
    fill(tmp_path / "one", ["x", "y"], 5)
    first = load_folder("one", "train", tmp_path, FORM)
    monkeypatch.setattr(folders, "open_picture", None)  # would fail
    again = load_folder("one", "train", tmp_path, FORM)
    assert torch.equal(again.images, first.images)
    assert again.checksums == first.checksums
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "one" / "x" / "01.jpg", 0, 77)
    changed = load_folder("one", "train", tmp_path, FORM)
    images = changed.images.clone()
    assert [torch.equal(*pair) for pair in zip(changed.images, first.images, strict=True)] == [True, False] + 6 * [True]
    assert changed.checksums != first.checksums
    (kept,) = (tmp_path / "folders").glob("one-train-*.bin")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert torch.equal(load_folder("one", "train", tmp_path, FORM).images, images), "a file cut short is no use"


def test_the_same_split_each_time_without_a_common_picture(tmp_path):
    fill(tmp_path / "one", ["x", "y"], 12)
    train, test = (load_domain("one", split, tmp_path) for split in ("train", "test"))
    assert (train.labels.bincount().tolist(), test.labels.bincount().tolist()) == ([10, 10], [2, 2])
    images = torch.cat((train.images, test.images)).flatten(1)
    assert len(images.unique(dim=0)) == 24


def test_a_split_of_ones_own_and_classes_called_train(tmp_path):
    fill(tmp_path / "own" / "train", ["x", "y"], 4)
    fill(tmp_path / "own" / "val", ["x", "y"], 3, seed=9)
    assert [len(load_domain("own", split, tmp_path)) for split in ("train", "test")] == [8, 6]
    fill(tmp_path / "vehicles", ["train", "bus"], 5)
    assert load_domain("vehicles", "test", tmp_path).classes == ("bus", "train")


def test_pictures_in_deep_folders_and_hidden_files(tmp_path):
    fill(tmp_path / "one" / "x", ["2024", "2025"], 3)
    draw(tmp_path / "one" / "y" / "0.PNG", 1, 0)
    for hidden in (".hidden/0.png", "__MACOSX/0.png", "y/.0.png"):
        draw(tmp_path / "one" / hidden, 0, 0)
    digits = load_domain("one", "train", tmp_path)
    assert (digits.classes, digits.labels.bincount().tolist()) == (("x", "y"), [5, 1])


def test_labels_are_those_of_the_source_whatever_the_order(tmp_path):
    """The built-in digits beside a folder of digits, and one that has more classes."""
    digits = load_domain("optdigits", "test", tmp_path)
    names = [str(i) for i in (3, 7, 1, 0, 2, 4, 5, 6, 8, 9)]
    for name in [*names, "blank"]:
        for i in range(5):
            path = tmp_path / "mine" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = digits.images[digits.labels == (0 if name == "blank" else int(name))][i, 0]
            Image.fromarray(image.numpy()).save(path)
    with pytest.raises(UserError, match=r"only mine has blank.*--common-classes"):
        load_pair("optdigits", "mine", False, tmp_path, False, None)
    pair = load_pair("mine", "optdigits", False, tmp_path, False, None, common=True)
    assert pair.classes == tuple("0123456789")
    assert len(pair.labelled) == 40
    for image, label in zip(pair.labelled.images, pair.labelled.labels, strict=True):
        expected = FORM.resize(digits.images[digits.labels == label][:4]).expand(-1, 3, -1, -1)
        assert any(torch.equal(image, other) for other in expected)
    fill(tmp_path / "letters", ["a", "b"], 5)
    with pytest.raises(UserError, match=r"only letters has a, b; only optdigits has 0, 1, 2, 3, 4, … \(10 in all\)"):
        load_pair("letters", "optdigits", False, tmp_path, False, None, common=True)


def test_an_unlabelled_set_has_no_label_and_no_test(tmp_path):
    for i in range(6):
        draw(tmp_path / "bare" / f"{i}.png", 0, i)
    train, test = (load_domain("bare", split, tmp_path) for split in ("train", "test"))
    assert (train.labels.tolist(), train.classes, len(test)) == ([UNLABELLED] * 6, (), 0)
    fill(tmp_path / "scans", ["a", "b"], 5)
    for source, target, target_only in (("scans", "bare", True), ("bare", "scans", False)):
        with pytest.raises(UserError, match=r"bare have no labels.*folder of its class"):
            load_pair(source, target, target_only, tmp_path, False, None)


def both(folder: Path) -> None:
    fill(folder, ["x"], 2)
    draw(folder / "0.png", 0, 0)


def unlabelled_test(folder: Path) -> None:
    fill(folder / "train", ["x", "y"], 2)
    draw(folder / "test" / "0.png", 0, 0)


def all_broken(folder: Path) -> None:
    (folder / "x").mkdir(parents=True)
    (folder / "x" / "0.png").write_bytes(b"nothing")


def foreign_test(folder: Path) -> None:
    fill(folder / "train", ["x", "y"], 2)
    fill(folder / "test", ["x", "z"], 2)


REFUSED = {
    "straight in it": both, "no picture that can be opened": Path.mkdir, "a test needs labels": unlabelled_test,
    "none of the 1 pictures": all_broken, r"classes \(z\) that are none of the known: x, y": foreign_test,
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_folders_that_are_no_domain(tmp_path, said):
    REFUSED[said](tmp_path / "it")
    fill(tmp_path / "other", ["x", "y"], 2)
    with pytest.raises(UserError, match=said) as caught:
        load_pair("it", "other", False, tmp_path, False, None)
    assert "it" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_where_decoded_pictures_cannot_be_kept(tmp_path):
    fill(tmp_path / "one", ["x", "y"], 5)
    (tmp_path / "kept").write_text("a file, no folder")
    with pytest.raises(UserError, match="cannot write to the folder kept/folders"):
        load_folder("one", "train", Path("kept"), FORM)


def test_weights_of_folders_that_are_not_at_hand(tmp_path, fail, capsys):
    for name in ("scans", "phone"):
        fill(tmp_path / name, ["a", "b"], 5)
    train("--source", "scans", "--target", "phone", *SMALL, "--run-dir", "run")
    for name in ("scans", "phone"):
        shutil.move(name, f"away-{name}")
    assert "phone is neither a domain" in fail(valid, "--weights", "run", "--device", "cpu", "--data-dir", "kept")
    assert "scans is neither" in fail(main, "--resume", "run", "--data-dir", "kept", "--device", "cpu")
    done = run_as_process(
        valid.__file__, "--weights", "run", "--domains", "away-phone", "--device", "cpu", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "away-phone" in done.stdout
