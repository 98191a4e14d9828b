"""Testing weights: the counts, where the weights come from, and which test sets can be had."""

import dataclasses
import hashlib
import http.server
import json
import re
import shlex
import shutil
import sys
import threading

import pytest
import torch
from conftest import ROOT, result_of, run_as_process, state_of, train, weights_of
from torch import nn

import download_data
import valid
from data_loader import CLASS_NAMES, DigitSet, Preprocessing
from digits.domains import load_domain
from methods.classifier import Classifier, load_classifier, usage
from methods.networks import NETWORKS, build_network
from methods.recipes import Config
from utils import pretrained
from utils.checkpoint import load_weights, save_weights

CPU = torch.device("cpu")
PER_IMAGE = Preprocessing(32, "per-image")
UNREACHABLE = "http://127.0.0.1:9/weights.safetensors"  # the port that discards; nothing listens there
pytestmark = pytest.mark.usefixtures("no_fetch")


@pytest.fixture
def classifier():
    """A network with dropout and running statistics of its own, as if it had been trained."""
    torch.manual_seed(0)
    model = build_network("small", dropout=0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)  # else it has one answer for every image
    return Classifier(model, PER_IMAGE, CPU, "fp32")


@pytest.fixture
def images():
    """Patterns of three by three squares, 15 pixels wide."""
    squares = torch.randint(0, 256, (23, 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return squares.repeat_interleave(5, 2).repeat_interleave(5, 3)


@pytest.mark.parametrize("count", [1, 10, 11, 23])
def test_counts_are_those_of_a_plain_loop(monkeypatch, classifier, images, count):
    """Rows the true digit, columns the predicted one, every image once, also those of the last and shorter batch."""
    labels = torch.randint(0, 10, (count,), generator=torch.Generator().manual_seed(2))
    network, predicted = classifier.model.eval(), []
    confusion = [[0] * 10 for _ in range(10)]
    with torch.no_grad():
        for image, label in zip(images[:count], labels.tolist(), strict=True):
            predicted.append(network(PER_IMAGE(image[None])).argmax().item())
            confusion[label][predicted[-1]] += 1
    correct = sum(confusion[digit][digit] for digit in range(10))
    if count == 23:
        assert 0 < correct < 23, "the comparison below would show little"
        assert len(set(predicted)) > 1, "a network of one answer"

    monkeypatch.setattr("methods.classifier.BATCH", 10)
    found = valid.evaluate(classifier, DigitSet("mnist", "test", images[:count], labels, "MNIST", {}))
    assert (found.confusion.tolist(), found.confusion.dtype) == (confusion, torch.int64)
    assert found.predicted.tolist() == predicted
    assert (found.correct, found.total, found.accuracy) == (correct, count, correct / count)


def test_probabilities_are_a_softmax_and_testing_changes_nothing(monkeypatch, classifier, images):
    """Whatever mode the network is in, it is tested in eval mode and left as it was; nothing is drawn."""
    monkeypatch.setattr("methods.classifier.BATCH", 10)
    network = classifier.model.eval()
    with torch.no_grad():
        expected = network(PER_IMAGE(images)).exp()
        expected /= expected.sum(1, keepdim=True)
    before, rng = {key: value.clone() for key, value in network.state_dict().items()}, torch.get_rng_state()
    for mode in (True, False):
        network.train(mode)
        found = classifier.probabilities(images)
        assert (found.dtype, found.requires_grad) == (torch.float32, False)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert all(module.training == mode for module in network.modules())
        torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), rng)

    rough = dataclasses.replace(classifier, precision="bf16").probabilities(images)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.sum(1), torch.ones(23), rtol=0, atol=1e-5)
    assert not torch.equal(rough, found), "autocast did nothing"
    torch.testing.assert_close(rough, found, rtol=0, atol=0.25)


