"""Random changes of training images: of the documented kind and size, drawn apart from what is done with them."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from digits.augmentation import (
    MILD,
    STRONG,
    View,
    add_neighbours,
    affine_draws,
    augment,
    blur,
    draw,
    elastic_draws,
    neighbours,
    random_appearance,
    random_erasing,
    random_warp,
    same_views,
    standardise,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def still(count: int) -> dict[str, torch.Tensor]:
    """Draws of `random_appearance` that change nothing: no blur, background or noise."""
    return {
        "numbers": torch.tensor([0.5, 0.0, 0.0]).repeat(count, 1),
        "background": torch.randn(count, 1, 4, 4, generator=generator(1)),
        "noise": torch.randn(count, 1, 32, 32, generator=generator(2)),
    }


def pictures(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 32, 32, generator=generator(3))


def gaussian(x: torch.Tensor, deviation: float) -> torch.Tensor:
    """scipy's Gaussian blur, in which what lies outside the image does not count."""
    filtered = partial(gaussian_filter, sigma=(0, 0, deviation, deviation), mode="constant", truncate=20)
    return torch.from_numpy(filtered(x.double().numpy()) / filtered(np.ones(x.shape))).float()


def logarithmic(affine: torch.Tensor) -> torch.Tensor:
    """Scales as they are drawn, as likely to get narrower as wider."""
    return torch.cat((affine[:, :2], (1 + affine[:, 2:4]).log(), affine[:, 4:]), 1)


CENTRES = (2 * torch.arange(32) + 1) / 32 - 1
RAMPS = torch.stack(torch.meshgrid(CENTRES, CENTRES, indexing="xy"))  # show which place was sampled


def test_random_warp_stays_within_its_documented_bounds_and_reaches_them():
    """Each image's map, from −1 to 1 over it, by least squares from pixels that never reach beyond the border."""
    warped = random_warp(RAMPS.repeat(4000, 1, 1, 1), affine_draws(4000, generator())).double()
    sampled = warped[..., 8:24, 8:24].flatten(2).mT
    design = torch.cat((RAMPS, torch.ones(1, 32, 32)))[:, 8:24, 8:24].double().flatten(1).T
    maps = torch.linalg.lstsq(design.expand(4000, -1, -1), sampled).solution.mT
    assert (design @ maps.mT - sampled).abs().max() < 1e-5  # it is an affine map indeed
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


def test_each_number_does_its_own_thing():
    x = pictures(5)
    z = (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), correction=0, keepdim=True)
    draws = still(5)
    torch.testing.assert_close(random_appearance(x, draws), z, rtol=1e-4, atol=1e-5)

    draws["numbers"][0, 0] = 1.0  # as blurred as can be
    draws["numbers"][1, 0] = 0.0  # as sharp as can be
    draws["numbers"][3, 1] = 1.0  # background
    draws["numbers"][4, 2] = 1.0  # noise
    smooth = torch.nn.functional.interpolate(draws["background"], (32, 32), mode="bicubic", align_corners=False)
    expected = z.clone()
    expected[:1] = gaussian(z[:1], 2.2)
    expected[1:2] += z[1:2] - gaussian(z[1:2], 1.0)
    expected[3] += 0.8 * smooth[3]
    expected[4] += 0.2 * draws["noise"][4]
    torch.testing.assert_close(random_appearance(x, draws), standardise(expected), rtol=1e-3, atol=1e-4)


def test_erasing_covers_what_was_drawn():
    z = standardise(pictures(6))
    # erase, left, top (over the middle half), area (on a logarithmic scale), length, turn (of 180°), dark or bright
    numbers = [
        [0.69, 0.50, 0.50, 1.0, 0.0, 0.00, 0.51],  # the largest square: 102.4 pixels, 5.06 to each side
        [0.69, 0.50, 0.00, 0.0, 1.0, 0.00, 0.99],  # the smallest and longest bar: 9.05 by 0.905 pixels
        [0.69, 0.50, 0.00, 0.0, 1.0, 0.50, 0.49],  # the same, upright
        [0.69, 0.50, 0.50, 0.0, 1.0, 0.25, 0.01],  # and from the upper left to the lower right
        [0.69, 0.00, 1.00, 1.0, 1.0, 0.00, 0.49],  # at the lower left: some of it lies outside
        [0.71, 0.50, 0.50, 1.0, 0.5, 0.00, 0.75],  # three images in ten are left as they are
    ]
    expected = z.clone()
    expected[0, :, 11:22, 11:22] = z[0].max()
    expected[1, :, 8, 12:21] = z[1].max()
    expected[2, :, 4:13, 16] = z[2].min()
    diagonal = torch.arange(13, 20)  # 4.52 to each side, √2 a pixel
    expected[3, :, diagonal, diagonal] = z[3].min()
    expected[4, :, 23:26, :24] = z[4].min()  # 32 by 3.2 pixels around column 8 and row 24
    assert torch.equal(random_erasing(z, torch.tensor(numbers)), expected)

    draws = {"affine": torch.zeros(6, 6), "strong": torch.arange(6) < 3, "erasing": torch.tensor(numbers), **still(6)}
    torch.testing.assert_close(augment(z, draws), standardise(expected), rtol=1e-4, atol=1e-5)


