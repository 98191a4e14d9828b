"""The architectures, as a table: the published networks and our own two; beside them those of torchvision."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from data_loader import Preprocessing, mean_pixel
from methods.backbones import PREFIX, backbone, parse_name, with_domain_norms
from methods.modern import ClassWiseDiscriminator
from methods.recipes import Config
from model import DANN, DomainDiscriminator, FeatureExtractor, LabelClassifier
from utils.cli import UserError


class Dropout(nn.Dropout):
    """Dropout whose mask comes from 16 random bits a value: on a CPU a fifth of the time of `nn.Dropout`.

    The probability is rounded to whole 65536ths, and kept values are scaled by that very probability.

    Shape: (*) -> (*)
    """

    def forward(self, x: Tensor) -> Tensor:
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # of the 65536 values that 16 bits take
        if not self.training or not dropped or x.device.type != "cpu":
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        values = words.view(torch.int16).as_strided(x.shape, torch.empty_like(x).stride())  # laid out as x is
        return x * (values >= dropped - 2**15).to(x.dtype).mul_(2**16 / (2**16 - dropped))


class LogitDifference(nn.Module):
    """Of a two-way softmax over (source, target) the logit of "target": the difference. Shape: (N, 2) -> (N,)"""

    def forward(self, logits: Tensor) -> Tensor:
        return logits[:, 1] - logits[:, 0]


def _conv(in_channels: int, out_channels: int, size: int, padding: int | str = "same") -> list[nn.Module]:
    return [nn.Conv2d(in_channels, out_channels, size, padding=padding), nn.ReLU(inplace=True)]


def _conv_pool(in_channels: int, out_channels: int, size: int, pool: nn.MaxPool2d) -> list[nn.Module]:
    """Convolution, ReLU and max pooling; the two commute, and after pooling ReLU has a fourth of the values."""
    convolution, relu = _conv(in_channels, out_channels, size)
    return [convolution, pool, relu]


def _conv_pool_norm(in_channels: int, out_channels: int, pool: bool = True, padding: int = 1) -> list[nn.Module]:
    """3×3 convolution, max pooling by 2 where asked for, and batch norm of the fourth of the values that are left."""
    pooling = [nn.MaxPool2d(2)] if pool else []
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=padding, bias=False)
    return [convolution, *pooling, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def _mlp(*sizes: int, dropout: float | None = None) -> list[nn.Module]:
    """Linear layers with ReLU between them and, unless it is None, dropout before each but the first.

    With a dropout of 0 its layers are there too: the names of the weights do not depend on it.
    """
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        layers += [Dropout(dropout)] if dropout is not None and i else []
        layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
    return layers[:-1]


def _system_a(part: str, dropout: float, classes: int) -> list[nn.Module]:
    """28×28. The paper's SVHN net as the usual PyTorch scripts write it; 28 → 14 → 7 by padded pooling."""
    if part == "classifier":
        return _mlp(6272, 3072, 2048, classes)
    if part == "discriminator":
        return [*_mlp(6272, 1024, 1024, 2), LogitDifference()]
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    convolutions = [*_conv_pool(3, 64, 5, pool), *_conv_pool(64, 64, 5, pool), *_conv(64, 128, 5)]
    return [*convolutions, Dropout(dropout), nn.Flatten()]


def _system_b(part: str, dropout: float, classes: int) -> list[nn.Module]:
    """32×32. The Keras scripts' CNN and CNN-GRL; dropout after each block is half of that before the labels."""
    if part == "classifier":
        return [Dropout(dropout), *_mlp(512, 32, classes)]
    if part == "discriminator":
        return [*_mlp(512, 512, 32, 2), LogitDifference()]
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64)):
        layers += [*_conv(inputs, outputs, 3), *_conv(outputs, outputs, 3, padding="valid")]
        layers += [nn.MaxPool2d(2), Dropout(dropout / 2)]
    return [*layers, nn.Flatten(), nn.Linear(64 * 6 * 6, 512), nn.ReLU(inplace=True)]


def _paper_svhn(part: str, dropout: float, classes: int) -> list[nn.Module]:
    """32×32. JMLR figure 4(c).

    Note: the paper does not state the padding; padding 2 and rounding up give 32 → 16 → 8.
    """
    if part == "classifier":
        return _mlp(8192, 3072, 2048, classes, dropout=dropout)
    if part == "discriminator":
        return [*_mlp(8192, 1024, 1024, 1, dropout=dropout), nn.Flatten(0)]
    pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
    return [*_conv_pool(3, 64, 5, pool), *_conv_pool(64, 64, 5, pool), *_conv(64, 128, 5), nn.Flatten()]


def _paper_mnist(part: str, dropout: float, classes: int) -> list[nn.Module]:
    """32×32. JMLR figure 4(a), padded so that 32 → 16 → 8 (the paper does not state the padding)."""
    if part == "classifier":
        return _mlp(3072, 100, 100, classes, dropout=dropout)
    if part == "discriminator":
        return [*_mlp(3072, 100, 1, dropout=dropout), nn.Flatten(0)]
    pool = nn.MaxPool2d(2)
    return [*_conv_pool(3, 32, 5, pool), *_conv_pool(32, 48, 5, pool), nn.Flatten()]


