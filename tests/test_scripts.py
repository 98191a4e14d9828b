"""Every script from its command line: a dry run of each, what it prints and writes, and the commands of the pages."""

import hashlib
import importlib
import io
import itertools
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
from conftest import ROOT, events_of, records_of, result_of, run_as_process, state_of, train, weights_of
from PIL import Image

from digits.domains import check_name
from methods import options
from methods.options import configure
from methods.recipes import RECIPES, recipe_config, to_dict
from utils.cli import UserError
from utils.distributed import ALONE

SCRIPTS = ["main.py", "valid.py", "download_data.py", "image_annotate.py"]
SCRIPTS += ["tools.report", "tools.benchmark", "tools.figures", "tools.ablation"]
SMALL = "--network small --augmentation affine --batch-size 16 --epochs 1 --device cpu --precision fp32 --no-download"
SMALL = SMALL.split()
SIGNALS = ("entropy", "diversity", "smallest_class_share", "bnm", "snd", "class_ami")
SIDES = ("source", "target")


def last_of(stdout):
    return json.loads(stdout.splitlines()[-1])


def check_result(result):
    """Numbers that agree with each other."""
    for side in SIDES:
        correct, total = result[f"{side}_correct"], result[f"{side}_total"]
        assert isinstance(correct, int)
        assert 0 <= correct <= total
        assert result[f"{side}_accuracy"] == correct / total
    assert result["seconds"] > 0
    assert result["images_per_second"] > 0
    assert result["precision"] in ("fp32", "bf16")


@pytest.fixture(scope="module")
def dry_run(tiny_data, tmp_path_factory):
    """The process `python main.py --dry-run`, with the default recipe, and its run folder."""
    folder = tmp_path_factory.mktemp("dry") / "run"
    done = run_as_process("main.py", "--dry-run", "--data-dir", tiny_data, "--run-dir", folder, "--device", "cpu")
    yield done, folder
    shutil.rmtree(folder, ignore_errors=True)  # half a gigabyte


@pytest.fixture(scope="module")
def result(dry_run):
    return last_of(dry_run[0].stdout)


def test_what_a_dry_run_says(dry_run, result):
    done, _ = dry_run
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "\r" not in done.stderr, "no progress bar where there is no terminal"
    assert len(re.findall(r"^epoch +[12]/2 ", done.stderr, re.MULTILINE)) == 2
    check_result(result)
    assert (result["source"], result["target"], result["method"]) == ("svhn", "mnist", "dann")
    assert (result["recipe"], result["seed"], result["epochs"]) == ("dann", 0, 2)
    assert (result["source_total"], result["target_total"]) == (23, 37)
    assert (result["device"], result["dry_run"]) == ("cpu", True)
    assert result["steps"] == 2, "two epochs of one step: 64 images in a batch of 64"
    assert result["command"].startswith("python main.py --dry-run --data-dir ")
    header, *lines, _ = done.stdout.splitlines()
    assert header.split() == ["test", "set", "accuracy", "correct", "/", "total"]
    for line, side, title in zip(lines, SIDES, ("SVHN", "MNIST"), strict=True):
        correct, total = result[f"{side}_correct"], result[f"{side}_total"]
        assert line.startswith(f"{title} subset, {total} ")
        assert line.endswith(f" {100 * correct / total:.2f}%  {correct} / {total}")


def test_files_of_a_run_folder(dry_run, result, tiny_data):
    folder = dry_run[1]
    names = {path.name for path in folder.iterdir()}
    checkpoints = {"last.pt", "previous.pt"}
    assert names == {"config.json", "metrics.jsonl", "result.json", "model.safetensors", "tensorboard"} | checkpoints
    boards = {"events" if "tfevents" in path.name else path.name for path in (folder / "tensorboard").iterdir()}
    assert boards == {"events", "projector_config.pbtxt", "00000", "00001"}, "the projector at the first and last step"
    config = json.loads((folder / "config.json").read_text())
    assert config == to_dict(recipe_config("dann")) | {"epochs": 2, "precision": result["precision"]}

    saved = result_of(folder)
    assert saved.keys() - result.keys() == {"config", "data", "versions", "resumed"}
    assert saved == saved | result | {"config": config, "resumed": []}
    assert saved["versions"]["torch"] == torch.__version__
    files = [*tiny_data.glob("*.mat"), *tiny_data.glob("MNIST/raw/*.gz")]
    assert {Path(key).name: md5 for key, md5 in saved["data"].items()} == {
        file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in files
    }

    weights, state = weights_of(folder), state_of(folder)
    torch.testing.assert_close(weights, state["model"], rtol=0, atol=0)
    statistics = re.compile("running_|source_|batches")  # of batch norm
    sizes = [weight.numel() for name, weight in weights.items() if not statistics.search(name)]
    assert sum(sizes) == result["parameters"]
    assert (state["epoch"], state["step"]) == (2, 0)


