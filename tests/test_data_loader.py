"""Pairing, augmentation and preprocessing; and that no label of the target can reach the training."""

import dataclasses
import inspect
import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

import data_loader
import main
from data_loader import (
    DigitSet,
    PairedLoader,
    Preprocessing,
    limit,
    mean_pixel,
    principal_grey,
    seed_of,
    shuffled_passes,
)
from utils.augmentation import affine_draws, random_warp
from utils.config import recipe_config
from utils.run_log import SilentLog

# ---- pairing


def numbered(count: int, first_label: int = 0) -> DigitSet:
    """Images of 4×4 pixels that all carry the number of their image."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return DigitSet("svhn", "train", images, (torch.arange(count) + first_label) % 10, "", {})


def numbered_loader(count_s: int, count_t: int, batch_size: int = 8, seed: int = 0, steps=None) -> PairedLoader:
    target = numbered(count_t).images
    return PairedLoader(numbered(count_s), target, batch_size, seed, Preprocessing(4), steps=steps)


def read_numbers(loader: PairedLoader, epoch: int, first_step: int = 0) -> list[tuple[list, list, list]]:
    """Each batch as the numbers of its source images, its labels, the numbers of its target images."""
    number = lambda x: (x[:, 0, 0, 0] * 255).round().int().tolist()  # noqa: E731
    return [(number(x_s), y_s.tolist(), number(x_t)) for x_s, y_s, x_t in loader.epoch(epoch, first_step)]


def flat(batches: list, column: int) -> list[int]:
    return [number for batch in batches for number in batch[column]]


@pytest.mark.parametrize(("count_s", "count_t"), [(53, 20), (20, 53), (40, 40), (7, 200)])
def test_an_epoch_covers_both_sets(count_s, count_t):
    batches = read_numbers(numbered_loader(count_s, count_t), 3)
    assert len(batches) == math.ceil(max(count_s, count_t) / 8)
    for column, count in ((0, count_s), (2, count_t)):
        assert {len(batch[column]) for batch in batches} == {8}  # constant shapes
        seen = flat(batches, column)
        for start in range(0, len(seen), count):  # pass by pass, each image once before any comes again
            one_pass = seen[start : start + count]
            assert len(set(one_pass)) == len(one_pass)
        assert set(seen) == set(range(count))
    assert flat(batches, 1) == [number % 10 for number in flat(batches, 0)]  # labels go with their images


def test_passes_over_the_smaller_set_differ():
    seen = flat(read_numbers(numbered_loader(200, 25), 0), 2)
    passes = [tuple(seen[start : start + 25]) for start in range(0, 200, 25)]
    assert len(set(passes)) == 8


def test_the_order_depends_on_seed_and_epoch_alone():
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1, 2):
            orders[seed, epoch] = read_numbers(numbered_loader(60, 60, seed=seed), epoch)
    torch.manual_seed(99)
    loader = numbered_loader(60, 60, seed=1)
    list(loader.epoch(0))
    torch.rand(5)
    assert read_numbers(loader, 2) == orders[1, 2]  # whatever came before it

    flattened = [tuple(flat(batches, column)) for batches in orders.values() for column in (0, 2)]
    assert len(set(flattened)) == 12  # 2 seeds × 3 epochs × 2 sets: no two orders agree


def test_an_image_meets_other_partners_in_other_epochs():
    """A pair (i, j) of two shuffled sets of 60 comes back next epoch with probability 1/60."""
    partners = []
    for epoch in (0, 1):
        batches = read_numbers(numbered_loader(60, 60, batch_size=60), epoch)
        partners.append(set(zip(flat(batches, 0), flat(batches, 2), strict=True)))
    assert len(partners[0] & partners[1]) <= 6
    assert sum(i == j for i, j in partners[0]) <= 6  # nor is it paired by index


def test_first_step_gives_the_tail_of_the_epoch():
    loader = numbered_loader(53, 20)
    whole = read_numbers(loader, 4)
    for first_step in range(len(whole) + 1):
        assert read_numbers(loader, 4, first_step) == whole[first_step:]


def test_given_steps_set_the_length_of_an_epoch():
    batches = read_numbers(numbered_loader(10, 12, batch_size=4, steps=9), 0)
    assert len(batches) == 9
    assert all(flat(batches, 0).count(number) in (3, 4) for number in range(10))  # 36 draws of 10


def test_shuffled_passes_is_uniform():
    """Each of 4 images comes first about as often."""
    firsts = [int(shuffled_passes(4, 4, seed_of(seed))[0]) for seed in range(2000)]
    counts = np.bincount(firsts, minlength=4)
    assert np.abs(counts - 500).max() < 5 * math.sqrt(2000 * 0.25 * 0.75)


def test_seed_of_tells_its_parts_apart():
    parts = [(s, e, k) for s in range(5) for e in range(5) for k in range(3)] + [(7,), (7, 1), (1, 7)]
    seeds = {seed_of(*numbers) for numbers in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_limit_keeps_the_first_images_with_their_labels():
    digits = limit(numbered(30, first_label=3), 4)
    assert digits.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert digits.labels.tolist() == [3, 4, 5, 6]


# ---- no label of the target in training


def tensors_in(value, seen: set[int]):
    """All tensors that can be reached from an object by its attributes."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from tensors_in(vars(value), seen)


