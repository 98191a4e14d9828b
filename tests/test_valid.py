"""Testing weights: the counts, where the weights come from, and which test sets can be had."""

import hashlib
import http.server
import json
import math
import re
import shlex
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import run_as_process
from torch import nn

import data_loader
import download_data
import main
import valid
from data_loader import DOMAINS, DigitSet, Preprocessing
from model import DANN
from utils import pretrained
from utils.checkpoint import load_weights
from utils.cli import UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
PER_IMAGE = Preprocessing(32, "per-image")
UNREACHABLE = "http://127.0.0.1:9/weights.safetensors"  # the port that discards; nothing listens there


def digit_set(images, labels):
    return DigitSet("mnist", "test", images, labels, "MNIST", {})


@pytest.fixture
def network():
    """A network with dropout and running statistics of its own, as if it had been trained."""
    torch.manual_seed(0)
    model = DANN("quick", dropout=0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)  # else it has one answer for every image
    return model


@pytest.fixture
def images():
    """Patterns of three by three squares, 15 pixels wide."""
    squares = torch.randint(0, 256, (23, 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return squares.repeat_interleave(5, 2).repeat_interleave(5, 3)


@pytest.fixture
def labels():
    return torch.randint(0, 10, (23,), generator=torch.Generator().manual_seed(2))


class Brightness(nn.Module):
    """Reads the digit d from an image whose every pixel is 10 d, and remembers the sizes of its batches."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        digit = (x.mean((1, 2, 3)) * 255 / 10).round().long()
        return nn.functional.one_hot(digit, 10).float()


def plain(digits):
    """Images that `Brightness` reads as these digits."""
    return (10 * torch.tensor(digits, dtype=torch.uint8)).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()


# --- evaluate and predict ---------------------------------------------------------------------------


def test_counts_are_those_of_a_plain_loop(monkeypatch, network, images, labels):
    network.eval()
    confusion = [[0] * 10 for _ in range(10)]
    with torch.no_grad():
        for image, label in zip(images, labels.tolist(), strict=True):
            confusion[label][network(PER_IMAGE(image[None])).argmax().item()] += 1
    correct = sum(confusion[digit][digit] for digit in range(10))
    assert 0 < correct < 23, "the comparison below would show little"
    assert sum(map(any, zip(*confusion, strict=True))) > 1, "a network of one answer"

    monkeypatch.setattr(valid, "EVALUATION_BATCH", 10)  # two full batches and one of three
    found = valid.evaluate(network, digit_set(images, labels), PER_IMAGE, CPU, "fp32")
    assert found.confusion.tolist() == confusion
    assert (found.correct, found.total) == (correct, 23)
    assert found.accuracy == correct / 23


@pytest.mark.parametrize(("count", "batches"), [(1, [1]), (10, [10]), (11, [10, 1]), (23, [10, 10, 3])])
def test_every_image_is_counted_once(monkeypatch, count, batches):
    monkeypatch.setattr(valid, "EVALUATION_BATCH", 10)
    model = Brightness()
    digits = [i % 10 for i in range(count)]
    found = valid.evaluate(model, digit_set(plain(digits), torch.tensor(digits)), Preprocessing(8), CPU, "fp32")
    assert model.batches == batches
    assert (found.correct, found.total, found.accuracy) == (count, count, 1.0)
    assert found.confusion.tolist() == [[digits.count(i) if i == j else 0 for j in range(10)] for i in range(10)]


def test_rows_are_the_true_digit_and_columns_the_read_one():
    true, read = [3, 3, 3, 7, 0, 9], [8, 8, 3, 1, 0, 4]
    found = valid.evaluate(Brightness(), digit_set(plain(read), torch.tensor(true)), Preprocessing(8), CPU, "fp32")
    assert found.confusion.dtype == torch.int64
    nonzero = {(i, j): n for i, row in enumerate(found.confusion.tolist()) for j, n in enumerate(row) if n}
    assert nonzero == {(3, 8): 2, (3, 3): 1, (7, 1): 1, (0, 0): 1, (9, 4): 1}
    assert (found.correct, found.total) == (2, 6)
    assert found.accuracy == 2 / 6


def test_dropout_and_batch_statistics_are_off(network, images, labels):
    """Whatever mode the network is in, it is tested as it will be used, and is left as it was."""
    digits = digit_set(images, labels)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network.eval()
    with torch.no_grad():
        expected = network(PER_IMAGE(images)).softmax(1)
    network.train()
    found = valid.predict(network, images, PER_IMAGE, CPU, "fp32")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    valid.evaluate(network, digits, PER_IMAGE, CPU, "fp32")
    assert all(module.training for module in network.modules())
    after = network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)

    network.eval()
    valid.evaluate(network, digits, PER_IMAGE, CPU, "fp32")
    assert not any(module.training for module in network.modules())


def test_testing_draws_nothing_and_keeps_no_graph(network, images):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    network.train()
    found = valid.predict(network, images, PER_IMAGE, CPU, "fp32")
    assert torch.equal(torch.get_rng_state(), state)
    assert not found.requires_grad


def test_predicted_rows_are_probabilities(monkeypatch, network, images):
    monkeypatch.setattr(valid, "EVALUATION_BATCH", 10)
    found = valid.predict(network, images, PER_IMAGE, CPU, "fp32")
    assert found.shape == (23, 10)
    assert found.dtype == torch.float32
    assert found.min() >= 0
    torch.testing.assert_close(found.sum(1), torch.ones(23), rtol=0, atol=1e-5)
    network.eval()
    with torch.no_grad():
        logits = network(PER_IMAGE(images[22:]))[0].tolist()  # the last image, by hand
    total = sum(math.exp(value) for value in logits)
    assert found[22].tolist() == pytest.approx([math.exp(value) / total for value in logits], abs=1e-5)


def test_probabilities_are_float32_after_bf16(network, images):
    found = valid.predict(network, images, PER_IMAGE, CPU, "bf16")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(1), torch.ones(23), rtol=0, atol=1e-5)
    exact = valid.predict(network, images, PER_IMAGE, CPU, "fp32")
    assert not torch.equal(found, exact), "autocast did nothing"
    torch.testing.assert_close(found, exact, rtol=0, atol=0.25)


def test_confusion_on_screen():
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    confusion[3, 8], confusion[0, 0] = 12345, 7
    lines = valid.confusion_table(confusion).splitlines()
    assert len(lines) == 11
    assert lines[0].split()[-10:] == list("0123456789")
    assert lines[4].split() == ["3", *["0"] * 8, "12345", "0"]
    assert lines[1].split() == ["0", "7", *["0"] * 9]
    assert len({len(line) for line in lines}) == 1


# --- weights of a run -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """No proxy, no weights from elsewhere, and no data from elsewhere either."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")

    def no_download(names, *arguments, **options):
        raise UserError(f"a test tried to download {list(names)}")

    monkeypatch.setattr(valid, "fetch", no_download)


@pytest.fixture(scope="module")
def run_of_main(tiny_data, tmp_path_factory):
    """The folder of a short run: batch-normed, on per-image normalised SVHN and MNIST."""
    folder = tmp_path_factory.mktemp("valid") / "run"
    settings = ("--network", "quick", "--image-size", "32", "--normalisation", "per-image", "--batch-size", "16")
    with pytest.MonkeyPatch.context() as monkeypatch:
        arguments = (*settings, "--epochs", "2", "--data-dir", str(tiny_data), "--run-dir", str(folder))
        monkeypatch.setattr(sys, "argv", ["main.py", *arguments, "--device", "cpu", "--no-download"])
        main.main()
    return folder


@pytest.fixture
def shelf(monkeypatch, tmp_path):
    """A folder in place of pretrained/, with an index that names weights nobody has; and an empty hub cache."""
    folder = tmp_path / "pretrained"
    folder.mkdir()
    monkeypatch.setattr(pretrained, "PRETRAINED", folder)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    write_index(folder, "elsewhere", "0" * 64, UNREACHABLE)
    return folder


def write_index(shelf, file, sha256, url):
    """One entry, called `digits`, which is the default."""
    entry = {"file": file, "sha256": sha256, "url": url}
    (shelf / "index.json").write_text(json.dumps({"default": "digits", "weights": {"digits": entry}}))


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def validate(monkeypatch, capsys, *arguments):
    """Run valid.py in this process; returns what its last line says, and its lines for people."""
    monkeypatch.setattr(sys, "argv", ["valid.py", *map(str, arguments)])
    capsys.readouterr()
    valid.main()
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[-1]), lines[:-1]


