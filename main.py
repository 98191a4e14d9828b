"""Train a network to classify the target domain without its labels, by gradient reversal.

    python main.py                                      # SVHN -> MNIST, recipe dann
    python main.py --epochs 4                           # the same in a sixth of the time, for a first look
    python main.py --recipe quick                       # synth -> optdigits, needs no download, a minute on two cores

Writes a run folder: config.json, metrics.jsonl, result.json, last.pt, previous.pt, model.safetensors, tensorboard/.
"""

from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_loader import PairedLoader, seed_of
from digits.augmentation import same_views
from digits.domains import Pair, load_pair
from methods.classifier import Classifier, Evaluation, usage
from methods.modern import ModernObjective, modern_views
from methods.networks import build_network, on_device, preprocessing_for
from methods.optimisation import balancing_weights, freeze, has_finite_gradient, limit_norms, make_optimizer
from methods.options import DRY_RUN_IMAGES, configure, parse_arguments, resume_command, run_folder
from methods.recipes import Config, to_dict
from methods.run import Run, run_folder_made
from methods.schedules import learning_rate, reversal_weight
from methods.teacher import Teacher
from model import DANN, domain_accuracy, domain_loss, reverse_gradient
from utils import distributed, machine
from utils.checkpoint import save_weights
from utils.cli import Interrupted, StopRequest, run_script, stop_on_signals
from utils.distributed import Processes
from utils.files import write_json
from valid import evaluate
from watch.records import result_record
from watch.screen import print_header, print_result
from watch.watcher import Watcher

Losses = dict[str, Tensor]


class DannObjective(nn.Module):
    """What domain-adversarial training minimises (paper, section 3, equation 9).

    Args:
        class_weights: how much a source image of each class counts in the domain loss, (K,); None: all alike.
        reduction: of the two domains' losses, "sum" or "mean".
        label_smoothing: share of a source label spread over all classes.
    """

    def __init__(self, model: DANN, class_weights: Tensor | None, reduction: str, label_smoothing: float):
        super().__init__()
        self.model, self.class_weights = model, class_weights
        self.reduction, self.label_smoothing = reduction, label_smoothing

    def forward(self, x_s: Tensor, y_s: Tensor, x_t: Tensor, lambda_p: float) -> tuple[Losses, Losses]:
        """The losses by name, whose sum is minimised, and what else is logged.

        Shape: source images and labels (B, C, S, S), (B,), target images (B, C, S, S)
        """
        f_s, f_t = self.model.features(x_s, x_t)  # (B, F) each
        y_logits = self.model.classifier(f_s)
        # Back to the extractor the gradient of the domain loss goes times −λ_p; the discriminator learns with weight 1.
        f = reverse_gradient(torch.cat((f_s, f_t)), lambda_p)
        d_s, d_t = self.model.discriminator(f).split(len(x_s))  # (B,) each: the logit of "target"
        weights = None if self.class_weights is None else self.class_weights[y_s]
        losses = {
            "loss_label": F.cross_entropy(y_logits, y_s, label_smoothing=self.label_smoothing),
            "loss_domain": domain_loss(d_s, d_t, weights, self.reduction),
        }
        return losses, {"domain_accuracy": domain_accuracy(d_s, d_t)}


def step(run: Run, config: Config, losses: Losses, mu_p: float) -> None:
    """One optimiser step down the sum of the losses at the learning rate μ_p (paper, equations 4 to 6)."""
    for group in run.optimizer.param_groups:
        group["lr"] = mu_p
    run.optimizer.zero_grad(set_to_none=True)
    loss: Tensor = sum(losses.values())  # type: ignore[assignment]
    loss.backward()
    if config.on_nan == "skip" and not has_finite_gradient(run.model):
        run.skipped.append(run.steps_done)
        return
    if config.clip_norm and "loss_domain" in losses:  # the reversed loss has no bound, its gradient can explode
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.clip_norm)
    run.optimizer.step()
    if config.max_norm:
        limit_norms(run.model, config.max_norm)
    if run.teacher:
        run.teacher.follow(run.model)


