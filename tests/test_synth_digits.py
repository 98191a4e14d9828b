"""The rendered digits: reproducible, truly labelled, and cached without half files."""

import itertools
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from sklearn.neighbors import KNeighborsClassifier

from digits import synth
from digits.synth import load_synth_digits, render_digit, render_digits

ROOT = Path(__file__).resolve().parent.parent
COUNT = 30  # images in these tests' cache files


@pytest.fixture(scope="module")
def rendered():
    return render_digits(seed=0, start=0, count=1500, workers=1)


def test_shapes_and_types_and_no_image_twice(rendered):
    for count, (images, labels) in ((1500, rendered), (0, render_digits(seed=0, start=5, count=0))):
        assert images.shape == (count, 32, 32, 3)
        assert labels.shape == (count,)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
        assert len({image.tobytes() for image in images}) == count, "no image twice"


def assert_images_from(loaded, rendered, start, count=COUNT):
    np.testing.assert_array_equal(loaded[0], rendered[0][start : start + count])
    np.testing.assert_array_equal(loaded[1], rendered[1][start : start + count])


def test_an_image_depends_on_seed_and_index_alone(rendered):
    for index in (41, 7, 40, 0):  # alone, and out of order
        image, label = render_digit(0, index)
        assert_images_from((image[None], [label]), rendered, index, 1)
    assert_images_from(render_digits(seed=0, start=35, count=10), rendered, 35, 10)


@pytest.mark.skipif(sys.platform != "linux", reason="one process does the work off Linux")
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_nothing(rendered, monkeypatch, workers):
    started = []

    class Pool(ProcessPoolExecutor):
        def __init__(self, max_workers, *args):
            started.append(max_workers)
            super().__init__(max_workers, *args)

    monkeypatch.setattr(synth, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(synth, "CHUNK", 20)
    loaded = render_digits(seed=0, start=10, count=90, workers=workers)  # the last chunk is half full
    assert started == [workers]
    assert_images_from(loaded, rendered, 10, 90)


def test_workers_serve_a_script_without_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nprint('started')\nfrom digits import synth\nprint('torch' in sys.modules)\nsynth.CHUNK = 20\n"
        "print(synth.render_digits(3, 0, 60, workers=2)[1].sum())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["started", "False", str(sum(render_digit(3, i)[1] for i in range(60)))]
    assert run.stderr == ""  # no terminal, no progress bar


def test_another_seed_gives_other_images(rendered):
    images, labels = render_digits(seed=1, start=0, count=100)
    assert not any(np.array_equal(a, b) for a, b in zip(images, rendered[0], strict=False))
    assert (labels == rendered[1][:100]).mean() < 0.3  # 0.1 by chance


def test_classes_are_uniform(rendered):
    counts = np.bincount(rendered[1], minlength=10)
    assert len(counts) == 10
    assert ((counts - 150) ** 2 / 150).sum() < 27.9  # of 9 degrees of freedom: passed by 999 of 1000 uniform draws


def plain_digits():
    """Black digits on white in three faces, sizes, turns and nine places, drawn by Pillow alone."""
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    images, labels = [], []
    for face, size in itertools.product(("DejaVuSans", "DejaVuSerif-Bold", "STIXGeneral"), (24, 30, 36)):
        font = ImageFont.truetype(str(fonts / f"{face}.ttf"), size)
        for x, y, angle, digit in itertools.product((13, 16, 19), (13, 16, 19), (-15, 0, 15), range(10)):
            picture = Image.new("L", (32, 32), 255)
            ImageDraw.Draw(picture).text((x, y + 0.36 * size), str(digit), 0, font, anchor="ms")
            images.append(np.asarray(picture.rotate(angle, fillcolor=255)))
            labels.append(digit)
    return np.array(images), np.array(labels)


def edge_orientations(grey):
    """Histograms of 6 edge orientations in 8 x 8 cells, blind to polarity. Shape: (N, 32, 32) -> (N, 384)."""
    down, across = np.gradient(grey.astype(float), axis=(1, 2))
    strength = np.hypot(across, down)
    bins = ((np.arctan2(down, across) % np.pi) / np.pi * 6).astype(int) % 6
    cells = [(strength * (bins == b)).reshape(-1, 8, 4, 8, 4).sum((2, 4)) for b in range(6)]
    features = np.stack(cells, axis=-1).reshape(len(grey), -1)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def test_the_label_is_that_of_the_digit_in_the_centre(rendered):
    images, labels = rendered
    plain_images, plain_labels = plain_digits()
    neighbours = KNeighborsClassifier(5).fit(edge_orientations(plain_images), plain_labels)
    predicted = neighbours.predict(edge_orientations(images.mean(-1)))
    assert (predicted == labels).mean() > 0.55  # 0.74 when written; 0.1 by chance
    for digit in range(10):  # two classes that changed places would show here
        assert np.bincount(predicted[labels == digit], minlength=10).argmax() == digit


def cache_files(*folders):
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())