def test_metrics_of_a_run_folder(dry_run, result):
    first, last = records = records_of(dry_run[1])
    assert [record["epoch"] for record in records] == [1, 2]
    assert [record["p"] for record in records] == [0.5, 1.0]
    # λ_p and the rates of the steps that were done, at p = 0 and 0.5, when a rise in a tenth of the run is over.
    assert [record["lambda_p"] for record in records] == [0, pytest.approx(2 / (1 + math.exp(-5)) - 1)]
    assert [record["learning_rate"] for record in records] == [
        0,
        pytest.approx(0.002 * (1 + math.cos(math.pi * 4 / 9)) / 2),
    ]
    for side in SIDES:
        assert last[f"{side}_accuracy"] == result[f"{side}_accuracy"]
    # Random weights know nothing: ten classes, and two domains whose losses are summed.
    assert first["loss_label"] == pytest.approx(math.log(10), rel=0.1)
    assert first["loss_domain"] == pytest.approx(2 * math.log(2), rel=0.1)
    assert 0 <= first["domain_accuracy"] <= 1


@pytest.fixture(scope="module")
def events(dry_run):
    """What TensorBoard shows of the dry run."""
    return events_of(dry_run[1])


def test_curves_in_tensorboard(events, dry_run):
    expected = {"schedule/p", "schedule/lambda_p", "schedule/learning_rate"}
    expected |= {"train/loss_label", "train/loss_domain", "train/domain_accuracy", "train/images_per_second"}
    expected |= {"test/source_accuracy", "test/target_accuracy", "features/proxy_a_distance"}
    expected |= {f"gradient_norm/{part}" for part in ("extractor", "classifier", "discriminator")}
    expected |= {f"target/{signal}" for signal in SIGNALS}
    curves = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert curves.keys() == expected
    assert all(map(math.isfinite, itertools.chain(*curves.values())))
    assert all(value > 0 for value in curves["gradient_norm/classifier"] + curves["gradient_norm/discriminator"])
    for name, value in (("p", 0), ("lambda_p", 0), ("learning_rate", 0)):
        assert events.Scalars(f"schedule/{name}")[0].step == 0
        assert curves[f"schedule/{name}"][0] == pytest.approx(value)
    records = records_of(dry_run[1])
    for name in ("loss_label", "loss_domain", "domain_accuracy"):  # an epoch of one step
        assert curves[f"train/{name}"][0] == pytest.approx(records[0][name], rel=1e-5)
    for name in ("test/source_accuracy", "test/target_accuracy", "train/images_per_second"):
        assert curves[name] == pytest.approx([record[name.split("/")[1]] for record in records])


def test_images_in_tensorboard(events):
    inputs = ["images/source", "images/target"]
    learnt = ["features/both_domains", "features/plane", "target/confusion", "target/misclassified"]
    assert sorted(events.Tags()["images"]) == sorted(inputs + learnt)
    pictures = []
    for tag in inputs:
        (event,) = events.Images(tag)
        assert event.step == 0
        pictures.append(np.array(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")))
        # 64 images of 32 pixels in rows of 16, two pixels between them and around
        assert pictures[-1].shape == (4 * 34 + 2, 16 * 34 + 2, 3)
    source, target = pictures
    assert (target[..., 0] == target[..., 2]).all(), "MNIST is grey"
    assert (source[..., 0] != source[..., 2]).any(), "SVHN has colours"


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"dann"}))
def test_dry_run_of_each_recipe(capsys, few_synth, tiny_data, tmp_path, recipe):
    """The default recipe has its own process above."""
    arguments = ("--recipe", recipe, "--dry-run", "--data-dir", tiny_data, "--run-dir", tmp_path, "--no-download")
    train(*arguments, "--device", "cpu")
    result, config = last_of(capsys.readouterr().out), recipe_config(recipe)
    check_result(result)
    assert (result["recipe"], result["source"], result["target"]) == (recipe, config.source, config.target)
    assert result["epochs"] == (3 if config.warm_start_epochs else 2)
    changed = {"epochs": 2, "warm_start_epochs": min(1, config.warm_start_epochs), "precision": result["precision"]}
    changed["epoch_steps"] = min(2, config.epoch_steps)
    assert json.loads((tmp_path / "config.json").read_text()) == to_dict(config) | changed
    for big in ("last.pt", "model.safetensors"):
        (tmp_path / big).unlink()


