"""Networks for other programs: as ONNX, or by torch.export, with the normalisation of images in them."""

import copy
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from methods.classifier import BATCH, Classifier
from utils.cli import UserError
from utils.files import make_folder, write_atomically

ENDINGS = {"onnx": ".onnx", "torch": ".pt2"}
TOLERANCE = 1e-4  # of the largest difference between probabilities
Run = Callable[[Tensor], Tensor]  # of images (N, C, S, S) uint8 to probabilities (N, K)


class Portable(nn.Module):
    """The classifier of target images, in fp32, from pixels to class probabilities.

    Shape: (N, 1 or 3, S, S) uint8, of the network's size -> (N, K) float32
    """

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.model, self.preprocess = copy.deepcopy(classifier.model).cpu().eval(), classifier.preprocess

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.preprocess.normalise(images.float() / 255), "target").softmax(1)


def export(classifier: Classifier, kind: str, folder: Path) -> Path:
    """Write the network into a folder, for any number of images at once; the file is checked by `largest_difference`.

    Args:
        kind: "onnx", or "torch" for torch.export.

    Raises: UserError where the packages for it are missing, or the file can't be written.
    """
    stem = classifier.path.parent.name if classifier.path.stem == "model" else classifier.path.stem
    path, network = folder / f"{stem}{ENDINGS[kind]}", Portable(classifier)
    example = torch.zeros(2, 1 if classifier.preprocess.grey else 3, *2 * [classifier.preprocess.image_size]).byte()
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    make_folder(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters about themselves
        program = torch.export.export(network, (example,), dynamic_shapes=shapes)
        if kind == "torch":
            archive = io.BytesIO()
            torch.export.save(program, archive)
            write_atomically(path, lambda file: file.write_bytes(archive.getvalue()))
            return path
        try:
            import onnxruntime  # noqa: F401, for the check
            import onnxscript  # noqa: F401, torch's exporter needs it
        except ImportError as error:
            command = "pip install onnx onnxscript onnxruntime"
            raise UserError(f"--export onnx needs the package {error.name}: run `{command}`") from None
        model = torch.onnx.export(
            program, (), None, verbose=False, dynamo=True, input_names=["images"], output_names=["probabilities"]
        )
        assert model is not None
        model.model.metadata_props["classes"] = json.dumps(classifier.classes)
        write_atomically(path, lambda file: model.save(file))
    return path


def load_export(path: Path) -> Run:
    """What `export` wrote, as a function of images."""
    if path.suffix == ENDINGS["torch"]:
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": np.ascontiguousarray(images.numpy())})[0])


@torch.inference_mode()
def largest_difference(run: Run, classifier: Classifier, images: Tensor) -> float:
    """Between the probabilities that an export and PyTorch give, over all images. Shape: (N, C, H, W) uint8"""
    network, largest = Portable(classifier), 0.0
    for batch in images.split(BATCH):
        resized = classifier.preprocess.resize(batch.cpu())
        resized = resized if classifier.preprocess.grey else resized.expand(-1, 3, -1, -1)
        largest = max(largest, (run(resized) - network(resized)).abs().max().item())
    return largest
