"""What TensorBoard shows of a run: the projector, histograms, predictions and hyper-parameters, against the weights."""

import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DRAWN, Killed, events_of, go_on, interrupted_run, kill, settings, train
from PIL import Image
from sklearn.decomposition import PCA
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import main
from data_loader import DigitSet, Preprocessing, spread_over
from digits.domains import load_domain
from methods.classifier import Classifier, load_classifier
from methods.networks import build_network
from methods.run import Run
from watch.board import Board, principal_components
from watch.features import proxy_a_distance
from watch.log import RunLog
from watch.plots import confusion_figure, histograms_figure, misclassified_figure

EACH = 18  # images of a domain in the projector: 2 · 18 = 6², and svhn has 23 test images
START, END = ("features:00000", "00000/features"), ("features:00011", "00011/features")  # of 3 epochs of 4 steps
FIGURES = ("features/both_domains", "features/plane", "target/confusion", "target/misclassified")


@pytest.fixture(scope="module")
def events(whole_run):
    return events_of(whole_run)


@pytest.fixture(scope="module")
def classifier(whole_run):
    return load_classifier(str(whole_run), torch.device("cpu"))


@pytest.fixture(scope="module")
def shown(tiny_data):
    """The test images of both domains that the projector holds."""
    return [spread_over(load_domain(name, "test", tiny_data), EACH) for name in ("svhn", "mnist")]


def entries(folder):
    """What the projector's file lists: (tensor's name, folder of its files)."""
    text = (folder / "tensorboard/projector_config.pbtxt").read_text()
    return re.findall(r'tensor_name: "([^"]*)"\ntensor_path: "([^"]*)/tensors.tsv"', text)


def test_points_have_domain_digit_prediction_and_thumbnail(whole_run, classifier, shown):
    assert entries(whole_run) == [START, END]
    header, *rows = (whole_run / "tensorboard/00011/features/metadata.tsv").read_text().splitlines()
    assert header == "domain\tclass\tpredicted\tright"
    expected = []
    for name, part in zip(("svhn", "mnist"), shown, strict=True):
        predicted = classifier.probabilities(part.images).argmax(1).tolist()
        for digit, answer in zip(part.labels.tolist(), predicted, strict=True):
            expected.append(f"{name}\t{digit}\t{answer}\t{'yes' if answer == digit else 'no'}")
    assert rows == expected

    sprite = np.asarray(Image.open(whole_run / "tensorboard/00011/features/sprite.png"))
    assert sprite.shape == (6 * 32, 6 * 32, 3)
    images = torch.cat([classifier.preprocess.resize(part.images).expand(-1, 3, -1, -1) for part in shown])
    tiles = sprite.reshape(6, 32, 6, 32, 3).transpose(0, 2, 4, 1, 3).reshape(36, 3, 32, 32)
    assert np.abs(tiles.astype(int) - images.numpy()).max() <= 1


def test_points_are_the_features_of_the_weights_that_are_kept(whole_run, classifier, shown):
    first, last = (np.loadtxt(whole_run / f"tensorboard/{step}/features/tensors.tsv") for step in ("00000", "00011"))
    features = torch.cat([classifier.features(part.images) for part in shown]).numpy()
    assert features.shape == (2 * EACH, 3072)
    assert last.shape == (2 * EACH, 2 * EACH)  # 36 points have no more than 36 components
    distances = np.linalg.norm(features[:, None] - features, axis=2)
    assert np.abs(np.linalg.norm(last[:, None] - last, axis=2) - distances).max() < 0.01
    assert np.abs(first - last).max() > 0.01, "they move"


def test_long_features_are_shown_by_their_principal_components_and_short_ones_as_they_are():
    features = torch.randn(80, 300, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.1, 300)
    found = principal_components(features).numpy()
    assert found.shape == (80, 50)
    expected = PCA(50, svd_solver="full").fit_transform(features.double().numpy())
    assert np.allclose(np.abs(found), np.abs(expected), atol=1e-6)
    short = torch.rand(40, 128).double()
    assert torch.allclose(principal_components(short.float()), short - short.mean(0))


def test_an_interrupted_run_shows_its_start_alone_and_a_resumed_one_start_and_end_once(
    monkeypatch, tiny_data, tmp_path, whole_run
):
    folder, save = tmp_path / "run", Run.save
    interrupted_run(main, "step", 6, kill, *settings(tiny_data), "--run-dir", folder)
    assert entries(folder) == [START]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", lambda run, *others: save(run, *others) if run.epoch < 3 else kill())
        with pytest.raises(Killed):  # when the end is shown already, but not saved
            go_on(folder, tiny_data)
    assert entries(folder) == [START, END]
    for _ in range(2):  # the second time it is finished
        go_on(folder, tiny_data)
        assert entries(folder) == [START, END]
    for step in ("00000", "00011"):
        for name in ("tensors.tsv", "metadata.tsv"):
            path = f"tensorboard/{step}/features/{name}"
            assert (folder / path).read_text() == (whole_run / path).read_text()


def test_what_is_shown_does_not_reach_the_weights(monkeypatch, tiny_data, tmp_path, whole_run):
    for method in ("epoch", "embed"):
        monkeypatch.setattr(Board, method, lambda *_: None)
    train(*settings(tiny_data), "--run-dir", tmp_path / "run")
    assert (tmp_path / "run/model.safetensors").read_bytes() == (whole_run / "model.safetensors").read_bytes()


