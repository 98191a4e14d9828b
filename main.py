"""Train a network to read the target domain without its labels, by gradient reversal.

    python main.py                                      # SVHN -> MNIST, recipe dann
    python main.py --recipe quick                       # synth -> optdigits, needs no download, a minute on two cores

The second command takes a minute and reads 79.7 % ± 5.9 of the handwritten digits (five seeds), where the same network
without reversal reads 69.3 % ± 3.5: results/synth-optdigits.

Writes a run folder: config.json, metrics.jsonl, result.json, last.pt, model.safetensors, tensorboard/.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import shlex
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data_loader import (
    DOMAINS,
    DigitSet,
    PairedLoader,
    Preprocessing,
    limit,
    preprocessing_for,
    seed_of,
)
from model import CLASSES, DANN, NETWORKS, balancing_weights, domain_loss, predicted_target
from utils import distributed, machine
from utils.board import Board
from utils.checkpoint import load_checkpoint, save_checkpoint, save_weights
from utils.cli import Interrupted, UserError, run_script, script_parser
from utils.config import (
    Config,
    add_config_arguments,
    config_from_arguments,
    from_dict,
    recipe_config,
    to_dict,
)
from utils.distributed import ALONE
from utils.files import make_folder, write_json
from utils.mean_teacher import MeanTeacher
from utils.optimisation import freeze, gradient_norms, limit_norms, make_optimizer
from utils.records import epoch_record, images_per_step, label_free_signals, result_record
from utils.run_log import RunLog, SilentLog, epoch_line, say
from utils.schedules import learning_rate, reversal_weight
from valid import Evaluation, evaluate, load_side_by_side, predict

LOG_EVERY_STEPS = 50
DRY_RUN_IMAGES = 256
SIGNAL_IMAGES = 2000
COLLAPSED_SHARE = 0.01  # a class that fewer target images are read as has been lost
OUTCOMES = ("loss_label", "loss_domain", "domain_accuracy", "loss_teacher", "teacher_share")  # of a step
CHECKPOINT_KEYS = {
    *("about", "config", "model", "teacher", "optimizer", "epoch", "step", "steps_per_epoch", "sums"),
    *("seconds", "train_seconds", "command", "dry_run", "rng"),
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """What a run reads: labelled images, unlabelled target images, and the two test sets that only the log sees."""

    labelled: DigitSet
    target_images: Tensor
    source_test: DigitSet
    target_test: DigitSet
    marks: dict[str, str]
    checksums: dict[str, str]
    steps: int  # optimiser steps an epoch: as asked for, or one pass over the larger set; the same for every method


def load_pair(config: Config, data_dir: Path, download: bool, dry_run: bool) -> Pair:
    """Read both domains, fetching what is missing when `download` allows it."""
    keys = [(name, split) for name in (config.source, config.target) for split in ("train", "test")]
    sets = load_side_by_side(keys, data_dir, download)
    for digits in sets.values():
        if digits.mark != DOMAINS[digits.domain].title:
            say(f"note: the {digits.split} file of {digits.domain} is not the official one; results say: {digits.mark}")
    marks = {
        "source_mark": sets[config.source, "train"].mark,
        "target_mark": sets[config.target, "train"].mark,
        "source_test_mark": sets[config.source, "test"].mark,
        "target_test_mark": sets[config.target, "test"].mark,
    }
    checksums = {f"{digits.domain}/{file}": md5 for digits in sets.values() for file, md5 in digits.checksums.items()}
    if dry_run:
        sets = {key: limit(digits, DRY_RUN_IMAGES) for key, digits in sets.items()}
    source, target = sets[config.source, "train"], sets[config.target, "train"]
    return Pair(
        labelled=target if config.method == "target-only" else source,
        target_images=target.images,
        source_test=sets[config.source, "test"],
        target_test=sets[config.target, "test"],
        marks=marks,
        checksums=checksums,
        steps=config.epoch_steps or -(-max(len(source), len(target)) // config.batch_size),
    )


class Losses(nn.Module):
    """The forward half of a training step, in one module: what `--compile` compiles and several processes share.

    Args:
        model: the network; its weights are trained.
        config: the settings of the losses count here.
        class_weights: how much a source image of each class counts in the domain loss, (10,); None: all alike.
    """

    def __init__(self, model: DANN, config: Config, class_weights: Tensor | None = None):
        super().__init__()
        self.model, self.config, self.class_weights = model, config, class_weights

    def forward(
        self,
        x_s: Tensor,
        y_s: Tensor,
        x_t: Tensor | None,
        lambda_p: float | Tensor,
        q_t: Tensor | None = None,
        teaches: bool = False,
    ) -> tuple[Tensor, ...]:
        """OUTCOMES: label loss, domain loss, domain accuracy, loss on the teacher's labels, share of those that count.

        Without target images all but the first are 0; accuracy and share are in [0, 1].

        Args:
            q_t: the teacher's class probabilities of the target images; None: there is no teacher.
            teaches: whether the teacher's labels count already.

        Shape: (B, C, H, W), (B,), (B, C, H, W), (), (B, 10) -> five of ()
        """
        model, config = self.model, self.config
        if x_t is None:
            loss_label = F.cross_entropy(model(x_s), y_s, label_smoothing=config.label_smoothing)
            return loss_label, *torch.zeros_like(loss_label).expand(4)
        if config.separate_domains:
            f_s, f_t = model.extractor(x_s), model.extractor(x_t)
        else:
            f_s, f_t = model.extractor(torch.cat((x_s, x_t))).split(len(x_s))
        loss_label = F.cross_entropy(model.classifier(f_s), y_s, label_smoothing=config.label_smoothing)

        # Self-training on the labels of which the teacher is sure (French et al. 2018; FixMatch, Sohn et al. 2020).
        loss_teacher = share = torch.zeros_like(loss_label)
        if q_t is not None:
            confidence, label = q_t.max(1)
            sure = (confidence > config.confidence).float()
            share = sure.mean()
            if teaches:
                loss_teacher = (sure * F.cross_entropy(model.classifier(f_t), label, reduction="none")).mean()

        # λ_p scales the gradient that reaches the extractor; the discriminator learns with weight 1.
        classes = None
        if config.adversary == "class-wise":  # the domain given the class (MADA, Pei et al. 2018)
            classes = torch.cat((F.one_hot(y_s, CLASSES), q_t))
        d_s, d_t = model.discriminator(torch.cat((f_s, f_t)), lambda_p, classes).split(len(x_s))
        # Domains whose classes differ in size are misread once they are alike (Tachet des Combes et al. 2020).
        weights = None if self.class_weights is None else self.class_weights[y_s]
        loss_domain = domain_loss(d_s, 0, weights) + domain_loss(d_t, 1)
        if config.domain_loss == "mean":
            loss_domain = loss_domain / 2
        hits = torch.cat((~predicted_target(d_s), predicted_target(d_t)))
        return loss_label, loss_domain, hits.float().mean(), loss_teacher, share


def always_adapts(config: Config) -> bool:
    """Whether every step of the run has a domain loss."""
    return config.method == "dann" and not config.warm_start_epochs


class Trainer:
    """The state of a run that a checkpoint keeps, and the training step."""

    def __init__(
        self,
        config: Config,
        pair: Pair,
        preprocess: Preprocessing,
        device: torch.device,
        folder: Path,
        processes: distributed.Processes = ALONE,
        compiled: bool = False,
    ):
        self.config, self.pair, self.device, self.folder, self.processes = config, pair, device, folder, processes
        self.precision, self.compiled = machine.choose_precision(config.precision, device), compiled
        torch.manual_seed(seed_of(config.seed))
        self.model = DANN(config.network, config.dropout).to(device, memory_format=torch.channels_last)
        if processes.count > 1:
            distributed.join_batch_norms(self.model)
        self.teacher = None
        if config.teacher_decay:
            self.teacher = MeanTeacher(
                self.model, config.teacher_decay, config.teacher_views, config.alignment, processes
            )
        class_weights = balancing_weights(pair.labelled.labels).to(device) if config.balance_classes else None
        self.losses = Losses(self.model, config, class_weights)
        if processes.count > 1:
            # In a warm start and for the bounds the discriminator gets no gradient.
            self.losses = DistributedDataParallel(
                self.losses,
                process_group=distributed.gradient_group(),
                find_unused_parameters=not always_adapts(config),
            )
        if compiled:
            self.losses = torch.compile(self.losses)
        self.optimizer = make_optimizer(self.model, config, device)
        self.loader = PairedLoader(
            pair.labelled,
            pair.target_images,
            config.batch_size,
            config.seed,
            preprocess,
            config.augmentation,
            device,
            pair.steps,
            processes.share(config.batch_size),
            two_views=config.method == "dann" and self.teacher is not None,
            target_strong_share=config.target_strong_share,
        )
        self.about = {
            "config": to_dict(config),
            "preprocessing": dataclasses.asdict(preprocess),
            **pair.marks,
        }
        self.epochs = config.warm_start_epochs + config.epochs
        self.epoch = self.step = 0  # the next step to do: its epoch, and its number within the epoch
        self.train_seconds = self.seconds = 0.0
        self.sums = torch.zeros(len(OUTCOMES) + 1, device=device)  # of this epoch's steps: outcomes, and their number
        self.steps_done = 0  # by this process
        self.stop_requested = False
        self.command, self.dry_run = machine.command_line(), False
        self.resume_command = f"{processes.launcher} {machine.script()} --resume {shlex.quote(str(folder))}"

    @property
    def adapts(self) -> bool:
        """Whether this epoch trains with gradient reversal: not in a warm start, nor for the bounds."""
        return self.config.method == "dann" and self.epoch >= self.config.warm_start_epochs

    @property
    def outcomes(self) -> tuple[str, ...]:
        """Those of OUTCOMES that this epoch has."""
        if not self.adapts:
            return OUTCOMES[:1]
        return OUTCOMES if self.teacher else tuple(name for name in OUTCOMES if "teacher" not in name)

    @property
    def tested_model(self) -> DANN:
        """The network that is tested and kept: the teacher where there is one."""
        return self.teacher.model if self.teacher else self.model

    def train_step(
        self, x_s: Tensor, y_s: Tensor, x_t: Tensor, lambda_p: float, mu_p: float, teaches: bool = False
    ) -> Tensor:
        """One optimiser step (paper, section 3, equations 4 to 6); returns OUTCOMES.

        Args:
            x_s, y_s, x_t: source images and labels, target images, as the paired loader gives them.
            lambda_p: λ_p ≥ 0, the weight of the reversed gradient.
            mu_p: learning rate μ_p.
            teaches: whether the teacher's labels count.

        Shape: (B, C, H, W), (B,), (B, C, H, W) or, with a teacher, (2, B, C, H, W) -> (5,)
        """
        config, model, optimizer = self.config, self.model, self.optimizer
        q_t = None
        with machine.autocast(self.device, self.precision):
            if self.adapts and self.teacher:
                x_t, weak_t = x_t
                moves = (config.perturbation, config.warp) if teaches else ()
                q_t, x_t = self.teacher.label(weak_t, x_t, *moves)
            # A tensor, because a compiled step would take each number for a step of its own.
            factor = torch.tensor(lambda_p) if self.compiled else lambda_p
            outcome = self.losses(x_s, y_s, x_t if self.adapts else None, factor, q_t, teaches)
        loss_label, loss_domain, _, loss_teacher, _ = outcome
        for group in optimizer.param_groups:
            group["lr"] = mu_p
        optimizer.zero_grad(set_to_none=True)
        (loss_label + loss_domain + config.teacher_weight * loss_teacher).backward()
        if self.adapts and config.clip_norm:  # the reversed loss has no bound, its gradient can explode
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        if config.max_norm:
            limit_norms(model, config.max_norm)
        if self.teacher:
            self.teacher.follow(model)
        return self.processes.mean_(torch.stack(outcome).detach())

    def train_epoch(self, log: RunLog) -> None:
        """All remaining steps of the current epoch."""
        config, steps = self.config, self.loader.steps
        warm = self.epoch < config.warm_start_epochs
        phase_epoch = self.epoch - (0 if warm else config.warm_start_epochs)
        if self.step == 0:
            torch.manual_seed(seed_of(config.seed, self.epoch, 2, *self.processes.own_seed))  # dropout
            self.sums.zero_()
            if phase_epoch == 0:
                self.optimizer.state.clear()  # after a warm start this is a new training: no old momentum
        if self.adapts:
            freeze(self.model, config.frozen_convolutions)
        self.model.train()
        title = f"epoch {self.epoch + 1}/{self.epochs}"
        bar = None if self.processes.writes else True  # tqdm's disable: None is silent where there is no terminal
        # Strongly changed images are not what is tested; the last steps make up for it (He et al., arXiv 1909.09148).
        mild_from = math.inf
        if config.augmentation == "strong" and not warm:
            mild_from = (config.strong_until * config.epochs - phase_epoch) * steps
        batches = self.loader.epoch(self.epoch, self.step, mild_from)
        for x_s, y_s, x_t in tqdm(batches, title, steps, False, initial=self.step, disable=bar):
            # Progress p in [0, 1) -> weight λ_p of the reversed gradient, learning rate μ_p (paper, section 4).
            phase_step = phase_epoch * steps + self.step
            p = 0.0 if warm else phase_step / (config.epochs * steps)
            p_lambda = p if config.lambda_update == "step" else phase_epoch / config.epochs
            lambda_p = reversal_weight(config, p_lambda) if self.adapts else 0.0
            mu_p = learning_rate(config, p, phase_step)

            if self.teacher:
                # Sure labels need less alignment, which pulls at classes that are not alike in size.
                self.teacher.alignment = config.alignment if p < config.alignment_until else config.alignment_after
            outcome = self.train_step(x_s, y_s, x_t, lambda_p, mu_p, self.adapts and p >= config.teacher_start)
            self.sums += torch.cat((outcome, outcome.new_ones(1)))

            step = self.epoch * steps + self.step
            # On the CPU there is nothing to wait for; elsewhere looking at the losses waits for the device.
            if step % LOG_EVERY_STEPS == 0 or self.device.type == "cpu":
                values = dict(zip(OUTCOMES, outcome.tolist(), strict=True))
                self.check_loss(
                    values["loss_label"], values["loss_domain"], f", lambda_p {lambda_p:.4g}, learning rate {mu_p:.4g}"
                )
            if step % LOG_EVERY_STEPS == 0:
                log.scalars(step, {"schedule/p": p, "schedule/lambda_p": lambda_p, "schedule/learning_rate": mu_p})
                log.scalars(step, {f"train/{name}": values[name] for name in self.outcomes})
                norms = gradient_norms(self.model)
                log.scalars(step, {f"gradient_norm/{name}": norm for name, norm in norms.items()})
            if step == 0:
                log.images("images/source", 0, x_s[:64])
                log.images("images/target", 0, (x_t[0] if self.loader.two_views else x_t)[:64])
            if not self.steps_done:
                say(f"first step {machine.seconds_since_start():.1f} s after the start")
            self.steps_done += 1
            self.step += 1
            if self.processes.any(self.stop_requested):
                self.stop_requested = True
                break

    def check_loss(self, loss_label: float, loss_domain: float, state: str = "") -> None:
        """Raise UserError when a loss is not finite; `state` says with what it came about."""
        if not math.isfinite(loss_label + loss_domain):
            step = self.epoch * self.loader.steps + self.step
            raise UserError(
                f"the loss is not finite at step {step} (epoch {self.epoch + 1}): "
                f"label loss {loss_label:.4g}, domain loss {loss_domain:.4g}{state}; "
                "try a smaller --lr or --precision fp32"
            )

    def check_weights(self) -> None:
        """Raise UserError when a weight is not finite, as the last step may have left it."""
        if not all(weight.isfinite().all() for weight in self.model.state_dict().values()):
            raise UserError(
                f"the weights are not finite after step {self.epoch * self.loader.steps + self.step}: "
                "try a smaller --lr or --precision fp32"
            )

    def save(self) -> None:
        """Write last.pt; a run that goes on from it ends with the same bits (CPU, fp32)."""
        self.check_weights()
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        rng = self.processes.gather(rng)
        if not self.processes.writes:
            return
        state = {
            "about": self.about,
            "config": to_dict(self.config),
            "model": self.model.state_dict(),
            "teacher": self.teacher and self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "steps_per_epoch": self.loader.steps,
            "sums": self.sums,
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "command": self.command,
            "dry_run": self.dry_run,
            "rng": rng,
        }
        save_checkpoint(self.folder / "last.pt", state)

    def load(self, state: dict) -> None:
        """Go on from what `save` wrote."""
        if (count := len(state["rng"])) != self.processes.count:
            launcher = distributed.Processes(count=count).launcher
            raise UserError(
                f"{self.folder} was trained by {count} processes, not {self.processes.count}: "
                f"resume it with `{launcher} {machine.script()} --resume …`"
            )
        if state["steps_per_epoch"] != self.loader.steps or state["about"] != self.about:
            raise UserError(f"{self.folder} was trained on other data: resume with the same --data-dir")
        self.model.load_state_dict(state["model"])
        if self.teacher:
            self.teacher.load_state_dict(state["teacher"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.sums = state["sums"].to(self.device)
        self.seconds, self.train_seconds = state["seconds"], state["train_seconds"]
        self.command = state["command"]
        rng = state["rng"][self.processes.rank]
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and self.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], self.device)


@contextlib.contextmanager
def stop_on_ctrl_c(trainer: Trainer) -> Iterator[None]:
    """Have the first Ctrl-C stop the training after its step; a second one ends at once."""

    def request_stop(signum, frame) -> None:
        trainer.stop_requested = True
        signal.signal(signum, signal.default_int_handler)

    # torchrun passes Ctrl-C on to its processes as SIGTERM.
    signals = (signal.SIGINT, signal.SIGTERM) if distributed.started_by_torchrun() else (signal.SIGINT,)
    previous = {number: signal.signal(number, request_stop) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(trainer: Trainer, preprocess: Preprocessing, log: RunLog) -> tuple[Evaluation, Evaluation]:
    """All epochs, each followed by a test on both domains for the log; returns the last test's results."""
    before = trainer.seconds
    started = time.perf_counter()
    tested = None
    board = Board(trainer, log) if trainer.processes.writes else None
    if board and not trainer.epoch and not trainer.step:
        board.embed(0, *board.features())

    while trainer.epoch < trainer.epochs:
        epoch_started = time.perf_counter()
        steps_before = trainer.step
        trainer.train_epoch(log)
        train_seconds = time.perf_counter() - epoch_started
        trainer.train_seconds += train_seconds
        if trainer.stop_requested:
            trainer.seconds = before + time.perf_counter() - started
            trainer.save()
            log.close()
            raise Interrupted(
                f"interrupted at epoch {trainer.epoch + 1}, step {trainer.step}: go on with `{trainer.resume_command}`"
            )
        images = images_per_step(trainer.config, trainer.adapts) * (trainer.step - steps_before)
        means = (trainer.sums[:-1] / trainer.sums[-1]).tolist()  # waits for the device, once an epoch
        outcome = dict(zip(OUTCOMES, means, strict=True))
        trainer.check_loss(outcome["loss_label"], outcome["loss_domain"])
        outcome = {name: outcome[name] if name in trainer.outcomes else None for name in OUTCOMES}
        trainer.epoch, trainer.step = trainer.epoch + 1, 0
        trainer.check_weights()

        tested = test(trainer, preprocess)
        trainer.seconds = before + time.perf_counter() - started
        if trainer.processes.writes:
            signals = target_signals(trainer, preprocess)
            record = epoch_record(trainer, outcome, tested) | signals
            record["images_per_second"] = images / train_seconds
            log.epoch(record)
            board.epoch(record, signals, tested[1])
            say(epoch_line(record, trainer.epochs, time.perf_counter() - epoch_started))
            if record["loss_domain"] is not None and signals["smallest_class_share"] < COLLAPSED_SHARE:
                warning = (
                    f"collapse at epoch {trainer.epoch}: one class is read in "
                    f"{signals['smallest_class_share']:.1%} of the target's training images"
                )
                say(f"warning: {warning}; should it stay, try a smaller --lambda-max")
                log.text(f"collapse/epoch_{trainer.epoch}", warning)
        trainer.save()
    return test(trainer, preprocess) if tested is None else tested  # None: resumed after its last epoch


