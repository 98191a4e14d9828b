"""What `torch.hub.load` gives of this repository: a trained network, and the gradient reversal layer."""

import torch as _torch

from methods import classifier as _classifier
from model import reverse_gradient as _reverse_gradient

dependencies = ["torch", "numpy", "safetensors", "tqdm"]


def dann(weights: str | None = None, device: str = "cpu") -> _classifier.Classifier:
    """A trained network: `.model`, `.preprocess`, `.classes`, and `.probabilities` of uint8 images (N, C, H, W).

    Args:
        weights: as `--weights` of valid.py; None: the default.

    Raises: UserError for weights that are not there.
    """
    return _classifier.load_classifier(weights, _torch.device(device))


def gradient_reversal():
    """The layer, a function of features and λ_p: it keeps its input, and multiplies the gradient by −λ_p."""
    return _reverse_gradient