def test_each_domain_is_tested_with_its_own_statistics(classifier, images):
    """The source's for the source alone; the target's for every other domain."""
    for norm in classifier.model.extractor.domain_norms:
        norm.source_mean.normal_(0, 0.5)
    classifier = dataclasses.replace(classifier, source="svhn", target="mnist")
    by_source, by_target = (classifier.probabilities(images, domain) for domain in ("source", "target"))
    assert not torch.equal(by_source.argmax(1), by_target.argmax(1))
    for name, expected in (("svhn", by_source), ("mnist", by_target), ("usps", by_target)):
        digits = DigitSet(name, "test", images, torch.zeros(23, dtype=torch.int64), "", {})
        assert torch.equal(valid.evaluate(classifier, digits).predicted, expected.argmax(1))
        assert torch.equal(valid.evaluate(classifier, digits, "source").predicted, by_source.argmax(1))
    assert torch.equal(classifier.probabilities(images), by_target)


def test_confusion_on_screen():
    counts = (torch.arange(100).view(10, 10) * 125).tolist()  # of up to five digits
    lines = valid.confusion_table(torch.tensor(counts), tuple("0123456789")).splitlines()
    assert lines[0].split()[-10:] == list("0123456789")
    assert [list(map(int, line.split())) for line in lines[1:]] == [[i, *row] for i, row in enumerate(counts)]
    assert len({len(line) for line in lines}) == 1


@pytest.fixture
def shelf(monkeypatch, tmp_path):
    """A folder in place of pretrained/, with an index that names weights nobody has; and an empty hub cache."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    folder = tmp_path / "pretrained"
    folder.mkdir()
    monkeypatch.setattr(pretrained, "PRETRAINED", folder)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    write_index(folder, "elsewhere", "0" * 64, UNREACHABLE)
    return folder


def write_index(shelf, file, sha256, url):
    """One entry, called `numerals`, which is the default."""
    entry = {"file": file, "sha256": sha256, "url": url}
    (shelf / "index.json").write_text(json.dumps({"default": "numerals", "weights": {"numerals": entry}}))


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def validate(monkeypatch, capsys, shelf, tiny_data):
    """Run valid.py in this process; returns what its last line says, and its lines for people."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["valid.py", "--data-dir", str(tiny_data), *map(str, arguments)])
        capsys.readouterr()
        valid.main()
        *lines, last = capsys.readouterr().out.splitlines()
        return json.loads(last), lines

    return run


def counts_of(found):
    return {name: (tested["correct"], tested["total"]) for name, tested in found["domains"].items()}


def expected_counts(run):
    result = result_of(run)
    assert (result["source_total"], result["target_total"]) == (23, 37)
    return {result[side]: (result[f"{side}_correct"], result[f"{side}_total"]) for side in ("source", "target")}


@pytest.mark.parametrize("file", ["", "model.safetensors", "last.pt"])
def test_weights_of_a_run_give_its_counts(validate, shelf, quick_run, file):
    (shelf / "index.json").unlink()  # a path needs no index
    found, lines = validate("--weights", quick_run / file)
    assert found.keys() == {"weights", "domains"}
    assert found["weights"] == str(quick_run / file)
    assert counts_of(found) == expected_counts(quick_run)
    assert lines[0].split() == ["test", "set", "accuracy", "correct", "/", "total"]
    for line, (correct, total) in zip(lines[1:], expected_counts(quick_run).values(), strict=True):
        assert re.search(rf" {100 * correct / total:.2f}%  {correct} / {total}$", line), line


def test_the_checkpoint_of_a_run_with_a_teacher_gives_the_teacher(validate, tiny_data, tmp_path):
    folder = tmp_path / "run"
    settings = ("--recipe", "modern", "--epochs", 2, "--epoch-steps", 4, "--batch-size", 8, "--precision", "fp32")
    train(*settings, "--data-dir", tiny_data, "--run-dir", folder, "--device", "cpu", "--no-download")
    for file in ("last.pt", "model.safetensors"):
        assert counts_of(validate("--weights", folder / file)[0]) == expected_counts(folder)
    student, kept = state_of(folder)["model"], weights_of(folder)
    torch.testing.assert_close(load_weights(folder / "last.pt")[0], kept, rtol=0, atol=0)
    assert student.keys() == kept.keys()
    assert any(not torch.equal(student[key], kept[key]) for key in kept)


