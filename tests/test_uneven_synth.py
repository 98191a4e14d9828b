"""The hard development pair: images of the documented kind, the same each time, classes of uneven size."""

import importlib.util
import json
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, interrupt_after, press_ctrl_c

import main
from digits.domains import DOMAINS
from digits.synth import render_digits
from tools import uneven_synth
from tools.uneven_synth import REACH, SHARES, SMEARED, degrade, uneven
from utils.cli import Interrupted


def contrast(images: torch.Tensor) -> torch.Tensor:
    return images.float().mean(1).flatten(1).std(1)


def test_degraded_images_are_dimmer_and_those_to_train_with_grey_and_smeared():
    digits = torch.from_numpy(render_digits(0, 0, 300)[0]).permute(0, 3, 1, 2).contiguous()
    before = digits.clone()
    train, test = (degrade(digits, 5, training) for training in (True, False))
    for x, training in ((train, True), (test, False)):
        assert (x.shape, x.dtype) == (digits.shape, torch.uint8)
        assert torch.equal(x, degrade(digits, 5, training))
        assert not torch.equal(x, degrade(digits, 6, training))
        ratio = contrast(x) / contrast(digits)
        assert 0.2 < ratio.median() < 0.5  # √0.12 = 0.35, and less where blur takes more
        assert ratio.max() < 1.3
    assert torch.equal(digits, before), "what was given stays as it is"

    assert (train == train[:, :1]).all()
    assert (test != test[:, :1]).flatten(1).any(1).float().mean() > 0.9
    middle = digits.shape[-1] // 2
    for columns in (slice(0, middle - REACH[1] + 2), slice(middle + REACH[1] - 2, None)):
        alike = [(x[..., columns] == x[..., columns][..., :1]).flatten(1).all(1).float().mean() for x in (train, test)]
        assert alike[0] == pytest.approx(SMEARED, abs=0.12)
        assert alike[1] < 0.05


def test_each_class_keeps_its_share():
    labels = torch.arange(10).repeat(4000)
    kept = labels[uneven(labels, 3)].bincount(minlength=10) / 4000
    assert kept.tolist() == pytest.approx(SHARES.tolist(), abs=0.03)
    assert SHARES.max() / SHARES.min() == pytest.approx(3)


def test_it_trains_like_main(monkeypatch, tiny_data, few_synth, tmp_path):
    monkeypatch.setitem(DOMAINS, "synth", DOMAINS["synth"])  # put back at the end
    folder = tmp_path / "run"
    started = importlib.util.find_spec("tools.uneven_synth")  # as by `python -m tools.uneven_synth`
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=started))
    options = f"--recipe quick --source mnist --target synth --data-dir {tiny_data} --dry-run --run-dir {folder}"
    monkeypatch.setattr(sys, "argv", [started.origin, *options.split()])
    with monkeypatch.context() as interrupted:
        interrupt_after(interrupted, main, "step", 1, press_ctrl_c)
        with pytest.raises(Interrupted) as stop:
            uneven_synth.run()

    command = f"python -m tools.uneven_synth --resume {folder} --data-dir {tiny_data}"
    assert f"`{command}`" in str(stop.value), "main.py would go on with another synth"
    monkeypatch.setattr(sys, "argv", [started.origin, *shlex.split(command)[3:]])
    uneven_synth.run()
    result = json.loads((folder / "result.json").read_text())
    assert result["command"] == f"python -m tools.uneven_synth {options}"
    assert result["target_mark"].startswith("degraded synth subset, ")
    assert result["target_total"] < 20, "of twenty test images some are left out"


def test_a_module_is_recorded_as_one(tmp_path):
    (tmp_path / "tool.py").write_text("from utils import machine\nprint(machine.command_line())\n")
    command = [sys.executable, "-m", "tool", "--name", "a b"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout == "python -m tool --name 'a b'\n"
