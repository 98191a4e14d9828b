"""What a person sees of a run while it trains: on the screen, in the log and on TensorBoard's pages."""

import math
import time
from collections.abc import Iterator

from torch import Tensor
from tqdm import tqdm

from data_loader import PairedLoader
from digits.domains import Pair
from methods.classifier import Classifier, Evaluation
from methods.optimisation import gradient_norms
from methods.recipes import Config, all_settings
from methods.run import Run
from utils import machine
from utils.cli import say
from utils.distributed import Processes
from watch.board import Board
from watch.log import RunLog, SilentLog
from watch.records import epoch_record, images_per_step
from watch.screen import counted, duration, epoch_line
from watch.validators import class_ami, prediction_signals

LOG_EVERY_STEPS = 50
TIMED_STEPS = 20  # from which the time of the whole run is estimated
SIGNAL_IMAGES = 2000
COLLAPSED = 0.1  # of its equal share: a class that fewer target images are predicted as has been lost


class Watcher:
    """Watches a run; of several processes the one that writes logs, and all look for losses that are not finite.

    Args:
        classifier: the network that is tested.
        go_on: the command that resumes the run.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        loader: PairedLoader,
        pair: Pair,
        classifier: Classifier,
        processes: Processes,
        go_on: str,
    ):
        self.config, self.loader, self.pair, self.classifier, self.go_on = config, loader, pair, classifier, go_on
        self.epochs = config.warm_start_epochs + config.epochs
        self.steps = self.epochs * loader.steps
        disable = None if processes.writes else True  # None is silent where there is no terminal
        self.bar = tqdm(total=self.steps, initial=run.steps_done, unit="step", leave=False, disable=disable)
        self.tested: tuple[Evaluation, Evaluation] | None = None  # of the last epoch
        self.seconds_before, self.started = run.seconds, time.perf_counter()
        self.steps_at_start = run.steps_done
        self.log = RunLog(run.folder, run.steps_done, run.records) if processes.writes else SilentLog()
        self.log.text("config", "\n".join(f"    {key}: {value}" for key, value in all_settings(config).items()))
        self.board = Board(run, config, pair, classifier, self.log) if processes.writes else None
        if self.board and not run.steps_done:
            self.board.embed(0, *self.board.features())

    def progress_bar(self, run: Run, batches: Iterator) -> Iterator:
        """The batches of the epoch, with a bar of the whole run where there is a terminal."""
        self.bar.set_description(f"epoch {run.epoch + 1}/{self.epochs}")
        for batch in batches:
            yield batch
            self.bar.update()

    def start_clock(self, run: Run) -> None:
        """The steps of an epoch begin."""
        self.epoch_started, self.first_step = time.perf_counter(), run.step

    def stop_clock(self, run: Run) -> None:
        """The steps of an epoch have ended, or were interrupted: take their time when the device has done them."""
        machine.synchronise(self.classifier.device)
        now = time.perf_counter()
        self.epoch_seconds, self.epoch_steps = now - self.epoch_started, run.step - self.first_step
        run.train_seconds += self.epoch_seconds
        run.seconds = self.seconds_before + now - self.started

    def step(
        self, run: Run, values: dict[str, Tensor], p: float, lambda_p: float, mu_p: float, x_s: Tensor, x_t: Tensor
    ) -> None:
        """Look at the step that the run has just done: at each on a CPU, elsewhere at those that are logged.

        Looking waits for the device.

        Args:
            values: losses and whatever else is logged, by name.
            x_s, x_t: its images.

        Raises: UserError when a loss is not finite.
        """
        lambda_p = lambda_p if "loss_domain" in values else 0.0
        number = run.steps_done
        if run.skips:
            warning = f"step {number} (epoch {run.epoch + 1}) is left out: its gradient is not finite"
            say(f"warning: {warning}")
            self.log.text(f"skipped/step_{number}", warning)
            return
        logs = number % LOG_EVERY_STEPS == 0
        if logs or self.classifier.device.type == "cpu":
            numbers = {name: value.item() for name, value in values.items()}
            run.check_losses(numbers, f", lambda_p {lambda_p:.4g}, learning rate {mu_p:.4g}")
        if logs:
            schedule = {"p": p, "lambda_p": lambda_p, "learning_rate": mu_p}
            self.log.scalars(number, {f"schedule/{name}": value for name, value in schedule.items()})
            self.log.scalars(number, {f"train/{name}": value for name, value in numbers.items()})
            norms = gradient_norms(run.model)
            self.log.scalars(number, {f"gradient_norm/{name}": norm for name, norm in norms.items()})
        if number == 0:
            self.log.images("images/source", 0, x_s[:64])
            self.log.images("images/target", 0, x_t.view(-1, *x_s.shape[1:])[: len(x_s)][:64])  # of views the first
        if number == self.steps_at_start:
            say(f"first step {machine.seconds_since_start():.1f} s after the start")
            self.first_step_done = time.perf_counter()
        elif number == self.steps_at_start + TIMED_STEPS:
            left = self.steps - number
            seconds = (time.perf_counter() - self.first_step_done) / TIMED_STEPS * left
            say(f"{counted(left, 'step')} to go: about {duration(seconds)}, without the tests after epochs")

    def close(self) -> None:
        """The training has ended, or was interrupted."""
        self.bar.close()
        self.log.close()

    def epoch(self, run: Run, means: dict[str, float], source: Evaluation, target: Evaluation) -> None:
        """Record the epoch that the run has just ended.

        Args:
            means: of its steps, of all that was logged.
            source, target: the tests after it.
        """
        self.tested = source, target
        signals = self.target_signals()
        run.seconds = self.seconds_before + time.perf_counter() - self.started
        record = epoch_record(run, self.config, means, source, target) | signals
        images = images_per_step(self.config, "loss_domain" in means) * self.epoch_steps
        record["images_per_second"] = images / self.epoch_seconds
        run.records.append(record)
        self.log.epoch(record)
        assert self.board is not None
        self.board.epoch(record, signals, target)
        say(epoch_line(record, self.epochs, time.perf_counter() - self.epoch_started))
        if has_collapsed(record, len(self.pair.classes)):
            share = f"{signals['smallest_class_share']:.1%}"
            warning = (
                f"collapse at epoch {run.epoch}: one class is predicted of {share} of the target's training images"
            )
            say(f"warning: {warning}; should it stay, try a smaller --lambda-max")
            self.log.text(f"collapse/epoch_{run.epoch}", warning)

    def target_signals(self) -> dict[str, float]:
        """How adaptation fares, by unlabelled target training images, SIGNAL_IMAGES spread over the set."""
        images = self.loader.images_t  # resized already
        images = images[:: max(1, len(images) // SIGNAL_IMAGES)]
        features = self.classifier.features(images)
        probabilities = self.classifier.predict(features)
        agreement = class_ami(features.cpu(), probabilities.argmax(1), probabilities.shape[1])
        return prediction_signals(probabilities) | {"class_ami": agreement}


def has_collapsed(record: dict, classes: int) -> bool:
    """Whether a network that has learnt the source, and adapts, predicts a class of hardly any target image.

    Before it has learnt the source it predicts one class of all, which is no collapse.
    """
    learnt = record["loss_label"] < math.log(classes) / 2  # half of what chance has
    return learnt and "loss_domain" in record and record["smallest_class_share"] < COLLAPSED / classes
