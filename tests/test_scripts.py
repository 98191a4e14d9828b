"""Every script from its command line: a dry run of each, what it prints and writes, and the README's commands."""

import hashlib
import importlib
import io
import json
import math
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_as_process, start
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from utils.config import RECIPES, recipe_config, to_dict

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = (
    "main.py", "valid.py", "download_data.py", "image_annotate.py",
    "tools/report.py", "tools/benchmark.py", "tools/figures.py", "tools/ablation.py",
)  # fmt: skip
KEYS = (
    "source", "target", "method", "recipe", "seed", "epochs", "source_accuracy", "target_accuracy", "source_correct",
    "source_total", "target_correct", "target_total", "seconds", "images_per_second", "device", "precision",
)  # fmt: skip
SMALL = (
    "--network", "quick", "--image-size", 32, "--augmentation", "affine", "--batch-size", 16, "--epochs", 1,
    "--device", "cpu", "--precision", "fp32", "--no-download",
)  # fmt: skip


def parser_of(script):
    """The function of a script that reads sys.argv."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    return getattr(module, "parse_arguments", None) or module.parse_args


def check_result(result):
    """The keys of a result, and numbers that agree with each other."""
    assert not [key for key in KEYS if key not in result]
    for side in ("source", "target"):
        correct, total = result[f"{side}_correct"], result[f"{side}_total"]
        assert isinstance(correct, int)
        assert 0 <= correct <= total
        assert result[f"{side}_accuracy"] == correct / total
    assert result["seconds"] > 0
    assert result["images_per_second"] > 0
    assert result["precision"] in ("fp32", "bf16")


# --- python main.py --dry-run -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry_run(tiny_data, tmp_path_factory):
    """The process `python main.py --dry-run`, with the default recipe, and its run folder."""
    folder = tmp_path_factory.mktemp("dry") / "run"
    done = run_as_process("main.py", "--dry-run", "--data-dir", tiny_data, "--run-dir", folder, "--device", "cpu")
    yield done, folder
    shutil.rmtree(folder, ignore_errors=True)  # half a gigabyte


@pytest.fixture(scope="module")
def result(dry_run):
    """What the last line of its stdout says."""
    return json.loads(dry_run[0].stdout.splitlines()[-1])


def test_dry_run_ends_well(dry_run):
    done, _ = dry_run
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "\r" not in done.stderr, "no progress bar where there is no terminal"
    lines = done.stderr.splitlines()
    assert len([line for line in lines if re.match(r"epoch +[12]/2 ", line)]) == 2


def test_result_on_stdout(result):
    check_result(result)
    assert (result["source"], result["target"], result["method"]) == ("svhn", "mnist", "dann")
    assert (result["recipe"], result["seed"], result["epochs"]) == ("dann", 0, 2)
    assert (result["source_total"], result["target_total"]) == (23, 37)
    assert result["device"] == "cpu"
    assert result["dry_run"] is True
    assert result["steps"] == 2, "two epochs of one step: 64 images in a batch of 128"
    assert result["command"].startswith("python main.py --dry-run --data-dir ")


def test_table_on_stdout(dry_run, result):
    header, source, target, _ = dry_run[0].stdout.splitlines()
    assert header.split() == ["test", "set", "accuracy", "correct", "/", "total"]
    for line, side, title in ((source, "source", "SVHN"), (target, "target", "MNIST")):
        correct, total = result[f"{side}_correct"], result[f"{side}_total"]
        assert line.startswith(f"{title} subset, {total} ")
        assert line.endswith(f" {100 * correct / total:.2f}%  {correct} / {total}")


def test_result_file_agrees_with_stdout(dry_run, result, tiny_data):
    saved = json.loads((dry_run[1] / "result.json").read_text())
    assert {key: saved[key] for key in result} == result
    assert set(saved) - set(result) == {"config", "data", "versions"}
    assert saved["versions"]["torch"] == torch.__version__
    names = ("train_32x32.mat", "test_32x32.mat")
    names += tuple(f"MNIST/raw/{f}-ubyte.gz" for f in ("train-images-idx3", "train-labels-idx1"))
    names += tuple(f"MNIST/raw/{f}-ubyte.gz" for f in ("t10k-images-idx3", "t10k-labels-idx1"))
    assert {Path(key).name: md5 for key, md5 in saved["data"].items()} == {
        Path(name).name: hashlib.md5((tiny_data / name).read_bytes()).hexdigest() for name in names
    }


def test_files_of_a_run_folder(dry_run):
    names = {path.name for path in dry_run[1].iterdir()}
    assert names == {"config.json", "metrics.jsonl", "result.json", "last.pt", "model.safetensors", "tensorboard"}
    (events,) = (dry_run[1] / "tensorboard").glob("*tfevents*")
    others = {path.name for path in (dry_run[1] / "tensorboard").iterdir()} - {events.name}
    assert others == {"projector_config.pbtxt", "00000", "00001"}, "the projector, at the first and the last step"


def test_config_of_a_run_folder(dry_run, result):
    """The recipe's settings, but the precision that was used in place of `auto`."""
    config = json.loads((dry_run[1] / "config.json").read_text())
    assert config == to_dict(recipe_config("dann")) | {"epochs": 2, "precision": result["precision"]}
    assert config == json.loads((dry_run[1] / "result.json").read_text())["config"]