def refusal(monkeypatch, capsys, *arguments):
    """Run valid.py in this process, which must fail; returns its one line."""
    monkeypatch.setattr(sys, "argv", ["valid.py", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_script(valid.main)
    said = capsys.readouterr()
    assert ended.value.code == 1
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said.err
    assert "Traceback" not in said.err
    assert "{" not in said.out, "a test that failed has no result"
    return errors[0]


def counts_of(domains):
    return {name: (found["correct"], found["total"], found["accuracy"]) for name, found in domains.items()}


def expected_counts(run):
    result = json.loads((run / "result.json").read_text())
    assert (result["source_total"], result["target_total"]) == (23, 37)
    return {
        result[side]: (result[f"{side}_correct"], result[f"{side}_total"], result[f"{side}_accuracy"])
        for side in ("source", "target")
    }


def test_who_may_read_a_run_may_read_its_weights(run_of_main):
    modes = {name: (run_of_main / name).stat().st_mode for name in ("model.safetensors", "result.json")}
    assert modes["model.safetensors"] == modes["result.json"]


@pytest.mark.parametrize("file", ["", "model.safetensors", "last.pt"])
def test_weights_of_a_run_give_its_counts(monkeypatch, capsys, run_of_main, shelf, tiny_data, file):
    found, lines = validate(monkeypatch, capsys, "--weights", run_of_main / file, "--data-dir", tiny_data)
    assert found.keys() == {"weights", "domains"}
    assert found["weights"] == str(run_of_main / file)
    assert counts_of(found["domains"]) == expected_counts(run_of_main)
    assert lines[0].split() == ["test", "set", "accuracy", "correct", "/", "total"]
    for line, (correct, total, accuracy) in zip(lines[1:], expected_counts(run_of_main).values(), strict=True):
        assert re.search(rf" {100 * accuracy:.2f}%  {correct} / {total}$", line), line


def test_the_file_tells_how_images_are_prepared(run_of_main, shelf):
    reader = valid.load_reader(str(run_of_main), CPU)
    assert reader.preprocess == Preprocessing(32, "per-image", (0.0, 0.0, 0.0))
    assert (reader.config.network, reader.config.source, reader.config.target) == ("quick", "svhn", "mnist")
    assert not reader.model.training
    weights = reader.model.state_dict()
    saved, about = load_weights(run_of_main / "model.safetensors")
    assert all(torch.equal(weights[key], saved[key]) for key in weights)
    assert about["config"]["precision"] in ("fp32", "bf16"), "the precision used, not `auto`"


def test_a_path_needs_no_index(monkeypatch, capsys, run_of_main, shelf, tiny_data):
    (shelf / "index.json").unlink()
    found, _ = validate(monkeypatch, capsys, "--weights", run_of_main, "--data-dir", tiny_data)
    assert counts_of(found["domains"]) == expected_counts(run_of_main)


# --- weights by name --------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("--weights", "digits")])
def test_weights_that_come_with_the_code(monkeypatch, capsys, run_of_main, shelf, tiny_data, arguments):
    shutil.copy(run_of_main / "model.safetensors", shelf / "digits.safetensors")
    write_index(shelf, "digits.safetensors", sha256_of(shelf / "digits.safetensors"), None)
    found, _ = validate(monkeypatch, capsys, *arguments, "--data-dir", tiny_data)
    assert found["weights"] == "digits"
    assert counts_of(found["domains"]) == expected_counts(run_of_main)


def test_weights_in_the_cache_of_torch_hub(monkeypatch, capsys, run_of_main, shelf, tiny_data, tmp_path):
    cached = tmp_path / "torch" / "hub" / "checkpoints" / "digits.safetensors"
    cached.parent.mkdir(parents=True)
    shutil.copy(run_of_main / "model.safetensors", cached)
    write_index(shelf, cached.name, sha256_of(cached), UNREACHABLE)
    found, _ = validate(monkeypatch, capsys, "--no-download", "--data-dir", tiny_data)
    assert counts_of(found["domains"]) == expected_counts(run_of_main)

    cached.write_bytes(cached.read_bytes()[:-1] + b"!")
    assert "--no-download" in refusal(monkeypatch, capsys, "--no-download", "--data-dir", tiny_data)
    assert "cannot download" in refusal(monkeypatch, capsys, "--data-dir", tiny_data)


def test_a_damaged_file_that_came_with_the_code(monkeypatch, capsys, run_of_main, shelf, tiny_data):
    file = shelf / "digits.safetensors"
    shutil.copy(run_of_main / "model.safetensors", file)
    write_index(shelf, file.name, sha256_of(file), None)
    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 1  # one bit of one weight: safetensors itself would not notice
    file.write_bytes(damaged)
    message = refusal(monkeypatch, capsys, "--data-dir", tiny_data)
    assert "digits.safetensors is damaged" in message
    assert "git checkout" in message


def test_a_file_that_should_have_come_with_the_code(monkeypatch, capsys, shelf, tiny_data):
    write_index(shelf, "digits.safetensors", "0" * 64, None)
    message = refusal(monkeypatch, capsys, "--data-dir", tiny_data)
    assert "digits.safetensors is missing" in message
    assert "git checkout" in message


def test_an_unknown_name(monkeypatch, capsys, shelf, tiny_data):
    message = refusal(monkeypatch, capsys, "--weights", "letters", "--data-dir", tiny_data)
    assert "letters" in message
    assert "digits" in message, "it names those there are"


@pytest.mark.parametrize("text", [None, "{", "[]", '{"default": "digits", "weights": {}}', '{"weights": {}}'])
def test_a_damaged_index(monkeypatch, capsys, shelf, tiny_data, text):
    (shelf / "index.json").unlink()
    if text is not None:
        (shelf / "index.json").write_text(text)
    assert "index.json is missing or damaged" in refusal(monkeypatch, capsys, "--data-dir", tiny_data)


def test_a_folder_without_weights(monkeypatch, capsys, shelf, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "model.safetensors" in refusal(monkeypatch, capsys, "--weights", tmp_path / "empty")


# --- weights by URL ---------------------------------------------------------------------------------


@pytest.fixture
def site(run_of_main):
    """A site on this machine that has the run's weights; its `paths` are what it was asked for."""
    content = (run_of_main / "model.safetensors").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.paths.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.paths = []
    server.sha256 = hashlib.sha256(content).hexdigest()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/some/digits.safetensors"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("upper", [False, True])
def test_weights_by_url_are_fetched_once(monkeypatch, capsys, run_of_main, shelf, tiny_data, site, upper):
    url = f"{site.url}#sha256={site.sha256.upper() if upper else site.sha256}"
    for arguments in ((), ("--no-download",)):
        found, _ = validate(monkeypatch, capsys, "--weights", url, *arguments, "--data-dir", tiny_data)
        assert found["weights"] == url
        assert counts_of(found["domains"]) == expected_counts(run_of_main)
    assert site.paths == ["/some/digits.safetensors"]


def test_weights_of_the_index_by_url(monkeypatch, capsys, run_of_main, shelf, tiny_data, site, tmp_path):
    write_index(shelf, "digits.safetensors", site.sha256, site.url)
    assert "--no-download" in refusal(monkeypatch, capsys, "--no-download", "--data-dir", tiny_data)
    assert site.paths == []
    for arguments in ((), ("--no-download",)):
        found, _ = validate(monkeypatch, capsys, *arguments, "--data-dir", tiny_data)
        assert counts_of(found["domains"]) == expected_counts(run_of_main)
    assert len(site.paths) == 1
    assert [path.read_bytes() for path in (tmp_path / "torch").rglob("*.safetensors")] == [
        (run_of_main / "model.safetensors").read_bytes()
    ]


def test_a_url_without_checksum_is_not_fetched(monkeypatch, capsys, shelf, tiny_data, site):
    for url in (site.url, f"{site.url}#md5=0"):
        assert "#sha256=" in refusal(monkeypatch, capsys, "--weights", url, "--data-dir", tiny_data)
    assert site.paths == []


def test_a_url_with_a_wrong_checksum_leaves_nothing(monkeypatch, capsys, shelf, tiny_data, site, tmp_path):
    url = f"{site.url}#sha256={'0' * 64}"
    assert "another checksum" in refusal(monkeypatch, capsys, "--weights", url, "--data-dir", tiny_data)
    assert site.paths == ["/some/digits.safetensors"]
    assert not [path for path in (tmp_path / "torch").rglob("*") if path.is_file()]


def test_a_url_without_a_file(monkeypatch, capsys, shelf, tiny_data):
    url = f"http://127.0.0.1:9/#sha256={'0' * 64}"
    assert "127.0.0.1:9" in refusal(monkeypatch, capsys, "--weights", url, "--data-dir", tiny_data)


# --- test sets --------------------------------------------------------------------------------------


def test_named_domains_in_their_order(monkeypatch, capsys, run_of_main, shelf, tiny_data):
    arguments = ("--weights", run_of_main, "--domains", "usps", "mnist", "usps", "--data-dir", tiny_data)
    found, _ = validate(monkeypatch, capsys, *arguments)
    assert list(found["domains"]) == ["usps", "mnist"]
    assert found["domains"]["usps"]["total"] == 11
    assert counts_of(found["domains"])["mnist"] == expected_counts(run_of_main)["mnist"]
    assert found["domains"]["usps"]["data"] == "USPS subset, 11", "numbers on other data than the official say so"


def test_all_domains_that_are_at_hand(monkeypatch, capsys, run_of_main, shelf, tiny_data, few_synth, tmp_path):
    """What is not there is named with the command that brings it, and not fetched."""
    data = tmp_path / "my data"
    shutil.copytree(tiny_data / "MNIST", data / "MNIST")
    found, lines = validate(monkeypatch, capsys, "--weights", run_of_main, "--domains", "all", "--data-dir", data)
    assert list(found["domains"]) == ["mnist", "synth", "optdigits"]
    assert counts_of(found["domains"])["mnist"] == expected_counts(run_of_main)["mnist"]
    assert found["domains"]["optdigits"]["total"] == 500
    assert "data" not in found["domains"]["optdigits"]
    not_tested = {line.split()[0]: line for line in lines if "not tested" in line}
    assert list(not_tested) == ["SVHN", "USPS"]
    for name, line in not_tested.items():
        command = re.search(r"`python download_data\.py (.*)`", line)[1]
        monkeypatch.setattr(sys, "argv", ["download_data.py", *shlex.split(command)])
        asked = download_data.parse_arguments()
        assert (asked.names, asked.data_dir) == ([name.lower()], data)


def test_nothing_to_test_is_a_failure(monkeypatch, capsys, run_of_main, shelf, tmp_path):
    arguments = ("--weights", run_of_main, "--domains", "svhn", "usps", "--data-dir", tmp_path / "nothing")
    message = refusal(monkeypatch, capsys, *arguments, "--no-download")
    assert "nothing could be tested" in message
    assert "download_data.py svhn" in message
    assert "download_data.py usps" in message
    assert not (tmp_path / "nothing").exists()


def test_without_its_own_domains_it_reads_digits_that_come_with_the_code(
    monkeypatch, capsys, run_of_main, shelf, few_synth, tmp_path
):
    """A fresh clone without a network: both domains are named with their commands, and something real is tested."""
    arguments = ("--weights", run_of_main, "--data-dir", tmp_path / "nothing", "--no-download")
    found, lines = validate(monkeypatch, capsys, *arguments)
    assert list(found["domains"]) == ["synth", "optdigits"]
    assert found["domains"]["optdigits"]["total"] == 500
    not_tested = [line for line in lines if "not tested" in line]
    assert [line.split()[0] for line in not_tested] == ["SVHN", "MNIST"]
    assert all("python download_data.py" in line for line in not_tested)


def test_one_missing_domain_does_not_hide_the_others(monkeypatch, capsys, run_of_main, shelf, tiny_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    (data / "test_32x32.mat").write_bytes(b"no matrix")
    found, lines = validate(monkeypatch, capsys, "--weights", run_of_main, "--data-dir", data)
    assert counts_of(found["domains"]) == {"mnist": expected_counts(run_of_main)["mnist"]}
    (line,) = [line for line in lines if "not tested" in line]
    assert line.startswith("SVHN ")
    assert "test_32x32.mat is truncated or malformed" in line


def test_confusion_matrices_on_request(monkeypatch, capsys, run_of_main, shelf, tiny_data):
    arguments = ("--weights", run_of_main, "--domains", "mnist", "--confusion", "--data-dir", tiny_data)
    found, lines = validate(monkeypatch, capsys, *arguments)
    rows = [[int(n) for n in line.split()] for line in lines[-10:]]
    assert [row[0] for row in rows] == list(range(10))
    labels = data_loader.load_domain("mnist", "test", tiny_data).labels.tolist()
    assert [sum(row[1:]) for row in rows] == [labels.count(digit) for digit in range(10)]
    assert sum(row[1 + row[0]] for row in rows) == found["domains"]["mnist"]["correct"]


def test_an_unknown_domain_is_a_usage_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["valid.py", "--domains", "letters"])
    with pytest.raises(SystemExit) as ended:
        run_script(valid.main)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert not [name for name in DOMAINS if name not in said]


# --- what comes with the code -----------------------------------------------------------------------


ELSEWHERE = "results/modern/svhn-mnist-elsewhere.json"  # what the default weights read of other domains
RESULTS = {  # of the runs that the weights which come with the code are from
    "synth-optdigits-quick": "results/synth-optdigits/quick-dann-seed0.json",
    "svhn-subset-mnist-modern": "results/svhn-mnist/modern-dann-seed0.json",
    "mnist-svhn-subset-modern": "results/mnist-svhn/modern-dann-seed0.json",
    "mnist-usps-modern": "results/mnist-usps/modern-dann-seed0.json",
    "usps-mnist-modern": "results/usps-mnist/modern-dann-seed0.json",
    "synth-svhn-subset-modern": "results/synth-svhn/modern-dann-seed0.json",
}


def run_by_a_reader(*arguments: object) -> dict:
    """The last line of valid.py, started as a reader would."""
    done = run_as_process("valid.py", "--no-download", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def recorded(path: str) -> dict:
    return json.loads((ROOT / path).read_text())


@pytest.mark.parametrize(
    ("weights", "correct"),
    [
        ("synth-optdigits-quick", recorded(RESULTS["synth-optdigits-quick"])["target_correct"]),
        ("svhn-subset-mnist-modern", recorded(ELSEWHERE)["domains"]["optdigits"]["correct"]),
    ],
)
def test_the_weights_that_come_with_the_code_do_what_their_result_says(weights, correct):
    """Another machine may round two images away."""
    default = weights == pretrained.read_index()["default"]
    found = run_by_a_reader("--domains", "optdigits", *([] if default else ["--weights", weights]))
    assert found["weights"] == weights
    assert list(found["domains"]) == ["optdigits"]
    optdigits = found["domains"]["optdigits"]
    assert optdigits["total"] == 500
    assert abs(optdigits["correct"] - correct) <= 2
    assert optdigits["accuracy"] == optdigits["correct"] / 500


def test_texts_give_the_recorded_numbers():
    """What README and model card say of the domains that the default weights have never seen."""
    record = recorded(ELSEWHERE)["domains"]
    for path in ("README.md", "pretrained/README.md"):
        text = " ".join((ROOT / path).read_text().split()).replace(" %", "")
        for name in ("usps", "synth", "optdigits"):
            assert f"{100 * record[name]['accuracy']:.2f}" in text, (path, name)
            assert f"({record[name]['correct']} / {record[name]['total']})" in text, (path, name)


def test_the_model_card_gives_the_number_of_each_run():
    sections = (ROOT / "pretrained/README.md").read_text().split("\n## ")[1:]
    cards = {section.split("\n")[0]: " ".join(section.split()) for section in sections}
    assert cards.keys() == RESULTS.keys() == pretrained.read_index()["weights"].keys()
    for weights, path in RESULTS.items():
        result = recorded(path)
        assert f"`{path}`" in cards[weights]
        assert f"{100 * result['target_accuracy']:.2f} %" in cards[weights], weights
        assert f"({result['target_correct']} / {result['target_total']})" in cards[weights], weights


@pytest.mark.parametrize("weights", [name for name in RESULTS if name != "synth-optdigits-quick"])
def test_weights_give_the_numbers_of_their_run(weights, real_data):
    """`python valid.py --data-dir …` and the result file; another machine may round."""
    result = recorded(RESULTS[weights])
    domains = {result["source"]: result["source_correct"], result["target"]: result["target_correct"]}
    domains.pop("synth", None)  # it would be made in the folder of real data
    default = weights == pretrained.read_index()["default"]
    named = [] if default else ["--weights", weights, "--domains", *domains]
    found = run_by_a_reader("--data-dir", real_data, *named)
    assert found["weights"] == weights
    assert list(found["domains"]) == list(domains)
    domains.pop("svhn", None)  # its results are of another test set, which will be replaced
    for name, correct in domains.items():
        assert abs(found["domains"][name]["correct"] - correct) <= 5


def test_what_the_default_weights_read_elsewhere_was_recorded_with_the_same_weights():
    result, record = recorded(RESULTS["svhn-subset-mnist-modern"]), recorded(ELSEWHERE)["domains"]
    assert record["mnist"]["correct"] == result["target_correct"]
    assert record["svhn"]["correct"] == result["source_correct"]


def test_every_entry_of_the_index_can_be_had():
    """Its file comes with the code and has the checksum that stands there, or there is an address to fetch it from."""
    index = json.loads((ROOT / "pretrained/index.json").read_text())
    assert index["default"] in index["weights"]
    for name, entry in index["weights"].items():
        assert entry.keys() >= {"file", "sha256", "url"}, name
        assert re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]), name
        file = ROOT / "pretrained" / entry["file"]
        if entry["url"] is None:
            assert file.is_file(), name
        if file.is_file():
            assert sha256_of(file) == entry["sha256"], name
