"""Every setting is a flag whose help tells the truth, and the recipes hold the published numbers."""

import argparse
import dataclasses
import json
import math
import re

import pytest
import torch

import main
from data_loader import DOMAINS
from utils.cli import UserError
from utils.config import (
    RECIPES,
    Config,
    add_config_arguments,
    check,
    config_from_arguments,
    from_dict,
    recipe_config,
    to_dict,
)

FIELDS = [item.name for item in dataclasses.fields(Config)]


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def run_parser(monkeypatch, *words: str) -> tuple[argparse.Namespace, dict]:
    monkeypatch.setattr("sys.argv", ["main.py", *words])
    return main.parse_arguments()


def configure(monkeypatch, *words: str) -> Config:
    """The settings that a call of main.py trains with, but for the precision, which depends on the machine."""
    config, _ = main.configure(*run_parser(monkeypatch, *words), torch.device("cpu"))
    return dataclasses.replace(config, precision="auto")


# ---- flags and help


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
    _, *options = re.split(r"^  (?=-)", capsys.readouterr().out, flags=re.MULTILINE)
    shown = {}
    for option in options:  # "--epochs N   passes … (default: 100)", perhaps over several lines
        if found := re.match(r"(--[a-z-]+)\b.*\(default: ([^()]*)\)\s*$", option.split("\n\n")[0], re.DOTALL):
            shown[found[1]] = found[2]
    config = configure(monkeypatch, *words)
    for name in FIELDS:
        value = getattr(config, name)
        text = shown[flag_of(name)]
        if isinstance(value, bool):
            assert text == ("True" if value else "False"), name
        elif isinstance(value, tuple):
            assert [int(word) for word in text.replace("none", "").split()] == list(value), name
        elif isinstance(value, str):
            assert text == value, name
        else:
            assert float(text) == value, name


# A value of each field that no recipe has, as it is typed and as it arrives.
OTHER = {
    "recipe": ("paper", "paper"),
    "source": ("usps", "usps"),
    "target": ("optdigits", "optdigits"),
    "method": ("target-only", "target-only"),
    "seed": ("17", 17),
    "network": ("paper-mnist", "paper-mnist"),
    "image_size": ("32", 32),
    "normalisation": ("per-image", "per-image"),
    "dropout": ("0.125", 0.125),
    "max_norm": ("2.5", 2.5),
    "epochs": ("7", 7),
    "warm_start_epochs": ("2", 2),
    "frozen_convolutions": ("1 2", (1, 2)),
    "epoch_steps": ("12", 12),
    "batch_size": ("33", 33),
    "augmentation": ("affine", "affine"),
    "target_strong_share": ("0.75", 0.75),
    "strong_until": ("0.5", 0.5),
    "label_smoothing": ("0.05", 0.05),
    "optimizer": ("adamw", "adamw"),
    "lr": ("3e-4", 0.0003),
    "momentum": ("0.5", 0.5),
    "weight_decay": ("0.25", 0.25),
    "lr_schedule": ("time-decay", "time-decay"),
    "lr_alpha": ("3", 3.0),
    "lr_beta": ("0.5", 0.5),
    "lr_decay": ("1e-6", 1e-6),
    "gamma": ("4", 4.0),
    "lambda_max": ("0.1", 0.1),
    "lambda_schedule": ("rise-and-fall", "rise-and-fall"),
    "lambda_update": ("epoch", "epoch"),
    "clip_norm": ("0.75", 0.75),
    "balance_classes": ("", True),
    "domain_loss": ("mean", "mean"),
    "adversary": ("class-wise", "class-wise"),
    "teacher_decay": ("0.75", 0.75),
    "teacher_views": ("both", "both"),
    "teacher_weight": ("0.5", 0.5),
    "teacher_start": ("0.35", 0.35),
    "perturbation": ("1.5", 1.5),
    "warp": ("0.4", 0.4),
    "alignment": ("0.25", 0.25),
    "alignment_until": ("0.6", 0.6),
    "alignment_after": ("0.3", 0.3),
    "confidence": ("0.7", 0.7),
    "precision": ("bf16", "bf16"),
}