def test_metrics_of_a_run_folder(dry_run, result):
    records = [json.loads(line) for line in (dry_run[1] / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    assert [record["p"] for record in records] == [0.5, 1.0]
    for record in records:
        assert record["lambda_p"] == pytest.approx(2 / (1 + math.exp(-10 * record["p"])) - 1)
    # The rates of the steps that were done, at p = 0 and 0.5.
    assert [record["learning_rate"] for record in records] == [0.01, pytest.approx(0.01 / 6**0.75)]
    assert [records[-1][f"{side}_accuracy"] for side in ("source", "target")] == [
        result["source_accuracy"], result["target_accuracy"],
    ]  # fmt: skip
    # Small random weights know nothing: ten classes, and two domains whose losses are summed.
    assert records[0]["loss_label"] == pytest.approx(math.log(10), rel=0.02)
    assert records[0]["loss_domain"] == pytest.approx(2 * math.log(2), rel=0.02)
    assert 0 <= records[0]["domain_accuracy"] <= 1


def test_weights_of_a_run_folder(dry_run, result):
    weights = load_file(dry_run[1] / "model.safetensors")
    state = torch.load(dry_run[1] / "last.pt", weights_only=True)
    assert weights.keys() == state["model"].keys()
    assert all(torch.equal(weights[key], state["model"][key]) for key in weights)
    assert sum(weight.numel() for weight in weights.values()) == result["parameters"]
    assert (state["epoch"], state["step"]) == (2, 0)


@pytest.fixture(scope="module")
def events(dry_run):
    """What TensorBoard shows of the dry run."""
    accumulator = EventAccumulator(str(dry_run[1] / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def test_curves_in_tensorboard(events):
    expected = {"schedule/p", "schedule/lambda_p", "schedule/learning_rate"}
    expected |= {"train/loss_label", "train/loss_domain", "train/domain_accuracy", "train/images_per_second"}
    expected |= {"test/source_accuracy", "test/target_accuracy"}
    expected |= {f"gradient_norm/{part}" for part in ("extractor", "classifier", "discriminator")}
    expected |= {f"target/{signal}" for signal in ("entropy", "diversity", "smallest_class_share")}
    assert set(events.Tags()["scalars"]) == expected
    for tag in expected:
        assert all(math.isfinite(event.value) for event in events.Scalars(tag)), tag
    for part in ("classifier", "discriminator"):
        assert all(event.value > 0 for event in events.Scalars(f"gradient_norm/{part}"))


def test_values_in_tensorboard(events, result, dry_run):
    first = {tag: events.Scalars(tag)[0] for tag in events.Tags()["scalars"]}
    assert (first["schedule/p"].step, first["schedule/p"].value) == (0, 0)
    assert first["schedule/lambda_p"].value == 0
    assert first["schedule/learning_rate"].value == pytest.approx(0.01)
    record = json.loads((dry_run[1] / "metrics.jsonl").read_text().splitlines()[0])
    for name in ("loss_label", "loss_domain", "domain_accuracy"):  # an epoch of one step
        assert first[f"train/{name}"].value == pytest.approx(record[name], rel=1e-5)
    for side in ("source", "target"):
        values = [event.value for event in events.Scalars(f"test/{side}_accuracy")]
        assert len(values) == 2
        assert values[-1] == pytest.approx(result[f"{side}_accuracy"])
    assert len(events.Scalars("train/images_per_second")) == 2


def test_images_and_settings_in_tensorboard(events):
    inputs, learnt = ["images/source", "images/target"], ["features/both_domains", "target/confusion", "target/misread"]
    assert sorted(events.Tags()["images"]) == sorted(inputs + learnt)
    pictures = []
    for tag in inputs:
        (event,) = events.Images(tag)
        assert event.step == 0
        pictures.append(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))
        # 64 images of 28 pixels in rows of 16, two pixels between them and around
        assert pictures[-1].size == (16 * 30 + 2, 4 * 30 + 2)
    source, target = (np.asarray(picture).astype(int) for picture in pictures)
    assert (target[..., 0] == target[..., 2]).all(), "MNIST is grey"
    assert (source[..., 0] != source[..., 2]).any(), "SVHN has colours"
    (tag,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("config")]
    text = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    assert "network: system-a" in text


def test_valid_gives_the_counts_of_the_run(dry_run, result, tiny_data):
    """`python valid.py`, another process on the weights file of the first."""
    done = run_as_process(
        "valid.py", "--weights", dry_run[1], "--data-dir", tiny_data, "--device", "cpu", "--no-download"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] == str(dry_run[1])
    assert {name: (tested["correct"], tested["total"]) for name, tested in found["domains"].items()} == {
        result[side]: (result[f"{side}_correct"], result[f"{side}_total"]) for side in ("source", "target")
    }


# --- recipes and methods ----------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"dann"}))
def test_dry_run_of_each_recipe(monkeypatch, capsys, few_synth, tiny_data, tmp_path, recipe):
    """The default recipe has its own process above."""
    arguments = ("--recipe", recipe, "--dry-run", "--data-dir", tiny_data, "--run-dir", tmp_path, "--no-download")
    start(monkeypatch, *arguments, "--device", "cpu")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    check_result(result)
    config = recipe_config(recipe)
    assert (result["recipe"], result["source"], result["target"]) == (recipe, config.source, config.target)
    assert result["epochs"] == (3 if config.warm_start_epochs else 2)
    saved = json.loads((tmp_path / "config.json").read_text())
    changed = {"epochs": 2, "warm_start_epochs": min(1, config.warm_start_epochs), "precision": result["precision"]}
    changed["epoch_steps"] = min(2, config.epoch_steps)
    assert saved == to_dict(config) | changed
    for big in ("last.pt", "model.safetensors"):
        (tmp_path / big).unlink()


def test_dry_run_of_the_paper_on_small_digits(monkeypatch, capsys, tiny_data, tmp_path):
    """From MNIST the paper uses another network."""
    arguments = ("--recipe", "paper", "--source", "mnist", "--target", "usps", "--dry-run", "--no-download")
    start(monkeypatch, *arguments, "--data-dir", tiny_data, "--run-dir", tmp_path, "--device", "cpu")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    check_result(result)
    assert (result["source_total"], result["target_total"]) == (37, 11)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["network"], config["lr_schedule"]) == ("paper-mnist", "annealed")


@pytest.mark.parametrize(("method", "mark"), [("source-only", "SVHN subset, 40"), ("target-only", "MNIST subset, 64")])
def test_bounds(monkeypatch, capsys, tiny_data, tmp_path, method, mark):
    """Lower and upper bound: no domain loss, as many steps as the adapted run, and the labels of one domain."""
    start(monkeypatch, *SMALL, "--method", method, "--data-dir", tiny_data, "--run-dir", tmp_path)
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    check_result(result)
    assert (result["method"], result["steps"]) == (method, 4)
    assert f"labels of {mark}: " in said.err
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (record["loss_domain"], record["domain_accuracy"], record["lambda_p"]) == (None, None, 0)


def test_default_run_folder_is_named_after_the_run(monkeypatch, capsys, tiny_data, tmp_path):
    monkeypatch.chdir(tmp_path)
    start(monkeypatch, *SMALL, "--seed", 3, "--data-dir", tiny_data)
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"svhn-mnist-dann-dann-seed3-\d{8}-\d{6}", folder.name)
    assert (folder / "result.json").exists()


# --- seeds ------------------------------------------------------------------------------------------


def test_seeds(monkeypatch, tiny_data, tmp_path):
    """The same seed gives the same weights bit for bit, another seed others; what ran before does not matter."""
    weights = {}
    for name, seed in (("first", 0), ("other", 1), ("again", 0)):
        torch.rand(len(weights) + 1)  # whoever drew before
        start(monkeypatch, *SMALL, "--seed", seed, "--data-dir", tiny_data, "--run-dir", tmp_path / name)
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    first, other, again = weights.values()
    assert all(torch.equal(first[key], again[key]) for key in first)
    differing = [key for key in first if not torch.equal(first[key], other[key])]
    assert [key for key in first if key.endswith("weight") and key not in differing] == []
    records = [json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in weights]
    losses = [(record["loss_label"], record["loss_domain"]) for record in records]
    assert losses[0] == losses[2] != losses[1]


def test_initial_weights_depend_on_the_seed(monkeypatch, tiny_data, tmp_path):
    """At a rate that moves no weight, what differs is where the two runs began."""
    runs = []
    for seed in (0, 1):
        arguments = (*SMALL, "--lr", 1e-12, "--seed", seed, "--data-dir", tiny_data, "--run-dir", tmp_path / str(seed))
        start(monkeypatch, *arguments)
        runs.append(load_file(tmp_path / str(seed) / "model.safetensors"))
    matrices = [key for key, value in runs[0].items() if value.ndim > 1]
    assert len(matrices) == 7, "three convolutions and four linear layers"
    assert all((runs[0][key] - runs[1][key]).abs().max() > 0.01 for key in matrices)


# --- command lines ----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(monkeypatch, capsys, script):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        parser_of(script)()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: ")
    assert "examples:" in text, "two real examples in the epilog"
    assert len(re.findall(rf"^ +python {re.escape(script)}", text, re.MULTILINE)) >= 2


@pytest.mark.parametrize("script", ["download_data.py", "tools/report.py"])
def test_help_of_a_process(script):
    """The two that need no torch, and so start at once."""
    done = run_as_process(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {Path(script).name}")


def test_examples_in_help_parse(monkeypatch, capsys):
    for script in SCRIPTS:
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit):
            parser_of(script)()
        lines = re.findall(r"^ +python (\S+\.py.*?)(?:   .*)?$", capsys.readouterr().out, re.MULTILINE)
        for line in lines:
            name, *arguments = shlex.split(line)
            monkeypatch.setattr(sys, "argv", [name, *arguments])
            parser_of(name)()  # SystemExit fails the test


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_shows_the_values_of_the_recipe(monkeypatch, capsys, recipe):
    monkeypatch.setattr(sys, "argv", ["main.py", "--recipe", recipe, "--help"])
    with pytest.raises(SystemExit):
        main.parse_arguments()
    text = " ".join(capsys.readouterr().out.split())
    config = recipe_config(recipe)
    assert re.search(rf"--epochs N [^-]*\(default: {config.epochs}\)", text)
    assert re.search(rf"images of each domain in a step \(default: {config.batch_size}\)", text)
    assert re.search(rf"learning rate μ_0 \(default: {config.lr}\)", text)
    assert f"architecture (default: {config.network})" in text


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        ("main.py", ["--rec", "quick"], "--rec"),
        ("main.py", ["--dry"], "--dry"),
        ("main.py", ["--recipe", "slow"], "'slow'"),
        ("main.py", ["--source", "letters"], "'letters'"),
        ("main.py", ["--epochs", "many"], "'many'"),
        ("main.py", ["--resume", "runs/a", "--run-dir", "runs/b"], "--run-dir"),
        ("valid.py", ["--weight", "quick"], "--weight"),
        ("valid.py", ["--domains"], "--domains"),
        ("download_data.py", ["--data", "here"], "--data"),
        ("download_data.py", ["letters"], "'letters'"),
        ("image_annotate.py", ["--out", "here", "-f", "a.png"], "--out"),
        ("image_annotate.py", [], "--file"),
        ("tools/report.py", ["--che"], "--che"),
        ("tools/ablation.py", ["--variants", "no luck"], "'no luck'"),
        ("tools/benchmark.py", ["--round", "3"], "--round"),
        ("tools/figures.py", ["--compare", "runs/source-only"], "--compare"),
    ],
)
def test_usage_mistakes(monkeypatch, capsys, script, arguments, told):
    """Abbreviations are mistakes too: they would change their meaning with the next option."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        parser_of(script)()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert told in said.err.splitlines()[-1]


def readme_commands():
    """The command lines of the README's bash blocks that start one of the scripts, continued lines joined."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    commands = []
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&>")
        lexer.whitespace_split = True
        words = list(lexer)
        ends = [i for i, word in enumerate(words) if word[0] in "|;&>"] + [len(words)]
        for first, end in zip([0] + [i + 1 for i in ends], ends, strict=False):
            command = words[first:end]
            if command and Path(command[0]).name == "torchrun":  # its own options come first
                command = command[[word in SCRIPTS for word in command].index(True) - 1 :]
                command[0] = "python"
            if len(command) > 1 and Path(command[0]).name == "python" and command[1] in SCRIPTS:
                commands.append(command[1:])
    return commands


def test_commands_of_the_readme(monkeypatch, capsys):
    commands = readme_commands()
    assert {script for script, *_ in commands} >= {"main.py", "valid.py", "download_data.py", "image_annotate.py"}
    for script, *arguments in commands:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        try:
            parsed = parser_of(script)()
            if script == "main.py" and "--resume" not in arguments:
                main.configure(*parsed, torch.device("cpu"))  # settings out of range, or that do not fit each other
        except SystemExit as ended:
            pytest.fail(f"python {shlex.join([script, *arguments])} exits {ended.code}: {capsys.readouterr().err}")
