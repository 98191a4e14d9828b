"""Every setting of training, and the recipes: the only place where a setting has a value.

A recipe is a `Config`; each of its fields is a flag of `main.py`, and the whole is saved with every run.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

METHODS = ("dann", "source-only", "target-only")
NORMALISATIONS = ("unit", "mean", "per-image")


def _setting(default: Any, group: str, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"group": group, "help": help, "choices": choices})


@dataclass(frozen=True)
class ModernConfig:
    """What the recipe `modern` has besides."""

    adversary: str = _setting(
        "class-wise", "gradient reversal in `modern`",
        "the discriminator tells the domains apart on the whole, or given the class",
        choices=("marginal", "class-wise"),
    )  # fmt: skip
    target_strong_share: float = _setting(
        0.25, "augmentation in `modern`", "share of unlabelled images that strong augmentation changes strongly"
    )
    strong_until: float = _setting(
        0.67, "augmentation in `modern`", "progress p at which milder changes replace strong augmentation; 1: never"
    )
    teacher_decay: float = _setting(
        0.99, "EMA teacher", "share of the weights' moving average that stays; the average is tested and kept"
    )
    teacher_views: str = _setting(
        "weak", "EMA teacher",
        "what it labels: the image changed weakly, or both that and the one in training, averaged",
        choices=("weak", "both"),
    )  # fmt: skip
    teacher_weight: float = _setting(1.0, "EMA teacher", "weight of the loss on its pseudo-labels")
    teacher_start: float = _setting(0.15, "EMA teacher", "progress p at which that loss begins")
    confidence: float = _setting(0.5, "EMA teacher", "probability above which a pseudo-label counts")
    perturbation: float = _setting(
        3.0, "EMA teacher", "l2 norm by which target images are changed to be predicted worse; 0: none"
    )
    warp: float = _setting(0.2, "EMA teacher", "l2 norm by which the affine map of a target image changes likewise")
    alignment: float = _setting(
        1.0, "EMA teacher", "how far the class shares of pseudo-labels are drawn towards equal ones, 0 to 1"
    )
    alignment_until: float = _setting(
        0.5, "EMA teacher", "progress p from which on they are drawn by alignment-after; 1: never"
    )
    alignment_after: float = _setting(0.5, "EMA teacher", "how far they are drawn from there on, 0 to 1")


@dataclass(frozen=True)
class Config:
    """All settings of a training run; the defaults are the recipe `dann`.

    `dann` is plain gradient reversal, with one setting for every pair: a small network whose batch norm keeps each
    domain's own statistics, the λ_p of the paper, and a domain loss in which the source's classes count alike.
    """

    recipe: str = _setting("dann", "what to train", "named set of hyper-parameters")
    source: str = _setting("svhn", "what to train", "domain with labels")
    target: str = _setting("mnist", "what to train", "domain without labels")
    method: str = _setting(
        "dann", "what to train", "gradient reversal, or its lower or upper bound with the same network and steps",
        choices=METHODS,
    )  # fmt: skip
    seed: int = _setting(0, "what to train", "seed of weights, order, dropout and augmentation")

    network: str = _setting("small", "network", "architecture")
    normalisation: str = _setting(
        "per-image", "network",
        "unit: [0, 1]; mean: less the mean pixel of both training sets; per-image: zero mean and unit variance each",
        choices=NORMALISATIONS,
    )  # fmt: skip
    dropout: float = _setting(0.0, "network", "dropout probability")
    max_norm: float = _setting(0.0, "network", "bound on the l2 norm of each unit's incoming weights; 0: none")

    epochs: int = _setting(24, "schedule", "passes over the larger set, or epochs of set length; p runs from 0 to 1")
    warm_start_epochs: int = _setting(0, "schedule", "passes on source labels alone before these")
    frozen_convolutions: tuple[int, ...] = _setting(
        (), "schedule", "convolutions (from 1) that stay as the warm start left them"
    )
    epoch_steps: int = _setting(0, "schedule", "steps of an epoch; 0: one pass over the larger set")
    batch_size: int = _setting(64, "schedule", "images of each domain in a step")
    augmentation: str = _setting(
        "affine", "schedule",
        "random change of training images; strong: shape, neighbours, blur, inversion, background, noise, erasing",
        choices=("none", "affine", "strong"),
    )  # fmt: skip
    label_smoothing: float = _setting(0.0, "schedule", "share of a source label spread over all classes")

    optimizer: str = _setting("adamw", "optimiser", "update rule", choices=("sgd", "adamw"))
    lr: float = _setting(2e-3, "optimiser", "learning rate μ_0")
    momentum: float = _setting(0.9, "optimiser", "momentum (SGD) or β₁ (AdamW)")
    weight_decay: float = _setting(0.01, "optimiser", "l2 penalty (SGD) or decoupled decay (AdamW)")
    lr_schedule: str = _setting(
        "cosine", "optimiser",
        "annealed: lr/(1+10p)^0.75; cosine: rise and half cosine; time-decay: lr/(1+decay·step)",
        choices=("annealed", "constant", "cosine", "time-decay"),
    )  # fmt: skip
    lr_decay: float = _setting(0.0, "optimiser", "decay of the time-decay rate, per step")
    on_nan: str = _setting(
        "stop", "optimiser", "a step whose gradient is not finite ends the run, or is left out",
        choices=("stop", "skip"),
    )  # fmt: skip

    lambda_max: float = _setting(1.0, "gradient reversal", "λ_max in λ_p = λ_max · (2/(1+exp(−10p)) − 1)")
    lambda_schedule: str = _setting(
        "rising", "gradient reversal", "rising: λ_p as above; rise-and-fall: times (1 + cos πp) / 2",
        choices=("rising", "rise-and-fall"),
    )  # fmt: skip
    lambda_update: str = _setting("step", "gradient reversal", "how often λ_p changes", choices=("step", "epoch"))
    clip_norm: float = _setting(
        0.0, "gradient reversal", "bound on the whole gradient's l2 norm while reversing; 0: none"
    )
    balance_classes: bool = _setting(
        True, "gradient reversal", "in the domain loss the source's classes count alike, not its images"
    )
    domain_loss: str = _setting(
        "sum", "gradient reversal", "the domains' mean losses are summed (chance: 2·ln 2) or averaged (chance: ln 2)",
        choices=("sum", "mean"),
    )  # fmt: skip

    precision: str = _setting(
        "auto", "machine", "auto: bf16 autocast where the machine has the instructions",
        choices=("auto", "fp32", "bf16"),
    )  # fmt: skip

    modern: ModernConfig | None = None


def _quick(source: str, target: str) -> Config:
    """`dann` on the built-in pair with a short schedule: about a minute on two cores."""
    return Config(recipe="quick", source="synth", target="optdigits", epochs=4, momentum=0.5)


def _system_a(source: str, target: str) -> Config:
    """System A, the PyTorch scripts that students usually meet first, literally.

    The paper's SVHN network at 28×28, its annealed rate and λ_p; the domain losses are summed.
    """
    return Config(
        recipe="system-a",
        network="system-a",
        normalisation="unit",
        dropout=0.5,
        epochs=100,
        batch_size=128,
        augmentation="none",
        optimizer="sgd",
        lr=0.01,
        weight_decay=1e-5,
        lr_schedule="annealed",
        balance_classes=False,
    )


def _paper(source: str, target: str) -> Config:
    """The paper's settings (Ganin et al., JMLR 17(59), 2016, section 5.2.4) for a pair of domains.

    Note: not given in the paper and chosen here: 300 epochs, dropout 0.5 and max-norm 4 in the SVHN net's
    fully connected layers (the paper says "dropout and l2-norm restriction" without values).
    """
    small = source in ("mnist", "usps", "optdigits")
    return dataclasses.replace(
        _system_a(source, target),
        recipe="paper",
        network="paper-mnist" if small else "paper-svhn",
        normalisation="mean",
        dropout=0.0 if small else 0.5,
        max_norm=0.0 if small else 4.0,
        epochs=300,
        batch_size=64,
        weight_decay=0.0,
        # JMLR, section 5.2.4: the SVHN → MNIST pair alone is trained without annealing.
        lr_schedule="constant" if (source, target) == ("svhn", "mnist") else "annealed",
        domain_loss="mean",
    )


def _cnn_grl(source: str, target: str) -> Config:
    """System B: a CNN trained on the source, then retrained with reversal, its inner convolutions frozen.

    Note: the published slice of layers to freeze leaves the first convolution free; so do we.
    """
    return dataclasses.replace(
        _system_a(source, target),
        recipe="cnn-grl",
        network="system-b",
        warm_start_epochs=100,
        frozen_convolutions=(2, 3, 4),
        batch_size=32,
        lr=1e-3,
        weight_decay=0.0,
        lr_schedule="time-decay",
        lr_decay=1e-5,
        lambda_update="epoch",
        domain_loss="mean",
    )


def _modern(source: str, target: str) -> Config:
    """EMA teacher and class-wise reversal: one setting for every pair (docs/modern.md)."""
    return Config(
        recipe="modern",
        network="modern",
        epochs=9,
        epoch_steps=180,
        batch_size=128,
        augmentation="strong",
        label_smoothing=0.1,
        weight_decay=0.05,
        lambda_max=0.3,
        lambda_schedule="rise-and-fall",
        balance_classes=False,
        modern=ModernConfig(),
    )


RECIPES: dict[str, Callable[[str, str], Config]] = {
    "dann": lambda source, target: Config(),
    "quick": _quick,
    "system-a": _system_a,
    "paper": _paper,
    "cnn-grl": _cnn_grl,
    "modern": _modern,
}


def recipe_config(name: str, source: str | None = None, target: str | None = None) -> Config:
    """The recipe's settings for a pair of domains; without a pair, for the recipe's own."""
    config = RECIPES[name](source or "svhn", target or "mnist")
    return dataclasses.replace(config, source=source or config.source, target=target or config.target)


def all_settings(config: Config) -> dict[str, Any]:
    """The settings by name, those of `modern` beside the others."""
    values = vars(config) | (vars(config.modern) if config.modern else {})
    return {name: value for name, value in values.items() if name != "modern"}


def to_dict(config: Config) -> dict[str, Any]:
    """The settings as plain values that JSON keeps."""
    values = dataclasses.asdict(config)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`; raises ValueError, naming them, when the fields are not those of this version."""
    if not isinstance(values, dict):
        raise ValueError("no settings by name")
    modern = values.get("modern")
    for kind, given in ((Config, values), (ModernConfig, modern)):
        names = {item.name for item in dataclasses.fields(kind)}
        if given is not None and names != set(given):
            raise ValueError(", ".join(sorted(names ^ set(given))))
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Config(**{**values, "modern": None if modern is None else ModernConfig(**modern)})
