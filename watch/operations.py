"""How much work a network is: operations counted from the layers, two for a multiplication with its addition.

Convolutions and matrix products count; batch norm, activations, pooling and the optimiser, a few per cent, do not.
"""

import functools

import torch

from methods.networks import build_network, input_shape
from methods.recipes import Config


@functools.cache
@torch.no_grad()
def operations(config: Config, classes: int = 10) -> dict[str, int]:
    """Operations of one image's forward pass through each part of the network."""
    from torch.utils.flop_counter import FlopCounterMode  # imported where it is needed: a second

    with torch.device("meta"):  # shapes alone, no weights
        model = build_network(config.network, classes=classes).eval()
        image = torch.zeros(1, *input_shape(config.network))
    features = model.extractor(image)
    passes = {
        "extractor": lambda: model.extractor(image),
        "classifier": lambda: model.classifier(features),
        "discriminator": lambda: model.discriminator(features),
    }
    counts = {}
    for name, forward in passes.items():
        with FlopCounterMode(display=False) as counter:
            forward()
        counts[name] = counter.get_total_flops()
    return counts


def operations_of_step(config: Config, adapts: bool = True, classes: int = 10) -> int:
    """Operations of a training step: 3 × forward, of which 2 × for the backward pass.

    The classifier sees source images alone, unless there is a teacher, which itself has a forward pass for each view,
    and where images are perturbed a backward one.
    """
    parts = operations(config, classes)
    extractor, classifier, discriminator = (parts[name] for name in ("extractor", "classifier", "discriminator"))
    if not adapts:
        return 3 * (extractor + classifier) * config.batch_size
    per_pair = 3 * (2 * extractor + 2 * discriminator + classifier)
    if modern := config.modern:
        perturbs = modern.perturbation > 0 or modern.warp > 0
        passes = 1 + (modern.teacher_views == "both") + 2 * perturbs  # of each view; there and back to the image alone
        per_pair += 3 * classifier + passes * (extractor + classifier)
    return per_pair * config.batch_size
