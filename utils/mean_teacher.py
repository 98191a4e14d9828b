"""The mean teacher: a network whose weights are a moving average of another's, which is steadier than that one is."""

import copy

import torch
from torch import Tensor

from model import DANN


class MeanTeacher:
    """The exponential moving average of a network in training (Tarvainen & Valpola, NeurIPS 2017).

    Args:
        model: the network to follow; the teacher starts as its copy, in eval mode.
        decay: share of the average that stays in each step, in (0, 1). It is smaller in the first steps, so that the
            weights that training began with are soon forgotten.
    """

    def __init__(self, model: DANN, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """Class probabilities of preprocessed images. Shape: (N, C, S, S) -> (N, 10) float32."""
        return self.model(x).float().softmax(1)

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
        return {"model": self.model.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.steps = state["steps"]