@pytest.fixture
def two_domains(monkeypatch):
    """Put random images under the names svhn (30 to train) and usps (21); returns the labels, to be changed at will."""
    generator = torch.Generator().manual_seed(0)
    images = {
        (name, split): torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
        for name, split, count, shape in (
            ("svhn", "train", 30, (3, 32, 32)),
            ("svhn", "test", 11, (3, 32, 32)),
            ("usps", "train", 21, (1, 16, 16)),
            ("usps", "test", 13, (1, 16, 16)),
        )
    }
    labels = {key: torch.randint(0, 10, (len(value),), generator=generator) for key, value in images.items()}
    for name in ("svhn", "usps"):
        row = dataclasses.replace(
            data_loader.DOMAINS[name],
            read=lambda data_dir, split, name=name: (images[name, split], labels[name, split]),
        )
        monkeypatch.setitem(data_loader.DOMAINS, name, row)
    return labels


def train_some_steps(config, folder) -> tuple[main.Trainer, dict[str, torch.Tensor]]:
    pair = main.load_pair(config, folder, download=False, dry_run=False)
    mean = mean_pixel((pair.labelled.images, pair.target_images))
    preprocess = Preprocessing(config.image_size, config.normalisation, mean)
    trainer = main.Trainer(config, pair, preprocess, torch.device("cpu"), folder)
    for epoch in range(2):
        trainer.epoch, trainer.step = epoch, 0
        trainer.train_epoch(SilentLog())
    return trainer, trainer.model.state_dict()


PAPER = dataclasses.replace(
    recipe_config("paper", "svhn", "usps"), network="paper-mnist", epochs=2, batch_size=8, precision="fp32"
)
QUICK = dataclasses.replace(
    recipe_config("quick", "svhn", "usps"), epochs=2, batch_size=8, precision="fp32", augmentation="affine"
)


@pytest.mark.parametrize("config", [PAPER, QUICK], ids=["paper", "quick"])
def test_labels_of_the_target_cannot_change_the_weights(config, two_domains, tmp_path):
    _, weights = train_some_steps(config, tmp_path)

    two_domains["usps", "train"] = torch.full((21,), 9)
    _, with_nonsense = train_some_steps(config, tmp_path)
    assert all(torch.equal(weights[name], value) for name, value in with_nonsense.items())

    two_domains["svhn", "train"] = torch.full((30,), 9)  # while those of the source do
    _, without_source = train_some_steps(config, tmp_path)
    assert not any(torch.equal(weights[name], value) for name, value in without_source.items() if "weight" in name)


