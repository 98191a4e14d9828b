"""Pairing and preprocessing; and that no label of the target can reach the training."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA
from small_run import SmallRun, random_digits

import main
from data_loader import DigitSet, PairedLoader, Preprocessing, mean_pixel, principal_grey, seed_of, spread_over
from digits.augmentation import View, same_views
from digits.domains import DOMAINS
from digits.readers import Reading
from methods.recipes import METHODS, recipe_config


def numbered(count: int) -> DigitSet:
    """Images of 4×4 pixels that all carry the number of their image."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return DigitSet("svhn", "train", images, torch.arange(count) % 10, "", {})


def numbered_loader(count_s: int, count_t: int, seed: int = 0, steps: int | None = None) -> PairedLoader:
    target = numbered(count_t).images
    return PairedLoader(numbered(count_s), target, 8, seed, Preprocessing(4), same_views("none"), steps=steps)


def numbers_of(loader: PairedLoader, epoch: int) -> list[tuple[list, list, list]]:
    """Each batch as the numbers of its source images, its labels, the numbers of its target images."""
    number = lambda x: (x[:, 0, 0, 0] * 255).round().int().tolist()  # noqa: E731
    return [(number(x_s), y_s.tolist(), number(x_t)) for x_s, y_s, x_t in loader.epoch(epoch)]


def flat(batches: list, column: int) -> list[int]:
    return [number for batch in batches for number in batch[column]]


@pytest.mark.parametrize(
    ("count_s", "count_t", "steps"), [(53, 20, None), (20, 53, None), (40, 40, None), (7, 200, None), (10, 12, 9)]
)
def test_an_epoch_covers_both_sets_in_passes_that_differ(count_s, count_t, steps):
    batches = numbers_of(numbered_loader(count_s, count_t, steps=steps), 3)
    assert len(batches) == (steps or math.ceil(max(count_s, count_t) / 8))
    for column, count in ((0, count_s), (2, count_t)):
        assert {len(batch[column]) for batch in batches} == {8}  # constant shapes
        seen = flat(batches, column)
        passes = [tuple(seen[start : start + count]) for start in range(0, len(seen), count)]
        assert all(len(set(one)) == len(one) for one in passes)  # each image once before any comes again
        assert len(set(passes)) == len(passes)
        assert set(seen) == set(range(count))
    assert flat(batches, 1) == [number % 10 for number in flat(batches, 0)]  # labels go with their images


def test_the_order_depends_on_seed_and_epoch_alone():
    each = list(itertools.product((0, 1), (0, 1, 2)))
    orders = {(seed, epoch): numbers_of(numbered_loader(60, 60, seed), epoch) for seed, epoch in each}
    loader = numbered_loader(60, 60, seed=1)
    list(loader.epoch(0))
    torch.rand(5)
    assert numbers_of(loader, 2) == orders[1, 2]  # whatever came before it
    assert len({tuple(flat(batches, column)) for batches in orders.values() for column in (0, 2)}) == 2 * len(each)


