"""Short forms of tools.soak and tools.fuzz: kills cost nothing, and damaged files are read or refused."""

import random

import pytest

from tools import fuzz, soak


def test_a_training_that_is_killed_again_and_again_ends_as_one_that_is_left_alone(monkeypatch, tiny_data, tmp_path):
    settings = ["--network", "small", "--epochs", "3", "--batch-size", "16", "--precision", "fp32"]
    monkeypatch.setattr(soak, "TRAINING", ["main.py", *settings, *soak.MACHINE])
    whole = tmp_path / "whole"
    assert soak.start([*soak.TRAINING, "--run-dir", str(whole), "--data-dir", str(tiny_data)]).wait() == 0
    killed = soak.soak_training(tmp_path / "killed", tiny_data, random.Random(3), 3, whole, 6)
    assert killed.total() >= 1
    (whole / "metrics.jsonl").write_text(
        (whole / "metrics.jsonl").read_text().replace('"loss_label": ', '"loss_label": 1')
    )
    with pytest.raises(soak.Fault, match="jsonl differs"):
        soak.compare(tmp_path / "killed", whole)


def test_a_download_that_is_killed_ends_with_the_right_file(monkeypatch, tmp_path):
    monkeypatch.setattr(soak, "FILE_BYTES", 2_000_000)
    assert soak.soak_download(tmp_path, random.Random(0), 2).total() >= 2


@pytest.mark.parametrize("name", fuzz.READERS)
def test_damaged_files_are_read_or_refused(name, tmp_path):
    outcomes, faults = fuzz.fuzz(name, 1, 40, tmp_path / "faults")
    assert outcomes.total() == 40
    assert outcomes["refused"] > 5
    assert faults == 0


def test_faults_of_a_reader_are_seen(monkeypatch, tmp_path):
    """An error that is no UserError, wrong content, a hang, and a process that dies."""

    def read(folder):
        content = (folder / "digits").read_bytes()
        if content != b"0123456789" * 20:
            {0: fail, 1: hang, 2: die}.get(content[:1] == b"0" and len(content) % 4, wrong)()
        return content

    def fail():
        raise KeyError("digits")

    def hang():
        while True:
            pass

    def die():
        fuzz.os._exit(3)

    def wrong():
        return None

    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    reader = fuzz.Reader(
        "digits", lambda folder: (folder / "digits").write_bytes(b"0123456789" * 20), read, guarded=True
    )
    monkeypatch.setitem(fuzz.READERS, "ours", reader)
    outcomes, faults = fuzz.fuzz("ours", 0, 12, tmp_path)
    assert outcomes.total() + faults == 12
    assert faults > 8
    assert list(tmp_path.iterdir())
