"""Signals that need no label: how sure a network is of unlabelled images, and which epoch to trust.

All look at images of the target that have no label, here of its training set.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SND_TEMPERATURE = 0.05  # Saito et al.


def prediction_signals(probabilities: Tensor) -> dict[str, float]:
    """What predictions tell: how sure they are, and whether they use all classes. Shape: (N, K) -> numbers

    `entropy`: mean entropy of a prediction, nats, 0 to ln K; low when the network is sure, rightly or not.
    `diversity`: entropy of the mean prediction, nats; ln K when all classes are predicted alike often.
    `smallest_class_share`: share of images predicted as the class that is predicted least, in [0, 1/K].
    `bnm`: batch nuclear-norm, as `batch_nuclear_norm`. `snd`: soft neighbourhood density.
    """
    mean = probabilities.mean(0)
    share = torch.bincount(probabilities.argmax(1), minlength=probabilities.shape[1]) / len(probabilities)
    return {
        "entropy": torch.special.entr(probabilities).sum(1).mean().item(),
        "diversity": torch.special.entr(mean).sum().item(),
        "smallest_class_share": share.min().item(),
        "bnm": batch_nuclear_norm(probabilities),
        "snd": soft_neighbourhood_density(probabilities),
    }


def batch_nuclear_norm(probabilities: Tensor) -> float:
    """The nuclear norm of the predictions over the largest it can be, √(NK): high when they are sure and diverse.

    Source: Cui et al., "Towards Discriminability and Diversity" (CVPR 2020), equation 9; as a validator Musgrave et
    al., "Three New Validators and a Large-Scale Benchmark Ranking for Unsupervised Domain Adaptation" (2022).

    Shape: (N, K) -> a number in (0, 1]
    """
    return torch.linalg.matrix_norm(probabilities, "nuc").item() / math.sqrt(probabilities.numel())


def soft_neighbourhood_density(probabilities: Tensor) -> float:
    """Mean entropy of how alike a prediction is to each other one, nats: high when there are dense neighbourhoods.

    Source: Saito et al., "Tune it the Right Way" (ICCV 2021), equations 2 to 4.

    Shape: (N, K) -> a number in [0, ln(N − 1)]
    """
    unit = F.normalize(probabilities)
    similarity = unit @ unit.T / SND_TEMPERATURE
    similarity.fill_diagonal_(-math.inf)
    return torch.special.entr(similarity.softmax(1)).sum(1).mean().item()


def class_ami(features: Tensor, predicted: Tensor, classes: int) -> float:
    """Adjusted mutual information between predictions and K clusters of the features: high when both agree.

    Source: Musgrave et al. (2022), section 3, "ClassAMI".

    Shape: (N, F), (N,) -> a number up to 1, about 0 for chance
    """
    from sklearn.cluster import KMeans  # imported where they are needed: a second
    from sklearn.metrics import adjusted_mutual_info_score

    clusters = KMeans(min(classes, len(features)), n_init=3, random_state=0).fit_predict(features.numpy())
    return float(adjusted_mutual_info_score(np.asarray(predicted), clusters))
