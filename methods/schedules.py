"""The schedules of training progress p: pure functions, so that a resumed run needs no hidden counter."""

import math

from methods.recipes import Config

GAMMA = 10.0  # γ of λ_p (Ganin & Lempitsky 2015, section 4)
ALPHA, BETA = 10.0, 0.75  # α and β of the annealed rate (the same place)
WARM_UP = 0.1  # share of a run in which the cosine rate rises


def adaptation_factor(p: float, gamma: float = GAMMA) -> float:
    """Weight of the reversed gradient, λ_p = 2 / (1 + exp(−γp)) − 1 (Ganin & Lempitsky 2015, section 4).

    Args:
        p: training progress in [0, 1].
        gamma: steepness γ; the paper's is 10.

    Returns: λ_p, from 0 at p = 0 to nearly 1 at p = 1.
    """
    return 2.0 / (1.0 + math.exp(-gamma * p)) - 1.0


def reversal_weight(config: Config, p: float) -> float:
    """The λ_p that a configuration asks for at progress p in [0, 1]: it rises by `adaptation_factor`, and may fall.

    Towards the end of a run the label losses are small: a λ_p that stays high would leave the lead to the reversed
    gradient, and the features would go on changing for its sake alone.
    """
    if config.lambda_update == "epoch":
        p = math.floor(p * config.epochs + 1e-6) / config.epochs  # as the epoch began
    rising = config.lambda_max * adaptation_factor(p)
    if config.lambda_schedule == "rising":
        return rising
    return rising * (1.0 + math.cos(math.pi * p)) / 2


def annealed_rate(p: float, mu_0: float = 0.01, alpha: float = ALPHA, beta: float = BETA) -> float:
    """Learning rate μ_p = μ_0 / (1 + αp)^β (Ganin & Lempitsky 2015, section 4), p in [0, 1]."""
    return mu_0 / (1.0 + alpha * p) ** beta


def cosine_rate(p: float, mu_0: float, warm_up: float = WARM_UP) -> float:
    """Learning rate that rises linearly over the first `warm_up` share of the run, then falls as a half cosine to 0."""
    if p < warm_up:
        return mu_0 * p / warm_up
    return 0.5 * mu_0 * (1.0 + math.cos(math.pi * (p - warm_up) / (1.0 - warm_up)))


def time_decay_rate(step: int, mu_0: float, decay: float) -> float:
    """Keras' `decay` of SGD, which divides the rate as steps go by: μ_0 / (1 + decay · step). It is no weight decay."""
    return mu_0 / (1.0 + decay * step)


def learning_rate(config: Config, p: float, step: int) -> float:
    """The rate μ_p that a configuration asks for at progress p in [0, 1], optimiser step `step` (from 0)."""
    if config.lr_schedule == "constant":
        return config.lr
    if config.lr_schedule == "annealed":
        return annealed_rate(p, config.lr)
    if config.lr_schedule == "cosine":
        return cosine_rate(p, config.lr)
    return time_decay_rate(step, config.lr, config.lr_decay)
