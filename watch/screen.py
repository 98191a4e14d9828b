"""What a run says on the screen."""

import json

import torch

from digits.domains import Pair
from methods.recipes import Config
from methods.run import Run
from utils import machine
from utils.cli import say

FEW_STEPS = 1000
NOT_PRINTED = ("config", "data", "versions", "resumed")  # of a result record: result.json has them


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 thread, 2,000 images."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def duration(seconds: float) -> str:
    """A time in words: 45 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def print_header(run: Run, config: Config, pair: Pair, device: torch.device) -> None:
    """What the run is made with."""
    session = run.sessions[-1]
    threads = counted(session["threads"], "thread")
    if session["processes"] > 1:
        threads += f" in each of {session['processes']} processes"
    compiled = ", compiled" if session["compile"] else ""
    say(f"{machine.header(device, config.precision)}{compiled}, {threads}")
    say(f"recipe {config.recipe}, method {config.method}, seed {config.seed}")
    say(f"labels of {pair.labelled.mark}: {counted(len(pair.labelled), 'image')}")
    say(f"no labels of {pair.marks['target_mark']}: {counted(len(pair.target_images), 'image')}")
    counts = {name: sum(w.numel() for w in part.parameters()) for name, part in run.model.parts().items()}
    say("parameters: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    epochs = counted(config.warm_start_epochs + config.epochs, "epoch")
    say(f"{epochs} of {counted(run.steps_per_epoch, 'step')}; run folder {run.folder}")
    steps = (config.warm_start_epochs + config.epochs) * run.steps_per_epoch
    if steps < FEW_STEPS and not run.dry_run:
        say(f"note: {counted(steps, 'step')} in all are few to learn in: for small sets give --epoch-steps 200")
    say(f"watch it: tensorboard --logdir {run.folder.parent}")


def percent(accuracy: float | None) -> str:
    """An accuracy in per cent, or that there is none, equally long."""
    return "no test" if accuracy is None else f"{accuracy:7.2%}"


def epoch_line(record: dict, epochs: int, seconds: float) -> str:
    """One aligned line for an epoch."""
    domain = ""
    if "loss_domain" in record:
        domain = f"  domain {record['loss_domain']:.3f}  dom-acc {record['domain_accuracy']:6.1%}"
    return (
        f"epoch {record['epoch']:3d}/{epochs}  p {record['p']:.3f}  lambda {record['lambda_p']:.3f}  "
        f"lr {record['learning_rate']:.4f} | label {record['loss_label']:.3f}{domain} | "
        f"source {percent(record['source_accuracy'])}  target {percent(record['target_accuracy'])} | "
        f"{seconds:.1f}s  {record['images_per_second']:,.0f} img/s"
    )


def accuracy_line(mark: str, correct: int, total: int) -> str:
    """One row of the table of test accuracies."""
    if not total:
        return f"{mark:28} not tested: no labels"
    return f"{mark:28} {correct / total:9.2%}  {correct} / {total}"


ACCURACY_HEADER = f"{'test set':28} {'accuracy':>9}  correct / total"


def print_result(result: dict) -> None:
    """The table of test accuracies and, last, the JSON line."""
    print(ACCURACY_HEADER)
    for domain in ("source", "target"):
        print(accuracy_line(result[f"{domain}_test_mark"], result[f"{domain}_correct"], result[f"{domain}_total"]))
    print(json.dumps({key: value for key, value in result.items() if key not in NOT_PRINTED}))
