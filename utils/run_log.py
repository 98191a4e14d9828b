"""What a run leaves for people and programs: metrics.jsonl, TensorBoard events and the lines on the screen."""

import json
import sys
from pathlib import Path

import torch
from tensorboardX import SummaryWriter
from torchvision.utils import make_grid

from utils.cli import UserError


def say(text: str = "") -> None:
    """Print a line for people: stderr, so that stdout ends with the result alone."""
    print(text, file=sys.stderr, flush=True)


class RunLog:
    """One TensorBoard writer and one metrics.jsonl for a run folder.

    Args:
        folder: the run folder; it exists.
        resume_step: optimiser steps already done; later events of an interrupted run are dropped.
        resume_epochs: epochs already in metrics.jsonl; later lines are dropped.
    """

    def __init__(self, folder: Path, resume_step: int = 0, resume_epochs: int = 0):
        self.metrics = folder / "metrics.jsonl"
        kept = self.metrics.read_text().splitlines()[:resume_epochs] if self.metrics.exists() else []
        self._write(lambda: self.metrics.write_text("".join(line + "\n" for line in kept)))
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step or None)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log values under tags with slashes at an optimiser step."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def images(self, tag: str, step: int, x: torch.Tensor, columns: int = 16) -> None:
        """Log a grid of network inputs, each stretched to [0, 1]. Shape: (N, 3, H, W)."""
        self.writer.add_image(tag, make_grid(x.float().cpu(), columns, normalize=True, scale_each=True), step)

    def text(self, tag: str, text: str) -> None:
        """Log a text in Markdown."""
        self.writer.add_text(tag, text)

    def epoch(self, record: dict) -> None:
        """Append one record to metrics.jsonl."""

        def append() -> None:
            with self.metrics.open("a") as file:
                file.write(json.dumps(record) + "\n")

        self._write(append)

    def close(self) -> None:
        """Flush everything to disk."""
        self.writer.close()

    def _write(self, action) -> None:
        try:
            action()
        except OSError as error:
            raise UserError(
                f"cannot write {self.metrics} ({error.strerror}): free some space, or choose --run-dir"
            ) from None


def epoch_line(record: dict, epochs: int, seconds: float) -> str:
    """One aligned line on the screen for an epoch."""
    domain = ""
    if record["loss_domain"] is not None:
        domain = f"  domain {record['loss_domain']:.3f}  dom-acc {record['domain_accuracy']:5.1%}"
    return (
        f"epoch {record['epoch']:3d}/{epochs}  p {record['p']:.3f}  lambda {record['lambda_p']:.3f}  "
        f"lr {record['learning_rate']:.4f} | label {record['loss_label']:.3f}{domain} | "
        f"source {record['source_accuracy']:6.2%}  target {record['target_accuracy']:6.2%} | "
        f"{seconds:.1f}s  {record['images_per_second']:,.0f} img/s"
    )
