"""The schedules against values worked out by hand."""

import dataclasses
import math
from functools import partial

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

RISING = dataclasses.replace(recipe_config("dann"), lambda_max=0.3)
FALLING = dataclasses.replace(RISING, lambda_schedule="rise-and-fall")
VALUES = {  # of p, or of the step
    "adaptation": (adaptation_factor, {0.0: 0.0, 0.1: 0.4621171573, 0.5: 0.9866142982, 1.0: 0.9999092043}),
    # 2 / (1 + exp(−x)) − 1 is the hyperbolic tangent of x / 2.
    "gamma": (partial(adaptation_factor, gamma=3.0), {0.1: math.tanh(0.15), 1.0: math.tanh(1.5)}),
    "rising": (partial(reversal_weight, RISING), {0.5: 0.3 * math.tanh(2.5), 1.0: 0.3 * math.tanh(5.0)}),
    "falling": (
        partial(reversal_weight, FALLING),
        {
            0.0: 0.0,
            0.25: 0.3 * math.tanh(1.25) * (2 + math.sqrt(2)) / 4,
            0.5: 0.3 * math.tanh(2.5) / 2,
            2 / 3: 0.3 * math.tanh(10 / 3) / 4,
            1.0: 0.0,
        },
    ),
    "annealed": (annealed_rate, {0.0: 0.01, 0.1: 0.0059460356, 0.5: 0.0026084743, 1.0: 0.0016556002}),
    # To the power of 3/4 by square roots alone.
    "alpha": (partial(annealed_rate, mu_0=0.3, alpha=4.0), {0.5: 0.3 / math.sqrt(3) / math.sqrt(math.sqrt(3))}),
    "beta": (partial(annealed_rate, mu_0=0.3, alpha=4.0, beta=2.0), {0.0: 0.3, 0.5: 0.3 / 9}),
    # Up to p = 0.1 a line, then half a cosine: a quarter of the way is 45°, half 90°, two thirds 120°.
    "cosine": (
        partial(cosine_rate, mu_0=2.0),
        {0.0: 0.0, 0.05: 1.0, 0.1: 2.0, 0.325: 1 + math.sqrt(0.5), 0.55: 1.0, 0.7: 0.5, 1.0: 0.0},
    ),
    "decay": (partial(time_decay_rate, mu_0=1.0, decay=1e-5), {0: 1.0, 1: 1 / 1.00001, 100_000: 0.5, 300_000: 0.25}),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_worked_out_by_hand(name):
    function, values = VALUES[name]
    assert {p: function(p) for p in values} == pytest.approx(values, rel=1e-10, abs=1e-10)


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


def test_learning_rate_uses_the_settings():
    expected = {
        "constant": 0.4,
        "annealed": 0.4 / 4**0.75,  # 1 + 10 · 0.3
        "cosine": 0.4 * (1 + math.cos(math.pi * 2 / 9)) / 2,  # (0.3 − 0.1) / 0.9
        "time-decay": 0.4 / 2.4,  # 1 + 0.02 · 70
    }
    for schedule, rate in expected.items():
        config = dataclasses.replace(recipe_config("dann"), lr=0.4, lr_schedule=schedule, lr_decay=0.02)
        assert learning_rate(config, 0.3, 70) == pytest.approx(rate, rel=1e-12), schedule
