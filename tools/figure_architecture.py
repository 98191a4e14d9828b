"""The network of a run with its gradients, after figure 1 of Ganin & Lempitsky (2015): drawn from the modules."""

import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor, nn

from tools.figure_data import Domains, Network
from watch.plots import SOURCE, TARGET, WIDTH, as_pictures

PIXELS = 850  # all places below are pixels of the figure as a README shows it
HEIGHT = 500
EXTRACTOR, CLASSIFIER, DISCRIMINATOR, REVERSAL = "#CDE8DF", "#CFE3F1", "#F7DDCB", "#333333"
LABEL_GRADIENT, DOMAIN_GRADIENT = SOURCE, TARGET
CENTRED: dict[str, Any] = {"ha": "center", "va": "center"}
SHORT = {
    "BatchNorm": "batch norm", "InstanceNorm": "instance norm", "GroupNorm": "group norm", "LayerNorm": "layer norm",
    "AdaptiveAvgPool": "average pool", "AdaptiveMaxPool": "max pool", "MaxPool": "max pool", "AvgPool": "average pool",
    "Dropout": "dropout",
}  # fmt: skip


@dataclass
class Stage:
    """A layer with weights, what comes with it, and the shape of what leaves it."""

    title: str
    extras: list[str] = field(default_factory=list)
    shape: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """The stage in a few lines."""
        extras = textwrap.wrap(", ".join(dict.fromkeys(self.extras)), 24)
        return "\n".join([self.title, *extras, "→ " + "×".join(map(str, self.shape))])


def title_of(module: nn.Module) -> str | None:
    """What to call a layer with weights; None for any other module."""
    if isinstance(module, nn.Conv2d):
        return "conv " + "×".join(map(str, module.kernel_size))
    if isinstance(module, nn.Linear):
        return "linear"
    return None


def extra_of(module: nn.Module) -> str | None:
    """What to call a module that comes with a layer; None for those that go without saying."""
    if getattr(module, "p", None) == 0:  # dropout that drops nothing
        return None
    name = type(module).__name__
    return next((short for key, short in SHORT.items() if name.startswith(key)), None)


