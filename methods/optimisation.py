"""What a training step needs of the optimiser and the weights, besides the step itself."""

import torch
from torch import Tensor, nn

from methods.recipes import Config
from model import DANN


def make_optimizer(model: nn.Module, config: Config, device: torch.device) -> torch.optim.Optimizer:
    """The recipe's optimiser over all three parts; fused, which is one pass over the weights."""
    weights, decay, fused = model.parameters(), config.weight_decay, device.type in ("cpu", "cuda")
    if config.optimizer == "sgd":
        return torch.optim.SGD(weights, config.lr, config.momentum, weight_decay=decay, fused=fused)
    return torch.optim.AdamW(weights, config.lr, (config.momentum, 0.999), weight_decay=decay, fused=fused)


def balancing_weights(labels: Tensor) -> Tensor:
    """The weight of a class's images with which all classes count alike; 1 on average, 0 for a class without images.

    Shape: (N,) -> (largest label + 1,)
    """
    counts = torch.bincount(labels)
    present = counts > 0
    return present * len(labels) / (present.sum() * counts.clamp(min=1))


def freeze(model: DANN, numbers: tuple[int, ...]) -> None:
    """Stop the training of these convolutions, counted from 1."""
    for number, convolution in enumerate(model.extractor.convolutions(), 1):
        convolution.requires_grad_(number not in numbers)


def has_finite_gradient(model: nn.Module) -> bool:
    """Whether no gradient of the weights is infinite or nan; waits for the device."""
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return bool(nn.utils.get_total_norm(gradients).isfinite())


@torch.no_grad()
def limit_norms(model: nn.Module, bound: float) -> None:
    """Scale down the incoming weights of each unit of the linear layers whose l2 norm exceeds `bound`."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.copy_(torch.renorm(module.weight, 2, 0, bound))


def gradient_norms(model: DANN) -> dict[str, float]:
    """The l2 norm of each part's gradient; parts without gradients are left out. Waits for the device."""
    gradients = {
        name: [w.grad for w in part.parameters() if w.grad is not None] for name, part in model.parts().items()
    }
    return {name: torch.nn.utils.get_total_norm(grads).item() for name, grads in gradients.items() if grads}
