"""What a person sees of a run while it trains: how far it is, and how long it will take."""

from dataclasses import replace

import pytest
from conftest import settings, train
from small_run import SmallRun

from methods.recipes import recipe_config
from watch import watcher
from watch.screen import duration

CONFIG = replace(recipe_config("system-a"), network="paper-mnist", batch_size=5, epochs=2, warm_start_epochs=1)


def test_the_bar_is_of_the_whole_run(monkeypatch, capsys, tiny_data, tmp_path):
    """A lone process shows one; lines go above it; without a terminal there is none."""
    bars, make = [], watcher.tqdm

    def shown(**options):
        bars.append(make(**options | {"disable": False, "mininterval": 0}))
        return bars[-1]

    monkeypatch.setattr(watcher, "tqdm", shown)
    train(*settings(tiny_data), "--warm-start-epochs", 1, "--run-dir", tmp_path / "run")
    (bar,) = bars
    assert (bar.total, bar.n, bar.leave) == (16, 16, False), "four epochs of four steps"
    drawn = capsys.readouterr().err
    assert "epoch 4/4" in drawn
    assert "| 9/16 [" in drawn
    monkeypatch.undo()
    train("--resume", tmp_path / "run", "--data-dir", tiny_data, "--device", "cpu")
    assert "\r" not in capsys.readouterr().err


def test_after_its_first_steps_a_run_says_how_long_it_will_take(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr(watcher, "TIMED_STEPS", 2)
    small = SmallRun(CONFIG, steps=3)
    monkeypatch.setattr(watcher.time, "perf_counter", lambda: next(clock))
    small.train()
    lines = [line for line in capsys.readouterr().err.splitlines() if " to go" in line]
    assert lines == ["7 steps to go: about 3 min, without the tests after epochs"], "two steps took 50 s"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5999, "100 min"), (6000, "1.7 h")]
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words
