"""What TensorBoard shows of a run: the projector, histograms, readings and hyper-parameters, against the weights."""

import io
import re

import numpy as np
import pytest
import torch
from conftest import Killed, interrupt_after, kill, settings, start
from PIL import Image
from sklearn.decomposition import PCA
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import main
from data_loader import DigitSet, load_domain
from utils.board import Board, principal_components, spread_over
from utils.plots import confusion_figure, histograms_figure, misread_figure
from utils.run_log import RunLog
from valid import load_reader, outputs, predict

LAST_STEP = 11  # of three epochs of four steps
EACH = 18  # images of a domain in the projector: 2 · 18 = 6², and svhn has 23 test images


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    """The folder of a whole run, svhn → mnist."""
    folder = tmp_path_factory.mktemp("board") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        start(monkeypatch, *settings(tiny_data), "--run-dir", folder)
    return folder


@pytest.fixture(scope="module")
def events(run):
    accumulator = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


@pytest.fixture(scope="module")
def reader(run):
    return load_reader(str(run), torch.device("cpu"))


@pytest.fixture(scope="module")
def shown(tiny_data):
    """The test images of both domains that the projector holds."""
    return [spread_over(load_domain(name, "test", tiny_data), EACH) for name in ("svhn", "mnist")]


def entries(folder):
    """What the projector's file lists: (tensor's name, folder of its files)."""
    text = (folder / "tensorboard/projector_config.pbtxt").read_text()
    return re.findall(r'tensor_name: "([^"]*)"\ntensor_path: "([^"]*)/tensors.tsv"', text)


def features_of(reader, parts):
    extractor, device = reader.model.extractor, torch.device("cpu")
    return [outputs(extractor, part.images, reader.preprocess, device, "fp32") for part in parts]


# --- the projector ----------------------------------------------------------------------------------


def test_the_projector_has_the_features_of_the_start_and_of_the_end(run):
    assert entries(run) == [("features:00000", "00000/features"), (f"features:{LAST_STEP:05}", "00011/features")]


def test_points_have_domain_digit_and_reading(run, reader, shown):
    lines = (run / "tensorboard/00011/features/metadata.tsv").read_text().splitlines()
    assert lines[0] == "domain\tdigit\tread as\tright"
    rows = [line.split("\t") for line in lines[1:]]
    assert [row[0] for row in rows] == ["svhn"] * EACH + ["mnist"] * EACH
    digits = torch.cat([part.labels for part in shown])
    read = [predict(reader.model, part.images, reader.preprocess, torch.device("cpu"), "fp32") for part in shown]
    read = torch.cat(read).argmax(1)
    assert [int(row[1]) for row in rows] == digits.tolist()
    assert [int(row[2]) for row in rows] == read.tolist()
    assert [row[3] == "yes" for row in rows] == (read == digits).tolist()


def test_points_are_the_features_of_the_weights_that_are_kept(run, reader, shown):
    points = np.loadtxt(run / "tensorboard/00011/features/tensors.tsv", delimiter="\t")
    features = torch.cat(features_of(reader, shown)).numpy()
    assert features.shape == (2 * EACH, 3072)
    assert points.shape == (2 * EACH, 2 * EACH)  # 36 points have no more than 36 components
    distances = np.linalg.norm(features[:, None] - features, axis=2)
    assert np.abs(np.linalg.norm(points[:, None] - points, axis=2) - distances).max() < 0.01


def test_points_move_from_start_to_end(run):
    first, last = (np.loadtxt(run / f"tensorboard/{step}/features/tensors.tsv") for step in ("00000", "00011"))
    assert np.abs(first - last).max() > 0.01


def test_each_point_has_its_image_as_a_thumbnail(run, reader, shown):
    sprite = np.asarray(Image.open(run / "tensorboard/00011/features/sprite.png"))
    assert sprite.shape == (6 * 32, 6 * 32, 3)
    images = torch.cat([reader.preprocess.resize(part.images).expand(-1, 3, -1, -1) for part in shown])
    tiles = sprite.reshape(6, 32, 6, 32, 3).transpose(0, 2, 4, 1, 3).reshape(36, 3, 32, 32)
    assert np.abs(tiles.astype(int) - images.numpy()).max() <= 1