def test_every_setting_is_a_flag_that_sets_it(monkeypatch):
    assert set(OTHER) | {"separate_domains"} == set(FIELDS)
    for name, (text, value) in OTHER.items():
        _, settings = run_parser(monkeypatch, flag_of(name), *text.split())
        assert list(settings) == [name]
        changed = config_from_arguments(settings, recipe_config("dann"))
        assert getattr(changed, name) == value
        assert type(getattr(changed, name)) is type(value)
        assert dataclasses.replace(changed, **{name: getattr(Config(), name)}) == Config()  # nothing else moved


def test_switches_take_no_word(monkeypatch):
    for words, expected in ((["--separate-domains"], True), (["--no-separate-domains"], False)):
        for recipe in ("dann", "quick"):  # whose defaults are off and on
            assert configure(monkeypatch, "--recipe", recipe, *words).separate_domains is expected
    assert configure(monkeypatch, "--recipe", "quick").separate_domains is True
    with pytest.raises(SystemExit) as left:
        run_parser(monkeypatch, "--separate-domains", "False")
    assert left.value.code == 2


def test_no_flag_has_type_bool():
    for name in RECIPES:
        parser = argparse.ArgumentParser()
        add_config_arguments(parser, recipe_config(name), tuple(DOMAINS))
        actions = [action for action in parser._actions if action.dest != "help"]
        assert [action.dest for action in actions] == FIELDS
        assert all(action.type is not bool for action in actions)


def test_nothing_given_is_the_recipe(monkeypatch):
    for name in RECIPES:
        assert configure(monkeypatch, "--recipe", name) == recipe_config(name)
    _, settings = run_parser(monkeypatch)
    assert settings == {}


def test_a_flag_beats_the_recipe(monkeypatch):
    config = configure(monkeypatch, "--recipe", "cnn-grl", "--lr", "0.5", "--frozen-convolutions")
    assert config == dataclasses.replace(recipe_config("cnn-grl"), lr=0.5, frozen_convolutions=())


@pytest.mark.parametrize("hardware", [False, True])
def test_precision_is_resolved_before_it_is_saved(hardware, monkeypatch):
    monkeypatch.setattr("utils.machine.has_bf16", lambda device: hardware)
    for words, expected in (([], "bf16" if hardware else "fp32"), (["fp32"], "fp32"), (["bf16"], "bf16")):
        parsed = run_parser(monkeypatch, *(["--precision", *words] if words else []))
        assert main.configure(*parsed, torch.device("cpu"))[0].precision == expected


