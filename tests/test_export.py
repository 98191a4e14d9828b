"""Networks for other programs: what comes out of the file is what comes out of PyTorch."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT

import valid
from data_loader import CLASS_NAMES
from methods import export
from methods.classifier import load_classifier

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", ["onnx", "torch"])
@pytest.mark.parametrize("weights", ["svhn-mnist-modern", "synth-optdigits-quick"])  # grey, and colour
def test_an_export_gives_what_pytorch_gives_for_any_number_of_images(monkeypatch, capsys, few_synth, weights, kind):
    words = ["--weights", weights, "--export", kind, "--domains", "synth", "optdigits", "--no-download"]
    monkeypatch.setattr(sys, "argv", ["valid.py", *words])
    valid.main()
    assert capsys.readouterr().err.count(f"wrote runs/exported/{weights}") == 2
    (path,) = valid.EXPORTED.iterdir()
    run, classifier = export.load_export(path), load_classifier(weights, CPU, False, "fp32")
    channels = 1 if classifier.preprocess.grey else 3
    for count in (1, 7):
        images = torch.randint(0, 256, (count, channels, 32, 32), dtype=torch.uint8)
        torch.testing.assert_close(run(images), classifier.probabilities(images), atol=1e-4, rtol=0)


def test_an_onnx_file_says_what_it_takes_and_gives(quick_run):
    classifier = load_classifier(str(quick_run), CPU, False, "fp32")
    path = export.export(classifier, "onnx", valid.EXPORTED)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert json.loads({entry.key: entry.value for entry in model.metadata_props}["classes"]) == [*CLASS_NAMES]
    session = onnxruntime.InferenceSession(path)
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.type, taken.shape[1:]) == ("images", "tensor(uint8)", [3, 32, 32])
    assert (given.name, given.shape[1:]) == ("probabilities", [10])
    probabilities = session.run(None, {"images": np.zeros((3, 3, 32, 32), np.uint8)})[0]
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
    assert [file.name for file in valid.EXPORTED.iterdir()] == ["run.onnx"], "all in one file"


def test_a_file_that_gives_something_else_is_not_passed_off(monkeypatch, fail, few_synth):
    monkeypatch.setattr(valid, "load_export", lambda path: lambda images: torch.full((len(images), 10), 0.1))
    words = ("--export", "torch", "--weights", "synth-optdigits-quick", "--no-download", "--device", "cpu")
    assert "other probabilities than PyTorch" in fail(valid, *words)


def test_without_the_packages_one_line_says_which(monkeypatch, fail):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    words = ("--export", "onnx", "--domains", "optdigits", "--no-download", "--device", "cpu")
    assert "pip install onnx onnxscript onnxruntime" in fail(valid, *words)
    assert not list(ROOT.glob("*.onnx"))