def train(
    run: Run, config: Config, loader: PairedLoader, watcher: Watcher, processes: Processes, compiled: bool,
    stop: StopRequest,
) -> None:  # fmt: skip
    """All steps that the run still has; after each epoch a test of both domains for the log, and a checkpoint."""
    device, precision = watcher.classifier.device, watcher.classifier.precision
    warm, objective = config.warm_start_epochs, None
    while run.epoch < warm + config.epochs:
        first_epoch = 0 if run.epoch < warm else warm  # of this phase
        if objective is None or run.epoch == warm:
            objective = make_objective(run, config, loader.labels_s)
            if compiled:
                objective.compile()
            objective = processes.wrap(objective)
        if run.step == 0:
            torch.manual_seed(seed_of(config.seed, run.epoch, 3, *processes.own_seed))  # of dropout
            if run.epoch == first_epoch:
                run.optimizer.state.clear()  # after a warm start this is a new training: no old momentum
        run.model.train()
        watcher.start_clock(run)
        for x_s, y_s, x_t in watcher.progress_bar(run, loader.epoch(run.epoch, run.step)):
            steps = (run.epoch - first_epoch) * loader.steps + run.step
            p = 0.0 if run.epoch < warm else steps / (config.epochs * loader.steps)  # progress, from 0 to 1
            lambda_p, mu_p = reversal_weight(config, p), learning_rate(config, p, steps)
            with machine.autocast(device, precision):
                losses, others = objective(x_s, y_s, x_t, lambda_p)
            step(run, config, losses, mu_p)
            values = processes.means(losses | others)
            watcher.step(run, values, p, lambda_p, mu_p, x_s, x_t)
            run.count_step(values)
            if processes.any(stop.made):
                break
        watcher.stop_clock(run)
        if run.step == loader.steps:
            means = run.end_epoch()
            if processes.writes:
                watcher.epoch(run, means, *test(watcher.classifier, watcher.pair))
            processes.wait()
        run.save(device, processes)
        if processes.any(stop.made) and run.epoch < warm + config.epochs:
            watcher.close()
            where = f"interrupted at epoch {run.epoch + 1}, step {run.step}"
            raise Interrupted(f"{where}: go on with `{watcher.go_on}`", stop.exit_code)


class SourceOnlyObjective(nn.Module):
    """The label loss alone: of a warm start, and of the bounds. It has no discriminator, which gets no gradient."""

    def __init__(self, model: DANN, label_smoothing: float):
        super().__init__()
        self.extractor, self.classifier, self.label_smoothing = model.extractor, model.classifier, label_smoothing

    def forward(self, x_s: Tensor, y_s: Tensor, x_t: Tensor, lambda_p: float) -> tuple[Losses, Losses]:
        """As of `DannObjective`."""
        y_logits = self.classifier(self.extractor(x_s, "source"))
        if self.extractor.domain_norms:
            with torch.no_grad():
                self.extractor(x_t, "target")  # for the target's statistics, which take no label
        return {"loss_label": F.cross_entropy(y_logits, y_s, label_smoothing=self.label_smoothing)}, {}


def make_objective(run: Run, config: Config, labels: Tensor) -> nn.Module:
    """What the phase of the run that begins, or goes on, minimises: a warm start, or the training proper."""
    if run.epoch < config.warm_start_epochs or config.method != "dann":
        return SourceOnlyObjective(run.model, config.label_smoothing)
    freeze(run.model, config.frozen_convolutions)
    class_weights = balancing_weights(labels) if config.balance_classes else None
    if config.modern and run.teacher:
        first_step, steps = (n * run.steps_per_epoch for n in (config.warm_start_epochs, config.epochs))
        return ModernObjective(run.model, run.teacher, config, class_weights, first_step, steps)
    return DannObjective(run.model, class_weights, config.domain_loss, config.label_smoothing)