def test_seed_of_tells_its_parts_and_their_number_apart():
    parts = [numbers for length in (1, 2, 3, 4) for numbers in itertools.product(range(5), repeat=length)]
    seeds = {seed_of(*numbers) for numbers in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_images_spread_over_a_set_keep_their_labels():
    digits = spread_over(numbered(30), 4)
    assert digits.images[:, 0, 0, 0].tolist() == [0, 7, 15, 22]
    assert digits.labels.tolist() == [0, 7, 5, 2]
    assert len(spread_over(numbered(3), 4)) == 3


class Shows:
    """A view of images so many times as bright."""

    def __init__(self, factor):
        self.factor = factor

    def draw(self, count, size, generator):
        return {}

    def apply(self, images, index, draws):
        return self.factor * images[index].float()


def test_views_of_the_target_come_in_their_order_and_show_the_same_images():
    views = [Shows(factor) for factor in (2, 3, 5)]
    loader = PairedLoader(numbered(20), numbered(30).images, 8, 0, Preprocessing(4), lambda epoch, step: views)
    for x_s, y_s, (first, second) in loader.epoch(0):
        assert torch.equal(x_s[:, 0, 0, 0] / 2 % 10, y_s.float())
        assert torch.equal(first / 3, second / 5)


def test_parts_of_several_processes_are_the_whole_batch():
    """Two loaders of half batches give what one gives, changed in the same way, also when they start in mid-epoch."""
    digits, target = random_digits(50, 16, 8), random_digits(30, 16, 9, channels=1).images
    kinds = [[View("strong"), View("affine"), View("weak")], [View("mild"), View("strong", 0.5), View("weak")]]

    def batches(part: slice = slice(None), first_step: int = 0) -> list[tuple]:
        views = lambda epoch, step: kinds[(epoch + step) % 2]  # noqa: E731
        loader = PairedLoader(digits, target, 12, 7, Preprocessing(16, grey=True), views, part=part)
        return list(loader.epoch(3, first_step))

    whole, *halves = batches(), batches(slice(0, 6)), batches(slice(6, 12))
    assert len(whole) == len(halves[0]) == 5
    assert whole[0][2].shape == (2, 12, 1, 16, 16)
    for batch, first, second in zip(whole, *halves, strict=True):
        for number, joined in enumerate(batch):
            torch.testing.assert_close(joined, torch.cat((first[number], second[number]), 1 if number == 2 else 0))
    for first_step in range(6):
        for batch, later in zip(whole[first_step:], batches(first_step=first_step), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, later, strict=True))


def tensors_in(value, seen: set[int]):
    """All tensors that can be reached from an object by its attributes."""
    if isinstance(value, torch.Tensor):
        yield value
    if id(value) in seen or isinstance(value, torch.Tensor | type):
        return
    seen.add(id(value))
    items = value if isinstance(value, list | tuple | dict) else getattr(value, "__dict__", {})
    for item in items.values() if hasattr(items, "values") else items:
        yield from tensors_in(item, seen)


@pytest.fixture
def two_domains(monkeypatch):
    """Put random images under the names svhn (30 to train) and usps (21); returns the labels, to be changed at will."""
    generator, images, labels = torch.Generator().manual_seed(0), {}, {}
    for name, shape, counts in (("svhn", (3, 32, 32), (30, 11)), ("usps", (1, 16, 16), (21, 13))):
        for split, count in zip(("train", "test"), counts, strict=True):
            images[name, split] = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
            labels[name, split] = torch.randint(0, 10, (count,), generator=generator)
        read = lambda data_dir, split, name=name: Reading(images[name, split], labels[name, split])  # noqa: E731
        monkeypatch.setitem(DOMAINS, name, dataclasses.replace(DOMAINS[name], read=read))
    return labels


def run_on(config, folder) -> SmallRun:
    pair = main.load_pair(config.source, config.target, config.method == "target-only", folder, False, None)
    return SmallRun(config, pair=pair)


PAPER = dataclasses.replace(recipe_config("paper", "svhn", "usps"), network="paper-mnist", epochs=2, batch_size=8)
QUICK = dataclasses.replace(recipe_config("quick", "svhn", "usps"), epochs=2, batch_size=8)
TAUGHT = dataclasses.replace(recipe_config("modern", "svhn", "usps"), epochs=2, epoch_steps=3, batch_size=8)
UPPER = dataclasses.replace(PAPER, method="target-only")


@pytest.mark.parametrize("config", [PAPER, QUICK, TAUGHT, UPPER], ids=["paper", "quick", "modern", "target-only"])
def test_the_labels_of_one_domain_alone_can_change_the_weights(config, two_domains, tmp_path):
    unseen, seen = ("svhn", "usps") if config is UPPER else ("usps", "svhn")
    weights = run_on(config, tmp_path).train().weights()
    two_domains[unseen, "train"].fill_(9)
    alike = run_on(config, tmp_path).train().weights()
    assert all(torch.equal(weights[name], value) for name, value in alike.items())
    two_domains[seen, "train"].fill_(9)
    others = run_on(config, tmp_path).train().weights()
    trained = [name for name in others if "weight" in name and not (config is UPPER and "discriminator" in name)]
    assert not any(torch.equal(weights[name], others[name]) for name in trained)


