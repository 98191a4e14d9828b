"""What a run writes down about its target: signals without labels, and when it reached which accuracy."""

import json
import math

import pytest
import torch

import main
from tests.test_run_log import read_events
from utils.records import label_free_signals, seconds_to


def test_signals_of_predictions_that_are_known():
    certain = torch.eye(10)[torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9])]
    signals = label_free_signals(certain)
    shares = [1 / 12] * 9 + [3 / 12]
    assert signals["entropy"] == 0
    assert signals["diversity"] == pytest.approx(-sum(share * math.log(share) for share in shares))
    assert signals["smallest_class_share"] == pytest.approx(1 / 12)

    unsure = label_free_signals(torch.full((5, 10), 0.1))
    assert unsure["entropy"] == pytest.approx(math.log(10), rel=1e-5)
    assert unsure["diversity"] == pytest.approx(math.log(10), rel=1e-5)

    collapsed = label_free_signals(torch.eye(10)[torch.zeros(7, dtype=torch.long)])
    assert collapsed == {"entropy": 0, "diversity": 0, "smallest_class_share": 0}

    two = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    entropies = [-sum(q * math.log(q) for q in row) for row in two.tolist()]
    assert label_free_signals(two)["entropy"] == pytest.approx(sum(entropies) / 2, rel=1e-5)


def test_seconds_are_those_of_the_first_epoch_that_was_there(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    accuracies = [0.5, 0.9, 0.89, 0.951, 0.9799]
    lines = [json.dumps({"target_accuracy": a, "seconds": 10.0 * i}) for i, a in enumerate(accuracies, 1)]
    metrics.write_text("\n".join(lines) + "\n")
    assert seconds_to(metrics) == {"90": 20.0, "95": 40.0, "98": None}


def test_a_lost_class_is_announced_in_the_log_and_on_the_screen(tiny_data, tmp_path, monkeypatch, capsys):
    """Predictions that never say 7 are a collapse; those of a run without a domain loss are none of its business."""
    lost = torch.full((50, 10), 0.01)
    lost[torch.arange(50), torch.tensor([0, 1, 2, 3, 4, 5, 6, 8, 9, 9] * 5)] = 0.91
    monkeypatch.setattr(main, "predict", lambda *_: lost)
    for method in ("dann", "source-only"):
        folder = tmp_path / method
        words = ["--dry-run", "--method", method, "--run-dir", str(folder), "--data-dir", str(tiny_data)]
        monkeypatch.setattr("sys.argv", ["main.py", "--recipe", "paper", *words, "--device", "cpu", "--no-download"])
        main.main()
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: collapse")]
        written = read_events(folder).Tags()["tensors"]
        epochs = [1, 2] if method == "dann" else []
        assert [f"at epoch {epoch}: one class is read in 0.0%" in line for epoch, line in enumerate(said, 1)] == [
            True for _ in epochs
        ]
        assert ("collapse/epoch_2/text_summary" in written) == (method == "dann")
        (first, last) = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
        assert first["smallest_class_share"] == last["smallest_class_share"] == 0