def test_figures_and_histograms_stand_at_the_ends_of_the_epochs(events, classifier, shown):
    for tag, steps in zip(FIGURES, ([3, 7, 11], [11], [11], [11]), strict=True):
        assert [event.step for event in events.Images(tag)] == steps
        picture = Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string))
        assert picture.width == 850, "wide enough to read"
        assert 200 < picture.height < 900
    for tag, part in zip(("source_svhn", "target_mnist"), shown, strict=True):
        histograms = events.Histograms(f"features/{tag}")
        assert [event.step for event in histograms] == [3, 7, 11]
        values, features = histograms[-1].histogram_value, classifier.features(part.images)
        assert values.num == features.numel()
        assert values.max == pytest.approx(features.max().item())
        assert values.sum == pytest.approx(features.sum().item(), rel=1e-4)


def test_settings_are_a_text_and_hyper_parameters_beside_the_final_metrics(events, whole_run):
    def hparams(tag):
        return HParamsPluginData.FromString(events.summary_metadata[tag].plugin_data.content)

    given = hparams(hparams_metadata.SESSION_START_INFO_TAG).session_start_info.hparams
    assert given["recipe"].string_value == "dann"
    assert given["batch_size"].number_value == 16
    assert given["separate_domains"].bool_value is False
    assert given["frozen_convolutions"].string_value == "()"
    metrics = {info.name.tag for info in hparams(hparams_metadata.EXPERIMENT_TAG).experiment.metric_infos}
    assert metrics == {"test/source_accuracy", "test/target_accuracy"}
    assert metrics <= set(events.Tags()["scalars"]), "TensorBoard takes their last values"
    assert hparams_metadata.SESSION_END_INFO_TAG in events.summary_metadata
    assert not list((whole_run / "tensorboard").glob("*/events*")), "no second run in its folder"
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "network: paper-mnist" in text
    assert "batch_size: 16" in text


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_a_confusion_matrix_shows_every_count():
    figure = confusion_figure({"dann": torch.arange(100).view(10, 10)}, "MNIST", tuple("0123456789"))
    assert texts(figure) == [str(count) for count in range(100)]
    assert figure.axes[0].get_title() == "dann: 10.00% (495 / 4,950)"
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("predicted", "true class")


@pytest.mark.parametrize("wrong", [[3, 15], []])
def test_misclassified_digits_bear_both_digits(tmp_path, wrong):
    labels = torch.arange(20) % 10
    digits = DigitSet("mnist", "test", torch.zeros(20, 1, 28, 28, dtype=torch.uint8), labels, "MNIST", {})
    predicted = labels.clone()
    predicted[wrong] = 8
    figure, counts = misclassified_figure({"dann": predicted}, digits, 28)
    assert counts == {"total": 20, "misclassified": len(wrong)}
    assert [text for text in texts(figure) if "true" in text] == ["8\ntrue 3", "8\ntrue 5"][: len(wrong)]
    assert any(f"{len(wrong)} of 20" in text for text in texts(figure))
    log = RunLog(tmp_path)
    log.figure("target/misclassified", 0, figure)  # also that of nothing can be drawn
    log.close()


def test_domains_that_are_apart_have_histograms_that_are():
    generator = torch.Generator().manual_seed(0)
    f_s, f_t = (torch.rand(200, 16, generator=generator) for _ in range(2))
    overlaps = []
    for moved in (f_t, f_t + torch.eye(16)[3] * 4):
        for axes in histograms_figure(f_s, moved, "svhn", "mnist").axes:
            heights = np.array([[bar.get_height() for bar in bars] for bars in axes.containers])  # (2, bins)
            assert heights.sum(1) == pytest.approx([1, 1])
            overlaps.append(heights.min(0).sum())
    assert overlaps[2] > 0.7  # along the domains' difference
    assert overlaps[5] == 0


def test_event_files_of_a_long_run_stay_small(tmp_path):
    """100 epochs with the largest features, 8,192, and pictures of noise, which PNG can't make smaller."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    digits = DigitSet("svhn", "test", images, torch.arange(2000) % 10, "SVHN", {})
    network = build_network("small")
    classifier = Classifier(network, Preprocessing(32), torch.device("cpu"), "fp32")
    log = RunLog(tmp_path)
    board = Board(None, None, SimpleNamespace(source_test=digits, target_test=digits), classifier, log)
    features = [torch.rand(512, 8192, generator=generator) for _ in range(2)]
    board.embed(0, *features)
    DRAWN["compare"](board, 1, *features)
    log.close()

    def size(pattern):
        return sum(path.stat().st_size for path in (tmp_path / "tensorboard").rglob(pattern))

    assert size("sprite.png") > 1_000_000
    whole = 2 * (size("sprite.png") + size("*.tsv")) + 100 * size("events*")
    assert whole < 30_000_000


def test_the_probe_beside_the_features_is_that_of_the_figures(events, classifier, shown):
    (event,) = events.Scalars("features/proxy_a_distance")
    f_s, f_t = (classifier.features(part.images).numpy() for part in shown)
    assert (event.step, event.value) == (11, pytest.approx(proxy_a_distance(f_s, f_t), abs=1e-3))


def test_images_are_taken_from_all_over_a_set():
    images = torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1)
    digits = DigitSet("mnist", "test", images, torch.arange(100), "", {})
    assert spread_over(digits, 4).labels.tolist() == [0, 25, 50, 75]
    assert len(spread_over(digits, 1000)) == 100
