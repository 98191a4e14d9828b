"""The figures: the numbers in them against independent computations, and the files of a run from the command line."""

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from conftest import ROOT, records_of, run_as_process, train
from PIL import Image
from torch import nn

from data_loader import DigitSet
from digits.domains import load_domain
from methods.networks import NETWORKS, build_network
from methods.recipes import Config
from tools import figures
from tools.figure_architecture import stages_of
from tools.figure_curves import chance_loss, column, lambda_curve
from tools.figure_data import load_network, sample
from utils.checkpoint import load_weights, save_weights
from valid import evaluate
from watch.features import neighbour_share, proxy_a_distance, same_class_share
from watch.plots import class_colours, spread

CPU = torch.device("cpu")
NAMES = ("architecture", "samples", "curves", "confusion", "misclassified", "features")
KEPT = ROOT / "results" / "figures"


def gaussian(count: int, features: int, seed: int, shift: float = 0.0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(count, features))
    values[:, 0] += shift
    return values


# --- how mixed two domains are ----------------------------------------------------------------------


def test_how_mixed_domains_are_between_the_extremes():
    far, alike = gaussian(600, 6, 1, shift=50), gaussian(600, 6, 1)
    assert proxy_a_distance(gaussian(600, 6, 0), far) == 2
    assert neighbour_share(gaussian(600, 6, 0), far) == 0
    assert 0 <= proxy_a_distance(gaussian(600, 6, 0), alike) < 0.2
    assert neighbour_share(gaussian(600, 6, 0), alike) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_proxy_a_distance_of_two_gaussians(shift):
    """The best classifier of two unit Gaussians at a distance d is linear and errs with probability Φ(−d/2)."""
    found = proxy_a_distance(gaussian(1500, 3, 0), gaussian(1500, 3, 1, shift))
    assert found == pytest.approx(2 * (1 - 2 * NormalDist().cdf(-shift / 2)), abs=0.1)


def test_proxy_a_distance_is_of_samples_that_the_classifier_has_not_seen():
    """In more dimensions than samples any labelling can be learnt by heart, and nothing of it holds for others."""
    assert proxy_a_distance(gaussian(40, 400, 0), gaussian(40, 400, 1)) < 0.8


def test_neighbour_share_by_all_distances():
    f_s, f_t = gaussian(40, 4, 0), gaussian(25, 4, 1, shift=1)
    features, domains = np.concatenate((f_s, f_t)), np.array([0] * 40 + [1] * 25)
    distances = ((features[:, None] - features) ** 2).sum(2)
    nearest = distances.argsort(1)[:, 1:11]  # the first is the image itself
    assert neighbour_share(f_s, f_t, 10) == pytest.approx((domains[nearest] != domains[:, None]).mean())


def test_same_class_share_by_hand():
    """Targets at 1, 6 and 9 next to sources at 0, 5 and 10."""
    f_s, f_t = np.array([[0.0], [5.0], [10.0]]), np.array([[1.0], [6.0], [9.0]])
    assert same_class_share(f_s, np.array([3, 4, 5]), f_t, np.array([3, 9, 5])) == pytest.approx(2 / 3)


# --- what is drawn ----------------------------------------------------------------------------------


def digit_set(split: str, first: int, count: int) -> DigitSet:
    """Images whose one pixel is their number."""
    images = torch.arange(first, first + count, dtype=torch.uint8).view(-1, 1, 1, 1)
    return DigitSet("mnist", split, images, images.flatten().long() % 10, "MNIST", {})


def test_a_sample_has_test_images_first_and_none_twice():
    test, train = digit_set("test", 0, 30), digit_set("train", 100, 50)
    images, labels = sample(test, train, 45, seed=0)
    numbers = images.flatten().tolist()
    assert sorted(numbers[:30]) == list(range(30))
    assert sorted(numbers[:30]) != numbers[:30], "drawn, not the first ones"
    assert len(set(numbers)) == 45
    assert min(numbers[30:]) >= 100
    assert labels.tolist() == [number % 10 for number in numbers]
    assert torch.equal(sample(test, train, 45, seed=0)[0], images)
    assert sample(test, train, 12, seed=0)[0].max() < 30


def test_each_digit_gets_its_turn():
    digits = torch.tensor([6] * 50 + [1, 9, 9])
    drawn = spread(torch.arange(53), digits, 6, seed=0)
    assert digits[drawn].tolist() == [1, 6, 6, 6, 9, 9]
    assert len(set(drawn.tolist())) == 6
    assert spread(torch.tensor([50]), digits, 6, seed=0).tolist() == [50]


