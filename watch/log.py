"""What a run leaves for people and programs: metrics.jsonl, TensorBoard events and the lines on the screen."""

import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams

from utils.cli import UserError
from utils.files import write_atomically

FIGURE_DPI = 100
ENTRY = "embeddings {\n"  # begins each in the file that the projector reads


class RunLog:
    """One TensorBoard writer and one metrics.jsonl for a run folder.

    Args:
        folder: the run folder; it exists.
        resume_step: optimiser steps already done; later events of an interrupted run are dropped.
        records: of the epochs already done; metrics.jsonl begins with them.
    """

    def __init__(self, folder: Path, resume_step: int = 0, records: Sequence[dict] = ()):
        self.metrics = folder / "metrics.jsonl"
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_atomically(self.metrics, lambda file: file.write_text(lines))
        self.folder = folder / "tensorboard"
        self.failure: BaseException | None = None
        # The writer's thread ends on an error; a queue that is never full keeps us from waiting for it for ever.
        self.previous_hook, threading.excepthook = threading.excepthook, self._thread_failed
        try:
            self.folder.mkdir(exist_ok=True)
            self._forget_embeddings(resume_step)
            self.writer = SummaryWriter(str(self.folder), purge_step=resume_step, max_queue=10_000)
        except OSError as error:
            raise self._cannot_write(self.folder, error) from None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log values under tags with slashes at an optimiser step."""
        self._check()
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def images(self, tag: str, step: int, x: torch.Tensor, columns: int = 16) -> None:
        """Log a grid of network inputs, each stretched to [0, 1]. Shape: (N, 3, H, W)."""
        from torchvision.utils import make_grid  # imported where it is needed: a second and a half

        self._check()
        self.writer.add_image(tag, make_grid(x.float().cpu(), columns, normalize=True, scale_each=True), step)

    def figure(self, tag: str, step: int, figure) -> None:
        """Log a matplotlib figure."""
        from watch.plots import rendered

        self._check()
        self.writer.add_image(tag, np.asarray(rendered(figure, FIGURE_DPI)), step, dataformats="HWC")

    def histograms(self, step: int, values: dict[str, torch.Tensor]) -> None:
        """Log how values are spread, under tags with slashes."""
        self._check()
        for tag, tensor in values.items():
            self.writer.add_histogram(tag, tensor.numpy(), step)

    def embedding(
        self,
        tag: str,
        step: int,
        points: torch.Tensor,
        metadata: list[tuple],
        header: tuple[str, ...],
        thumbnails: torch.Tensor,
    ) -> None:
        """Show points in the projector, each with its metadata and a thumbnail.

        Shape: points (N, F), N values of metadata, thumbnails (N, 3, S, S) in [0, 1], N square
        """
        self._check()
        rounded = np.round(points.double().numpy(), 4)  # each becomes a text
        try:
            self.writer.add_embedding(rounded, metadata, thumbnails.numpy(), step, tag, list(header))
        except OSError as error:
            raise self._cannot_write(self.folder, error) from None

    def hyper_parameters(self, settings: dict, metrics: dict[str, float]) -> None:
        """Show the settings beside the last values of the metrics, which are logged already, in the HPARAMS tab."""
        self._check()
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in settings.items()
        }
        # `add_hparams` of the writer would make a second, nameless run of it.
        for summary in hparams(plain, metrics):
            self.writer.file_writer.add_summary(summary)

    def text(self, tag: str, text: str) -> None:
        """Log a text in Markdown."""
        self.writer.add_text(tag, text)

    def epoch(self, record: dict) -> None:
        """Append one record to metrics.jsonl."""
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise self._cannot_write(self.metrics, error) from None

    def close(self) -> None:
        """Flush everything to disk."""
        self._check()
        try:
            self.writer.close()
        except OSError as error:
            self.failure = error
        self._check()
        threading.excepthook = self.previous_hook

    def _forget_embeddings(self, resume_step: int) -> None:
        """Leave out of the projector what an interrupted run showed after the step that this one goes on from."""
        config = self.folder / "projector_config.pbtxt"
        if not config.exists():
            return
        kept = []
        for entry in config.read_text().split(ENTRY)[1:]:
            step = re.search(r'tensor_name: "[^"]*:(\d+)"', entry)
            if step is None or int(step[1]) < resume_step:
                kept.append(entry)
        write_atomically(config, lambda file: file.write_text("".join(ENTRY + entry for entry in kept)))

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        if issubclass(failed.exc_type, OSError) and "tensorboardX" in type(failed.thread).__module__:
            self.failure = failed.exc_value
        else:
            self.previous_hook(failed)

    def _check(self) -> None:
        """Raise UserError when the events can't be written: the writer itself would go on in silence."""
        if self.failure is not None:
            # What is left in its buffers can't be written either: without this, closing it would try again.
            self.writer.file_writer.event_writer._closed = True
            threading.excepthook = self.previous_hook
            raise self._cannot_write(self.folder, self.failure)

    @staticmethod
    def _cannot_write(path: Path, error: BaseException) -> UserError:
        reason = getattr(error, "strerror", None) or error
        return UserError(f"cannot write {path} ({reason}): free some space, or choose another --run-dir")


class SilentLog(RunLog):
    """Takes what a run log takes and keeps nothing: for the processes that don't write."""

    def __init__(self) -> None:
        pass

    def scalars(self, *_: object) -> None:
        """Nothing."""

    images = figure = histograms = embedding = hyper_parameters = text = epoch = close = scalars  # type: ignore[assignment]
