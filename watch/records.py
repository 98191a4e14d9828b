"""What a run writes down: a record of each epoch, and of the whole run."""

from typing import Any

from digits.domains import Pair
from methods.classifier import Evaluation
from methods.recipes import Config
from methods.run import Run
from methods.schedules import reversal_weight
from watch.operations import operations_of_step


def epoch_record(
    run: Run, config: Config, means: dict[str, float], source: Evaluation, target: Evaluation
) -> dict[str, Any]:
    """The epoch that has just ended: a line of metrics.jsonl.

    `lambda_p` and `learning_rate` are those of its last step, losses are means over its steps. A warm start and the
    bounds have no domain loss.
    """
    epochs = max(0, run.epoch - config.warm_start_epochs)
    last_p = (epochs * run.steps_per_epoch - 1) / (config.epochs * run.steps_per_epoch)
    return {
        "epoch": run.epoch,
        "p": epochs / config.epochs,
        "lambda_p": reversal_weight(config, last_p) if "loss_domain" in means else 0.0,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        **means,
        **accuracies(source, target),
        "seconds": run.seconds,
    }


def accuracies(source: Evaluation, target: Evaluation) -> dict[str, float | None]:
    """The accuracies of both tests, in [0, 1]; None where no image has a label, for JSON knows no nan."""
    tests = {"source_accuracy": source, "target_accuracy": target}
    return {name: tested.accuracy if tested.total else None for name, tested in tests.items()}


def seconds_to(records: list[dict]) -> dict[str, float | None]:
    """When the target test accuracy was first at least 90, 95 and 98 % after an epoch, in seconds; None for never."""
    reached = {}
    for percent in (90, 95, 98):
        times = (record["seconds"] for record in records if 100 * (record["target_accuracy"] or 0) >= percent)
        reached[str(percent)] = next(times, None)
    return reached


def images_per_step(config: Config, adapts: bool) -> int:
    """How many images pass through the network in a step."""
    return config.batch_size * (2 if adapts else 1)


def result_record(run: Run, config: Config, pair: Pair, source: Evaluation, target: Evaluation) -> dict[str, Any]:
    """The run in one record: what result.json holds.

    Command, machine and versions are those of its first part; `resumed` has those of the others, if there are any.
    """
    epochs = config.warm_start_epochs + config.epochs
    steps = epochs * run.steps_per_epoch
    adapted = config.epochs * run.steps_per_epoch if config.method == "dann" else 0
    classes = len(pair.classes)
    images = adapted * images_per_step(config, True) + (steps - adapted) * images_per_step(config, False)
    return {
        "kind": "training",
        **{key: getattr(config, key) for key in ("source", "target", "method", "recipe", "seed")},
        "epochs": epochs,
        **accuracies(source, target),
        "source_correct": source.correct,
        "source_total": source.total,
        "target_correct": target.correct,
        "target_total": target.total,
        "seconds": round(run.seconds, 2),
        "images_per_second": round(images / run.train_seconds, 1),
        **pair.marks,
        "dry_run": run.dry_run,
        "steps": steps,
        "skipped_steps": len(run.skipped),
        "operations": adapted * operations_of_step(config, True, classes)
        + (steps - adapted) * operations_of_step(config, False, classes),
        "seconds_to": seconds_to(run.records),
        "parameters": sum(w.numel() for w in run.model.parameters()),
        **run.sessions[0],
        "resumed": run.sessions[1:],
        "data": pair.checksums,
        "config": run.config,
    }
