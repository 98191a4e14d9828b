"""What a run writes down: a record of each epoch, and of the whole run."""

import json
from pathlib import Path

import torch
from torch import Tensor

from utils import machine
from utils.config import Config, to_dict
from utils.operations import operations_of_step
from utils.schedules import reversal_weight


def epoch_record(trainer, outcome: dict, tested: tuple) -> dict:
    """The epoch that has just ended: a line of metrics.jsonl. What `outcome`, its steps' mean, lacks is None there."""
    config = trainer.config
    source, target = tested
    p = max(0, trainer.epoch - config.warm_start_epochs) / config.epochs
    return {
        "epoch": trainer.epoch,
        "p": p,
        "lambda_p": 0.0 if outcome["loss_domain"] is None else reversal_weight(config, p),
        "learning_rate": trainer.optimizer.param_groups[0]["lr"],
        **outcome,
        "source_accuracy": source.accuracy,
        "target_accuracy": target.accuracy,
        "seconds": trainer.seconds,
    }


def seconds_to(metrics: Path) -> dict[str, float | None]:
    """When the target test accuracy was first at least 90, 95 and 98 % after an epoch, in seconds; None for never."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    reached = {}
    for percent in (90, 95, 98):
        times = (record["seconds"] for record in records if 100 * record["target_accuracy"] >= percent)
        reached[str(percent)] = next(times, None)
    return reached


def label_free_signals(probabilities: Tensor) -> dict[str, float]:
    """What predictions tell without labels: how sure they are, and whether they use all classes. (N, 10) -> values.

    `entropy`: mean entropy of a prediction, nats, 0 to ln 10; low when the network is sure, rightly or not.
    `diversity`: entropy of the mean prediction, nats; ln 10 = 2.303 when all classes are predicted alike often.
    `smallest_class_share`: share of images read as the class that is read least, in [0, 0.1].
    """
    mean = probabilities.mean(0)
    share = torch.bincount(probabilities.argmax(1), minlength=probabilities.shape[1]) / len(probabilities)
    return {
        "entropy": torch.special.entr(probabilities).sum(1).mean().item(),
        "diversity": torch.special.entr(mean).sum().item(),
        "smallest_class_share": share.min().item(),
    }


def images_per_step(config: Config, adapts: bool) -> int:
    """How many images pass through the network in a step."""
    return config.batch_size * (2 if adapts else 1)


def result_record(trainer, source, target) -> dict:
    """The run in one record: what result.json holds."""
    config = trainer.config
    steps = trainer.epochs * trainer.loader.steps
    adapted = config.epochs * trainer.loader.steps if config.method == "dann" else 0
    images = adapted * images_per_step(config, True) + (steps - adapted) * images_per_step(config, False)
    return {
        "kind": "training",
        **{key: getattr(config, key) for key in ("source", "target", "method", "recipe", "seed")},
        "epochs": trainer.epochs,
        "source_accuracy": source.accuracy,
        "target_accuracy": target.accuracy,
        "source_correct": source.correct,
        "source_total": source.total,
        "target_correct": target.correct,
        "target_total": target.total,
        "seconds": round(trainer.seconds, 2),
        "images_per_second": round(images / trainer.train_seconds, 1),
        "device": trainer.device.type,
        "machine": machine.describe(trainer.device),
        "precision": trainer.precision,
        "compile": trainer.compiled,
        "threads": torch.get_num_threads(),
        "processes": trainer.processes.count,
        **trainer.pair.marks,
        "dry_run": trainer.dry_run,
        "steps": steps,
        "operations": adapted * operations_of_step(config) + (steps - adapted) * operations_of_step(config, False),
        "seconds_to": seconds_to(trainer.folder / "metrics.jsonl"),
        "parameters": sum(w.numel() for w in trainer.model.parameters()),
        "command": trainer.command,
        "commit": machine.commit(),
        "versions": machine.versions(),
        "data": trainer.pair.checksums,
        "config": to_dict(config),
    }
