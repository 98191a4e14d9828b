"""The EMA teacher: a network whose weights are a moving average of another's, which is steadier than that one is."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from model import DANN
from utils.distributed import Processes

Tensors = tuple[Tensor, ...] | list[Tensor]
MEAN_SHARE = 0.02  # how much of the mean prediction is of the latest batch


class Teacher:
    """The exponential moving average of a network in training (Tarvainen & Valpola, NeurIPS 2017).

    It is no `nn.Module`, so that an objective that holds it neither trains nor synchronises it.

    Args:
        model: the network to follow; the teacher starts as its copy, in eval mode.
        decay: share of the average that stays in each step, in (0, 1). It is smaller in the first steps, so that the
            weights that training began with are soon forgotten.
        classes: K, how many classes it predicts.
        processes: those that train together, each with its share of a batch.
    """

    def __init__(self, model: DANN, decay: float, classes: int, processes: Processes):
        def average(averages: Tensors, values: Tensors, _: object) -> None:
            steps = int(self.average.n_averaged)  # on the CPU: nothing to wait for
            share = 1 - min(decay, steps / (steps + 9))
            if averages[0].is_floating_point():
                torch._foreach_lerp_(averages, values, share)
            else:
                torch._foreach_copy_(averages, values)

        self.average = AveragedModel(model, multi_avg_fn=average, use_buffers=True).eval().requires_grad_(False)
        self.average.update_parameters(model)  # the first call copies
        self.mean = next(model.parameters()).new_full((classes,), 1 / classes)  # of its predictions, a moving average
        self.processes = processes

    @property
    def model(self) -> DANN:
        """The network with the averaged weights."""
        return self.average.module  # type: ignore[return-value]

    def follow(self, model: DANN) -> None:
        """Take in the weights and the batch statistics that `model` has after a step."""
        self.average.update_parameters(model)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Class probabilities. Shape: (N, C, S, S) -> (N, K) float32, rows sum to 1"""
        return self.model(x).float().softmax(1)

    @torch.no_grad()
    def align(self, q: Tensor, kappa: float) -> Tensor:
        """Draw probabilities to an estimate of the target's class shares.

        Each class counts by (uniform / mean prediction)^κ (distribution alignment, Berthelot et al. 2020): the target
        is taken to have the shares that were predicted, drawn towards equal ones by κ in [0, 1]. With κ = 0 a class
        that is predicted less and less often is lost; with κ = 1 all classes are taken to be alike in size.

        Shape: (N, K) -> (N, K), rows sum to 1
        """
        if not kappa:
            return q
        self.mean.lerp_(self.processes.mean_(q.mean(0)), MEAN_SHARE)
        q = q * (1 / len(self.mean) / self.mean) ** kappa
        return q / q.sum(1, keepdim=True)

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return {"average": self.average.state_dict(), "mean": self.mean}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`."""
        self.average.load_state_dict(state["average"])
        self.mean.copy_(state["mean"])


@torch.no_grad()
def perturb(x: Tensor, logits_of: Callable[[Tensor], Tensor], q: Tensor, radius: float, warp: float) -> Tensor:
    """Change images to where a network predicts their labels q worse (virtual adversarial training).

    After Miyato et al. (TPAMI 2018). A single gradient gives the direction: it is not zero, because q comes from
    another view of the image. The affine map that warps an image is found in the same way, from the identity on (after
    Xiao et al., ICLR 2018, who warp each pixel by itself).

    Args:
        logits_of: the network.
        q: class probabilities.
        radius: l2 norm of what is added to an image.
        warp: l2 norm of what is added to the six numbers of its map, which count in halves of the image.

    Shape: (N, C, S, S), (N, K) -> (N, C, S, S)
    """
    with torch.enable_grad():
        start = [x.detach().requires_grad_()]
        if warp:
            start.append(torch.eye(2, 3).to(x).repeat(len(x), 1, 1).requires_grad_())
        loss = F.cross_entropy(logits_of(warped(*start)).float(), q, reduction="sum")
    changes = map(of_length, torch.autograd.grad(loss, start), (radius, warp))
    return warped(*(value.detach() + change for value, change in zip(start, changes, strict=True)))


def of_length(x: Tensor, length: float) -> Tensor:
    """Each image's tensor with that l2 norm, or zero where it is zero. Shape: (N, ...) -> (N, ...)"""
    norm = x.flatten(1).norm(dim=1).clamp_min(1e-12)
    return length * x / norm.view(-1, *[1] * (x.ndim - 1))


def warped(x: Tensor, affine: Tensor | None = None) -> Tensor:
    """Images seen through affine maps, edge pixels going on; None: as they are.

    Shape: (N, C, S, S), (N, 2, 3) -> (N, C, S, S)
    """
    if affine is None:
        return x
    with torch.autocast(x.device.type, enabled=False):  # bf16 is too coarse for places
        grid = F.affine_grid(affine, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