def forbid_rendering(monkeypatch):
    def render(*args, **kwargs):
        raise AssertionError("rendered although a cache file was there")

    monkeypatch.setattr(synth, "render_digits", render)


def test_cache_is_written_once_and_used_again(tmp_path, rendered, monkeypatch, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert_images_from(load_synth_digits(0, 60, COUNT, [first, second]), rendered, 60)
    (path,) = cache_files(first, second)
    assert path.parent == first / "synth"
    assert_images_from(load_synth_digits(0, 90, COUNT, [first, second]), rendered, 90)  # a file of its own
    assert len(cache_files(first, second)) == 2
    forbid_rendering(monkeypatch)
    for folders in ([first, second], [second, first]):  # from the one that has it
        assert_images_from(load_synth_digits(0, 60, COUNT, folders), rendered, 60)
    assert capsys.readouterr().err == ""


def test_another_version_uses_no_old_cache(tmp_path, monkeypatch):
    load_synth_digits(0, 0, COUNT, [tmp_path])
    monkeypatch.setattr(synth, "VERSION", synth.VERSION + 1)
    forbid_rendering(monkeypatch)
    with pytest.raises(AssertionError, match="rendered although"):
        load_synth_digits(0, 0, COUNT, [tmp_path])


def flip_a_bit(data):
    middle = len(data) // 2  # a pixel
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 100, flip_a_bit],
    ids=["truncated", "empty", "foreign", "one bit"],
)
def test_a_damaged_cache_is_rendered_again(tmp_path, rendered, monkeypatch, capsys, damage):
    load_synth_digits(0, 0, COUNT, [tmp_path])
    (path,) = cache_files(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert_images_from(load_synth_digits(0, 0, COUNT, [tmp_path]), rendered, 0)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
    forbid_rendering(monkeypatch)  # the file is whole again
    assert_images_from(load_synth_digits(0, 0, COUNT, [tmp_path]), rendered, 0)
    assert capsys.readouterr().err == ""


def test_a_cache_of_another_count_is_damaged(tmp_path, rendered):
    load_synth_digits(0, 0, COUNT, [tmp_path])
    (path,) = cache_files(tmp_path)
    path.rename(path.with_name(path.name.replace(f"_{COUNT}.", "_20.")))
    assert_images_from(load_synth_digits(0, 0, 20, [tmp_path]), rendered, 0, 20)


def test_a_folder_that_cannot_be_written(tmp_path, rendered, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert_images_from(load_synth_digits(0, 0, COUNT, [blocked / "below"]), rendered, 0)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(blocked) in line
    assert_images_from(load_synth_digits(0, 0, COUNT, [blocked / "below", tmp_path / "free"]), rendered, 0)
    assert len(cache_files(tmp_path / "free")) == 1
    assert capsys.readouterr().err == ""


def test_a_full_disk_leaves_no_half_file(tmp_path, rendered, monkeypatch, capsys):
    def write_half(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synth.np, "savez", write_half)
    assert_images_from(load_synth_digits(0, 0, COUNT, [tmp_path]), rendered, 0)
    assert cache_files(tmp_path) == []
    assert "No space left" in capsys.readouterr().err
