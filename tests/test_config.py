"""Every setting is a flag whose help tells the truth, and the recipes hold the published numbers."""

import argparse
import dataclasses
import json
import math
import re

import pytest
import torch

from methods import options
from methods.options import parse_arguments, with_settings
from methods.recipes import RECIPES, Config, ModernConfig, all_settings, from_dict, recipe_config, to_dict
from utils.cli import UserError
from utils.distributed import ALONE

OF_MODERN = [item.name for item in dataclasses.fields(ModernConfig)]
FIELDS = [item.name for item in dataclasses.fields(Config) if item.name != "modern"]


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def run_parser(monkeypatch, *words: str) -> tuple[argparse.Namespace, dict]:
    monkeypatch.setattr("sys.argv", ["main.py", *words])
    return parse_arguments()


def fail_to_parse(monkeypatch, capsys, *words: str) -> str:
    """The last line of what the parser says to words that it does not take."""
    with pytest.raises(SystemExit) as left:
        run_parser(monkeypatch, *words)
    assert left.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def configure(monkeypatch, *words: str) -> Config:
    """The settings that a call of main.py trains with, but for the precision, which depends on the machine."""
    config, _ = options.configure(*run_parser(monkeypatch, *words), torch.device("cpu"), ALONE)
    return dataclasses.replace(config, precision="auto")


CALLS = [
    [],
    *(["--recipe", name] for name in RECIPES),
    ["--recipe", "paper", "--source", "mnist", "--target", "usps"],
    ["--recipe", "paper", "--source", "synth", "--target", "svhn"],
    ["--recipe", "quick", "--source", "svhn", "--target", "mnist"],
]


@pytest.mark.parametrize("words", CALLS, ids=" ".join)
def test_help_shows_every_default_as_it_is(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")  # so that no default is broken in two
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as left:
        run_parser(monkeypatch, *words, "--help")
    assert left.value.code == 0
    _, *flags = re.split(r"^  (?=-)", capsys.readouterr().out, flags=re.MULTILINE)
    shown = {}
    for flag in flags:  # "--epochs N   passes … (default: 100)", perhaps over several lines
        if found := re.match(r"(--[a-z-]+)\b.*\(default: ([^()]*)\)\s*$", flag.split("\n\n")[0], re.DOTALL):
            shown[found[1]] = found[2]
    values = all_settings(configure(monkeypatch, *words))
    assert set(values) == {*FIELDS, *(OF_MODERN if "modern" in words else ())}
    for name, value in values.items():
        text = shown[flag_of(name)]
        if isinstance(value, tuple):
            assert [int(word) for word in text.replace("none", "").split()] == list(value), name
        elif isinstance(value, bool | str):
            assert text == str(value), name
        else:
            assert float(text) == value, name


# Of each setting a value that no recipe has: words, and of other kinds one value that is in every range.
WORDS = {
    "recipe": "paper", "source": "usps", "target": "optdigits", "method": "target-only", "network": "paper-mnist",
    "normalisation": "mean", "augmentation": "none", "optimizer": "sgd", "lr_schedule": "time-decay",
    "lambda_schedule": "rise-and-fall", "lambda_update": "epoch", "domain_loss": "mean", "adversary": "marginal",
    "teacher_views": "both", "precision": "bf16", "on_nan": "skip",
}  # fmt: skip
KINDS = {bool: ([], False), int: (["7"], 7), float: (["1.25e-1"], 0.125), tuple: (["1", "2"], (1, 2))}
DEFAULTS = all_settings(recipe_config("modern")) | all_settings(recipe_config("dann"))
OTHER = {name: ([WORDS[name]], WORDS[name]) if name in WORDS else KINDS[type(DEFAULTS[name])] for name in DEFAULTS}


def test_every_setting_is_a_flag_that_sets_it(monkeypatch):
    assert set(OTHER) == {*FIELDS, *OF_MODERN}
    for name, (words, value) in OTHER.items():
        recipe = "modern" if name in OF_MODERN else "dann"
        flag = flag_of(name) if words else "--no-" + flag_of(name)[2:]
        _, settings = run_parser(monkeypatch, "--recipe", recipe, flag, *words)
        assert {*settings} == {"recipe", name}
        before, after = (all_settings(with_settings(recipe_config(recipe), given)) for given in ({}, settings))
        assert after == before | {name: value} != before  # and nothing else moved
        assert type(after[name]) is type(before[name])


def test_settings_of_modern_are_unknown_to_other_recipes(monkeypatch, capsys):
    for recipe in sorted(set(RECIPES) - {"modern"}):
        for name in OF_MODERN:
            words = ("--recipe", recipe, flag_of(name), *OTHER[name][0])
            assert flag_of(name) in fail_to_parse(monkeypatch, capsys, *words)
    with pytest.raises(UserError, match=r"--teacher-decay, --warp.* quick"):  # as of a run that is resumed
        with_settings(recipe_config("quick"), {"warp": 0.1, "teacher_decay": 0.9})


def test_nothing_given_is_the_recipe_and_a_flag_beats_it(monkeypatch):
    for name in RECIPES:  # which are within the ranges, and know their name
        assert configure(monkeypatch, "--recipe", name) == recipe_config(name)
        for source, target in (("mnist", "usps"), ("synth", "svhn")):
            config = configure(monkeypatch, "--recipe", name, "--source", source, "--target", target)
            assert config == recipe_config(name, source, target)
            assert (config.recipe, config.source, config.target) == (name, source, target)
    assert run_parser(monkeypatch)[1] == {}
    assert not configure(monkeypatch, "--recipe", "quick", "--no-balance-classes").balance_classes
    config = configure(monkeypatch, "--recipe", "cnn-grl", "--lr", "0.5", "--frozen-convolutions")
    assert config == dataclasses.replace(recipe_config("cnn-grl"), lr=0.5, frozen_convolutions=())


@pytest.mark.parametrize("hardware", [False, True])
def test_precision_is_resolved_before_it_is_saved(hardware, monkeypatch):
    monkeypatch.setattr("utils.machine.has_bf16", lambda device: hardware)
    for words, expected in ((), "bf16" if hardware else "fp32"), (["fp32"], "fp32"), (["bf16"], "bf16"):
        parsed = run_parser(monkeypatch, *(["--precision", *words] if words else []))
        assert options.configure(*parsed, torch.device("cpu"), ALONE)[0].precision == expected


def test_usage_errors(monkeypatch, capsys):
    for words in (
        *("--epochs 3.5", "--lr fast", "--lr-schedule linear", "--domain-loss product"),
        *("--frozen-convolutions all", "--separate-domains False", "--recipe unheard"),
        "--epoch 3",  # no abbreviations: this is --epochs or a mistake
    ):
        assert words.split()[-1] in fail_to_parse(monkeypatch, capsys, *words.split())


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("network", "resnet", "modern-64, or torchvision:resnet18"),
        ("network", "torchvision:resnet19", "take torchvision:resnet1"),
        ("network", "torchvision:resnet18@8", "resnet18@8"),
        ("network", "torchvision:resnet18@2000", "16 to 1024"),
        ("network", "torchvision:squeezenet1_0", "no linear layer"),
        ("source", "cifar", "optdigits"),
        ("target", "no/such/folder", "nor a folder"),
    ],
)
def test_networks_and_domains_that_are_not_there(setting, value, named):
    with pytest.raises(UserError, match=re.escape(value.partition("@")[0])) as caught:
        with_settings(recipe_config("dann"), {setting: value})
    assert named in str(caught.value)
    assert len(str(caught.value)) < 300


