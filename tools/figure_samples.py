"""Digits in rows: what the domains look like, and what a network sees of them."""

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from data_loader import PairedLoader, Preprocessing, spread_over
from digits.augmentation import same_views
from tools.figure_data import Domains, Network
from watch.plots import COLUMNS, Row, as_pictures, gallery


def samples_figure(network: Network, domains: Domains) -> Figure:
    """Images of both domains as they are, and below each what the network gets of it in a training step."""
    settings = network.settings
    source, target = spread_over(domains.source_train, 1000), spread_over(domains.target_train, 1000)
    count = min(COLUMNS, len(source), len(target))

    def batch(prepare: Preprocessing, augmentation: str) -> tuple[Tensor, Tensor, Tensor]:
        """The first batch of the loader that trains; its order depends on the seed alone."""
        views = same_views(augmentation)
        return next(PairedLoader(source, target.images, count, settings.seed, prepare, views, steps=1).epoch(0))

    raw_s, y_s, _ = batch(Preprocessing(source.images.shape[-1]), "none")
    _, _, raw_t = batch(Preprocessing(target.images.shape[-1]), "none")
    x_s, _, x_t = batch(network.classifier.preprocess, settings.augmentation)
    values = torch.cat((x_s, x_t)).flatten().numpy()
    low, high = np.percentile(values, (0.5, 99.5))  # one scale for both domains
    return gallery(
        [
            Row(as_pictures(raw_s, 0, 1), None, "as it is", f"Source, {source.domain}, with labels"),
            Row(as_pictures(x_s, low, high), [str(digit) for digit in y_s.tolist()], "in training"),
            Row(as_pictures(raw_t, 0, 1), None, "as it is", f"Target, {target.domain}, no labels"),
            Row(as_pictures(x_t, low, high), ["?"] * count, "in training"),
        ],
        left=1.5,
    )