def stages_of(part: nn.Module, *inputs: Tensor) -> tuple[list[Stage], Tensor]:
    """The stages of a part of the network in the order of its forward pass, and what it returns for the inputs."""
    stages: list[Stage] = []
    ahead: list[str] = []

    def note(module: nn.Module, _: object, output: Tensor) -> None:
        if title := title_of(module):
            stages.append(Stage(title, ahead.copy()))
            ahead.clear()
        elif extra := extra_of(module):
            (stages[-1].extras if stages else ahead).append(extra)
        if stages and (title_of(module) or output.dim() == len(stages[-1].shape) + 1):  # not as it is flattened
            stages[-1].shape = tuple(output.shape[1:])

    hooks = [module.register_forward_hook(note) for module in part.modules() if not list(module.children())]
    try:
        with torch.inference_mode():
            output = part(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return stages, output


def draw_box(
    axes: Axes, place: tuple[float, float, float, float], fill: str, edge: str = "0.4", radius: int = 8
) -> None:
    """A box with round corners. Args: place: left, bottom, right, top."""
    left, bottom, right, top = place
    shape = f"round,pad=0,rounding_size={radius}"
    axes.add_patch(FancyBboxPatch((left, bottom), right - left, top - bottom, shape, facecolor=fill, edgecolor=edge))


def draw_part(axes: Axes, name: str, part: nn.Module, stages: list[Stage], place: tuple, fill: str) -> None:
    """A panel with the part's name and a box for each stage. Args: place: left, right, y of the middle."""
    left, right, middle = place
    bottom, top = middle - 95, middle + 95
    draw_box(axes, (left, bottom, right, top), fill)
    count = sum(weight.numel() for weight in part.parameters())
    axes.text((left + right) / 2, top - 15, name, fontsize=9, fontweight="bold", **CENTRED)
    axes.text((left + right) / 2, bottom + 11, f"{count:,} parameters", fontsize=8, **CENTRED)
    step = (right - left - 12) / len(stages)
    width = min(step - 6, 76)
    for i, stage in enumerate(stages):
        x = left + 6 + (i + 0.5) * step
        draw_box(axes, (x - width / 2, bottom + 23, x + width / 2, bottom + 160), "white", "0.5", 3)
        size = min(8, width / (1.85 * (stage.text.count("\n") + 1)))  # as many lines as there are must fit
        style: dict[str, Any] = {"fontsize": size, "rotation": 90, "linespacing": 1.25, "multialignment": "center"}
        axes.text(x, bottom + 91, stage.text, **style, **CENTRED)


def draw_path(axes: Axes, points: list[tuple[float, float]], colour: str = "black", dashed: bool = False) -> None:
    """A line through the points that ends in an arrow head: a value forwards, or dashed a gradient backwards."""
    style: dict[str, Any] = {"color": colour, "linewidth": 1.8 if dashed else 1.3}
    axes.plot(*zip(*points[:-1], strict=True), linestyle="--" if dashed else "-", **style)
    style |= {"arrowstyle": "-|>", "linestyle": "--" if dashed else "-", "mutation_scale": 13}
    axes.annotate("", points[-1], points[-2], arrowprops=style | {"shrinkA": 0, "shrinkB": 0})


def draw_inputs(axes: Axes, network: Network, domains: Domains) -> None:
    """A training image of each domain as the network gets it, and the arrow into the extractor."""
    images = (domains.source_train.images[:1], domains.target_train.images[:1])
    x = torch.cat([network.classifier.preprocess(image) for image in images])
    low, high = float(x.min()), float(x.max())
    places = (("source", SOURCE, 266, 332), ("target", TARGET, 178, 168))
    for picture, (name, colour, bottom, y) in zip(as_pictures(x, low, high), places, strict=True):
        axes.imshow(picture, extent=(10, 66, bottom, bottom + 56), aspect="auto")
        axes.text(38, y, name, **CENTRED, color=colour, fontweight="bold")
    draw_path(axes, [(70, 250), (92, 250)])


def architecture_figure(network: Network, domains: Domains) -> Figure:
    """The three parts with their layers, and the gradients that train them."""
    classifier, model = network.classifier, network.classifier.model
    image = domains.source_train.images[:1].to(classifier.device)
    layers, features = stages_of(model.extractor, classifier.preprocess(image))
    label_layers, _ = stages_of(model.classifier, features)
    domain_layers, _ = stages_of(model.discriminator, features)

    figure = Figure(figsize=(WIDTH, WIDTH * HEIGHT / PIXELS))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    draw_inputs(axes, network, domains)
    draw_part(axes, "FeatureExtractor  $G_f$", model.extractor, layers, (94, 430, 250), EXTRACTOR)
    draw_part(axes, "LabelClassifier  $G_y$", model.classifier, label_layers, (500, 742, 372), CLASSIFIER)
    draw_part(axes, "DomainDiscriminator  $G_d$", model.discriminator, domain_layers, (552, 742, 128), DISCRIMINATOR)
    draw_box(axes, (472, 80, 536, 176), REVERSAL)
    axes.text(504, 128, "Gradient\nReversal\n$R_\\lambda$", color="white", fontsize=8.5, **CENTRED)
    for y, name, beside, words in (
        (372, "$L_y$", 322, "label loss\non source\nalone"),
        (128, "$L_d$", 178, "domain loss\non both\ndomains"),
    ):
        draw_box(axes, (770, y - 18, 836, y + 18), "white", "black")
        axes.text(803, y, name, fontsize=12, **CENTRED)
        axes.text(803, beside, words, fontsize=8.5, **CENTRED)
        draw_path(axes, [(742, y), (770, y)])

    draw_path(axes, [(430, 250), (458, 250), (458, 372), (500, 372)])
    draw_path(axes, [(458, 250), (458, 142), (472, 142)])
    draw_path(axes, [(536, 128), (552, 128)])
    axes.text(468, 250, f"features f, {features[0].numel():,} values", va="center")
    draw_path(axes, [(803, 390), (803, 486), (440, 486), (440, 365), (94, 365)], LABEL_GRADIENT, dashed=True)
    draw_path(axes, [(803, 110), (803, 14), (504, 14), (504, 80)], DOMAIN_GRADIENT, dashed=True)
    draw_path(axes, [(472, 100), (440, 100), (440, 134), (94, 134)], DOMAIN_GRADIENT, dashed=True)
    for x, y, colour, text in (
        (621, 486, LABEL_GRADIENT, r"$\partial L_y\,/\,\partial\theta_y$"),
        (262, 365, LABEL_GRADIENT, r"$\partial L_y\,/\,\partial\theta_f$"),
        (647, 14, DOMAIN_GRADIENT, r"$\partial L_d\,/\,\partial\theta_d$"),
        (262, 134, DOMAIN_GRADIENT, r"$-\lambda_p\,\partial L_d\,/\,\partial\theta_f$"),
    ):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 3}
        axes.text(x, y, text, **CENTRED, color=colour, fontsize=13, bbox=box)
    axes.text(
        12,
        468,
        f"Network {network.settings.network}\nSolid: values, forwards\nDashed: gradients, backwards",
        va="center",
        linespacing=1.4,
    )
    words = (
        "The sum $L_y + L_d$ is minimised: the discriminator learns to\n"
        "tell the domains apart. To the extractor its gradient comes\n"
        "reversed: it learns features that are alike in both domains."
    )
    axes.text(12, 60, words, va="center", linespacing=1.4)
    axes.set(xlim=(0, PIXELS), ylim=(0, HEIGHT))
    return figure
