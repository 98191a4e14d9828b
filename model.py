"""The networks: gradient reversal inside a feature extractor, a label classifier and a domain discriminator.

Source: Ganin & Lempitsky, "Unsupervised Domain Adaptation by Backpropagation" (ICML 2015) and Ganin et al.,
"Domain-Adversarial Training of Neural Networks" (JMLR 17(59), 2016).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


class GradientReversal(torch.autograd.Function):
    """R_λ(x) = x, with dR_λ/dx = −λ·I in the backward pass (paper, section 3, equations 9 and 10)."""

    @staticmethod
    def forward(x: Tensor, lambda_p: float) -> Tensor:
        return x.view_as(x)  # a view: autograd would skip a function that returns its very input

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, ctx.lambda_p = inputs

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return -ctx.lambda_p * grad_output, None


def reverse_gradient(x: Tensor, lambda_p: float | Tensor = 1.0) -> Tensor:
    """Pass x on unchanged and multiply the gradient that comes back by −λ_p.

    Args:
        x: any shape; the features f = G_f(x).
        lambda_p: factor λ_p ≥ 0, a float or, for code that is compiled, a tensor without dimensions.

    Shape: (*) -> (*)
    """
    return GradientReversal.apply(x, lambda_p)


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


def _conv(in_channels: int, out_channels: int, size: int, padding: int | str = "same") -> list[nn.Module]:
    return [nn.Conv2d(in_channels, out_channels, size, padding=padding), nn.ReLU(inplace=True)]


def _conv_pool(in_channels: int, out_channels: int, size: int, pool: nn.MaxPool2d) -> list[nn.Module]:
    """Convolution, ReLU and max pooling; the two commute, and after pooling ReLU has a fourth of the values."""
    convolution, relu = _conv(in_channels, out_channels, size)
    return [convolution, pool, relu]


def _conv_norm_pool(in_channels: int, out_channels: int) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.MaxPool2d(2), nn.ReLU(inplace=True)]


def _conv_pool_norm(in_channels: int, out_channels: int, pool: bool, padding: int = 1) -> list[nn.Module]:
    """3×3 convolution, max pooling by 2 where asked for, and batch norm of the fourth of the values that are left."""
    pooling = [nn.MaxPool2d(2)] if pool else []
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=padding, bias=False)
    return [convolution, *pooling, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def _mlp(*sizes: int, dropout: float = 0.0) -> nn.Sequential:
    """Linear layers with ReLU between them and, where asked for, dropout before each but the first."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        layers += [Dropout(dropout)] if dropout and i else []
        layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def _system_a(part: str, dropout: float) -> nn.Sequential:
    """28×28. The paper's SVHN net as the usual PyTorch scripts write it; 28 → 14 → 7 by padded pooling."""
    if part == "classifier":
        return _mlp(6272, 3072, 2048, CLASSES)
    if part == "discriminator":
        return _mlp(6272, 1024, 1024, 2)
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    layers = [
        *_conv_pool(3, 64, 5, pool),
        *_conv_pool(64, 64, 5, pool),
        *_conv(64, 128, 5),
        Dropout(dropout),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers)


def _system_b(part: str, dropout: float) -> nn.Sequential:
    """32×32. The Keras scripts' CNN and CNN-GRL; dropout after each block is half of that before the labels."""
    if part == "classifier":
        return nn.Sequential(Dropout(dropout), *_mlp(512, 32, CLASSES))
    if part == "discriminator":
        return _mlp(512, 512, 32, 2)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64)):
        layers += [*_conv(inputs, outputs, 3), *_conv(outputs, outputs, 3, padding="valid")]
        layers += [nn.MaxPool2d(2), Dropout(dropout / 2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 6 * 6, 512), nn.ReLU(inplace=True))


def _paper_svhn(part: str, dropout: float) -> nn.Sequential:
    """32×32. JMLR figure 4(c).

    Note: the paper does not state the padding; padding 2 and rounding up give 32 → 16 → 8.
    """
    if part == "classifier":
        return _mlp(8192, 3072, 2048, CLASSES, dropout=dropout)
    if part == "discriminator":
        return _mlp(8192, 1024, 1024, 1, dropout=dropout)
    pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
    return nn.Sequential(*_conv_pool(3, 64, 5, pool), *_conv_pool(64, 64, 5, pool), *_conv(64, 128, 5), nn.Flatten())


def _paper_mnist(part: str, dropout: float) -> nn.Sequential:
    """32×32. JMLR figure 4(a), padded so that 32 → 16 → 8 (the paper does not state the padding)."""
    if part == "classifier":
        return _mlp(3072, 100, 100, CLASSES, dropout=dropout)
    if part == "discriminator":
        return _mlp(3072, 100, 1, dropout=dropout)
    pool = nn.MaxPool2d(2)
    return nn.Sequential(*_conv_pool(3, 32, 5, pool), *_conv_pool(32, 48, 5, pool), nn.Flatten())


