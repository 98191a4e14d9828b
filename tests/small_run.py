"""A run of main.py on a few random images, without files, screen or log."""

import copy
import dataclasses
from pathlib import Path

import torch
from torch import Tensor

import main
from data_loader import DigitSet
from digits.domains import Pair
from methods.networks import NETWORKS
from methods.recipes import Config
from utils.cli import StopRequest
from utils.distributed import Processes
from watch.watcher import Watcher


class Silent(Processes):
    """A lone process that writes nothing."""

    writes = False


SILENT = Silent()


def random_digits(count: int, size: int, seed: int, channels: int = 3) -> DigitSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    return DigitSet("svhn", "train", images, torch.arange(count) % 10, "", {})


class SmallRun:
    """What main.py makes of a configuration, in fp32 or, for close comparisons, float64.

    `saved` holds the weights after each epoch, `means` the means of what was logged.
    """

    def __init__(self, config: Config, steps: int = 3, double: bool = False, pair: Pair | None = None):
        self.config, self.row = dataclasses.replace(config, precision="fp32"), NETWORKS[config.network]
        source, target = (random_digits(steps * config.batch_size, self.row.image_size, seed) for seed in (1, 2))
        pair = pair or Pair(source, source.images, target.images, source, target, {}, {})
        self.run, self.loader, classifier = main.set_up(
            self.config, pair, Path("nowhere"), False, False, torch.device("cpu"), SILENT
        )
        self.watcher = Watcher(self.run, self.config, self.loader, pair, classifier, SILENT, "go on")
        self.model = self.run.model.double() if double else self.run.model
        self.dtype = torch.float64 if double else torch.float32
        self.saved: list[dict[str, Tensor]] = []
        self.means: list[dict[str, float]] = []
        end_epoch = self.run.end_epoch
        self.run.end_epoch = lambda: self.means.append(end_epoch())
        self.run.save = lambda *_: self.saved.append(self.weights())

    def weights(self) -> dict[str, Tensor]:
        return copy.deepcopy(self.model.state_dict())

    def batch(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random input of the network and labels."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.config.batch_size, self.row.channels, self.row.image_size, self.row.image_size)
        x_s, x_t = torch.rand(2, *shape, generator=generator, dtype=self.dtype)
        return x_s, torch.randint(0, 10, shape[:1], generator=generator), x_t.square()

    def objective(self) -> torch.nn.Module:
        self.model.train()
        return main.make_objective(self.run, self.config, self.loader.labels_s)

    def step(self, batch: tuple[Tensor, ...], lambda_p: float, mu_p: float) -> dict[str, float]:
        """One step of the phase that the run is in; what it returns and logs."""
        losses, others = self.objective()(*batch, lambda_p)
        main.step(self.run, self.config, losses, mu_p)
        return {name: value.item() for name, value in (losses | others).items()}

    def train(self, compiled: bool = False) -> "SmallRun":
        """All steps that are left."""
        main.train(self.run, self.config, self.loader, self.watcher, SILENT, compiled, StopRequest())
        return self