def test(trainer: Trainer, preprocess: Preprocessing) -> tuple[Evaluation, Evaluation]:
    """The weights on both test sets, for the log; the process that writes does it while the others wait."""
    sets = (trainer.pair.source_test, trainer.pair.target_test)
    tested = ()
    if trainer.processes.writes:
        model, device, precision = trainer.tested_model, trainer.device, trainer.precision
        tested = tuple(evaluate(model, part, preprocess, device, precision) for part in sets)
    trainer.processes.wait()
    return tested


def target_signals(trainer: Trainer, preprocess: Preprocessing) -> dict[str, float]:
    """How adaptation fares, by unlabelled target training images, SIGNAL_IMAGES spread over the set."""
    images = trainer.loader.images_t  # resized already
    images = images[:: max(1, len(images) // SIGNAL_IMAGES)]
    return label_free_signals(predict(trainer.tested_model, images, preprocess, trainer.device, trainer.precision))


def parse_arguments() -> tuple[argparse.Namespace, dict]:
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
        "  python main.py --data-dir data --epochs 12     SVHN -> MNIST, a shorter schedule",
    )
    add_config_arguments(parser, defaults, tuple(DOMAINS))
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
        "--download",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fetch data that is missing (default: yes)",
    )
    group.add_argument("--dry-run", action="store_true", help=f"two epochs on {DRY_RUN_IMAGES} images: does it run?")
    args = parser.parse_args()
    settings = {key: vars(args).pop(key) for key in list(vars(args)) if hasattr(defaults, key)}
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads must be above 0, not {args.threads}")
    if args.resume and args.run_dir:
        parser.error("--resume goes on in its own folder: leave --run-dir out")
    return args, settings