@pytest.mark.parametrize(
    "words",
    [
        ["--recipe", "unheard"],
        ["--source", "cifar"],
        ["--epoch", "3"],  # no abbreviations: this is --epochs or a mistake
        ["--epochs", "3.5"],
        ["--lr", "fast"],
        ["--network", "resnet"],
        ["--lr-schedule", "linear"],
        ["--domain-loss", "product"],
        ["--frozen-convolutions", "all"],
    ],
    ids=" ".join,
)
def test_usage_errors(words, monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        run_parser(monkeypatch, *words)
    assert left.value.code == 2
    assert words[0] in capsys.readouterr().err


# ---- ranges


OUT_OF_RANGE = [
    ("epochs", 0), ("epochs", -3), ("batch_size", 0), ("lr", 0.0), ("lr", -0.1), ("lr", math.nan),
    ("image_size", 0), ("gamma", 0.0), ("gamma", -1.0), ("warm_start_epochs", -1), ("weight_decay", -1e-5),
    ("max_norm", -1.0), ("clip_norm", -1.0), ("lr_decay", -1e-5), ("lambda_max", -0.5), ("lambda_max", math.nan),
    ("lr_alpha", -1.0), ("seed", -1), ("momentum", -0.1), ("dropout", 1.0), ("dropout", -0.1), ("dropout", math.nan),
    ("frozen_convolutions", (0,)), ("frozen_convolutions", (2, -1)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_values_out_of_range_are_errors_of_one_line(name, value):
    with pytest.raises(UserError) as caught:
        config_from_arguments({name: value}, recipe_config("dann"))
    message = str(caught.value)
    assert flag_of(name) in message
    assert "\n" not in message


def test_the_edges_of_the_ranges_are_allowed():
    edges = {
        "epochs": 1,
        "batch_size": 1,
        "warm_start_epochs": 0,
        "weight_decay": 0.0,
        "max_norm": 0.0,
        "lambda_max": 0.0,
        "momentum": 0.0,
        "dropout": 0.0,
        "seed": 0,
    }
    assert config_from_arguments(edges, recipe_config("dann")) == dataclasses.replace(Config(), **edges)


def test_source_and_target_differ(monkeypatch):
    with pytest.raises(UserError, match="source and target are both mnist"):
        configure(monkeypatch, "--source", "mnist", "--target", "mnist")


def test_image_size_is_the_networks(monkeypatch):
    with pytest.raises(UserError, match="system-a takes --image-size 28, not 32"):
        configure(monkeypatch, "--image-size", "32")
    assert configure(monkeypatch, "--image-size", "32", "--network", "system-b").image_size == 32


# ---- saving


@pytest.mark.parametrize("name", RECIPES)
def test_settings_survive_json(name):
    config = dataclasses.replace(recipe_config(name), seed=2**62, frozen_convolutions=(1, 3), lr=0.1 + 0.2)
    text = json.dumps(to_dict(config), allow_nan=False)
    assert list(json.loads(text)) == FIELDS
    restored = from_dict(json.loads(text))
    assert restored == config
    assert restored.frozen_convolutions == (1, 3)
    assert all(type(getattr(restored, name)) is type(getattr(config, name)) for name in FIELDS)


def test_settings_of_a_run_that_lacks_later_ones_do_without_them():
    values = to_dict(recipe_config("quick"))
    added = [item.name for item in dataclasses.fields(Config) if item.metadata.get("added")]
    for name in added:
        del values[name]
    restored = from_dict(values)
    assert restored == recipe_config("quick")
    off = ("epoch_steps", "label_smoothing", "teacher_decay", "teacher_weight")
    assert set(off) < set(added)
    assert not any(getattr(restored, name) for name in off)
    assert restored.adversary == "marginal"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--recipe quick --teacher-weight 1", "--teacher-weight needs a teacher"),
        ("--recipe quick --perturbation 1", "--perturbation needs a teacher"),
        ("--recipe quick --warp 0.1", "--warp needs a teacher"),
        ("--recipe modern --warp -0.1", "--warp must not be negative"),
        (
            "--recipe modern --teacher-decay 0 --teacher-weight 0 --perturbation 0 --warp 0",
            "--adversary class-wise needs a teacher",
        ),
        ("--recipe quick --teacher-decay 0.9 --adversary class-wise", "--network modern"),
        ("--recipe modern --teacher-decay 1", "--teacher-decay must be at least 0 and below 1"),
        ("--recipe modern --confidence -0.1", "--confidence must be at least 0 and below 1"),
        ("--recipe modern --strong-until 1.01", "--strong-until must be between 0 and 1"),
        ("--recipe modern --alignment-until 1.1", "--alignment-until must be between 0 and 1"),
        ("--recipe modern --alignment-after -0.1", "--alignment-after must be between 0 and 1"),
        ("--recipe modern --alignment 1.5", "--alignment must be between 0 and 1"),
        ("--recipe modern --epoch-steps -1", "--epoch-steps must not be negative"),
        ("--recipe modern --batch-size 1", "--batch-size must be at least 2"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(monkeypatch, words, reason):
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        configure(monkeypatch, *words.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "unknown", "list", "none"])
def test_settings_of_another_version_are_refused(damage):
    values = to_dict(Config())
    if damage == "missing":
        del values["gamma"]
    elif damage == "unknown":
        values["warmth"] = 3
    else:
        values = [] if damage == "list" else None
    with pytest.raises(UserError) as caught:
        from_dict(values)
    named = {"missing": "gamma", "unknown": "warmth"}.get(damage, "not a mapping")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- the published numbers


SYSTEM_A = {
    "source": "svhn", "target": "mnist", "method": "dann", "network": "system-a", "image_size": 28,
    "normalisation": "unit", "dropout": 0.5, "max_norm": 0.0, "epochs": 100, "warm_start_epochs": 0,
    "batch_size": 128, "augmentation": "none", "optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-5,
    "lr_schedule": "annealed", "lr_alpha": 10.0, "lr_beta": 0.75, "gamma": 10.0, "lambda_max": 1.0,
    "lambda_update": "step", "domain_loss": "sum", "frozen_convolutions": (),
}  # fmt: skip
PAPER = {
    "method": "dann", "image_size": 32, "normalisation": "mean", "batch_size": 64, "augmentation": "none",
    "optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "lr_alpha": 10.0, "lr_beta": 0.75, "gamma": 10.0,
    "lambda_max": 1.0, "lambda_update": "step", "domain_loss": "mean", "warm_start_epochs": 0,
    "frozen_convolutions": (), "separate_domains": False,
}  # fmt: skip
SYSTEM_B = {
    "method": "dann", "network": "system-b", "image_size": 32, "normalisation": "unit", "dropout": 0.5,
    "batch_size": 32, "augmentation": "none", "optimizer": "sgd", "lr": 1e-3, "momentum": 0.9, "weight_decay": 0.0,
    "lr_schedule": "time-decay", "lr_decay": 1e-5, "gamma": 10.0, "lambda_max": 1.0, "lambda_update": "epoch",
}  # fmt: skip
PUBLISHED = {
    ("dann", None, None): SYSTEM_A,
    ("dann", "mnist", "usps"): {**SYSTEM_A, "source": "mnist", "target": "usps"},
    ("paper", "svhn", "mnist"): {**PAPER, "network": "paper-svhn", "lr_schedule": "constant"},
    ("paper", "mnist", "svhn"): {**PAPER, "network": "paper-mnist", "lr_schedule": "annealed"},
    ("paper", "synth", "svhn"): {**PAPER, "network": "paper-svhn", "lr_schedule": "annealed"},
    ("cnn-grl", None, None): {**SYSTEM_B, "source": "svhn", "target": "mnist"},
    ("cnn-grl", "mnist", "svhn"): {**SYSTEM_B, "source": "mnist", "target": "svhn"},
}


@pytest.mark.parametrize(("recipe", "source", "target"), PUBLISHED)
def test_recipes_hold_the_published_numbers(recipe, source, target):
    config = recipe_config(recipe, source, target)
    for name, value in PUBLISHED[recipe, source, target].items():
        assert getattr(config, name) == value, name


def test_what_the_papers_leave_open_is_set():
    """Dropout and a norm limit are there for the SVHN net, without values; a warm start freezes some convolutions."""
    svhn, mnist = recipe_config("paper", "svhn", "mnist"), recipe_config("paper", "mnist", "svhn")
    assert svhn.dropout > 0
    assert svhn.max_norm > 0
    assert mnist.dropout == 0
    assert mnist.max_norm == 0
    grl = recipe_config("cnn-grl")
    assert grl.warm_start_epochs > 0
    assert grl.frozen_convolutions
    assert set(grl.frozen_convolutions) < {1, 2, 3, 4}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_within_their_own_ranges(name):
    for source, target in ((None, None), ("mnist", "usps"), ("synth", "svhn")):
        config = recipe_config(name, source, target)
        check(config)
        assert config.recipe == name
        assert (source, target) in ((config.source, config.target), (None, None))
