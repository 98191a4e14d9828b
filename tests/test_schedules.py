"""The schedules against values worked out by hand, and which recipe uses which."""

import dataclasses
import math

import pytest

from utils.config import recipe_config
from utils.schedules import (
    adaptation_factor,
    annealed_rate,
    cosine_rate,
    learning_rate,
    reversal_weight,
    time_decay_rate,
)


@pytest.mark.parametrize(("p", "expected"), [(0.0, 0.0), (0.1, 0.4621171573), (0.5, 0.9866142982), (1.0, 0.9999092043)])
def test_adaptation_factor(p, expected):
    assert adaptation_factor(p) == pytest.approx(expected, abs=1e-10)
    # 2 / (1 + exp(−x)) − 1 is the hyperbolic tangent of x / 2.
    assert adaptation_factor(p, gamma=3.0) == pytest.approx(math.tanh(3.0 * p / 2), abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "p", "expected"),
    [
        ("rising", 0.0, 0.0),
        ("rising", 0.5, 0.3 * math.tanh(1.0)),
        ("rising", 1.0, 0.3 * math.tanh(2.0)),
        ("rise-and-fall", 0.0, 0.0),
        ("rise-and-fall", 0.25, 0.3 * math.tanh(0.5) * (2 + math.sqrt(2)) / 4),
        ("rise-and-fall", 0.5, 0.3 * math.tanh(1.0) / 2),
        ("rise-and-fall", 2 / 3, 0.3 * math.tanh(4 / 3) / 4),
        ("rise-and-fall", 1.0, 0.0),
    ],
)
def test_reversal_weight(schedule, p, expected):
    config = dataclasses.replace(recipe_config("dann"), gamma=4.0, lambda_max=0.3, lambda_schedule=schedule)
    assert reversal_weight(config, p) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("p", "expected"), [(0.0, 0.01), (0.1, 0.0059460356), (0.5, 0.0026084743), (1.0, 0.0016556002)]
)
def test_annealed_rate(p, expected):
    assert annealed_rate(p) == pytest.approx(expected, abs=1e-10)
    fall = 1 + 4 * p  # to the power of 3/4, by square roots alone
    assert annealed_rate(p, 0.3, alpha=4.0) == pytest.approx(0.3 / (math.sqrt(fall) * math.sqrt(math.sqrt(fall))))
    assert annealed_rate(p, 0.3, alpha=4.0, beta=2.0) == pytest.approx(0.3 / (fall * fall))


@pytest.mark.parametrize(
    ("p", "share"),
    [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.325, (1 + math.sqrt(0.5)) / 2), (0.55, 0.5), (0.7, 0.25), (1.0, 0.0)],
)
def test_cosine_rate(p, share):
    """Up to p = 0.1 a line, then half a cosine: a quarter of the way is 45°, half 90°, two thirds 120°."""
    assert cosine_rate(p, 0.02) == pytest.approx(0.02 * share, abs=1e-12)


@pytest.mark.parametrize(("step", "expected"), [(0, 1e-3), (1, 1e-3 / 1.00001), (100_000, 5e-4), (300_000, 2.5e-4)])
def test_time_decay_rate(step, expected):
    assert time_decay_rate(step, 1e-3, 1e-5) == pytest.approx(expected, rel=1e-12)


# Rates at p = 0, 0.5, 1, where 1000 steps make the run.
RATES = {
    ("dann", "svhn", "mnist"): (0.01, 0.0026084743, 0.0016556002),
    ("dann", "mnist", "svhn"): (0.01, 0.0026084743, 0.0016556002),
    ("paper", "svhn", "mnist"): (0.01, 0.01, 0.01),  # the paper's exception
    ("paper", "mnist", "svhn"): (0.01, 0.0026084743, 0.0016556002),
    ("paper", "synth", "svhn"): (0.01, 0.0026084743, 0.0016556002),
    ("paper", "svhn", "usps"): (0.01, 0.0026084743, 0.0016556002),
    ("cnn-grl", "svhn", "mnist"): (1e-3, 1e-3 / 1.005, 1e-3 / 1.01),
    ("quick", "synth", "optdigits"): (0.0, 2e-3 * 0.5868240888, 0.0),  # (1 + cos 80°) / 2
}


@pytest.mark.parametrize(("recipe", "source", "target"), RATES)
def test_learning_rate_of_the_recipes(recipe, source, target):
    config = recipe_config(recipe, source, target)
    rates = [learning_rate(config, step / 1000, step) for step in (0, 500, 1000)]
    assert rates == pytest.approx(RATES[recipe, source, target], abs=1e-10)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", 0.4),
        ("annealed", 0.4 / 3**0.5),  # 1 + 8 · 0.25 = 3
        ("cosine", 0.4 * (1 + math.cos(math.pi / 6)) / 2),  # (0.25 − 0.1) / 0.9 is a sixth
        ("time-decay", 0.4 / 2.4),  # 1 + 0.02 · 70
    ],
)
def test_learning_rate_uses_the_settings(schedule, expected):
    config = dataclasses.replace(
        recipe_config("dann"), lr=0.4, lr_schedule=schedule, lr_alpha=8.0, lr_beta=0.5, lr_decay=0.02
    )
    assert learning_rate(config, 0.25, 70) == pytest.approx(expected, rel=1e-12)