OUT_OF_RANGE = [
    ("epochs", 0), ("epochs", -3), ("batch_size", 0), ("lr", 0.0), ("lr", -0.1), ("lr", math.nan), ("lr", math.inf),
    ("warm_start_epochs", -1), ("weight_decay", -1e-5), ("max_norm", -1.0), ("clip_norm", -1.0), ("lr_decay", -1e-5),
    ("lambda_max", -0.5), ("lambda_max", math.nan), ("seed", -1), ("dropout", 1.0), ("dropout", -0.1),
    ("dropout", math.nan), ("label_smoothing", 1.0), ("epoch_steps", -1), ("batch_size", 1),
    ("frozen_convolutions", (0,)), ("frozen_convolutions", (2, -1)), ("frozen_convolutions", (7,)),
    ("teacher_decay", 1.0), ("confidence", -0.1), ("strong_until", 1.01), ("target_strong_share", 1.5),
    ("alignment", 1.5), ("alignment_until", 1.1), ("alignment_after", -0.1), ("warp", -0.1), ("perturbation", -1.0),
    ("teacher_weight", -1.0), ("teacher_start", -0.5), ("network", "small"), ("target", "svhn"),
    ("network", "torchvision:vit_b_16@64"),
]  # fmt: skip


def test_values_out_of_range_are_errors_of_one_line():
    """Of modern, whose batches need two images, and whose discriminator a logit for each class; svhn is its source."""
    for name, value in OUT_OF_RANGE:
        with pytest.raises(UserError) as caught:
            with_settings(recipe_config("modern"), {name: value})
        message = str(caught.value)
        assert flag_of(name) in message
        assert "\n" not in message