def test_the_file_tells_how_images_are_prepared(quick_run):
    classifier = load_classifier(str(quick_run), CPU)
    assert classifier.preprocess == Preprocessing(32, "per-image", (0.0, 0.0, 0.0))
    assert (classifier.source, classifier.target, classifier.classes) == ("svhn", "mnist", tuple("0123456789"))
    assert not classifier.model.training
    saved, about = load_weights(quick_run / "model.safetensors")
    torch.testing.assert_close(classifier.model.state_dict(), saved, rtol=0, atol=0)
    assert about["precision"] in ("fp32", "bf16"), "the precision used, not `auto`"
    modes = {(quick_run / name).stat().st_mode for name in ("model.safetensors", "result.json")}
    assert len(modes) == 1, "who may read a run may read its weights"


@pytest.mark.parametrize("network", NETWORKS)
def test_weights_fit_whatever_dropout_they_were_trained_with(network):
    with torch.device("meta"):
        without, dropping = (build_network(network, dropout) for dropout in (0.0, 0.5))
    without.load_state_dict(dropping.state_dict(), assign=True)  # an error names what does not fit


def test_weights_need_no_more_beside_them_than_their_use(validate, quick_run, tmp_path):
    weights, about = load_weights(quick_run / "model.safetensors")
    about = {**about, "preprocessing": dict(about["preprocessing"]), "training": {"a_setting_of_tomorrow": [1]}}
    assert about.keys() == usage(Config(), PER_IMAGE, CLASS_NAMES, {}).keys()
    save_weights(tmp_path / "bare.safetensors", weights, about)
    assert counts_of(validate("--weights", tmp_path / "bare.safetensors")[0]) == expected_counts(quick_run)
    assert load_classifier(str(tmp_path / "bare.safetensors"), CPU).training == about["training"]


@pytest.mark.parametrize(
    ("folder", "url"),
    [("pretrained", None), ("torch/hub/checkpoints", UNREACHABLE)],
    ids=["come with the code", "in the cache of torch hub"],
)
def test_weights_at_hand_are_verified(validate, fail, quick_run, shelf, tmp_path, folder, url):
    file, content = tmp_path / folder / "digits.safetensors", bytearray((quick_run / "model.safetensors").read_bytes())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    write_index(shelf, file.name, sha256_of(file), url)
    for words in ((), ("--weights", "numerals")):
        found, _ = validate(*words, "--no-download")
        assert found["weights"] == "numerals"
        assert counts_of(found) == expected_counts(quick_run)
    content[-5] ^= 1  # one bit of one weight: safetensors itself would not notice
    file.write_bytes(content)
    for fault in ("damaged", "missing"):
        if url is None:
            assert re.search(rf"{file} .*{fault}.*git checkout {file}", fail(valid))
        else:
            assert "--no-download" in fail(valid, "--no-download")
            assert "127.0.0.1:9" in fail(valid)
        file.unlink(missing_ok=True)


def test_names_and_folders_without_weights(fail, shelf, tmp_path):
    assert re.search("letters.*numerals", fail(valid, "--weights", "letters")), "it names those there are"
    assert str(tmp_path / "model.safetensors") in fail(valid, "--weights", tmp_path)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"default": "digits", "weights": {}}', '{"weights": {}}'])
def test_a_damaged_index(fail, shelf, text):
    (shelf / "index.json").unlink()
    if text is not None:
        (shelf / "index.json").write_text(text)
    assert re.search(f"{shelf / 'index.json'}.*git checkout", fail(valid))


@pytest.mark.parametrize(
    ("file", "sha256", "url"),
    [
        ("../digits.safetensors", "0" * 64, None),
        ("/etc/digits.safetensors", "0" * 64, None),
        ("..", "0" * 64, UNREACHABLE),
        (".hidden", "0" * 64, None),
        ("digits.safetensors", "../" * 4 + "0" * 52, UNREACHABLE),
        ("digits.safetensors", "0" * 64, ["http://127.0.0.1"]),
        (["digits.safetensors"], "0" * 64, None),
    ],
)
def test_an_index_whose_names_lead_elsewhere_is_refused(fail, shelf, quick_run, tmp_path, file, sha256, url):
    """Even where the file that is named has the checksum that is named."""
    shutil.copy(quick_run / "model.safetensors", tmp_path / "digits.safetensors")
    if sha256 == "0" * 64 and url is None:
        sha256 = sha256_of(tmp_path / "digits.safetensors")
    write_index(shelf, file, sha256, url)
    before = set(tmp_path.rglob("*"))
    assert "git checkout" in fail(valid)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://weights.invalid/a.safetensors#sha256=" + "0" * 64, "no https address"),
        ("https://weights.invalid/a.safetensors#sha256=../../../a", "no checksum"),
        ("https://weights.invalid/a.safetensors#md5=" + "0" * 32, "no checksum"),
        ("file:///etc/passwd", "no weights at"),
    ],
)
def test_addresses_that_are_not_asked(fail, shelf, url, told):
    assert told in fail(valid, "--weights", url)