def test_nothing_in_training_holds_labels_of_the_target(two_domains, tmp_path):
    train_labels = two_domains["usps", "train"]
    trainer, _ = train_some_steps(PAPER, tmp_path)
    reachable = list(tensors_in(trainer, set()))
    assert any(torch.equal(tensor, two_domains["svhn", "train"]) for tensor in reachable)  # the search finds labels
    assert any(torch.equal(tensor, two_domains["usps", "test"]) for tensor in reachable)  # those that are evaluated
    assert not any(torch.equal(tensor, train_labels) for tensor in reachable)
    # And the loader could not take any: of the target it asks for a tensor of images.
    assert inspect.signature(PairedLoader).parameters["target_images"].annotation is torch.Tensor
    labels = [tensor for tensor in tensors_in(trainer.loader, set()) if tensor.dtype != torch.uint8]
    assert len(labels) == 1
    assert torch.equal(labels[0], two_domains["svhn", "train"])


def test_the_bounds_do_the_same_number_of_steps(two_domains, tmp_path):
    steps = {}
    for method in ("dann", "source-only", "target-only"):
        trainer, _ = train_some_steps(dataclasses.replace(PAPER, method=method), tmp_path)
        steps[method] = (trainer.loader.steps, sum(1 for _ in trainer.loader.epoch(0)))
        name = "usps" if method == "target-only" else "svhn"
        assert torch.equal(trainer.loader.labels_s, two_domains[name, "train"])
    assert set(steps.values()) == {(4, 4)}  # 30 images by 8


def test_target_only_learns_from_the_labels_of_the_target(two_domains, tmp_path):
    config = dataclasses.replace(PAPER, method="target-only")
    _, weights = train_some_steps(config, tmp_path)
    two_domains["svhn", "train"] = torch.full((30,), 9)
    _, other_source = train_some_steps(config, tmp_path)
    assert all(torch.equal(weights[name], value) for name, value in other_source.items())
    two_domains["usps", "train"] = torch.full((21,), 9)
    _, other_target = train_some_steps(config, tmp_path)
    assert not torch.equal(weights["classifier.layers.0.weight"], other_target["classifier.layers.0.weight"])


# ---- preprocessing


def test_unit_normalisation_by_hand():
    images = torch.tensor([[[[0, 255], [51, 102]]]], dtype=torch.uint8)
    x = Preprocessing(2, "unit")(images)
    assert x.dtype == torch.float32
    for channel in range(3):  # grey becomes three equal channels
        torch.testing.assert_close(x[0, channel], torch.tensor([[0.0, 1.0], [0.2, 0.4]]))


def test_mean_normalisation_by_hand():
    images = torch.tensor([[[[0]], [[51]], [[255]]]], dtype=torch.uint8)
    x = Preprocessing(1, "mean", (0.5, 0.25, 0.125))(images)
    torch.testing.assert_close(x.view(3), torch.tensor([-0.5, -0.05, 0.875]))
    grey = Preprocessing(1, "mean", (0.5, 0.25, 0.125))(images[:, :1])
    torch.testing.assert_close(grey.view(3), torch.tensor([-0.5, -0.25, -0.125]))


def test_per_image_normalisation_by_hand():
    images = torch.tensor([[[[0, 255], [255, 0]]]], dtype=torch.uint8)
    x = Preprocessing(2, "per-image")(images)
    # Mean 1/2, sum of squared deviations 1, divided by 4: the values are ±1.
    torch.testing.assert_close(x[0, 0], torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))


