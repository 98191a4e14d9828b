"""Training curves."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from methods.recipes import Config
from methods.schedules import reversal_weight
from tools.figure_data import Network
from watch.plots import REFERENCE, SOURCE, TARGET, new_figure

LINES: dict[int, tuple[dict[str, Any], ...]] = {  # the last network is the run, one before it what it is compared with
    1: ({"linestyle": "-", "marker": "o"},),
    2: ({"linestyle": ":", "marker": "s", "markerfacecolor": "white"}, {"linestyle": "-", "marker": "o"}),
}
NEUTRAL = "#444444"


def column(network: Network, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and a value of each; an epoch that has no such value is left out."""
    points = [(record["epoch"], record[key]) for record in network.records if record.get(key) is not None]
    epochs, values = np.array(points, dtype=float).reshape(-1, 2).T
    return epochs, values


def lambda_curve(settings: Config) -> tuple[np.ndarray, np.ndarray]:
    """Epochs, from 0 on, and the λ_p of the training steps there."""
    epochs = np.linspace(0, settings.warm_start_epochs + settings.epochs, 500)
    p = np.maximum(epochs - settings.warm_start_epochs, 0) / settings.epochs
    if settings.lambda_update == "epoch":
        p = np.minimum(p, 1 - 1 / settings.epochs)  # the end of the last epoch is still of it
    return epochs, np.array([reversal_weight(settings, value) for value in p])


def chance_loss(settings: Config) -> tuple[float, str]:
    """The domain loss of a discriminator that can't tell the domains apart, and how to write it."""
    if settings.domain_loss == "sum":
        return 2 * math.log(2), f"2·ln 2 ≈ {2 * math.log(2):.3f}"
    return math.log(2), f"ln 2 ≈ {math.log(2):.3f}"


def reference(axes: Axes, value: float, text: str) -> None:
    """The dashed line of what a curve should tend to, its name below it."""
    axes.axhline(value, color=REFERENCE, linestyle="--", linewidth=1.2, zorder=3)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}
    place: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
    axes.annotate(text, (0.98, value), (0, -6), bbox=box, ha="right", va="top", **place)


def curves_figure(networks: list[Network]) -> Figure:
    """Losses, domain accuracy, test accuracies, λ_p and the learning rate over the epochs of a run."""
    figure = new_figure(5.2)
    panels = figure.subplots(2, 3).flatten()
    titles = ("label loss", "domain loss", "domain accuracy", "test accuracy", "λ$_p$", "learning rate μ$_p$")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, loc="left")
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlim(0, max(record["epoch"] for network in networks for record in network.records) + 0.3)
    label_loss, domain_loss, domain_accuracy, accuracy, weight, rate = panels
    for network, style in zip(networks, LINES[len(networks)], strict=True):
        style = {"markersize": 4, "linewidth": 1.6, "color": NEUTRAL} | style
        label_loss.plot(*column(network, "loss_label"), **style)
        domain_loss.plot(*column(network, "loss_domain"), **style)
        domain_accuracy.plot(*column(network, "domain_accuracy"), **style)
        accuracy.plot(*column(network, "source_accuracy"), **style | {"color": SOURCE})
        accuracy.plot(*column(network, "target_accuracy"), **style | {"color": TARGET})
        if network.settings.method == "dann":
            weight.plot(*lambda_curve(network.settings), color=NEUTRAL, linewidth=1.6)
    rate.plot(*column(networks[-1], "learning_rate"), color=NEUTRAL, linewidth=1.6, marker="o", markersize=4)
    adapted = [network.settings for network in networks if network.settings.method == "dann"]
    for axes in (label_loss, domain_loss, rate):
        axes.set_ylim(0, axes.get_ylim()[1])
    if adapted:
        chance, text = chance_loss(adapted[-1])
        reference(domain_loss, chance, text)
        reference(domain_accuracy, 0.5, "50 %: chance")
        domain_loss.set_ylim(0, max(1.15 * chance, domain_loss.get_ylim()[1]))
    else:
        for axes in (domain_loss, domain_accuracy, weight):
            axes.text(0.5, 0.5, "no reversal", ha="center", va="center", transform=axes.transAxes)
    domain_accuracy.set_ylim(0, 1.02)
    weight.set_ylim(0, 1.05 * max([settings.lambda_max for settings in adapted] or [1]))
    for axes in (domain_accuracy, accuracy):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes in panels[3:]:
        axes.set_xlabel("epochs")
    handles = [
        Line2D([], [], color=NEUTRAL, markersize=4, label=network.label, **style)
        for network, style in zip(networks, LINES[len(networks)], strict=True)
    ]
    handles += [
        Line2D([], [], color=SOURCE, linewidth=4, label=f"{networks[-1].classifier.source} (source)"),
        Line2D([], [], color=TARGET, linewidth=4, label=f"{networks[-1].classifier.target} (target)"),
        Line2D([], [], color=REFERENCE, linestyle="--", label="domains alike"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure
