"""The command line of main.py: a flag for each setting, those of the machine, and the checks of all."""

import argparse
import dataclasses
import math
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from digits.domains import DOMAINS, check_name, same_domain
from methods.modern import ClassWiseDiscriminator
from methods.networks import NETWORKS, build_network, input_shape
from methods.recipes import RECIPES, Config, ModernConfig, all_settings, from_dict, recipe_config
from methods.run import read_state
from utils import machine
from utils.checkpoint import PREVIOUS
from utils.cli import UserError, script_parser
from utils.distributed import Processes

DRY_RUN_IMAGES = 256
CHOICES = {"recipe": tuple(RECIPES)}
NAMES = {  # what the help says of settings that are no choice among few
    "source": f": {', '.join(DOMAINS)}, or a folder of pictures",
    "target": "; likewise",
    "network": f": {', '.join(NETWORKS)}, or torchvision:NAME",
}
POSITIVE = ("epochs", "batch_size", "lr")
NOT_NEGATIVE = (
    *("warm_start_epochs", "weight_decay", "max_norm", "clip_norm", "lr_decay", "lambda_max", "seed", "epoch_steps"),
    *("teacher_weight", "teacher_start", "perturbation", "warp"),
)
UP_TO_ONE = ("alignment", "alignment_until", "alignment_after", "strong_until", "target_strong_share")
BELOW_ONE = ("momentum", "dropout", "label_smoothing", "teacher_decay", "confidence")


def parse_arguments() -> tuple[argparse.Namespace, dict[str, Any]]:
    """The options of the machine, and the settings that were given on the command line."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--recipe", "--source", "--target"):
        first.add_argument(flag)
    chosen, _ = first.parse_known_args()
    try:
        defaults = recipe_config(chosen.recipe or "dann", chosen.source, chosen.target)
    except KeyError:
        defaults = recipe_config("dann")  # the full parser says what is wrong

    parser = script_parser(
        description="Train on labelled source and unlabelled target images by gradient reversal. "
        f"The defaults shown are those of the recipe {defaults.recipe}.",
        epilog="examples:\n"
        "  python main.py --recipe quick                  built-in data, about a minute on two cores\n"
        "  python main.py --data-dir data --epochs 4      SVHN -> MNIST, a first look\n"
        "  python main.py --source scans --target phone   two folders of pictures of your own",
    )
    add_config_arguments(parser, defaults)
    group = parser.add_argument_group("run")
    machine.add_device_argument(group)
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads a process (default: torch's choice)")
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the step (default: no)"
    )
    group.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="(default: %(default)s)")
    group.add_argument("--run-dir", type=Path, metavar="DIR", help="run folder (default: runs/<pair>-<recipe>-…)")
    group.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    group.add_argument(
        "--download", action=argparse.BooleanOptionalAction, default=True, help="fetch missing data (default: yes)"
    )
    group.add_argument("--common-classes", action="store_true", help="leave out classes that only one domain has")
    group.add_argument("--pretrained", action="store_true", help="start from ImageNet weights, for torchvision:NAME")
    group.add_argument("--dry-run", action="store_true", help=f"two epochs on {DRY_RUN_IMAGES} images: does it run?")
    args = parser.parse_args()
    names = {item.name for kind in (Config, ModernConfig) for item in dataclasses.fields(kind)}
    settings = {key: vars(args).pop(key) for key in list(vars(args)) if key in names}
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads must be above 0, not {args.threads}")
    if args.resume and args.pretrained:
        parser.error("--resume goes on with the weights of its folder: leave --pretrained out")
    if args.resume and args.run_dir:
        parser.error("--resume goes on in its own folder: leave --run-dir out")
    return args, settings


def add_config_arguments(parser: argparse.ArgumentParser, defaults: Config) -> None:
    """Give a parser one flag a setting. Only flags that were given appear in the parsed namespace."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    owners: list[Config | ModernConfig] = [defaults, defaults.modern] if defaults.modern else [defaults]
    for owner in owners:
        for item in dataclasses.fields(owner):
            if not item.metadata:
                continue
            name, about = item.metadata["group"], item.metadata
            group = groups[name] = groups.get(name) or parser.add_argument_group(name)
            default = getattr(owner, item.name)
            shown = " ".join(map(str, default)) or "none" if isinstance(default, tuple) else default
            options: dict[str, Any] = {
                "default": argparse.SUPPRESS,
                "help": f"{about['help']}{NAMES.get(item.name, '')} (default: {shown})".replace("%", "%%"),
            }
            if isinstance(default, bool):
                options |= {"action": argparse.BooleanOptionalAction}
            elif isinstance(default, tuple):
                options |= {"type": int, "nargs": "*", "metavar": "N"}
            else:
                allowed = CHOICES.get(item.name, about["choices"])
                metavar = None if allowed else {int: "N", float: "X"}.get(type(default))
                options |= {"type": type(default), "choices": allowed, "metavar": metavar}
            group.add_argument(_flag(item.name), **options)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def with_settings(config: Config, settings: dict[str, Any]) -> Config:
    """A configuration with the settings that were given put in; raises UserError on a value out of range."""
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    settings |= {name: settings[name].rstrip("/") for name in ("source", "target") if name in settings}
    of_modern = {item.name for item in dataclasses.fields(ModernConfig)} & settings.keys()
    if of_modern:
        if config.modern is None:
            flags = ", ".join(sorted(map(_flag, of_modern)))
            raise UserError(f"{flags}: a setting of the recipe modern, not of {config.recipe}; give --recipe modern")
        modern = dataclasses.replace(config.modern, **{key: settings.pop(key) for key in of_modern})
        settings["modern"] = modern
    config = dataclasses.replace(config, **settings)
    check(config)
    return config


def check(config: Config) -> None:
    """Raise UserError for a setting out of its range, and for settings that don't go together."""
    for name, value in all_settings(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{_flag(name)} must be a finite number, not {value}")
        if name in POSITIVE and not value > 0:
            raise UserError(f"{_flag(name)} must be above 0, not {value}")
        if name in NOT_NEGATIVE and not value >= 0:
            raise UserError(f"{_flag(name)} must not be negative, it is {value}")
        if name in UP_TO_ONE and not 0 <= value <= 1:
            raise UserError(f"{_flag(name)} must be between 0 and 1, not {value}")
        if name in BELOW_ONE and not 0 <= value < 1:
            raise UserError(f"{_flag(name)} must be at least 0 and below 1, not {value}")
    for name in (config.source, config.target):
        check_name(name)
    if same_domain(config.source, config.target):
        raise UserError(
            f"source and target are both {config.source}: name two domains, e.g. --source svhn --target mnist"
        )
    with torch.device("meta"):  # shapes alone, no weights
        model = build_network(config.network)
        if config.network not in NETWORKS:  # a pass takes a second, and only there can the size be wrong
            try:
                model(torch.zeros(2, *input_shape(config.network)))
            except Exception as error:  # torchvision's networks say it in their own ways
                reason = " ".join(str(error).split())[:160]
                raise UserError(f"--network {config.network} can't take pictures of that size ({reason})") from None
    layers = len(model.extractor.convolutions())
    if any(not 1 <= number <= layers for number in config.frozen_convolutions):
        raise UserError(f"--frozen-convolutions counts from 1, and the network {config.network} has {layers}")
    batch_normed = any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in model.modules())
    if batch_normed and config.batch_size < 2:
        raise UserError(f"--batch-size must be at least 2 for the batch statistics of the network {config.network}")
    class_wise = isinstance(model.discriminator, ClassWiseDiscriminator)
    if config.modern and config.modern.adversary == "class-wise" and not class_wise:
        raise UserError(
            "--adversary class-wise needs a discriminator with a logit for each class: "
            "give --network modern, or --adversary marginal"
        )


def configure(
    args: argparse.Namespace, settings: dict[str, Any], device: torch.device, processes: Processes
) -> tuple[Config, dict[str, Any] | None]:
    """The settings of this run, precision resolved, and for a resumed one its checkpoint."""
    if "precision" in settings:
        settings = {**settings, "precision": machine.choose_precision(settings["precision"], device)}
    if args.resume:
        state = read_state(args.resume)
        try:
            config = from_dict(state["config"])
        except ValueError as error:
            raise UserError(
                f"{args.resume} was made by another version of this program ({error}): train again"
            ) from None
        before, asked = all_settings(config), all_settings(with_settings(config, settings))
        if changed := [key for key in before if before[key] != asked[key]]:
            differ = ", ".join(f"{key} is {before[key]} there, {asked[key]} here" for key in changed)
            raise UserError(
                f"--resume goes on with the settings of {args.resume} ({differ}): leave them out, or start a new run"
            )
    else:
        state = None
        defaults = recipe_config(settings.get("recipe", "dann"), settings.get("source"), settings.get("target"))
        config = with_settings(defaults, settings)
        config = dataclasses.replace(config, precision=machine.choose_precision(config.precision, device))
        if args.dry_run:
            warm, steps = min(1, config.warm_start_epochs), min(2, config.epoch_steps)
            config = dataclasses.replace(config, epochs=2, warm_start_epochs=warm, epoch_steps=steps)
    if config.batch_size % processes.count:
        raise UserError(f"--batch-size {config.batch_size} can't be split between {processes.count} processes")
    return config, state


def run_folder(args: argparse.Namespace, config: Config) -> Path:
    """The folder of this run, not yet made; a new run never goes into the folder of an old one."""
    if args.resume:
        return args.resume
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    source, target = (Path(name).resolve().name for name in (config.source, config.target))
    name = f"{source}-{target}-{config.recipe}-{config.method}-seed{config.seed}-{stamp}"
    folder = args.run_dir or Path("runs") / name
    if any((folder / name).exists() for name in ("last.pt", PREVIOUS, "result.json")):
        raise UserError(f"{folder} holds a run already: go on with `--resume {folder}`, or choose another --run-dir")
    return folder


def resume_command(args: argparse.Namespace, folder: Path, processes: Processes) -> str:
    """The command that goes on with this run, on the same data, device, threads and so on."""
    words = [*processes.launcher.split(), *machine.script(), "--resume", str(folder)]
    if args.data_dir != Path("data"):
        words += ["--data-dir", str(args.data_dir)]
    if args.device != "auto":
        words += ["--device", args.device]
    if args.threads:
        words += ["--threads", str(args.threads)]
    flags = {"--common-classes": args.common_classes, "--compile": args.compile, "--no-download": not args.download}
    words += [flag for flag, given in flags.items() if given]
    return shlex.join(words)
