"""Gradient reversal and the three parts of a domain-adversarial neural network.

    images x ── extractor G_f ── features f ──┬── classifier G_y ─────────────────────── logits of the classes
                                              └── gradient reversal ── discriminator G_d ── logit of "target"

Forwards, the reversal layer does nothing. Backwards, it multiplies the gradient by −λ: the discriminator learns to tell
the domains apart, and the extractor learns features by which it cannot.

Source: Ganin & Lempitsky, "Unsupervised Domain Adaptation by Backpropagation" (ICML 2015) and Ganin et al.,
"Domain-Adversarial Training of Neural Networks" (JMLR 17(59), 2016). methods/networks.py has the architectures.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


class GradientReversal(torch.autograd.Function):
    """R_λ(x) = x, with dR_λ/dx = −λ·I in the backward pass (paper, section 3, equations 9 and 10)."""

    generate_vmap_rule = True  # for torch.func: gradients of each sample

    @staticmethod
    def forward(x: Tensor, lambda_p: float) -> Tensor:
        return x.view_as(x)  # a view: autograd would skip a function that returns its very input

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, float], output: Tensor) -> None:
        _, ctx.lambda_p = inputs

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        return -ctx.lambda_p * grad_output, None


def reverse_gradient(x: Tensor, lambda_p: float = 1.0) -> Tensor:
    """Pass x on unchanged and multiply the gradient that comes back by −λ_p.

    Args:
        x: the features f = G_f(x), of any shape.
        lambda_p: factor λ_p ≥ 0.

    Shape: (*) -> (*)
    """
    return GradientReversal.apply(x, lambda_p)


class DomainBatchNorm(nn.Module):
    """Batch norm with each domain's own statistics, in training and in testing; scale and shift are shared.

    Source: Li et al., arXiv 1603.04779; Chang et al., CVPR 2019 (who learn a scale and a shift of each domain, too).

    Args:
        norm: a batch norm, whose running statistics both domains start from.

    Shape: that of `norm`
    """

    SHARE = 0.03  # of the newest batch in the running statistics; with 0.1 tests would be noisier
    source_mean: Tensor
    source_var: Tensor

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d):
        super().__init__()
        self.norm, self.domain = norm, "target"
        norm.momentum = self.SHARE
        for name in ("mean", "var"):
            self.register_buffer(f"source_{name}", getattr(norm, f"running_{name}").clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.domain == "target":
            return self.norm(x)
        statistics = {"running_mean": self.source_mean, "running_var": self.source_var}  # training changes them
        return functional_call(self.norm, statistics, (x,))


class FeatureExtractor(nn.Module):
    """G_f: images to features.

    Called with the images' domain, "source" or "target", whose statistics each `DomainBatchNorm` takes.

    Shape: (N, C, S, S) -> (N, F)
    """

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.layers = layers
        self.domain_norms = [module for module in layers.modules() if isinstance(module, DomainBatchNorm)]

    def forward(self, x: Tensor, domain: str = "target") -> Tensor:
        for norm in self.domain_norms:
            norm.domain = domain
        return self.layers(x)

    def convolutions(self) -> list[nn.Conv2d]:
        """The convolutions in the order of the forward pass."""
        return [module for module in self.layers.modules() if isinstance(module, nn.Conv2d)]


class LabelClassifier(nn.Module):
    """G_y: features to the logits of the classes. Shape: (N, F) -> (N, K)"""

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.layers = layers

    def forward(self, f: Tensor) -> Tensor:
        return self.layers(f)


class DomainDiscriminator(nn.Module):
    """G_d: features to the logit of "target", which is above 0 where an image seems to be of the target.

    Its `layers` end with one value an image. Shape: (N, F) -> (N,)
    """

    def __init__(self, layers: nn.Sequential):
        super().__init__()
        self.layers = layers

    def forward(self, f: Tensor) -> Tensor:
        return self.layers(f)


class DANN(nn.Module):
    """Domain-adversarial neural network: extractor, classifier and discriminator (paper, figure 1).

    Calling it classifies images of a domain. Training uses its parts, with `reverse_gradient` before the discriminator.

    Shape: (N, C, S, S) -> (N, K), preprocessed images to logits
    """

    def __init__(self, extractor: FeatureExtractor, classifier: LabelClassifier, discriminator: DomainDiscriminator):
        super().__init__()
        self.extractor, self.classifier, self.discriminator = extractor, classifier, discriminator

    def forward(self, x: Tensor, domain: str = "target") -> Tensor:
        return self.classifier(self.extractor(x, domain))

    def features(self, x_s: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """The features f_s, f_t of a source and a target batch. Shape: two of (B, C, S, S) -> two of (B, F)"""
        if self.extractor.domain_norms:
            return self.extractor(x_s, "source"), self.extractor(x_t, "target")
        f_s, f_t = self.extractor(torch.cat((x_s, x_t))).split(len(x_s))
        return f_s, f_t

    def parts(self) -> dict[str, nn.Module]:
        """The three parts by name."""
        return dict(self.named_children())


def domain_loss(d_s: Tensor, d_t: Tensor, weights: Tensor | None = None, reduction: str = "sum") -> Tensor:
    """Cross-entropy of the domain, 0 = source, 1 = target, in nats (paper, equation 9).

    A discriminator that cannot tell the domains apart has 2·ln 2 with "sum", ln 2 with "mean".

    Args:
        d_s, d_t: logits of "target" of source and target images.
        weights: how much each source image counts, with an expectation of 1; None: all alike.
        reduction: "sum" or "mean" of the two domains' mean losses.

    Shape: (B,), (B,), (B,) -> ()
    """
    kind = torch.promote_types(d_s.dtype, torch.float32)  # bf16 is too coarse for a logarithm
    losses_s, losses_t = F.softplus(d_s.to(kind)), F.softplus(-d_t.to(kind))  # −log of sigmoid(−d), of sigmoid(d)
    if weights is not None:
        losses_s = weights * losses_s
    loss = losses_s.mean() + losses_t.mean()
    return loss / 2 if reduction == "mean" else loss


def domain_accuracy(d_s: Tensor, d_t: Tensor) -> Tensor:
    """Share of images whose domain is predicted right, in [0, 1]. Shape: (B,), (B,) -> ()"""
    return torch.cat((d_s <= 0, d_t > 0)).float().mean()
