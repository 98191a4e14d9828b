"""The schedules against values worked out by hand."""

import dataclasses
import math

import pytest
from conftest import records_of, train

from methods.recipes import recipe_config
from methods.schedules import (
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
        ("rising", 0.5, 0.3 * math.tanh(2.5)),
        ("rising", 1.0, 0.3 * math.tanh(5.0)),
        ("rise-and-fall", 0.0, 0.0),
        ("rise-and-fall", 0.25, 0.3 * math.tanh(1.25) * (2 + math.sqrt(2)) / 4),
        ("rise-and-fall", 0.5, 0.3 * math.tanh(2.5) / 2),
        ("rise-and-fall", 2 / 3, 0.3 * math.tanh(10 / 3) / 4),
        ("rise-and-fall", 1.0, 0.0),
    ],
)
def test_reversal_weight(schedule, p, expected):
    config = dataclasses.replace(recipe_config("dann"), lambda_max=0.3, lambda_schedule=schedule)
    assert reversal_weight(config, p) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("epochs", [2, 7, 100])
def test_a_reversal_weight_that_changes_once_an_epoch_is_that_of_its_first_step(epochs):
    config = dataclasses.replace(recipe_config("cnn-grl"), epochs=epochs)
    for step in range(11 * epochs):
        first = 2 / (1 + math.exp(-10 * (step // 11) / epochs)) - 1
        assert reversal_weight(config, step / (11 * epochs)) == pytest.approx(first, abs=1e-12)


def test_records_hold_the_reversal_weight_of_their_epochs_steps(tiny_data, tmp_path):
    machine = ("--device", "cpu", "--no-download", "--data-dir", tiny_data, "--run-dir", tmp_path / "run")
    train("--recipe", "cnn-grl", "--dry-run", *machine)
    records = records_of(tmp_path / "run")
    expected = [0.0, *(2 / (1 + math.exp(-10 * epoch / 2)) - 1 for epoch in (0, 1))]  # after an epoch of warm start
    assert [record["lambda_p"] for record in records] == pytest.approx(expected, abs=1e-12)
    assert [record["p"] for record in records] == [0, 0.5, 1]  # which is at the end


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


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", 0.4),
        ("annealed", 0.4 / 4**0.75),  # 1 + 10 · 0.3
        ("cosine", 0.4 * (1 + math.cos(math.pi * 2 / 9)) / 2),  # (0.3 − 0.1) / 0.9
        ("time-decay", 0.4 / 2.4),  # 1 + 0.02 · 70
    ],
)
def test_learning_rate_uses_the_settings(schedule, expected):
    config = dataclasses.replace(recipe_config("dann"), lr=0.4, lr_schedule=schedule, lr_decay=0.02)
    assert learning_rate(config, 0.3, 70) == pytest.approx(expected, rel=1e-12)