def _small(part: str, dropout: float, classes: int, size: int = 32) -> list[nn.Module]:
    """Our own small network: three 3×3 convolutions, 32 → 16 → 8 → 4 or 64 → 32 → 16 → 8, and 128 features.

    Its batch norm keeps each domain's own statistics.
    """
    if part == "classifier":
        return _mlp(128, classes)
    if part == "discriminator":
        return [*_mlp(128, 128, 1), nn.Flatten(0)]
    blocks = [*_conv_pool_norm(3, 32), *_conv_pool_norm(32, 48), *_conv_pool_norm(48, 64), nn.Flatten()]
    features = [nn.Linear(64 * (size // 8) ** 2, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(inplace=True)]
    layers = [*blocks, Dropout(dropout), *features]
    return [*with_domain_norms(nn.Sequential(*layers)).children()]


def _modern(part: str, dropout: float, classes: int) -> list[nn.Module]:
    """Grey 32×32 or 64×64. Our own: six batch-normed 3×3 convolutions, averaged over places; 128 features.

    The average binds the features to no place. The discriminator judges each class by itself.
    """
    if part == "classifier":
        return _mlp(128, classes)
    if part == "discriminator":
        return _mlp(128, 128, classes)
    layers: list[nn.Module] = []
    for inputs, outputs, pool in ((1, 32, True), (32, 64, False), (64, 64, True), (64, 128, False), (128, 128, True)):
        layers += _conv_pool_norm(inputs, outputs, pool)
    layers += [*_conv_pool_norm(128, 256, False, padding=0), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Dropout(dropout)]
    return [*layers, nn.Linear(256, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(inplace=True)]


@dataclass(frozen=True)
class Network:
    """One row of the table of architectures.

    `layers(part, dropout, classes)` lists the layers of the "extractor", the "classifier" or the "discriminator".
    """

    layers: Callable[[str, float, int], list[nn.Module]]
    image_size: int  # height and width of its input, pixels
    channels: int = 3  # 3: colour; 1: grey, which colour images are turned into
    discriminator: type[DomainDiscriminator] = DomainDiscriminator


NETWORKS: dict[str, Network] = {
    "system-a": Network(_system_a, 28),
    "system-b": Network(_system_b, 32),
    "paper-svhn": Network(_paper_svhn, 32),
    "paper-mnist": Network(_paper_mnist, 32),
    "small": Network(_small, 32),
    "small-64": Network(partial(_small, size=64), 64),
    "modern": Network(_modern, 32, channels=1, discriminator=ClassWiseDiscriminator),
    "modern-64": Network(_modern, 64, channels=1, discriminator=ClassWiseDiscriminator),
}


def input_shape(name: str) -> tuple[int, int, int]:
    """Channels, 1 or 3, height and width of what a network takes; raises UserError where there is no such network."""
    if name.startswith(PREFIX):
        _, size = parse_name(name)
        return 3, size, size
    if name not in NETWORKS:
        raise UserError(f"there is no network {name}: choose one of {', '.join(NETWORKS)}, or {PREFIX}resnet18")
    network = NETWORKS[name]
    return network.channels, network.image_size, network.image_size


def build_network(
    name: str, dropout: float = 0.0, classes: int = 10, pretrained: bool = False, download: bool = True
) -> DANN:
    """A network with new weights.

    Args:
        name: a key of NETWORKS, or `torchvision:NAME` or `torchvision:NAME@SIZE`.
        dropout: probability in [0, 1).
        classes: how many there are.
        pretrained, download: as of `methods.backbones.backbone`.

    Raises: UserError for a name that is none, and for weights that can't be had.
    """
    if name.startswith(PREFIX):
        layers, features = backbone(parse_name(name)[0], pretrained, download)
        return DANN(
            FeatureExtractor(layers.append(Dropout(dropout))),
            LabelClassifier(nn.Sequential(*_mlp(features, classes))),
            ClassWiseDiscriminator(nn.Sequential(*_mlp(features, 1024, classes))),
        )
    if pretrained:
        raise UserError(f"--pretrained: there are ImageNet weights of networks {PREFIX}NAME alone, not of {name}")
    input_shape(name)  # raises for a name that is none
    network = NETWORKS[name]
    model = DANN(
        FeatureExtractor(nn.Sequential(*network.layers("extractor", dropout, classes))),
        LabelClassifier(nn.Sequential(*network.layers("classifier", dropout, classes))),
        network.discriminator(nn.Sequential(*network.layers("discriminator", dropout, classes))),
    )
    if name in INITIALISATIONS:
        model.apply(INITIALISATIONS[name])
    return model


def on_device(model: DANN, device: torch.device) -> DANN:
    """The network on a device, its convolutions' weights laid out as images are, channels last."""
    return model.to(device).to(memory_format=torch.channels_last)


def preprocessing_for(config: Config, images: Sequence[Tensor] = ()) -> Preprocessing:
    """What the configuration does to images; `images` are both training sets, whose mean pixel it may need."""
    mean = mean_pixel(images) if config.normalisation == "mean" and images else (0.0, 0.0, 0.0)
    channels, size, _ = input_shape(config.network)
    return Preprocessing(size, config.normalisation, mean, channels == 1)


def _initialise_system_a(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _initialise_system_b(module: nn.Module) -> None:
    """As Keras does unless told otherwise (Glorot & Bengio 2010)."""
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


INITIALISATIONS = {"system-a": _initialise_system_a, "system-b": _initialise_system_b}  # where not PyTorch's own
