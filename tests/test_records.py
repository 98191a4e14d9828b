"""What a run writes down about itself: signals without labels, a lost class, and when it reached which accuracy."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import events_of, records_of, result_of, settings, train

from digits.domains import load_domain
from methods.classifier import load_classifier
from methods.run import Run
from valid import evaluate
from watch.records import seconds_to
from watch.screen import counted
from watch.validators import class_ami, prediction_signals
from watch.watcher import Watcher, has_collapsed


def entropy(shares) -> float:
    return -sum(share * math.log(share) for share in shares)


def test_signals_of_predictions_that_are_known():
    certain = prediction_signals(torch.eye(10)[torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9])])
    expected = {
        "entropy": 0,
        "diversity": entropy([1 / 12] * 9 + [3 / 12]),
        "smallest_class_share": 1 / 12,
        "bnm": (9 + math.sqrt(3)) / math.sqrt(120),  # singular values: the roots of the classes' counts
        "snd": (9 * math.log(11) + 3 * math.log(2)) / 12,  # nobody near but the three of a class
    }
    assert certain == pytest.approx(expected, abs=1e-4)
    unsure = prediction_signals(torch.full((5, 10), 0.1))
    expected = {"entropy": math.log(10), "diversity": math.log(10), "bnm": 0.1, "snd": math.log(4)}
    assert {name: unsure[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    collapsed = prediction_signals(torch.eye(10)[torch.zeros(7, dtype=torch.long)])
    expected = {"entropy": 0, "diversity": 0, "smallest_class_share": 0, "bnm": math.sqrt(0.1), "snd": math.log(6)}
    assert collapsed == pytest.approx(expected, rel=1e-5)
    two = [[0.9, 0.1], [0.4, 0.6]]
    mean = (entropy(two[0]) + entropy(two[1])) / 2
    assert prediction_signals(torch.tensor(two))["entropy"] == pytest.approx(mean, rel=1e-5)


def test_clusters_agree_with_predictions_that_follow_them_and_with_no_others():
    classes = torch.arange(200) % 4
    features = 10 * torch.eye(4)[classes] + torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    assert class_ami(features, 3 - classes, 4) == pytest.approx(1)
    assert class_ami(features, torch.arange(200) // 50, 4) == pytest.approx(0, abs=0.02)


def test_seconds_are_those_of_the_first_epoch_that_was_there():
    accuracies = [0.5, 0.9, 0.89, 0.951, 0.9799]
    records = [{"target_accuracy": a, "seconds": 10.0 * i} for i, a in enumerate(accuracies, 1)]
    assert seconds_to(records) == {"90": 20.0, "95": 40.0, "98": None}


@pytest.mark.parametrize(("method", "epochs"), [("dann", (2, 3)), ("source-only", ())])
def test_a_lost_class_is_announced_once_the_source_is_learnt(monkeypatch, capsys, tiny_data, tmp_path, method, epochs):
    """Not after a first epoch at chance, nor in a run without reversal; in the log and on the screen."""
    lost = torch.full((50, 10), 0.01)
    lost[torch.arange(50), torch.tensor([0, 1, 2, 3, 4, 5, 6, 8, 9, 9] * 5)] = 0.91  # never 7
    monkeypatch.setattr(Watcher, "target_signals", lambda watcher: prediction_signals(lost))
    end_epoch = Run.end_epoch
    monkeypatch.setattr(Run, "end_epoch", lambda run: end_epoch(run) | ({"loss_label": 1.1} if run.epoch > 1 else {}))
    train(*settings(tiny_data), "--method", method, "--run-dir", tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if "collapse" in line]
    assert len(said) == len(epochs)
    assert all(f"epoch {epoch}:" in line and "0.0%" in line for epoch, line in zip(epochs, said, strict=True))
    texts = {tag for tag in events_of(tmp_path).Tags()["tensors"] if tag.startswith("collapse")}
    assert texts == {f"collapse/epoch_{epoch}/text_summary" for epoch in epochs}
    assert [record["smallest_class_share"] for record in records_of(tmp_path)] == [0, 0, 0]
    assert records_of(tmp_path)[0]["loss_label"] > 2, "the first epoch was at chance"


def test_what_a_collapse_is():
    """Half of ln 10 = 2.303 is 1.151."""
    for loss, share, collapsed in ((1.2, 0.0, False), (1.1, 0.0, True), (1.1, 0.0099, True), (1.1, 0.011, False)):
        record = {"loss_label": loss, "smallest_class_share": share}
        assert has_collapsed(record | {"loss_domain": 1.4}, 10) is collapsed
        assert has_collapsed(record, 10) is False


def test_seconds_are_taken_when_the_device_is_done(monkeypatch):
    calls = []
    monkeypatch.setattr("utils.machine.synchronise", lambda device: calls.append(device))
    monkeypatch.setattr("time.perf_counter", lambda: calls.append("clock") or 12.0)
    watcher, run = Watcher.__new__(Watcher), SimpleNamespace(step=7, train_seconds=5.0, seconds=None)
    watcher.classifier = SimpleNamespace(device="device")
    watcher.epoch_started, watcher.first_step, watcher.started, watcher.seconds_before = 10.0, 3, 8.0, 100.0
    watcher.stop_clock(run)
    assert calls == ["device", "clock"]
    assert (run.train_seconds, run.seconds, watcher.epoch_seconds, watcher.epoch_steps) == (7.0, 104.0, 2.0, 4)


def test_numbers_and_their_nouns_agree():
    assert [counted(number, "thread") for number in (0, 1, 2)] == ["0 threads", "1 thread", "2 threads"]


def test_source_only_is_tested_with_the_statistics_of_either_domain(tiny_data, tmp_path, quick_run):
    """Its own statistics of the target, which need no label, and the source's alone."""
    words = "--method source-only --batch-size 16 --epochs 25 --lr 0.02 --device cpu --no-download"
    train(*words.split(), "--data-dir", tiny_data, "--run-dir", tmp_path / "run")
    classifier = load_classifier(str(tmp_path / "run"), torch.device("cpu"))
    result, mnist = result_of(tmp_path / "run"), load_domain("mnist", "test", tiny_data)
    by_target, by_source = (evaluate(classifier, mnist, domain) for domain in ("target", "source"))
    assert result["target_correct"] == by_target.correct
    assert result["target_correct_by_source_statistics"] == by_source.correct
    assert not torch.equal(by_target.predicted, by_source.predicted), "tests on the same digits tell nothing"
    assert "target_correct_by_source_statistics" not in result_of(quick_run)
