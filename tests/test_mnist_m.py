"""MNIST-M: the blend by its definition, the official archive, and what results call each."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from digits import files
from digits.domains import load_domain
from digits.mnist_m import blend, read_photographs
from digits.readers import MNIST_M_IMAGES, MissingData
from utils.cli import UserError

COUNTS = {"train": 7, "test": 5}


@pytest.fixture
def photographs() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in ((40, 50), (33, 32), (64, 90))
    ]


@pytest.fixture
def digits() -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (60, 28, 28), dtype=np.uint8) * rng.integers(0, 2, (60, 28, 28), dtype=np.uint8)


def pictures(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def write_archive(path, left_out: str = "") -> dict[str, np.ndarray]:
    """The official archive's layout; its pictures by split."""
    written = {split: pictures(count, seed) for seed, (split, count) in enumerate(COUNTS.items())}
    with tarfile.open(path, "w:gz") as archive:

        def add(name: str, content: bytes) -> None:
            if name != left_out:
                member = tarfile.TarInfo(f"mnist_m/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))

        for split, images in written.items():
            for i, image in reversed(list(enumerate(images))):
                png = io.BytesIO()
                Image.fromarray(image).save(png, "PNG")
                add(f"mnist_m_{split}/{i:08d}.png", png.getvalue())
            lines = [f"{i:08d}.png {i % 10}\n" for i in range(len(images))]
            add(f"mnist_m_{split}_labels.txt", "".join(lines).encode())
    return written


def test_each_image_is_a_patch_of_a_photograph_that_is_inverted_where_the_digit_is(digits, photographs):
    images = blend(digits, photographs, 5)
    framed = 255 * np.pad(digits > 0, ((0, 0), (2, 2), (2, 2)))[..., None].astype(int)
    seen = set()
    for image, digit in zip(images, framed, strict=True):
        found = [
            (number, top, left)
            for number, photograph in enumerate(photographs)
            for top in range(photograph.shape[0] - 31)
            for left in range(photograph.shape[1] - 31)
            if np.array_equal(image, np.abs(digit - photograph[top : top + 32, left : left + 32].astype(int)))
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert {number for number, *_ in seen} == {0, 1, 2}
    assert len(seen) > 40, "the patches differ"


def test_an_image_depends_on_its_number_and_the_seed_alone(digits, photographs):
    images = blend(digits, photographs, 5)
    np.testing.assert_array_equal(blend(digits[:9], photographs, 5), images[:9])
    assert not np.array_equal(blend(digits, photographs, 6), images)


def test_training_images_are_made_of_mnist_and_photographs_once(tiny_data, tmp_path, photographs, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "MNIST").symlink_to(tiny_data / "MNIST")
    with pytest.raises(MissingData, match=r"mnist_m\.tar\.gz.*download_data.py mnist-m"):
        load_domain("mnist-m", "train", folder)
    (folder / "BSDS500/train").mkdir(parents=True)
    with pytest.raises(UserError, match="BSDS500"):
        load_domain("mnist-m", "train", folder)
    for i, photograph in enumerate(photographs):
        Image.fromarray(photograph).save(folder / f"BSDS500/train/{i}.jpg")
    made = load_domain("mnist-m", "train", folder)
    mnist = load_domain("mnist", "train", folder)
    assert made.labels.tolist() == mnist.labels.tolist()
    expected = blend(mnist.images[:, 0].numpy(), read_photographs(folder / "BSDS500"), 0)
    np.testing.assert_array_equal(made.images.permute(0, 2, 3, 1).numpy(), expected)
    assert made.mark == f"MNIST-M subset, {len(mnist)}"
    monkeypatch.setattr("digits.readers.blend", None)
    assert load_domain("mnist-m", "train", folder).images.equal(made.images)


def test_the_official_archive_is_read_and_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.setattr("digits.readers.MNIST_M_IMAGES", COUNTS)
    written = write_archive(tmp_path / "mnist_m.tar.gz")
    for _ in range(2):
        for split, images in written.items():
            found = load_domain("mnist-m", split, tmp_path)
            np.testing.assert_array_equal(found.images.permute(0, 2, 3, 1).numpy(), images)
            assert found.labels.tolist() == [i % 10 for i in range(len(images))]
        monkeypatch.setattr("digits.readers.read_archive", None)


@pytest.mark.parametrize("left_out", ["mnist_m_test/00000003.png", "mnist_m_test_labels.txt"])
def test_an_archive_that_lacks_something_is_named(tmp_path, monkeypatch, left_out):
    monkeypatch.setattr("digits.readers.MNIST_M_IMAGES", COUNTS)
    write_archive(tmp_path / "mnist_m.tar.gz", left_out)
    with pytest.raises(UserError, match=r"mnist_m\.tar\.gz"):
        load_domain("mnist-m", "test", tmp_path)


def test_a_test_set_of_other_pixels_is_marked(tmp_path):
    labels = np.arange(MNIST_M_IMAGES["test"]) % 10
    np.savez(tmp_path / "mnist_m_test.npz", images=pictures(len(labels), 3), labels=labels)
    assert load_domain("mnist-m", "test", tmp_path).mark == "MNIST-M unofficial, 9,001"
    np.savez(tmp_path / "mnist_m_test.npz", images=pictures(3, 3).astype(float), labels=labels[:3])
    with pytest.raises(UserError, match=r"mnist_m_test\.npz.*float64"):
        load_domain("mnist-m", "test", tmp_path)


def test_only_files_with_an_address_are_fetched(monkeypatch, tmp_path):
    fetched = []
    monkeypatch.setattr(files, "fetch_file", lambda name, file, folder: fetched.append(file.path))
    files.fetch(["mnist-m"], tmp_path, "test")
    files.fetch(["mnist-m"], tmp_path, "train")
    assert fetched == ["mnist_m.tar.gz"] * 2


def test_the_real_test_set_is_official_and_shows_mnists_digits(real_data):
    test, mnist = (load_domain(name, "test", real_data) for name in ("mnist-m", "mnist"))
    assert test.mark == "MNIST-M"
    assert test.labels.equal(mnist.labels[: len(test)])


def test_the_real_test_set_is_blended_in_the_same_way(real_data):
    """On photographs that are nearly of one colour under the digit, at every grey of its pixels."""
    test, mnist = (load_domain(name, "test", real_data) for name in ("mnist-m", "mnist"))
    digits = np.pad(mnist.images[: len(test), 0].numpy(), ((0, 0), (2, 2), (2, 2)))
    dark, bright = [], []
    for image, digit in zip(test.images.permute(0, 2, 3, 1).numpy().astype(float), digits, strict=True):
        ground = image[digit == 0]
        if ground.std(0).max() < 8 and ground.mean() < 90:
            away = np.abs(image - (255 - ground.mean(0))).mean(-1)
            dark += away[(digit > 0) & (digit < 64)].tolist()
            bright += away[digit > 192].tolist()
    assert min(len(dark), len(bright)) > 5000
    assert max(np.percentile(dark, 95), np.percentile(bright, 95)) < 20
