"""What TensorBoard shows of what a run has learnt: features of both domains and readings of the target."""

import dataclasses
import math

import torch
from torch import Tensor, nn

from data_loader import DigitSet
from utils.config import to_dict
from utils.run_log import RunLog
from valid import Evaluation, outputs

LARGEST_SIDE = 32  # thumbnails in a row of the projector's square of them, half of which are the source's
COMPONENTS = 50  # of a feature vector that has more values than MOST_VALUES
MOST_VALUES = 128
READ = 2000  # target test images, spread over the set, among which misread ones are looked for
METADATA = ("domain", "digit", "read as", "right")


class Board:
    """Shows the network that a trainer tests, on test images of both domains; nothing of it reaches the training.

    Args:
        trainer: the run.
        log: where it is shown.
    """

    def __init__(self, trainer, log: RunLog):
        self.trainer, self.log = trainer, log
        pair = trainer.pair
        side = min(LARGEST_SIDE, math.isqrt(2 * min(len(pair.source_test), len(pair.target_test))))
        side -= side % 2
        self.parts = [spread_over(digits, side * side // 2) for digits in (pair.source_test, pair.target_test)]

    def epoch(self, record: dict, signals: dict[str, float], tested: Evaluation) -> None:
        """What an epoch gave, and after the last one what the run has learnt.

        Args:
            record: as `utils.records.epoch_record` makes it. signals: those without labels.
            tested: the test on the target.
        """
        trainer = self.trainer
        step = trainer.epoch * trainer.loader.steps - 1  # the last one done: a resumed run keeps it
        accuracies = {f"test/{name}_accuracy": record[f"{name}_accuracy"] for name in ("source", "target")}
        self.log.scalars(step, accuracies)
        self.log.scalars(step, {"train/images_per_second": record["images_per_second"]})
        self.log.scalars(step, {f"target/{name}": value for name, value in signals.items()})
        features = self.features()
        self.compare(step, *features)
        if trainer.epoch == trainer.epochs:
            self.embed(step, *features)
            self.read(step, tested)
            self.log.hyper_parameters(to_dict(trainer.config), accuracies)

    def features(self) -> list[Tensor]:
        """Of the images of each domain, by the extractor in eval mode. Shape: -> two of (N, F), float32 on the CPU"""
        trainer = self.trainer
        settings = trainer.loader.preprocess, trainer.device, trainer.precision
        return [outputs(trainer.tested_model.extractor, part.images, *settings).cpu() for part in self.parts]

    def embed(self, step: int, f_s: Tensor, f_t: Tensor) -> None:
        """The features in the projector, with domain, digit and reading, and the images as thumbnails."""
        trainer, resize = self.trainer, self.trainer.loader.preprocess.resize
        rows = []
        for part, f in zip(self.parts, (f_s, f_t), strict=True):
            logits = outputs(trainer.tested_model.classifier, f, nn.Identity(), trainer.device, trainer.precision)
            for digit, answer in zip(part.labels.tolist(), logits.argmax(1).tolist(), strict=True):
                rows.append((part.domain, digit, answer, "yes" if answer == digit else "no"))
        thumbnails = torch.cat([resize(part.images).expand(-1, 3, -1, -1) for part in self.parts])
        points = principal_components(torch.cat((f_s, f_t)))
        self.log.embedding("features", step, points, rows, METADATA, thumbnails / 255)

    def compare(self, step: int, f_s: Tensor, f_t: Tensor) -> None:
        """The features of the two domains as histograms, one below the other and over each other."""
        from utils.plots import histograms_figure  # with matplotlib, which would keep the first step waiting

        names = [part.domain for part in self.parts]
        self.log.histograms(step, {f"features/source_{names[0]}": f_s, f"features/target_{names[1]}": f_t})
        self.log.figure("features/both_domains", step, histograms_figure(f_s, f_t, *names))

    def read(self, step: int, tested: Evaluation) -> None:
        """The confusion matrix on the target's test set, and digits of it that are misread."""
        from utils.plots import confusion_figure, misread_figure

        target, name = self.trainer.pair.target_test, self.trainer.config.method
        self.log.figure("target/confusion", step, confusion_figure({name: tested.confusion}, target.mark))
        readings = {name: tested.predicted[spread_index(target, READ)]}
        figure, _ = misread_figure(readings, spread_over(target, READ), self.trainer.loader.preprocess.image_size)
        self.log.figure("target/misread", step, figure)


def spread_index(digits: DigitSet, count: int) -> Tensor:
    """Numbers of `count` images at equal distances over a set, or of all where it has fewer. Shape: -> (count,)"""
    count = min(count, len(digits))
    return torch.arange(count) * len(digits) // max(count, 1)


def spread_over(digits: DigitSet, count: int) -> DigitSet:
    """The images that `spread_index` numbers."""
    index = spread_index(digits, count)
    return dataclasses.replace(digits, images=digits.images[index], labels=digits.labels[index])


def principal_components(features: Tensor) -> Tensor:
    """Feature vectors of at most MOST_VALUES values as they are, longer ones by their first principal components.

    Shape: (N, F) -> (N, F) or (N, COMPONENTS), without the mean
    """
    centred = features.double() - features.double().mean(0)
    if centred.shape[1] <= MOST_VALUES:
        return centred
    # The eigenvectors of the N × N products give the same points as those of the F × F covariances.
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    return (vectors * values.clamp_min(0).sqrt()).flip(1)[:, :COMPONENTS]