def test_nothing_in_training_holds_labels_of_the_target(two_domains, tmp_path):
    small = run_on(PAPER, tmp_path).train()
    reachable = list(tensors_in([small.run, small.loader, small.watcher, small.objective()], set()))
    found = {key for key, labels in two_domains.items() if any(torch.equal(tensor, labels) for tensor in reachable)}
    assert found == two_domains.keys() - {("usps", "train")}  # so the search finds labels, those that are tested too
    (labels,) = (tensor for tensor in tensors_in(small.loader, set()) if tensor.dtype != torch.uint8)
    assert torch.equal(labels, two_domains["svhn", "train"])


def test_the_bounds_do_the_same_steps_and_subtract_the_same_mean(two_domains, tmp_path):
    """Also target-only, which learns from the target's labels, subtracts the mean of both training sets."""
    mean_s, mean_t = (
        DOMAINS[name].read(tmp_path, "train").images.double().mean((0, 2, 3)) for name in ("svhn", "usps")
    )
    for method in METHODS:
        small = run_on(dataclasses.replace(PAPER, method=method), tmp_path)
        assert small.run.steps_per_epoch == len(list(small.loader.epoch(0))) == 4  # 30 by 8
        name = "usps" if method == "target-only" else "svhn"
        assert torch.equal(small.loader.labels_s, two_domains[name, "train"])
        assert small.loader.preprocess.mean == pytest.approx(((mean_s + mean_t) / 2 / 255).tolist(), abs=2e-6)


def test_unit_and_mean_normalisation_by_hand():
    images = torch.tensor([[[[0, 255], [51, 102]]]], dtype=torch.uint8)
    x = Preprocessing(2, "unit")(images)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[0], torch.tensor([[0.0, 1.0], [0.2, 0.4]]).expand(3, 2, 2))  # grey in each channel
    images = torch.tensor([[[[0]], [[51]], [[255]]]], dtype=torch.uint8)
    subtract = Preprocessing(1, "mean", (0.5, 0.25, 0.125))
    torch.testing.assert_close(subtract(images).view(3), torch.tensor([-0.5, -0.05, 0.875]))
    torch.testing.assert_close(subtract(images[:, :1]).view(3), torch.tensor([-0.5, -0.25, -0.125]))


def test_per_image_normalisation_against_numpy():
    preprocess = Preprocessing(16, "per-image")
    pixels = np.random.default_rng(0).integers(0, 200, (4, 3, 16, 16), np.uint8)
    for image, result in zip(pixels / 255, preprocess(torch.from_numpy(pixels)).numpy(), strict=True):
        np.testing.assert_allclose(result, (image - image.mean()) / image.std(), atol=2e-6)
    # A grey image is the same whether its file has one channel or three equal ones.
    grey = torch.from_numpy(pixels[:, :1])
    torch.testing.assert_close(preprocess(grey), preprocess(grey.repeat(1, 3, 1, 1)), rtol=5e-3, atol=1e-6)


def test_a_blank_image_stays_finite():
    for channels, level in itertools.product((1, 3), (0, 17, 255)):
        images = torch.full((2, channels, 20, 20), level, dtype=torch.uint8)
        images[1, 0, 3, 3] ^= 1  # one pixel that differs by one level
        x = Preprocessing(28, "per-image")(images)
        assert x[0].abs().max() < 1e-3
        assert x.isfinite().all()
        assert x.abs().max() < 100