def configure(
    args: argparse.Namespace, settings: dict, device: torch.device, processes: distributed.Processes = ALONE
) -> tuple[Config, dict | None]:
    """The settings of this run, precision resolved, and for a resumed one its checkpoint."""
    if "precision" in settings:
        settings = {**settings, "precision": machine.choose_precision(settings["precision"], device)}
    if not args.resume:
        defaults = recipe_config(settings.get("recipe", "dann"), settings.get("source"), settings.get("target"))
        config = config_from_arguments(settings, defaults)
        if args.dry_run:
            short = {"warm_start_epochs": min(1, config.warm_start_epochs), "epoch_steps": min(2, config.epoch_steps)}
            config = dataclasses.replace(config, epochs=2, **short)
        config = dataclasses.replace(config, precision=machine.choose_precision(config.precision, device))
        state = None
    else:
        state = load_checkpoint(args.resume / "last.pt")
        if missing := sorted(CHECKPOINT_KEYS - state.keys()):
            raise UserError(
                f"{args.resume / 'last.pt'} is no checkpoint of a run of this version (it lacks {', '.join(missing)}): "
                "name a folder that main.py wrote, or train again"
            )
        config = from_dict(state["config"])
        asked = config_from_arguments(settings, config)
        changed = [key for key in settings if getattr(asked, key) != getattr(config, key)]
        if changed:
            told = ", ".join(f"{key} is {getattr(config, key)} there, {getattr(asked, key)} here" for key in changed)
            raise UserError(
                f"--resume goes on with the settings of {args.resume} ({told}): leave them out, or start a new run"
            )
    with torch.device("meta"):  # shapes alone, no weights
        layers = len(DANN(config.network).extractor.convolutions())
    if any(number > layers for number in config.frozen_convolutions):
        raise UserError(f"--frozen-convolutions: the network {config.network} has {layers} convolutions")
    network = NETWORKS[config.network]
    if network.batch_normed and config.batch_size < 2:
        raise UserError(f"--batch-size must be at least 2 for the batch statistics of the network {config.network}")
    if config.batch_size % processes.count:
        raise UserError(f"--batch-size {config.batch_size} can't be split between {processes.count} processes")
    wants_teacher = {
        "--teacher-weight": config.teacher_weight,
        "--perturbation": config.perturbation,
        "--warp": config.warp,
        "--adversary class-wise": config.adversary == "class-wise",
    }
    if not config.teacher_decay and any(wants_teacher.values()):
        needs = next(flag for flag, wanted in wants_teacher.items() if wanted)
        raise UserError(f"{needs} needs a teacher: give a --teacher-decay above 0, e.g. 0.99")
    if config.adversary == "class-wise" and not network.class_wise:
        able = ", ".join(name for name, row in NETWORKS.items() if row.class_wise)
        raise UserError(f"--adversary class-wise needs a discriminator with a logit for each class: --network {able}")
    if config.image_size != network.image_size:
        raise UserError(
            f"the network {config.network} takes --image-size {network.image_size}, not {config.image_size}"
        )
    return config, state