def test_long_features_are_shown_by_their_principal_components():
    features = torch.randn(80, 300, generator=torch.Generator().manual_seed(0)) * torch.linspace(3, 0.1, 300)
    found = principal_components(features).numpy()
    expected = PCA(50, svd_solver="full").fit_transform(features.double().numpy())
    assert found.shape == (80, 50)
    assert np.allclose(np.abs(found), np.abs(expected), atol=1e-6)


def test_short_features_are_shown_as_they_are():
    features = torch.rand(40, 128)
    assert torch.allclose(principal_components(features), features.double() - features.double().mean(0))


def test_a_resumed_run_shows_start_and_end_once(monkeypatch, tiny_data, tmp_path, run):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        save = main.Trainer.save
        patch.setattr(main.Trainer, "save", lambda trainer: save(trainer) if trainer.epoch < 3 else kill())
        with pytest.raises(Killed):  # when the end is shown already, but not saved
            start(patch, *settings(tiny_data), "--run-dir", folder)
    assert entries(folder) == entries(run)
    start(monkeypatch, "--resume", folder, "--data-dir", tiny_data, "--device", "cpu")
    assert entries(folder) == entries(run)
    for name in ("tensors.tsv", "metadata.tsv"):
        for step in ("00000", "00011"):
            path = f"tensorboard/{step}/features/{name}"
            assert (folder / path).read_text() == (run / path).read_text()


def test_a_finished_run_that_is_resumed_keeps_its_projector(monkeypatch, tiny_data, run):
    before = entries(run)
    start(monkeypatch, "--resume", run, "--data-dir", tiny_data, "--device", "cpu")
    assert entries(run) == before


def test_an_interrupted_run_shows_its_start_alone(monkeypatch, tiny_data, tmp_path):
    folder = tmp_path / "run"
    interrupt_after(monkeypatch, "train_step", 6, kill)
    with pytest.raises(Killed):
        start(monkeypatch, *settings(tiny_data), "--run-dir", folder)
    assert [name for name, _ in entries(folder)] == ["features:00000"]


def test_what_is_shown_does_not_reach_the_weights(monkeypatch, tiny_data, tmp_path, run):
    for method in ("epoch", "embed"):
        monkeypatch.setattr(Board, method, lambda *_: None)
    start(monkeypatch, *settings(tiny_data), "--run-dir", tmp_path / "run")
    assert (tmp_path / "run/model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


# --- images, histograms, hyper-parameters, text -----------------------------------------------------


def test_pictures_and_histograms_stand_at_the_ends_of_the_epochs(events):
    assert [event.step for event in events.Images("features/both_domains")] == [3, 7, 11]
    assert [event.step for event in events.Images("target/confusion")] == [11]
    assert [event.step for event in events.Images("target/misread")] == [11]
    for tag in ("features/source_svhn", "features/target_mnist"):
        assert [event.step for event in events.Histograms(tag)] == [3, 7, 11]


def test_histograms_are_of_each_domains_features(events, reader, shown):
    for tag, features in zip(("source_svhn", "target_mnist"), features_of(reader, shown), strict=True):
        shown_values = events.Histograms(f"features/{tag}")[-1].histogram_value
        assert shown_values.num == features.numel()
        assert shown_values.max == pytest.approx(features.max().item())
        assert shown_values.sum == pytest.approx(features.sum().item(), rel=1e-4)


def test_pictures_are_wide_enough_to_read(events):
    for tag in ("features/both_domains", "target/confusion", "target/misread"):
        picture = Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string))
        assert picture.width == 850
        assert 200 < picture.height < 900


def hparams(events, tag):
    content = events.summary_metadata[tag].plugin_data.content
    return HParamsPluginData.FromString(content)


def test_hyper_parameters_stand_beside_the_final_metrics(events, run):
    given = hparams(events, hparams_metadata.SESSION_START_INFO_TAG).session_start_info.hparams
    assert given["recipe"].string_value == "dann"
    assert given["batch_size"].number_value == 16
    assert given["separate_domains"].bool_value is False
    assert given["frozen_convolutions"].string_value == "[]"
    experiment = hparams(events, hparams_metadata.EXPERIMENT_TAG).experiment
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert metrics == {"test/source_accuracy", "test/target_accuracy"}
    assert metrics <= set(events.Tags()["scalars"]), "TensorBoard takes their last values"
    assert hparams_metadata.SESSION_END_INFO_TAG in events.summary_metadata
    assert [path.name for path in (run / "tensorboard").glob("*/events*")] == [], "no second run in its folder"