@pytest.fixture
def site(quick_run):
    """A site on this machine that has the run's weights; its `paths` are what it was asked for."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=quick_run)

        def log_request(self, *_):
            self.server.paths.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.paths, server.sha256 = [], sha256_of(quick_run / "model.safetensors")
        server.url = f"http://127.0.0.1:{server.server_address[1]}/model.safetensors"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("named_by", ["URL", "URL in capitals", "index"])
def test_weights_are_fetched_once(validate, fail, quick_run, shelf, site, tmp_path, named_by):
    write_index(shelf, "model.safetensors", site.sha256, site.url)
    name, words = "numerals", ()
    if named_by != "index":
        name = f"{site.url}#sha256={site.sha256.upper() if 'capitals' in named_by else site.sha256}"
        words = ("--weights", name)
    assert "--no-download" in fail(valid, *words, "--no-download")
    assert site.paths == []
    for more in ((), ("--no-download",)):
        found, _ = validate(*words, *more)
        assert found["weights"] == name
        assert counts_of(found) == expected_counts(quick_run)
    assert site.paths == ["/model.safetensors"]
    (kept,) = (path for path in (tmp_path / "torch").rglob("*") if path.is_file())
    assert kept.read_bytes() == (quick_run / "model.safetensors").read_bytes()


def test_a_url_without_the_right_checksum_leaves_nothing(fail, shelf, site, tmp_path):
    for url in (site.url, f"{site.url}#md5=0"):
        assert "#sha256=" in fail(valid, "--weights", url)
    assert site.paths == [], "it is not fetched"
    assert "checksum" in fail(valid, "--weights", f"{site.url}#sha256={'0' * 64}")
    assert site.paths == ["/model.safetensors"]
    assert not [path for path in (tmp_path / "torch").rglob("*") if path.is_file()]


def test_named_domains_in_their_order_and_confusion_matrices_on_request(validate, quick_run, tiny_data):
    found, lines = validate("--weights", quick_run, "--domains", "usps", "mnist", "usps", "--confusion")
    assert list(found["domains"]) == ["usps", "mnist"]
    assert found["domains"]["usps"]["total"] == 11
    assert found["domains"]["usps"]["data"] == "USPS subset, 11", "numbers on other data than the official say so"
    assert counts_of(found)["mnist"] == expected_counts(quick_run)["mnist"]
    rows = [[int(n) for n in line.split()[1:]] for line in lines[-10:]]
    assert list(map(sum, rows)) == load_domain("mnist", "test", tiny_data).labels.bincount().tolist()
    assert sum(row[digit] for digit, row in enumerate(rows)) == found["domains"]["mnist"]["correct"]


def not_tested(lines):
    """The lines that say so, by the domain's name."""
    return {line.split()[0]: line for line in lines if "not tested" in line}


@pytest.mark.parametrize(
    ("words", "at_hand", "tested", "missing"),
    [
        (("--domains", "all"), ["MNIST"], ["mnist", "synth", "optdigits"], ["SVHN", "USPS", "MNIST-M"]),
        (("--no-download",), [], ["synth", "optdigits"], ["SVHN", "MNIST"]),
    ],
    ids=["all that are at hand", "a fresh clone without a network"],
)
def test_what_is_not_at_hand_is_named_with_the_command_that_brings_it(
    monkeypatch, validate, quick_run, tiny_data, few_synth, tmp_path, words, at_hand, tested, missing
):
    """It is not fetched; without its own domains a network classifies digits that come with the code."""
    data = tmp_path / "my data"
    for folder in at_hand:
        shutil.copytree(tiny_data / folder, data / folder)
    found, lines = validate("--weights", quick_run, "--data-dir", data, *words)
    assert list(found["domains"]) == tested
    if at_hand:
        assert counts_of(found)["mnist"] == expected_counts(quick_run)["mnist"]
    assert found["domains"]["optdigits"]["total"] == 500
    assert "data" not in found["domains"]["optdigits"]
    assert list(not_tested(lines)) == missing
    for name, line in not_tested(lines).items():
        command = re.search(r"`python download_data\.py (.*)`", line)[1]
        monkeypatch.setattr(sys, "argv", ["download_data.py", *shlex.split(command)])
        asked = download_data.parse_arguments()
        assert (asked.names, asked.data_dir) == ([name.lower()], data)


