"""The features of the figures' networks, without and with gradient reversal."""

from matplotlib.figure import Figure

from tools.figure_data import Domains, Network, sample
from utils.cli import UserError
from watch.features import NEIGHBOURS, SEED, draw_features, features_figure

SAMPLES = 3000  # half of each domain


def compared_features(networks: list[Network], domains: Domains) -> tuple[Figure, list[dict[str, float]]]:
    """The features of each network, coloured by domain and by class; and the numbers beside the pictures."""
    sources = len(domains.source_test) + len(domains.source_train)
    targets = len(domains.target_test) + len(domains.target_train)
    half = min(SAMPLES // 2, sources, targets)
    if half <= NEIGHBOURS:
        raise UserError(f"{half} images of a domain are too few for a figure: download the whole set again")
    x_s, y_s = sample(domains.source_test, domains.source_train, half, SEED)
    x_t, y_t = sample(domains.target_test, domains.target_train, half, SEED)
    figure, grid = features_figure(len(networks), domains.source_test.domain, domains.target_test.domain, 2 * half)
    numbers = [
        draw_features(
            row,
            network.label,
            network.features(x_s, "source"),
            y_s.numpy(),
            network.features(x_t),
            y_t.numpy(),
            domains.target_test.classes,
        )
        for row, network in zip(grid, networks, strict=True)
    ]
    return figure, numbers