def test(classifier: Classifier, pair: Pair) -> tuple[Evaluation, Evaluation]:
    """The weights on both test sets, for the log."""
    return evaluate(classifier, pair.source_test), evaluate(classifier, pair.target_test)


def set_up(
    config: Config, pair: Pair, folder: Path, dry_run: bool, compiled: bool, device: torch.device, processes: Processes,
    pretrained: bool = False, download: bool = True,
) -> tuple[Run, PairedLoader, Classifier]:  # fmt: skip
    """A run at its start, the loader that feeds it, and the classifier that is tested and kept."""
    torch.manual_seed(seed_of(config.seed))
    model = build_network(config.network, config.dropout, len(pair.classes), pretrained, download)
    model = on_device(model, device)
    if processes.count > 1:
        distributed.join_batch_norms(model, device)
    teacher = None
    if config.modern:
        teacher = Teacher(model, config.modern.teacher_decay, len(pair.classes), processes)
    preprocess = preprocessing_for(config, (pair.source_images, pair.target_images))
    larger = max(len(pair.source_images), len(pair.target_images))
    steps = config.epoch_steps or -(-larger // config.batch_size)  # an epoch; the same for every method
    views = modern_views(config, config.modern, steps) if config.modern else same_views(config.augmentation)
    part = processes.part(config.batch_size)
    loader = PairedLoader(
        pair.labelled, pair.target_images, config.batch_size, config.seed, preprocess, views, device, steps, part
    )
    settings = to_dict(config)
    run = Run(
        folder=folder,
        model=model,
        optimizer=make_optimizer(model, config, device),
        teacher=teacher,
        config=settings,
        use=usage(config, preprocess, pair.classes, settings | pair.marks),
        data={"marks": pair.marks, "checksums": pair.checksums, "images": pair.counts},
        steps_per_epoch=steps,
        dry_run=dry_run,
        sessions=[machine.session(device, config.precision, compiled, processes.count)],
    )
    used = (preprocess, device, config.precision, pair.classes, config.source, config.target)
    return run, loader, Classifier(run.tested_model, *used)


def main() -> None:
    args, settings = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = machine.choose_device(args.device)
    machine.prepare(device)
    if args.compile:
        machine.check_compiler(device)
    with ExitStack() as held, distributed.join(device) as processes:
        config, state = configure(args, settings, device, processes)
        folder = processes.from_first(run_folder(args, config))
        dry_run = state["dry_run"] if state else args.dry_run
        most = DRY_RUN_IMAGES if dry_run else None
        target_only, form = config.method == "target-only", preprocessing_for(config)
        pair = processes.first_alone(
            lambda: load_pair(
                config.source, config.target, target_only, args.data_dir, args.download, most, form, args.common_classes
            )
        )
        if processes.writes:
            held.enter_context(run_folder_made(folder))
        run, loader, classifier = set_up(
            config, pair, folder, dry_run, args.compile, device, processes, args.pretrained, args.download
        )
        if state:
            run.load(state, device, processes)
        elif processes.writes:
            write_json(folder / "config.json", to_dict(config))
        print_header(run, config, pair, device)
        go_on = resume_command(args, folder, processes)
        watcher = Watcher(run, config, loader, pair, classifier, processes, go_on)
        with stop_on_signals() as stop:
            train(run, config, loader, watcher, processes, args.compile, stop)
        watcher.close()
        if processes.writes:
            source, target = watcher.tested or test(classifier, pair)  # the latter: resumed after its end
            save_weights(folder / "model.safetensors", run.tested_model.state_dict(), run.use)
            result = result_record(run, config, pair, source, target)
            if config.method == "source-only" and run.model.extractor.domain_norms:
                by_source = evaluate(classifier, pair.target_test, "source")  # as if it had seen no target image
                result["target_correct_by_source_statistics"] = by_source.correct
            write_json(folder / "result.json", result)
            print_result(result)


if __name__ == "__main__":
    run_script(main)