def test_neighbours_stand_where_they_were_drawn():
    """Their edges are 0, so that columns of a ramp, less the mean of all four edges, turn up on the sides."""
    x = pictures(4)
    columns = torch.arange(32.0).expand(4, 1, 32, 32).contiguous()
    ramp, steep = columns - 15.5, 2 * (columns - 15.5)  # the mean over an edge is 15.5
    numbers = [
        [[0.0, 0.59], [0.0, 0.61]],  # one on the left, its centre 16 pixels from the middle
        [[0.0, 0.61], [1.0, 0.59]],  # one on the right, 24 pixels from the middle
        [[0.5, 0.00], [0.25, 0.00]],  # both, 20 and 18 pixels
        [[0.0, 0.61], [0.0, 0.61]],  # none
    ]
    expected = torch.cat((x[..., :1].expand(-1, -1, -1, 16), x, x[..., -1:].expand(-1, -1, -1, 16)), -1)
    expected[0, :, :, :32] += ramp[0]  # from 16 pixels left of the image to its middle
    expected[1, :, :, 40:] += steep[0, :, :, :24]
    expected[2, :, :, :28] += ramp[0, :, :, 4:]
    expected[2, :, :, 34:] += steep[0, :, :, :30]
    found = add_neighbours(x, [columns, 2 * columns], torch.tensor(numbers))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_scale_brings_neighbours_nearer():
    """The square in the middle is shown as it is; made narrower, it shows its sides too, and nothing beyond them."""
    x = torch.rand(3, 1, 32, 64, generator=generator())
    affine = torch.zeros(3, 6)
    affine[1, 2] = 1.0  # twice as narrow
    affine[2, 2] = 2.0  # three times: the edges go on
    out = random_warp(x, affine)
    torch.testing.assert_close(out[0], x[0, :, :, 16:48], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out[1], x[1].unflatten(2, (32, 2)).mean(3), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out[2, :, :, :5], x[2, :, :, :1].expand(-1, -1, 5), rtol=1e-4, atol=1e-4)


def test_neighbours_come_from_the_whole_set_and_are_warped_with_the_image():
    images = torch.arange(8).view(8, 1, 1, 1).expand(8, 1, 32, 32)
    draws = draw("strong", 500, 32, generator(5))
    found = neighbours(images, draws)
    assert found.shape == (500, 2, 1, 32, 32)
    assert torch.equal(found[..., 0, 0, 0], (8 * draws["others"]).long())
    assert torch.bincount(found[..., 0, 0].flatten(), minlength=8).min() > 60
    assert neighbours(images, draw("affine", 3, 32, generator())) is None

    x, others = pictures(2), pictures(4).view(2, 2, 1, 32, 32)
    draws = {"affine": affine_draws(2, generator(6)), "neighbours": torch.zeros(2, 2, 2)}
    beside = [standardise(other) for other in others.unbind(1)]
    expected = random_warp(add_neighbours(standardise(x), beside, draws["neighbours"]), draws["affine"])
    torch.testing.assert_close(augment(x, draws, others), expected)