@pytest.mark.parametrize("network", NETWORKS)
def test_stages_are_the_layers_of_the_network(network):
    """One stage a convolution or linear layer; what leaves a stage is what its layer and its pooling make."""
    model, row = build_network(network, 0.5).eval(), NETWORKS[network]
    stages, features = stages_of(model.extractor, torch.zeros(2, row.channels, row.image_size, row.image_size))
    layers = [module for module in model.extractor.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for stage, layer in zip(stages, layers, strict=True):
        kernel = "" if isinstance(layer, nn.Linear) else "×".join(map(str, layer.kernel_size))
        assert stage.title == (f"conv {kernel}" if kernel else "linear")
        assert stage.shape[0] == layer.weight.shape[0]
    assert math.prod(stages[-1].shape) == features[0].numel()
    heights = [stage.shape[1] for stage in stages if len(stage.shape) == 3]
    assert all(first >= second for first, second in pairwise([row.image_size, *heights]))
    label_stages, logits = stages_of(model.classifier, features)
    assert label_stages[-1].shape == (10,) == tuple(logits.shape[1:])


def test_stages_name_what_comes_with_a_layer():
    stages, _ = stages_of(build_network("small").eval().extractor, torch.zeros(1, 3, 32, 32))
    assert [stage.text.split("\n") for stage in stages] == [
        *(["conv 3×3", "max pool, batch norm", f"→ {shape}"] for shape in ("32×16×16", "48×8×8", "64×4×4")),
        ["linear", "batch norm", "→ 128"],
    ]


def test_the_curves_that_the_figures_show_beside_the_measured_ones():
    """The domain loss of discriminators that say one half to everything; λ over a warm start and two epochs."""
    half = -math.log(0.5)
    assert chance_loss(Config(domain_loss="sum"))[0] == pytest.approx(half + half)
    assert chance_loss(Config(domain_loss="mean"))[0] == pytest.approx((half + half) / 2)
    at_half = 2 / (1 + math.exp(-5)) - 1
    epochs, factors = lambda_curve(Config(epochs=2, warm_start_epochs=1, lambda_max=0.5))
    assert (epochs[0], epochs[-1]) == (0, 3)
    assert (factors[epochs <= 1] == 0).all()
    assert np.interp(2, epochs, factors) == pytest.approx(0.5 * at_half, abs=1e-3)
    epochs, factors = lambda_curve(Config(epochs=2, lambda_update="epoch"))
    assert (factors[epochs < 1] == 0).all()
    assert factors[epochs > 1] == pytest.approx(at_half)


# --- python -m tools.figures ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tiny_data, tmp_path_factory):
    """A run with gradient reversal and its source-only counterpart, of two short epochs each."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("dann", "source-only"):
        train(
            "--network", "small", "--normalisation", "per-image", "--batch-size", 16, "--dry-run", "--device", "cpu",
            "--precision", "fp32", "--no-download", "--data-dir", tiny_data,
            "--method", method, "--run-dir", folder / method,
        )  # fmt: skip
    return folder


@pytest.fixture
def arguments(tiny_data):
    return ("--data-dir", tiny_data, "--device", "cpu", "--no-download")


def check_figures(folder: Path) -> None:
    """As wide as on a screen of high resolution, small, with something on them and nothing cut off."""
    for name in NAMES:
        path = folder / f"{name}.png"
        assert path.stat().st_size < 300_000, name
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.shape[1] == 1700, name
        assert 0.005 < (pixels < 250).any(2).mean() < 0.9, name
        edge = np.concatenate((pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
        assert (edge == 255).all(), f"{name} is cut off, or its page is not white"


def test_figures_of_a_run_and_its_source_only_run(monkeypatch, runs, arguments):
    """A process, as a user would start it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads of so small a job only wait for each other
    done = run_as_process("-m", "tools.figures", runs / "dann", "--compare", runs / "source-only", *arguments)
    assert done.returncode == 0, done.stderr
    check_figures(runs / "dann" / "figures")
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed == json.loads((runs / "dann" / "figures" / "figures.json").read_text())
    assert [network["label"] for network in printed["networks"]] == ["source only", "DANN"]
    for network, name in zip(printed["networks"], ("source-only", "dann"), strict=True):
        result = json.loads((runs / name / "result.json").read_text())
        assert all(network[key] == result[key] for key in ("target_correct", "target_total", "method", "seed"))
        assert network["samples"] == 126, "all of the 63 svhn images, and as many of MNIST's"
        assert network["features"] == 128
    counts, (before, after) = printed["target_test_images"], printed["networks"]
    assert counts["gained"] - counts["lost"] == after["target_correct"] - before["target_correct"]


def test_figures_of_a_run_alone(monkeypatch, capsys, runs, arguments, tmp_path):
    """Of one without a domain loss, so that panels stay empty."""
    command = ("figures.py", runs / "source-only", "--out", tmp_path, *arguments)
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    figures.main()
    check_figures(tmp_path)
    result = json.loads((runs / "source-only" / "result.json").read_text())
    wrong = result["target_total"] - result["target_correct"]
    counts = json.loads(capsys.readouterr().out)["target_test_images"]
    assert counts == {"total": result["target_total"], "misclassified": wrong}


def test_features_do_not_depend_on_the_batch(runs, tiny_data):
    """Eval mode: in training mode batch norm would mix the images of a batch."""
    network, images = load_network(runs / "dann", CPU), load_domain("mnist", "test", tiny_data).images[:9]
    classifier = network.classifier
    classifier.model.train()
    features = network.features(images)
    np.testing.assert_allclose(network.features(images[4:5])[0], features[4], atol=1e-5)
    with torch.no_grad():
        expected = classifier.model.eval().extractor.layers(classifier.preprocess(images))
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_curves_leave_out_what_was_not_measured(runs):
    """Where a record lacks a value, and where it has null for one."""
    for folder in (runs / "source-only", KEPT / "source-only"):
        network, records = load_network(folder, CPU), records_of(folder)
        assert [values.tolist() for values in column(network, "loss_domain")] == [[], []]
        epochs, losses = column(network, "loss_label")
        assert epochs.tolist() == list(range(1, len(records) + 1))
        assert losses.tolist() == [record["loss_label"] for record in records]


@pytest.fixture
def damaged(runs, tmp_path):
    """A copy of a run's two files to spoil."""
    for name in ("model.safetensors", "metrics.jsonl"):
        shutil.copy(runs / "dann" / name, tmp_path)
    return tmp_path


def metrics(content: bytes):
    return lambda run: (run / "metrics.jsonl").write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (shutil.rmtree, "python main.py --run-dir"),
        (lambda run: (run / "model.safetensors").unlink(), "python main.py --run-dir"),
        (lambda run: (run / "model.safetensors").rename(run / "last.pt"), "python main.py --resume"),
        (lambda run: (run / "model.safetensors").write_bytes(b"weights"), "model.safetensors"),
        (lambda run: (run / "metrics.jsonl").unlink(), "python main.py --recipe dann --source svhn --target mnist"),
        (metrics(b"{"), "metrics.jsonl is damaged"),
        (metrics(b"\xff"), "metrics.jsonl is damaged"),
        (metrics(b"[]\n"), "metrics.jsonl is damaged"),
        (metrics(b'{"epoch": 1}\n'), "'lambda_p'"),
        (metrics(b""), "metrics.jsonl is empty"),
    ],
)
def test_a_bad_run_is_one_line_that_names_the_command(fail, damaged, arguments, spoil, named):
    spoil(damaged)
    message = fail(figures, damaged, *arguments)
    assert named in message
    assert str(damaged) in message