@pytest.mark.parametrize(("size", "image_size"), [(8, 32), (16, 28), (28, 32), (32, 28), (45, 28), (64, 32), (500, 32)])
def test_resizing_agrees_with_pillow(size, image_size):
    pixels = np.random.default_rng(size).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    pixels[2] = 7
    resized = Preprocessing(image_size).resize(torch.from_numpy(pixels).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    for ours, image in zip(resized.numpy(), pixels, strict=True):
        theirs = np.asarray(Image.fromarray(image).resize((image_size, image_size), Image.Resampling.BILINEAR))
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    assert (resized[2] == 7).all()  # what is constant stays so


def test_resizing_in_parts_is_resizing_at_once():
    images, chosen = random_digits(4100, 3, 0, channels=1).images, [0, 4095, 4096, 4099]
    resized = Preprocessing(4).resize(images)
    assert len(resized) == 4100
    one_by_one = [Preprocessing(4).resize(images[i : i + 1]) for i in chosen]
    assert torch.equal(resized[chosen], torch.cat(one_by_one))


@pytest.mark.parametrize("normalisation", ["unit", "mean", "per-image"])
def test_training_batches_are_what_is_tested(normalisation):
    """Resized once in the loader, or at once as for a test: the same numbers, each with its own label."""
    digits, target = random_digits(24, 32, 1), random_digits(19, 16, 2, channels=1).images
    before, preprocess = digits.images.clone(), Preprocessing(28, normalisation, (0.4, 0.3, 0.2))
    tested_s, tested_t = preprocess(digits.images), preprocess(target)
    for x_s, y_s, x_t in PairedLoader(digits, target, 6, 0, preprocess, same_views("none")).epoch(0):
        same_s, same_t = ((x[:, None] == tested).flatten(2).all(2) for x, tested in ((x_s, tested_s), (x_t, tested_t)))
        assert same_s.sum(1).tolist() == same_t.sum(1).tolist() == [1] * 6
        assert torch.equal(y_s, same_s.int().argmax(1) % 10)
    assert torch.equal(digits.images, before)  # and what comes in is left alone


def grey_by_hand(image: np.ndarray) -> np.ndarray:
    """The first principal component of a (3, H, W) image's colours, as scikit-learn finds it."""
    found = PCA(1).fit(image.reshape(3, -1).T)
    direction = found.components_[0] * np.sign(found.components_[0].sum())
    return image.mean() + ((image - found.mean_[:, None, None]) * direction[:, None, None]).sum(0) / 3**0.5


@pytest.mark.parametrize("size", [16, 32])
def test_a_grey_network_gets_the_principal_component_of_the_colours(size):
    """Taken before resizing, and rounded once; grey images of the right size come back as they are."""
    colour, preprocess = random_digits(3, 32, 5).images, Preprocessing(size, grey=True)
    principal = np.stack([grey_by_hand(image) for image in colour.numpy().astype(np.float64)])
    resized = preprocess.resize(colour)
    assert resized.shape == (3, 1, size, size)
    if size == 32:
        assert np.array_equal(resized[:, 0].numpy(), np.rint(principal).clip(0, 255))
    else:
        expected = np.stack([np.asarray(Image.fromarray(g.astype(np.float32)).resize((16, 16), 2)) for g in principal])
        assert np.abs(resized[:, 0].numpy() - expected.clip(0, 255)).max() <= 0.51
    assert preprocess.resize(resized) is resized
    torch.testing.assert_close(preprocess(colour), resized.float() / 255)


def test_grey_colours_stay_as_they_are():
    grey = random_digits(2, 32, 6, channels=1).images.float()
    grey[1] = 7.0
    torch.testing.assert_close(principal_grey(grey.expand(-1, 3, -1, -1)), grey)


def test_mean_pixel_against_numpy():
    rng = np.random.default_rng(3)
    colour = rng.integers(0, 256, (4100, 3, 2, 2), dtype=np.uint8)  # more than are averaged at a time
    grey = rng.integers(0, 100, (50, 1, 5, 5), dtype=np.uint8)
    expected = (colour.mean((0, 2, 3)) + grey.mean()) / 2 / 255  # each set counts alike, whatever its size
    assert mean_pixel((torch.from_numpy(colour), torch.from_numpy(grey))) == pytest.approx(expected.tolist(), abs=2e-6)