def run_folder(args: argparse.Namespace, config: Config) -> Path:
    """The folder of this run, not yet made; a new run never goes into the folder of an old one."""
    if args.resume:
        return args.resume
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{config.source}-{config.target}-{config.recipe}-{config.method}-seed{config.seed}-{stamp}"
    folder = args.run_dir or Path("runs") / name
    if (folder / "last.pt").exists() or (folder / "result.json").exists():
        raise UserError(f"{folder} holds a run already: go on with `--resume {folder}`, or choose another --run-dir")
    return folder


def print_header(trainer: Trainer) -> None:
    """What the run is made with, on the screen."""
    config, pair, processes = trainer.config, trainer.pair, trainer.processes
    threads = f"{torch.get_num_threads()} threads"
    if processes.count > 1:
        threads += f" in each of {processes.count} processes"
    compiled = ", compiled" if trainer.compiled else ""
    say(f"{machine.header(trainer.device, trainer.precision)}{compiled}, {threads}")
    say(f"recipe {config.recipe}, method {config.method}, seed {config.seed}")
    say(f"labels of {pair.labelled.mark}: {len(pair.labelled):,} images")
    say(f"no labels of {pair.marks['target_mark']}: {len(pair.target_images):,} images")
    counts = {name: sum(w.numel() for w in part.parameters()) for name, part in trainer.model.parts().items()}
    say("parameters: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    say(f"{trainer.epochs} epochs of {pair.steps} steps; run folder {trainer.folder}")
    say(f"watch it: tensorboard --logdir {trainer.folder.parent}")


def finish(trainer: Trainer, source: Evaluation, target: Evaluation) -> None:
    """Write weights and result, print the table and last the JSON line."""
    save_weights(trainer.folder / "model.safetensors", trainer.tested_model.state_dict(), trainer.about)
    result = result_record(trainer, source, target)
    write_json(trainer.folder / "result.json", result)
    marks = trainer.pair.marks
    print(f"{'test set':28} {'accuracy':>9}  correct / total")
    for mark, tested in ((marks["source_test_mark"], source), (marks["target_test_mark"], target)):
        print(f"{mark:28} {tested.accuracy:9.2%}  {tested.correct} / {tested.total}")
    print(json.dumps({key: value for key, value in result.items() if key not in ("config", "data", "versions")}))


def main() -> None:
    args, settings = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = machine.choose_device(args.device)
    machine.keep_memory(device)
    if args.compile:
        machine.check_compiler(device)
    with distributed.join(device) as processes:
        config, state = configure(args, settings, device, processes)
        folder = run_folder(args, config)
        dry_run = state["dry_run"] if state else args.dry_run
        pair = processes.first_alone(lambda: load_pair(config, args.data_dir, args.download, dry_run))
        preprocess = preprocessing_for(config, (pair.labelled.images, pair.target_images))
        make_folder(folder)
        trainer = Trainer(config, pair, preprocess, device, folder, processes, args.compile)
        trainer.dry_run = dry_run
        if args.data_dir != Path("data"):
            trainer.resume_command += f" --data-dir {shlex.quote(str(args.data_dir))}"
        if state:
            trainer.load(state)
        print_header(trainer)
        if processes.writes and not args.resume:
            write_json(folder / "config.json", to_dict(config))
        first_step = trainer.epoch * pair.steps + trainer.step
        log = RunLog(folder, first_step, trainer.epoch) if processes.writes else SilentLog()
        log.text("config", "\n".join(f"    {key}: {value}" for key, value in to_dict(config).items()))
        with stop_on_ctrl_c(trainer):
            tested = train(trainer, preprocess, log)
        log.close()
        if processes.writes:
            finish(trainer, *tested)


if __name__ == "__main__":
    run_script(main)
