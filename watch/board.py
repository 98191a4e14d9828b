"""What TensorBoard shows of what a run has learnt: features of both domains and predictions of the target."""

import dataclasses
import math

import torch
from torch import Tensor

from data_loader import UNLABELLED, spread_index, spread_over
from digits.domains import Pair
from methods.classifier import Classifier, Evaluation
from methods.recipes import Config, all_settings
from methods.run import Run
from watch.log import RunLog

LARGEST_SIDE = 32  # thumbnails in a row of the projector's square of them, half of which are the source's
COMPONENTS = 50  # of a feature vector that has more values than MOST_VALUES
MOST_VALUES = 128
LOOKED_AT = 2000  # target test images, spread over the set, among which misclassified ones are looked for
METADATA = ("domain", "class", "predicted", "right")


class Board:
    """Shows the network that a run tests, on test images of both domains; nothing of it reaches the training.

    Args:
        classifier: that network.
        log: where it is shown.
    """

    def __init__(self, run: Run, config: Config, pair: Pair, classifier: Classifier, log: RunLog):
        self.run, self.config, self.pair, self.classifier, self.log = run, config, pair, classifier, log
        shown = [pair.source_test, pair.target_test]
        if not len(pair.target_test):  # without labels: what it was trained on is shown
            labels = torch.full((len(pair.target_images),), UNLABELLED)
            shown[1] = dataclasses.replace(pair.target_test, images=pair.target_images, labels=labels)
        side = min(LARGEST_SIDE, math.isqrt(2 * min(map(len, shown))))
        side -= side % 2
        self.parts = [spread_over(digits, side * side // 2) for digits in shown]

    def epoch(self, record: dict, signals: dict[str, float], tested: Evaluation) -> None:
        """What an epoch gave, and after the last one what the run has learnt.

        Args:
            record: as `watch.records.epoch_record` makes it. signals: those without labels.
            tested: the test on the target.
        """
        step = self.run.steps_done - 1  # the last one done: a resumed run keeps it
        named = {f"test/{name}_accuracy": record[f"{name}_accuracy"] for name in ("source", "target")}
        accuracies = {tag: accuracy for tag, accuracy in named.items() if accuracy is not None}
        self.log.scalars(step, accuracies)
        self.log.scalars(step, {"train/images_per_second": record["images_per_second"]})
        self.log.scalars(step, {f"target/{name}": value for name, value in signals.items()})
        features = self.features()
        self.compare(step, *features)
        if self.run.epoch == self.config.warm_start_epochs + self.config.epochs:
            self.embed(step, *features)
            self.show_features(step, *features)
            if tested.total:
                self.show_predictions(step, tested)
            self.log.hyper_parameters(all_settings(self.config), accuracies)

    def features(self) -> list[Tensor]:
        """Of the images of each domain, by the extractor in eval mode. Shape: -> two of (N, F), float32 on the CPU"""
        source, target = (part.images for part in self.parts)
        return [self.classifier.features(source, "source").cpu(), self.classifier.features(target).cpu()]

    def embed(self, step: int, f_s: Tensor, f_t: Tensor) -> None:
        """The features in the projector, with domain, class and prediction, and the images as thumbnails."""
        resize = self.classifier.preprocess.resize
        rows = []
        for part, domain in zip(self.parts, ("source", "target"), strict=True):
            predicted = self.classifier.probabilities(part.images, domain).argmax(1)
            for label, answer in zip(part.labels.tolist(), predicted.tolist(), strict=True):
                known = ("–", "–") if label == UNLABELLED else (part.classes[label], "yes" if answer == label else "no")
                rows.append((part.domain, known[0], part.classes[answer], known[1]))
        thumbnails = torch.cat([resize(part.images).expand(-1, 3, -1, -1) for part in self.parts])
        points = principal_components(torch.cat((f_s, f_t)))
        self.log.embedding("features", step, points, rows, METADATA, thumbnails / 255)

    def compare(self, step: int, f_s: Tensor, f_t: Tensor) -> None:
        """The features of the two domains as histograms, one below the other and over each other."""
        from watch.plots import histograms_figure  # with matplotlib, which would keep the first step waiting

        names = [part.domain for part in self.parts]
        self.log.histograms(step, {f"features/source_{names[0]}": f_s, f"features/target_{names[1]}": f_t})
        self.log.figure("features/both_domains", step, histograms_figure(f_s, f_t, *names))

    def show_features(self, step: int, f_s: Tensor, f_t: Tensor) -> None:
        """The features of both domains in the plane, and how well a fresh linear probe tells the domains apart."""
        from watch.features import NEIGHBOURS, draw_features, features_figure  # with scikit-learn, another second

        source, target = self.parts
        if min(len(f_s), len(f_t)) <= NEIGHBOURS:
            return
        figure, (row,) = features_figure(1, source.domain, target.domain, len(f_s) + len(f_t))
        numbers = draw_features(
            row,
            self.config.method,
            f_s.numpy(),
            source.labels.numpy(),
            f_t.numpy(),
            target.labels.numpy(),
            target.classes,
        )
        self.log.figure("features/plane", step, figure)
        self.log.scalars(step, {"features/proxy_a_distance": numbers["proxy_a_distance"]})

    def show_predictions(self, step: int, tested: Evaluation) -> None:
        """The confusion matrix on the target's test set, and digits of it that are misclassified."""
        from watch.plots import confusion_figure, misclassified_figure

        target, name = self.pair.target_test, self.config.method
        self.log.figure(
            "target/confusion", step, confusion_figure({name: tested.confusion}, target.mark, target.classes)
        )
        predictions = {name: tested.predicted[spread_index(target, LOOKED_AT)]}
        size = self.classifier.preprocess.image_size
        figure, _ = misclassified_figure(predictions, spread_over(target, LOOKED_AT), size)
        self.log.figure("target/misclassified", step, figure)


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