def test_nothing_to_test_is_a_failure(fail, quick_run, tmp_path):
    data = tmp_path / "nothing"
    message = fail(valid, "--weights", quick_run, "--domains", "svhn", "usps", "--data-dir", data, "--no-download")
    assert re.search(r"download_data\.py svhn.*download_data\.py usps", message)
    assert not data.exists()


def test_one_missing_domain_does_not_hide_the_others(validate, quick_run, tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    (data / "test_32x32.mat").write_bytes(b"no matrix")
    found, lines = validate("--weights", quick_run, "--data-dir", data)
    assert counts_of(found) == {"mnist": expected_counts(quick_run)["mnist"]}
    ((name, line),) = not_tested(lines).items()
    assert name == "SVHN"
    assert "test_32x32.mat" in line


INDEX = json.loads((ROOT / "pretrained/index.json").read_text())


def recorded(weights):
    """The record of the run that the weights are from: of all records the one with their settings."""
    about = load_weights(ROOT / "pretrained" / INDEX["weights"][weights]["file"])[1]
    config = about["training"]
    lines = (ROOT / f"results/{config['source']}-{config['target']}.jsonl").read_text().splitlines()
    (record,) = [record for record in map(json.loads, lines) if record["config"].items() <= config.items()]
    return record


def test_the_weights_that_need_no_download_do_what_their_record_says():
    """Another machine may round two images away."""
    name = "synth-optdigits-quick"
    done = run_as_process("valid.py", "--domains", "optdigits", "--weights", name, "--no-download")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    tested = found["domains"]["optdigits"]
    assert (tested["total"], tested["accuracy"]) == (500, tested["correct"] / 500)
    assert abs(tested["correct"] - recorded(name)["target_correct"]) <= 2


@pytest.mark.parametrize("weights", [name for name in INDEX["weights"] if "mnist" in name])
def test_weights_do_what_their_record_says(weights, real_data):
    """On MNIST and USPS; of SVHN's test set a small data folder has only the beginning. A machine may round."""
    record, classifier = recorded(weights), load_classifier(weights, CPU)
    for side in ("source", "target"):
        if record[side] != "svhn":
            tested = valid.evaluate(classifier, load_domain(record[side], "test", real_data))
            assert abs(tested.correct - record[f"{side}_correct"]) <= 5
            assert tested.total == record[f"{side}_total"]


def test_every_weights_file_is_in_the_index_and_in_the_model_card():
    """And each entry of the index can be had: it comes with the code, or there is an address to fetch it from."""
    sections = re.findall(r"^## (.*)$", (ROOT / "pretrained/README.md").read_text(), re.MULTILINE)
    assert set(sections) == {*INDEX["weights"], "detector"}
    files = {path.name for path in (ROOT / "pretrained").glob("*.safetensors")}
    detector = INDEX["detector"]
    assert files <= {entry["file"] for entry in (*INDEX["weights"].values(), detector)}
    assert sha256_of(ROOT / "pretrained" / detector["file"]) == detector["sha256"]
    for name, entry in INDEX["weights"].items():
        assert re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]), name
        assert entry["file"] in files or entry["url"], name
        if entry["file"] in files:
            assert sha256_of(ROOT / "pretrained" / entry["file"]) == entry["sha256"], name
            loaded = load_classifier(name, CPU, False)
            assert (loaded.source, loaded.target) == (recorded(name)["source"], recorded(name)["target"])
            assert loaded.preprocess.normalisation == "per-image"
            assert loaded.preprocess.grey == name.endswith("modern")