def test_some_images_can_be_left_without_strong_changes():
    """They get affine changes of their own bounds, neighbours, inversion and erasing, as many as the others."""
    x, others = pictures(400), pictures(800).view(400, 2, 1, 32, 32)
    draws = View("strong", 0.25).draw(400, 32, generator())
    strong = draws["strong"]
    assert 70 < strong.sum() < 130
    drawn = logarithmic(draws["affine"])
    assert drawn[:, 2:4].mean(0).abs().max() < 0.05
    for chosen, own in ((strong, torch.tensor(STRONG)), (~strong, torch.tensor(MILD))):
        largest = drawn[chosen].abs().amax(0)
        assert ((largest <= own + 1e-6) & (largest > 0.85 * own)).all()
    assert torch.equal(draws["elastic"].abs().amax((1, 2, 3)) > 0, strong)

    out = augment(x, draws, others)
    all_strong = augment(x, draws | {"strong": torch.ones_like(strong)}, others)
    assert torch.equal(out[strong], all_strong[strong])
    mild = standardise(augment(x, {name: draws[name] for name in ("affine", "inverted", "neighbours")}, others))
    mild = standardise(random_erasing(mild, draws["erasing"]))
    torch.testing.assert_close(out[~strong], mild[~strong])
    assert (all_strong - mild).abs().amax((1, 2, 3)).min() > 0.1
    for share in (0.0, 1.0):
        assert (draw("strong", 400, 32, generator(), share)["strong"] == bool(share)).all()


@pytest.mark.parametrize("augmentation", ["mild", "strong"])
def test_inversion_is_all_that_is_drawn_for_it(augmentation):
    """An image that is inverted is the negative of what it is without; a strong one so far as noise and bars let it."""
    x, others = pictures(200), pictures(400).view(200, 2, 1, 32, 32)
    draws = draw(augmentation, 200, 32, generator())
    if augmentation == "strong":
        draws["numbers"][:, 1:] = 0.0  # no background and no noise
        draws["erasing"][:, 0] = 1.0  # nothing erased
    inverted = draws["inverted"]
    out, upright = augment(x, draws, others), augment(x, draws | {"inverted": torch.zeros_like(inverted)}, others)
    torch.testing.assert_close(out[inverted], -upright[inverted], rtol=1e-4, atol=1e-4)
    assert torch.equal(out[~inverted], upright[~inverted])
    assert 70 < inverted.sum() < 130


def test_elastic_displacements_move_pixels_by_what_was_drawn():
    elastic = elastic_draws(3000, generator())
    assert elastic.std((1, 2, 3)).max() < 0.12 * 1.6
    assert elastic.std().item() == pytest.approx(0.12 / math.sqrt(3), rel=0.03)  # amplitudes uniform from 0 on
    small, ramps = 0.2 * elastic[:8], RAMPS.repeat(8, 1, 1, 1)
    moved = random_warp(ramps, torch.zeros(8, 6), small) - ramps
    expected = torch.nn.functional.interpolate(small, (32, 32), mode="bicubic", align_corners=True)
    torch.testing.assert_close(moved[..., 10:22, 10:22], expected[..., 10:22, 10:22], rtol=1e-3, atol=1e-4)


def test_blur_is_drawn_between_its_bounds_and_of_each_channel_by_itself():
    draws, x = still(3), pictures(3)
    draws["numbers"][:, 0] = torch.tensor([0.5001, 0.75, 1.0])  # on a logarithmic scale
    for image, out, deviation in zip(x, random_appearance(x, draws), (0.4, math.sqrt(0.4 * 2.2), 2.2), strict=True):
        expected = standardise(gaussian(standardise(image[None]), deviation))
        torch.testing.assert_close(out[None], expected, rtol=1e-2, atol=1e-2)

    colours, deviation = torch.rand(2, 3, 9, 9, generator=generator()), torch.tensor([0.5, 2.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(blur(colours, deviation)[:, 1:2], blur(colours[:, 1:2], deviation))
    even = torch.full((2, 3, 9, 9), 0.3)
    torch.testing.assert_close(blur(even, deviation), even)


def test_the_bounds_of_weak_and_mild_changes():
    """Of mild ones scales are as likely to shrink as to grow, and there are inversion and neighbours; nothing else."""
    weak, full = draw("weak", 2000, 32, generator()), affine_draws(2000, generator())
    assert list(weak) == ["affine"]
    torch.testing.assert_close(weak["affine"], 0.3 * full)
    assert torch.equal(draw("affine", 2000, 32, generator())["affine"], full)
    assert draw("none", 5, 32, generator()) == {}
    assert [view.augmentation for view in same_views("affine")(3, 7)] == ["affine", "affine"]  # of both domains
    draws = draw("mild", 3000, 32, generator())
    assert set(draws) == {"affine", "inverted", "others", "neighbours"}
    drawn = logarithmic(draws["affine"])
    assert drawn.abs().amax(0).tolist() == pytest.approx(MILD, rel=0.01)
    assert drawn.mean(0).abs().max() < 0.02