def test_the_configuration_is_a_text(events):
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "network: paper-mnist" in text
    assert "batch_size: 16" in text


# --- the figures by themselves ----------------------------------------------------------------------


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_a_confusion_matrix_shows_every_count():
    confusion = torch.arange(100).view(10, 10)
    figure = confusion_figure({"dann": confusion}, "MNIST")
    assert texts(figure) == [str(count) for count in range(100)]
    assert figure.axes[0].get_title() == "dann: 10.00% (495 / 4,950)"
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("read", "true digit")


def test_misread_digits_bear_both_digits():
    labels = torch.arange(20) % 10
    digits = DigitSet("mnist", "test", torch.zeros(20, 1, 28, 28, dtype=torch.uint8), labels, "MNIST", {})
    read = labels.clone()
    read[[3, 15]] = 8
    figure, counts = misread_figure({"dann": read}, digits, 28)
    assert counts == {"total": 20, "misread": 2}
    assert [text for text in texts(figure) if "true" in text] == ["8\ntrue 3", "8\ntrue 5"]


def test_nothing_misread_is_shown_as_such(tmp_path):
    labels = torch.arange(20) % 10
    digits = DigitSet("mnist", "test", torch.zeros(20, 1, 28, 28, dtype=torch.uint8), labels, "MNIST", {})
    figure, counts = misread_figure({"dann": labels}, digits, 28)
    assert counts["misread"] == 0
    assert any("0 of 20" in text for text in texts(figure))
    log = RunLog(tmp_path)
    log.figure("target/misread", 0, figure)
    log.close()


def heights(axes):
    """The bars of both domains. Shape: (2, bins)"""
    return np.array([[bar.get_height() for bar in bars] for bars in axes.containers])


def test_domains_that_are_apart_have_histograms_that_are():
    generator = torch.Generator().manual_seed(0)
    f_s, f_t = (torch.rand(200, 16, generator=generator) for _ in range(2))
    alike = histograms_figure(f_s, f_t, "svhn", "mnist")
    apart = histograms_figure(f_s, f_t + torch.eye(16)[3] * 4, "svhn", "mnist")
    for axes in (*alike.axes, *apart.axes):
        assert heights(axes).sum(1) == pytest.approx([1, 1])
    overlaps = [np.minimum(*heights(figure.axes[2])).sum() for figure in (alike, apart)]
    assert overlaps[0] > 0.7
    assert overlaps[1] == 0


# --- size -------------------------------------------------------------------------------------------


def test_event_files_of_a_long_run_stay_small(tmp_path):
    """100 epochs with the largest features, 8,192, and pictures of noise, which PNG can't make smaller."""

    class Noise:
        """Stands for the trainer of `paper` on SVHN and MNIST."""

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(2000) % 10
    trainer = Noise()
    trainer.pair = Noise()
    trainer.pair.source_test = trainer.pair.target_test = DigitSet("svhn", "test", images, labels, "SVHN", {})
    trainer.loader, trainer.loader.preprocess = Noise(), main.Preprocessing(32)
    trainer.tested_model, trainer.device, trainer.precision = Noise(), torch.device("cpu"), "fp32"
    trainer.tested_model.classifier = torch.nn.Linear(8192, 10)
    log = RunLog(tmp_path)
    board = Board(trainer, log)
    features = [torch.rand(512, 8192, generator=generator) for _ in range(2)]
    board.embed(0, *features)
    board.compare(1, *features)
    log.close()

    def size(pattern):
        return sum(path.stat().st_size for path in (tmp_path / "tensorboard").rglob(pattern))

    assert size("sprite.png") > 1_000_000
    whole = 2 * (size("sprite.png") + size("*.tsv")) + 100 * size("events*")
    assert whole < 30_000_000


def test_images_are_taken_from_all_over_a_set():
    digits = DigitSet(
        "mnist", "test", torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(100), "", {}
    )
    assert spread_over(digits, 4).labels.tolist() == [0, 25, 50, 75]
    assert len(spread_over(digits, 1000)) == 100