def test_the_edges_of_the_ranges_are_allowed():
    edges = {"epochs": 1, "batch_size": 1, "seed": 0, "frozen_convolutions": (3,)}
    edges |= dict.fromkeys(("warm_start_epochs", "epoch_steps"), 0)
    edges |= dict.fromkeys(("weight_decay", "max_norm", "lambda_max", "dropout", "label_smoothing"), 0.0)
    system_a = recipe_config("system-a")  # without batch norm, which needs two images
    assert with_settings(system_a, edges) == dataclasses.replace(system_a, **edges)
    edges = dict.fromkeys(("strong_until", "alignment", "alignment_until", "target_strong_share"), 1.0)
    edges |= dict.fromkeys(("teacher_decay", "warp", "perturbation", "alignment_after", "confidence"), 0.0)
    modern = dataclasses.replace(ModernConfig(), **edges)
    assert with_settings(recipe_config("modern"), edges).modern == modern
    marginal = {"network": "small", "adversary": "marginal"}
    assert with_settings(recipe_config("modern"), marginal).network == "small"


@pytest.mark.parametrize("name", RECIPES)
def test_settings_survive_json(name):
    config = dataclasses.replace(recipe_config(name), seed=2**62, frozen_convolutions=(1, 3), lr=0.1 + 0.2)
    restored = from_dict(json.loads(json.dumps(to_dict(config), allow_nan=False)))
    assert restored == config
    assert list(map(type, all_settings(restored).values())) == list(map(type, all_settings(config).values()))


@pytest.mark.parametrize("inner", [False, True])
def test_settings_of_another_version_are_refused_by_name(inner):
    known = "warp" if inner else "lr_decay"
    for name, change in (("warmth", lambda owner: owner.update(warmth=3)), (known, lambda owner: owner.pop(known))):
        values = to_dict(recipe_config("modern"))
        change(values["modern"] if inner else values)
        with pytest.raises(ValueError, match=rf"^{name}$"):
            from_dict(values)


SYSTEM_A = {
    "source": "svhn", "target": "mnist", "method": "dann", "network": "system-a", "normalisation": "unit",
    "dropout": 0.5, "max_norm": 0.0, "epochs": 100, "warm_start_epochs": 0, "batch_size": 128, "augmentation": "none",
    "optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-5, "lr_schedule": "annealed", "lambda_max": 1.0,
    "lambda_update": "step", "domain_loss": "sum", "frozen_convolutions": (),
}  # fmt: skip
PAPER = {
    "method": "dann", "normalisation": "mean", "batch_size": 64, "augmentation": "none", "optimizer": "sgd",
    "lr": 0.01, "momentum": 0.9, "lambda_max": 1.0, "lambda_update": "step", "domain_loss": "mean",
    "warm_start_epochs": 0, "frozen_convolutions": (), "network": "paper-svhn", "lr_schedule": "annealed",
}  # fmt: skip
SYSTEM_B = {
    "source": "svhn", "target": "mnist", "method": "dann", "network": "system-b", "normalisation": "unit",
    "dropout": 0.5, "batch_size": 32, "augmentation": "none", "optimizer": "sgd", "lr": 1e-3, "momentum": 0.9,
    "weight_decay": 0.0, "lr_schedule": "time-decay", "lr_decay": 1e-5, "lambda_max": 1.0, "lambda_update": "epoch",
}  # fmt: skip
PUBLISHED = {
    ("system-a", None, None): SYSTEM_A,
    ("system-a", "mnist", "usps"): SYSTEM_A | {"source": "mnist", "target": "usps"},
    ("paper", "svhn", "mnist"): PAPER | {"lr_schedule": "constant"},
    ("paper", "mnist", "svhn"): PAPER | {"network": "paper-mnist"},
    ("paper", "synth", "svhn"): PAPER,
    ("paper", "svhn", "usps"): PAPER,
    ("cnn-grl", None, None): SYSTEM_B,
    ("cnn-grl", "mnist", "svhn"): SYSTEM_B | {"source": "mnist", "target": "svhn"},
}


@pytest.mark.parametrize(("recipe", "source", "target"), PUBLISHED)
def test_recipes_hold_the_published_numbers(recipe, source, target):
    published = PUBLISHED[recipe, source, target]
    assert all_settings(recipe_config(recipe, source, target)).items() >= published.items()


def test_what_the_papers_leave_open_is_set():
    """Dropout and a norm limit are there for the SVHN net, without values; a warm start freezes some convolutions."""
    svhn, mnist = recipe_config("paper", "svhn", "mnist"), recipe_config("paper", "mnist", "svhn")
    assert min(svhn.dropout, svhn.max_norm) > 0
    assert (mnist.dropout, mnist.max_norm) == (0, 0)
    grl = recipe_config("cnn-grl")
    assert grl.warm_start_epochs > 0
    assert set() < set(grl.frozen_convolutions) < {1, 2, 3, 4}