def _quick(part: str, dropout: float) -> nn.Sequential:
    """32×32. Our own small network: three batch-normed 3×3 convolutions, 32 → 16 → 8 → 4, and 128 features."""
    if part == "classifier":
        return _mlp(128, CLASSES)
    if part == "discriminator":
        return _mlp(128, 128, 1)
    blocks = [*_conv_norm_pool(3, 32), *_conv_norm_pool(32, 48), *_conv_norm_pool(48, 64), nn.Flatten()]
    features = [nn.Linear(64 * 4 * 4, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(inplace=True)]
    return nn.Sequential(*blocks, Dropout(dropout), *features)


def _modern(part: str, dropout: float) -> nn.Sequential:
    """Grey 32×32. Our own: six batch-normed 3×3 convolutions, 32 → 16 → 8 → 4 → 2, averaged over places; 128 features.

    The average binds the features to no place. The discriminator judges each class by itself.
    """
    if part == "classifier":
        return _mlp(128, CLASSES)
    if part == "discriminator":
        return _mlp(128, 128, CLASSES)
    layers: list[nn.Module] = []
    for inputs, outputs, pool in ((1, 32, True), (32, 64, False), (64, 64, True), (64, 128, False), (128, 128, True)):
        layers += _conv_pool_norm(inputs, outputs, pool)
    layers += [*_conv_pool_norm(128, 256, False, padding=0), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(256, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(inplace=True))


@dataclass(frozen=True)
class Network:
    """One row of the table of architectures.

    `layers(part, dropout)` builds the "extractor", the "classifier" or the "discriminator".
    """

    layers: Callable[[str, float], nn.Sequential]
    image_size: int  # height and width of its input, pixels
    channels: int = 3  # 3: colour; 1: grey, which colour images are turned into
    batch_normed: bool = False
    class_wise: bool = False  # whether its discriminator has a logit for each class


NETWORKS: dict[str, Network] = {
    "system-a": Network(_system_a, 28),
    "system-b": Network(_system_b, 32),
    "paper-svhn": Network(_paper_svhn, 32),
    "paper-mnist": Network(_paper_mnist, 32),
    "quick": Network(_quick, 32, batch_normed=True),
    "modern": Network(_modern, 32, channels=1, batch_normed=True, class_wise=True),
}


class FeatureExtractor(nn.Module):
    """G_f: images to features, which are ≥ 0. Shape: (N, C, S, S) -> (N, F), C and S as NETWORKS says."""

    def __init__(self, network: str = "system-a", dropout: float = 0.5):
        super().__init__()
        self.layers = NETWORKS[network].layers("extractor", dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def convolutions(self) -> list[nn.Conv2d]:
        """The convolutions in the order of the forward pass."""
        return [module for module in self.layers if isinstance(module, nn.Conv2d)]


class LabelClassifier(nn.Module):
    """G_y: features to the logits of the ten digits. Shape: (N, F) -> (N, 10)."""

    def __init__(self, network: str = "system-a", dropout: float = 0.5):
        super().__init__()
        self.layers = NETWORKS[network].layers("classifier", dropout)

    def forward(self, f: Tensor) -> Tensor:
        return self.layers(f)


class DomainDiscriminator(nn.Module):
    """G_d behind the gradient reversal: features to the logits of the domain, 0 = source, 1 = target.

    A class-wise network (`modern`) has a logit of the target for each class (MADA, Pei et al., AAAI 2018); of an image
    counts their mean under `classes`, its class probabilities, or without them under all classes alike.

    Shape: (N, F), classes (N, 10) -> (N, 2), or (N, 1) with the target's logit alone in all networks but the systems'.
    """

    def __init__(self, network: str = "system-a", dropout: float = 0.5):
        super().__init__()
        self.layers = NETWORKS[network].layers("discriminator", dropout)

    def forward(self, f: Tensor, lambda_p: float | Tensor, classes: Tensor | None = None) -> Tensor:
        logits = self.layers(reverse_gradient(f, lambda_p))
        if logits.shape[1] <= 2:
            return logits
        return logits.mean(1, keepdim=True) if classes is None else (logits * classes).sum(1, keepdim=True)


class DANN(nn.Module):
    """Domain-adversarial neural network: extractor, classifier and discriminator (paper, figure 1).

    Calling it classifies images; training uses its three parts.

    Args:
        network: a key of NETWORKS.
        dropout: probability in [0, 1).

    Shape: (N, C, S, S) -> (N, 10), preprocessed images to logits; C and S as NETWORKS says
    """

    def __init__(self, network: str = "system-a", dropout: float = 0.5):
        super().__init__()
        self.extractor = FeatureExtractor(network, dropout)
        self.classifier = LabelClassifier(network, dropout)
        self.discriminator = DomainDiscriminator(network, dropout)
        if network == "system-a":
            self.apply(_initialise_system_a)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.extractor(x))

    def parts(self) -> dict[str, nn.Module]:
        """The three parts by name."""
        return dict(self.named_children())


def _initialise_system_a(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.zeros_(module.bias)


def domain_loss(logits: Tensor, domain: int, weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of a batch that is all of one domain, 0 = source, 1 = target; in nats.

    Args:
        weights: how much each image counts, with an expectation of 1; None: all alike.

    Shape: (N, 2) or (N, 1), (N,) -> ()
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bf16 is too coarse for a logarithm
    if logits.shape[1] == 1:  # the logistic form, -log sigmoid(±logit)
        losses = F.softplus(logits if domain == 0 else -logits).squeeze(1)
    else:
        losses = F.cross_entropy(logits, logits.new_full((len(logits),), domain, dtype=torch.long), reduction="none")
    return losses.mean() if weights is None else (weights * losses).mean()


def balancing_weights(labels: Tensor) -> Tensor:
    """The weight of a class's images with which all classes count alike; 1 on average, 0 for a class without images.

    Shape: (N,) -> (10,)
    """
    counts = torch.bincount(labels, minlength=CLASSES)
    present = counts > 0
    return present * len(labels) / (present.sum() * counts.clamp(min=1))


def predicted_target(logits: Tensor) -> Tensor:
    """Which images the discriminator takes for target images. Shape: (N, 2) or (N, 1) -> (N,), bool."""
    return logits[:, 0] > 0 if logits.shape[1] == 1 else logits[:, 1] > logits[:, 0]