def test_per_image_normalisation_against_numpy():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 200, (4, 3, 16, 16), dtype=np.uint8)
    x = Preprocessing(16, "per-image")(torch.from_numpy(pixels)).numpy()
    for image, result in zip(pixels.astype(np.float64) / 255, x, strict=True):
        np.testing.assert_allclose(result, (image - image.mean()) / image.std(), atol=2e-6)
    # A grey image reads the same whether its file has one channel or three equal ones.
    grey = torch.from_numpy(pixels[:, :1])
    one, three = (Preprocessing(16, "per-image")(images) for images in (grey, grey.repeat(1, 3, 1, 1)))
    torch.testing.assert_close(one, three, rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("level", [0, 17, 255])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_blank_image_stays_finite(level, channels):
    images = torch.full((2, channels, 20, 20), level, dtype=torch.uint8)
    images[1, 0, 3, 3] ^= 1  # one pixel that differs by one level
    x = Preprocessing(28, "per-image")(images)
    assert x[0].abs().max() < 1e-3
    assert x.isfinite().all()
    assert x.abs().max() < 100


@pytest.mark.parametrize("size", [8, 16, 28, 33, 64])
def test_resizing_a_constant_image_changes_nothing(size):
    images = torch.tensor([7, 200], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, size, size).contiguous()
    resized = Preprocessing(28).resize(images)
    assert torch.equal(resized, images[:, :, :1, :1].expand(2, 3, 28, 28))


@pytest.mark.parametrize(("size", "image_size"), [(8, 32), (16, 28), (28, 32), (32, 28), (45, 28), (64, 32), (500, 32)])
def test_resizing_agrees_with_pillow(size, image_size):
    pixels = np.random.default_rng(size).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    resized = Preprocessing(image_size).resize(torch.from_numpy(pixels).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    for ours, image in zip(resized.numpy(), pixels, strict=True):
        theirs = np.asarray(Image.fromarray(image).resize((image_size, image_size), Image.Resampling.BILINEAR))
        difference = np.abs(ours.astype(int) - theirs.astype(int))
        assert difference.max() <= 1
        assert theirs.std() > 3  # there is something to compare


def test_resizing_in_parts_is_resizing_at_once():
    images = torch.randint(0, 256, (4100, 1, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    resized = Preprocessing(4).resize(images)
    assert len(resized) == 4100
    one_by_one = torch.cat([Preprocessing(4).resize(images[i : i + 1]) for i in (0, 4095, 4096, 4099)])
    assert torch.equal(resized[[0, 4095, 4096, 4099]], one_by_one)


@pytest.mark.parametrize("normalisation", ["unit", "mean", "per-image"])
def test_training_batches_are_what_evaluation_sees(normalisation):
    """Resized once in the loader, or at once as `predict` does it: the same numbers, each with its own label."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(0, 256, (24, 3, 32, 32), generator=generator, dtype=torch.uint8)
    target = torch.randint(0, 256, (19, 1, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (24,), generator=generator)
    preprocess = Preprocessing(28, normalisation, (0.4, 0.3, 0.2))
    loader = PairedLoader(DigitSet("svhn", "train", source, labels, "", {}), target, 6, 0, preprocess)
    evaluated_s, evaluated_t = preprocess(source), preprocess(target)
    for x_s, y_s, x_t in loader.epoch(0):
        for image, label in zip(x_s, y_s, strict=True):
            same = [i for i in range(24) if torch.equal(image, evaluated_s[i])]
            assert len(same) == 1
            assert label == labels[same[0]]
        for image in x_t:
            assert sum(torch.equal(image, evaluated_t[i]) for i in range(19)) == 1


def test_preprocessing_leaves_its_input_alone():
    images = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    before = images.clone()
    for normalisation in ("unit", "mean", "per-image"):
        Preprocessing(8, normalisation, (0.1, 0.2, 0.3))(images)
    assert torch.equal(images, before)


def grey_by_hand(image: np.ndarray) -> np.ndarray:
    """The first principal component of a (3, H, W) image's colours, as scikit-learn finds it."""
    found = PCA(1).fit(image.reshape(3, -1).T)
    direction = found.components_[0] * np.sign(found.components_[0].sum())
    return image.mean() + ((image - found.mean_[:, None, None]) * direction[:, None, None]).sum(0) / 3**0.5


@pytest.mark.parametrize("size", [16, 32])
def test_a_grey_network_gets_the_principal_component_of_the_colours(size):
    """Taken before resizing, and rounded once; grey images of the right size come back as they are."""
    colour = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    preprocess = Preprocessing(size, grey=True)
    principal = np.stack([grey_by_hand(image) for image in colour.numpy().astype(np.float64)])
    resized = preprocess.resize(colour)
    assert resized.shape == (3, 1, size, size)
    if size == 32:
        assert np.array_equal(resized[:, 0].numpy(), np.rint(principal).clip(0, 255))
    else:
        expected = np.stack([np.asarray(Image.fromarray(g.astype(np.float32)).resize((16, 16), 2)) for g in principal])
        assert np.abs(resized[:, 0].numpy() - expected.clip(0, 255)).max() <= 0.51
    assert preprocess.resize(resized) is resized
    assert preprocess(colour).shape == (3, 1, size, size)
    torch.testing.assert_close(preprocess(colour), resized.float() / 255)


def test_a_digit_that_differs_in_hue_alone_is_seen_and_brighter_stays_brighter():
    """Red on green of the same brightness comes out with the same contrast as two greys as far apart."""
    red, green = torch.tensor([180.0, 60.0, 60.0]), torch.tensor([60.0, 180.0, 60.0])
    digit = (torch.arange(32) % 4 < 2).expand(32, 32)
    hue = torch.where(digit, red[:, None, None], green[:, None, None])[None]
    assert hue.mean(1).std() == 0
    levels = principal_grey(hue).unique()
    assert levels.max() - levels.min() == pytest.approx((red - green).norm().item() / 3**0.5)
    assert levels.mean().item() == pytest.approx(100, abs=1e-3)

    bright = torch.where(
        digit, torch.tensor([200.0, 90.0, 40.0])[:, None, None], torch.tensor([20.0, 60.0, 50.0])[:, None, None]
    )
    found = principal_grey(bright[None])[0, 0]
    assert found[digit].min() > found[~digit].max()
    three = torch.randint(0, 256, (2, 1, 32, 32), generator=torch.Generator().manual_seed(6)).float()
    torch.testing.assert_close(principal_grey(three.expand(-1, 3, -1, -1)), three)
    torch.testing.assert_close(principal_grey(torch.full((1, 3, 4, 4), 7.0)), torch.full((1, 1, 4, 4), 7.0))


def test_mean_pixel_against_numpy():
    rng = np.random.default_rng(3)
    colour = rng.integers(0, 256, (4100, 3, 2, 2), dtype=np.uint8)  # more than are averaged at a time
    grey = rng.integers(0, 100, (50, 1, 5, 5), dtype=np.uint8)
    expected = (colour.mean((0, 2, 3)) + grey.mean()) / 2 / 255  # each set counts alike, whatever its size
    assert mean_pixel((torch.from_numpy(colour), torch.from_numpy(grey))) == pytest.approx(expected.tolist(), abs=2e-6)


# ---- augmentation


def moved(x: torch.Tensor, seed: int) -> torch.Tensor:
    return random_warp(x, affine_draws(len(x), torch.Generator().manual_seed(seed)))


def fitted_maps(count: int, size: int = 32) -> torch.Tensor:
    """The affine map of each image, found from how a horizontal and a vertical ramp come out. -> (N, 2, 3)

    Sampling a ramp gives the coordinate that was sampled, so that the map follows by least squares from the pixels
    near the centre, which never reach beyond the border. Coordinates run from −1 to 1 over the image.
    """
    centres = (2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    out = moved(torch.stack((x, y)).expand(count, 2, size, size).contiguous().float(), 0).double()
    inner = slice(size // 4, -size // 4)
    design = torch.stack((x, y, torch.ones_like(x)), -1)[inner, inner].reshape(-1, 3)
    sampled = out[:, :, inner, inner].reshape(count, 2, -1)
    solution = torch.linalg.lstsq(design.expand(count, -1, -1), sampled.mT).solution.mT
    assert (design @ solution.mT - sampled.mT).abs().max() < 1e-5  # it is an affine map indeed
    return solution


def test_random_warp_stays_within_its_documented_bounds_and_reaches_them():
    maps = fitted_maps(4000)
    shear, sin = (maps[:, 0, 1] + maps[:, 1, 0]) / 2, (maps[:, 1, 0] - maps[:, 0, 1]) / 2
    cos = (1 - sin**2).sqrt()
    drawn = {  # what was drawn, and its bound
        "degrees": (sin.asin() * 180 / math.pi, 15.0),
        "width": (maps[:, 0, 0] / cos - 1, 0.15),
        "height": (maps[:, 1, 1] / cos - 1, 0.15),
        "shear": (shear, 0.15),
        "right": (maps[:, 0, 2] * 16, 2.0),  # pixels of 32
        "down": (maps[:, 1, 2] * 16, 2.0),
    }
    for name, (values, bound) in drawn.items():
        assert values.abs().max() <= bound * 1.0001, name
        assert values.min() < -0.99 * bound, name
        assert values.max() > 0.99 * bound, name
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name  # uniform
    correlation = torch.corrcoef(torch.stack([values for values, _ in drawn.values()]))
    assert (correlation - torch.eye(6)).abs().max() < 0.08  # each for itself


def test_random_warp_moves_a_blob_by_little():
    coordinate = torch.arange(32.0) - 15.5
    bump = torch.exp(-(coordinate**2) / 8)
    x = (bump[:, None] * bump).expand(500, 3, 32, 32).contiguous()
    out = moved(x, 1)
    assert out.min() >= 0
    assert out.max() <= x.max() + 1e-6
    assert torch.equal(out[:, 0], out[:, 2])  # all channels move together
    weight = out[:, 0].sum((1, 2))
    for axis in (1, 2):
        centre = (out[:, 0].sum(3 - axis) * coordinate).sum(1) / weight
        assert centre.abs().max() < 4  # 2 pixels at the centre of what is sampled, at most twice that in the result
        assert centre.std().item() == pytest.approx(2 / math.sqrt(3), rel=0.15)
    assert len(torch.unique(out.flatten(1), dim=0)) == 500  # no two images alike


def test_random_warp_keeps_the_range_and_follows_the_seed():
    x = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(3)) * 0.5 + 0.2
    first, second = moved(x, 4), moved(x, 5)
    assert torch.equal(moved(x, 4), first)
    assert not torch.equal(first, second)
    assert x.min() <= first.min()
    assert first.max() <= x.max() + 1e-6
    constant = torch.full((3, 3, 32, 32), 0.37)
    torch.testing.assert_close(moved(constant, 6), constant)


def test_shares_of_several_processes_are_the_whole_batch():
    """Two loaders of half batches give what one gives, augmentation included, also when they start in mid-epoch."""
    generator = torch.Generator().manual_seed(8)
    images = torch.randint(0, 256, (50, 3, 16, 16), generator=generator, dtype=torch.uint8)
    target = torch.randint(0, 256, (30, 1, 16, 16), generator=generator, dtype=torch.uint8)
    digits = DigitSet("svhn", "train", images, torch.arange(50) % 10, "", {})

    def loader(share: slice) -> PairedLoader:
        return PairedLoader(digits, target, 12, 7, Preprocessing(16), "affine", share=share)

    whole = list(loader(slice(None)).epoch(3))
    halves = [list(loader(slice(start, start + 6)).epoch(3)) for start in (0, 6)]
    assert len(whole) == len(halves[0]) == 5
    for batch, first, second in zip(whole, *halves, strict=True):
        for joined, *parts in zip(batch, first, second, strict=True):
            assert torch.equal(joined, torch.cat(parts))
    for batch, later in zip(whole[2:], loader(slice(None)).epoch(3, first_step=2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, later, strict=True))


def test_the_loader_augments_both_domains_alike():
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).expand(40, 3, 32, 32).contiguous()
    digits = DigitSet("svhn", "train", ramp, torch.zeros(40, dtype=torch.long), "", {})
    loaders = {name: PairedLoader(digits, ramp, 40, 0, Preprocessing(32), name) for name in ("none", "affine")}
    x_s, _, x_t = next(loaders["none"].epoch(0))
    assert torch.equal(x_s, ramp / 255)
    assert torch.equal(x_t, ramp / 255)
    x_s, _, x_t = next(loaders["affine"].epoch(0))
    for x in (x_s, x_t):
        moved = (x - ramp / 255).abs().mean((1, 2, 3))
        assert (moved > 1e-3).all()
        assert 0.01 < moved.mean() < 0.2
    assert not torch.equal(x_s, x_t)