def test_a_run_to_compare_with_must_be_of_the_same_domains(fail, runs, damaged, arguments):
    weights, about = load_weights(damaged / "model.safetensors")
    save_weights(damaged / "model.safetensors", weights, about | {"source": "usps"})
    message = fail(figures, runs / "dann", "--compare", damaged, *arguments)
    assert "svhn → mnist and usps → mnist" in message
    assert "--source svhn --target mnist --method source-only --seed 0" in message


def test_missing_data_is_one_line(fail, runs, arguments, tmp_path):
    message = fail(figures, runs / "dann", "--out", tmp_path / "out", *arguments, "--data-dir", tmp_path / "none")
    assert "python download_data.py" in message


# --- what is kept in results/figures ----------------------------------------------------------------


def test_kept_figures_are_shown_and_come_from_the_kept_networks():
    check_figures(KEPT)
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    assert all(f"results/figures/{name}.png)" in pages for name in NAMES)
    kept = json.loads((KEPT / "figures.json").read_text(encoding="utf-8"))
    for entry, method in zip(kept["networks"], ("source-only", "dann"), strict=True):
        network = load_network(KEPT / method, CPU)
        assert network.settings.method == method == entry["method"]
        tested = evaluate(network.classifier, load_domain(entry["target"], "test", ROOT / "data"))
        assert tested.total == entry["target_total"]
        assert abs(tested.correct - entry["target_correct"]) <= 2  # another machine may round two images away


def test_colours_tell_any_number_of_classes_apart():
    for count in (2, 10, 26, 100):
        colours = class_colours(count)
        assert len(set(colours)) == len(colours) == count
    assert class_colours(3) == class_colours(10)[:3]
