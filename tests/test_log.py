"""What a run writes down for people and programs: metrics.jsonl and TensorBoard events, also after a resume."""

import io
import itertools
import socket

import numpy as np
import pytest
import torch
from conftest import events_of, go_on, interrupted_run, kill, press_ctrl_c, records_of, settings
from PIL import Image

import main
from watch.log import RunLog
from watch.screen import epoch_line

RECORD = {
    "epoch": 1, "p": 0.1, "lambda_p": 0.462, "learning_rate": 0.01, "loss_label": 2.3, "loss_domain": 1.386,
    "domain_accuracy": 0.5, "source_accuracy": 0.25, "target_accuracy": 1.0, "seconds": 1.0,
    "images_per_second": 9000.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_names(monkeypatch):
    """tensorboardX names a file by second and host; here several writers start within one second."""
    numbers = itertools.count()
    monkeypatch.setattr(socket, "gethostname", lambda: f"host{next(numbers):04d}")


def test_a_new_log_starts_empty_and_each_record_is_on_disk_at_once(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "of": "a run that failed"}\n')
    log = RunLog(tmp_path)
    assert records_of(tmp_path) == []
    log.epoch(RECORD)
    assert records_of(tmp_path) == [RECORD]
    log.close()


@pytest.mark.parametrize("left", [b'{"epoch": 1}\n' * 3, b'{"epoch": 1, "p": 0.', b"\xff", b""])
def test_a_resumed_log_begins_with_the_records_of_the_checkpoint_whatever_was_left(tmp_path, left):
    kept = [{"epoch": epoch, "start": "first"} for epoch in (1, 2)]
    (tmp_path / "metrics.jsonl").write_bytes(left)
    log = RunLog(tmp_path, resume_step=20, records=kept)
    assert records_of(tmp_path) == kept
    log.epoch({"epoch": 3, "start": "second"})
    log.close()
    assert records_of(tmp_path) == [*kept, {"epoch": 3, "start": "second"}]


def test_resuming_drops_later_events_and_keeps_earlier_ones(tmp_path):
    log = RunLog(tmp_path)
    log.images("images/source", 0, torch.rand(4, 3, 8, 8))
    for step in range(10):
        log.scalars(step, {"train/loss_label": 100.0 + step})
    log.scalars(9, {"test/only_at_the_end": 1.0})
    log.close()
    log = RunLog(tmp_path, resume_step=5)
    for step in (5, 6, 7):
        log.scalars(step, {"train/loss_label": 200.0 + step})
    log.close()
    events = events_of(tmp_path)
    curve = [(event.step, event.value) for event in events.Scalars("train/loss_label")]
    assert curve == [*((step, 100 + step) for step in range(5)), (5, 205), (6, 206), (7, 207)]
    assert events.Scalars("test/only_at_the_end") == []
    assert [event.step for event in events.Images("images/source")] == [0]


def test_a_log_that_starts_again_shows_nothing_of_what_was_killed_before_its_first_checkpoint(tmp_path):
    for value in (1.0, 2.0):
        log = RunLog(tmp_path)
        log.scalars(0, {"train/loss_label": value})
        log.close()
        for file in (tmp_path / "tensorboard").iterdir():  # named by the second, as if a minute had passed
            file.rename(file.with_name(file.name + f".{value}"))
    assert [event.value for event in events_of(tmp_path).Scalars("train/loss_label")] == [2.0]


def test_images_are_stretched_to_full_range(tmp_path):
    """Inputs of zero mean are negative in half of their pixels; the picture shows them from black to white."""
    x = torch.linspace(-3, -1, 64).view(1, 1, 8, 8).expand(2, 3, 8, 8)
    log = RunLog(tmp_path)
    log.images("images/target", 0, x, columns=2)
    log.close()
    (event,) = events_of(tmp_path).Images("images/target")
    pixels = np.array(Image.open(io.BytesIO(event.encoded_image_string)).convert("L"), dtype=np.float32)
    assert pixels.shape == (8 + 2 * 2, 2 * 8 + 3 * 2)  # two images, two pixels around each
    assert np.abs(pixels[2:10, 2:10] - np.linspace(0, 255, 64).reshape(8, 8)).max() <= 1


def curves(folder):
    """Of each curve its steps and values, but for values that depend on the clock; and steps of images."""
    events = events_of(folder)
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    found["train/images_per_second"] = [step for step, _ in found["train/images_per_second"]]
    return found | {tag: [event.step for event in events.Images(tag)] for tag in ("images/source", "images/target")}


@pytest.mark.parametrize(
    ("steps", "interruption"),
    [
        pytest.param(6, press_ctrl_c, id="Ctrl-C within the second epoch"),
        pytest.param(8, press_ctrl_c, id="Ctrl-C in the last step of the second epoch"),
        pytest.param(5, kill, id="killed right after the first epoch"),
        pytest.param(7, kill, id="killed within the second epoch, events of which must go"),
    ],
)
def test_a_resumed_run_shows_the_same_curves(monkeypatch, whole_run, tiny_data, tmp_path, steps, interruption):
    folder, logs = tmp_path / "run", []
    monkeypatch.setattr("watch.watcher.LOG_EVERY_STEPS", 3)
    monkeypatch.setattr("watch.watcher.RunLog", lambda *arguments: logs.append(RunLog(*arguments)) or logs[-1])
    interrupted_run(main, "step", steps, interruption, *settings(tiny_data), "--run-dir", folder)
    if interruption is kill:
        logs[0].close()  # so that what the killed run logged is on disk, as it may be
    expected = curves(whole_run)
    del expected["features/proxy_a_distance"]  # comes with figures, which the other runs do not draw
    assert expected["images/source"] == expected["images/target"] == [0]
    for _ in range(2):  # the second time it is finished, and nothing is taken away
        go_on(folder, tiny_data)
        assert curves(folder) == expected
        assert [record["epoch"] for record in records_of(folder)] == [1, 2, 3]


def test_the_lines_of_epochs_are_aligned():
    later = RECORD | {"epoch": 12, "p": 1.0, "source_accuracy": 1.0, "domain_accuracy": 1.0, "target_accuracy": 0.0}
    first, second = (epoch_line(record, 100, 8.4) for record in (RECORD, later))
    assert first.startswith("epoch   1/100  p 0.100  lambda 0.462  lr 0.0100 | label 2.300  domain 1.386")
    assert [len(part) for part in first.split("|")[:-1]] == [len(part) for part in second.split("|")[:-1]]
    assert "100.00%" in second


def test_a_run_without_domain_loss_says_nothing_of_it():
    line = epoch_line({key: value for key, value in RECORD.items() if "domain" not in key}, 4, 1.0)
    assert "dom" not in line
    assert "source  25.00%" in line