@pytest.mark.parametrize(("method", "mark"), [("source-only", "SVHN subset, 40"), ("target-only", "MNIST subset, 64")])
def test_bounds_in_a_folder_that_is_named_after_the_run(monkeypatch, capsys, tiny_data, tmp_path, method, mark):
    """Lower and upper bound: no domain loss, as many steps as the adapted run, and the labels of one domain."""
    monkeypatch.chdir(tmp_path)
    train(*SMALL, "--method", method, "--seed", 3, "--data-dir", tiny_data)
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"svhn-mnist-dann-{method}-seed3-\d{{8}}-\d{{6}}", folder.name)
    result = result_of(folder)
    check_result(result)
    assert (result["method"], result["steps"]) == (method, 4)
    assert f"\nlabels of {mark}: " in capsys.readouterr().err
    (record,) = records_of(folder)
    assert not {"loss_domain", "domain_accuracy"} & record.keys()
    assert record["lambda_p"] == 0


@pytest.mark.parametrize("rate", [0.01, 1e-12], ids=["trained", "as they began, for no weight is moved"])
def test_seeds(tiny_data, tmp_path, rate):
    """The same seed gives the same weights bit for bit, another seed others; what ran before does not matter."""
    weights, losses = [], []
    for number, seed in enumerate((0, 1, 0)):
        torch.rand(number + 1)  # whoever drew before
        folder = tmp_path / str(number)
        train(*SMALL, "--lr", rate, "--seed", seed, "--data-dir", tiny_data, "--run-dir", folder)
        weights.append(weights_of(folder))
        losses += [(record["loss_label"], record["loss_domain"]) for record in records_of(folder)]
    first, other, again = weights
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    matrices = [key for key, value in first.items() if value.ndim > 1]
    assert len(matrices) == 7, "three convolutions and four linear layers"
    assert all((first[key] - other[key]).abs().max() > 0.01 for key in matrices)
    assert losses[0] == losses[2] != losses[1]


def parse(monkeypatch, name, *arguments):
    """What a script makes of a command line."""
    module = importlib.import_module(name.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return (getattr(module, "parse_arguments", None) or module.parse_args)()


def commands(text):
    """The commands in lines of shell that start one of the scripts: its name and its arguments."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"[|;&>]|\bdo\b", line):
            words = shlex.split(part.replace("$seed", "0"), comments=True)
            first = next((i for i, word in enumerate(words) if word in SCRIPTS), None)
            if first is not None and words[0] != "git":
                found.append(words[first:])
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_examples_that_parse(monkeypatch, capsys, script):
    with pytest.raises(SystemExit) as ended:
        parse(monkeypatch, script, "--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: ")
    lines = re.findall(r"^ +(python .*?)(?:   .*)?$", text, re.MULTILINE)
    examples = commands("\n".join(lines))
    assert len(examples) >= 2, "two real examples in the epilog"
    for name, *arguments in examples:
        assert name == script
        if arguments != ["--help"]:
            parse(monkeypatch, name, *arguments)  # SystemExit fails the test


@pytest.mark.parametrize(
    ("script", "words", "told"),
    [
        ("main.py", "--resume runs/a --run-dir runs/b", "--run-dir"),
        ("valid.py", "--weight quick", "--weight"),
        ("valid.py", "--domains", "--domains"),
        ("image_annotate.py", "--out here -f a.png", "--out"),
        ("image_annotate.py", "", "--file"),
        ("tools.report", "--che", "--che"),
        ("tools.ablation", "--variants luck", "'luck'"),
        ("tools.benchmark", "--round 3", "--round"),
        ("tools.figures", "--compare runs/source-only", "--compare"),
    ],
)
def test_usage_mistakes(monkeypatch, capsys, script, words, told):
    """Abbreviations are mistakes too: they would change their meaning with the next option."""
    with pytest.raises(SystemExit) as ended:
        parse(monkeypatch, script, *words.split())
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert told in said.err.splitlines()[-1]


def test_commands_of_the_pages_are_understood(monkeypatch):
    """The bash blocks of README and docs, with settings in their ranges and that fit each other."""
    pages = [ROOT / "README.md", ROOT / "results/figures/README.md", *sorted(ROOT.glob("[!.]*/*.md"))]
    blocks = [re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL) for page in pages]
    assert {name for name, *_ in commands("".join(blocks[0]))} >= {"main.py", "valid.py", "image_annotate.py"}
    monkeypatch.setattr(
        options, "check_name", lambda name: None if "/" in name else check_name(name)
    )  # no folders here
    for name, *arguments in commands("".join(itertools.chain(*blocks))):
        try:
            parsed = parse(monkeypatch, name, *arguments)
            if name == "main.py" and "--resume" not in arguments:
                configure(*parsed, torch.device("cpu"), ALONE)
        except (SystemExit, UserError) as error:
            pytest.fail(f"{shlex.join([name, *arguments])}: {error}")
