"""The mean teacher: a network whose weights are a moving average of another's, which is steadier than that one is."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from model import CLASSES, DANN
from utils.distributed import ALONE, Processes

MEAN_SHARE = 0.02  # how much of the mean prediction is of the latest batch


class MeanTeacher:
    """The exponential moving average of a network in training (Tarvainen & Valpola, NeurIPS 2017).

    Args:
        model: the network to follow; the teacher starts as its copy, in eval mode.
        decay: share of the average that stays in each step, in (0, 1). It is smaller in the first steps, so that the
            weights that training began with are soon forgotten.
        views: what it labels, "weak" or "both".
        alignment: κ of `align`, in [0, 1].
        processes: those that train together, each with its share of a batch.
    """

    def __init__(
        self,
        model: DANN,
        decay: float,
        views: str = "weak",
        alignment: float = 0.0,
        processes: Processes = ALONE,
    ):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.views, self.alignment, self.processes, self.steps = decay, views, alignment, processes, 0
        self.mean = next(model.parameters()).new_full((CLASSES,), 1 / CLASSES)  # of its predictions, a moving average

    @torch.no_grad()
    def label(self, weak: Tensor, strong: Tensor, radius: float = 0.0, warp: float = 0.0) -> tuple[Tensor, Tensor]:
        """Class probabilities of preprocessed target images, and the strongly changed ones moved and warped.

        With both views the probabilities are the mean of those of the weakly and of the strongly changed image: the
        teacher is only sure where it reads the two alike.

        An image moves to where the teacher reads it less as it has labelled it (virtual adversarial training, Miyato
        et al., TPAMI 2018). A single gradient gives the direction: it is not zero here, because the label comes not
        from the view that moves alone. The affine map that warps it moves in the same way, from none on (after Xiao
        et al., ICLR 2018, who warp each pixel by itself).

        Args:
            radius: l2 norm of what is added to an image.
            warp: l2 norm of what is added to the six numbers of its map, which count in halves of the image.

        Shape: (N, C, S, S), (N, C, S, S) -> (N, 10) float32, rows sum to 1; (N, C, S, S)
        """
        q = self.model(weak).float().softmax(1)
        moves = radius > 0 or warp > 0
        if self.views == "both" or moves:
            with torch.set_grad_enabled(moves):
                moved = [strong.detach().requires_grad_(moves)]
                if warp:
                    moved.append(torch.eye(2, 3).to(strong).repeat(len(strong), 1, 1).requires_grad_())
                logits = self.model(warped(*moved)).float()
            if self.views == "both":
                q = (q + logits.softmax(1)) / 2
        q = self.align(q)
        if moves:
            with torch.enable_grad():
                loss = F.cross_entropy(logits, q, reduction="sum")
            changes = map(of_length, torch.autograd.grad(loss, moved), (radius, warp))
            strong = warped(*(start.detach() + change for start, change in zip(moved, changes, strict=True)))
        return q, strong

    def align(self, q: Tensor) -> Tensor:
        """Draw probabilities to an estimate of the target's class shares.

        Each class counts by (uniform / mean prediction)^κ (distribution alignment, Berthelot et al. 2020): the target
        is taken to have the shares that were predicted, drawn towards equal ones by κ. With κ = 0 a class that is read
        less and less often is lost; with κ = 1 all classes are taken to be alike in size.

        Shape: (N, 10) -> (N, 10), rows sum to 1
        """
        if not self.alignment:
            return q
        self.mean.lerp_(self.processes.mean_(q.mean(0)), MEAN_SHARE)
        q = q * (1 / CLASSES / self.mean) ** self.alignment
        return q / q.sum(1, keepdim=True)

    @torch.no_grad()
    def follow(self, model: DANN) -> None:
        """Take in the weights and the batch statistics that `model` has after a step."""
        self.steps += 1
        share = 1 - min(self.decay, self.steps / (self.steps + 9))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), share)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs, share)
            else:
                mine.copy_(theirs)

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return {"model": self.model.state_dict(), "mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.mean.copy_(state["mean"])
        self.steps = state["steps"]


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
