"""The recipe `modern`: class-wise reversal beside the pseudo-labels of an EMA teacher, on strongly augmented images."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_loader import Views
from digits.augmentation import View
from methods.recipes import Config, ModernConfig
from methods.teacher import Teacher, perturb
from model import DANN, DomainDiscriminator, domain_accuracy, domain_loss, reverse_gradient


class ClassWiseDiscriminator(DomainDiscriminator):
    """G_d with a logit of "target" for each class (MADA, Pei et al., AAAI 2018).

    Of an image counts the logits' mean under `classes`, its class probabilities; without them all classes alike.

    Shape: (N, F), (N, K) -> (N,)
    """

    def forward(self, f: Tensor, classes: Tensor | None = None) -> Tensor:
        logits = self.layers(f)
        return logits.mean(1) if classes is None else (logits * classes).sum(1)


class ModernObjective(nn.Module):
    """Label loss, class-wise domain loss behind gradient reversal, and the loss on the teacher's pseudo-labels.

    Args:
        model: the network in training.
        teacher: its moving average, which has followed it in every step of the run.
        class_weights: how much a source image of each class counts in the domain loss, (K,); None: all alike.
        first_step, steps: where in the run reversal begins, and for how many steps it lasts.
    """

    def __init__(
        self, model: DANN, teacher: Teacher, config: Config, class_weights: Tensor | None, first_step: int, steps: int
    ):
        super().__init__()
        assert config.modern is not None
        self.model, self.teacher, self.config, self.settings = model, teacher, config, config.modern
        self.class_weights, self.first_step, self.steps = class_weights, first_step, steps

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the objective but for the pseudo-labels, which take a gradient of their own."""
        self.pseudo_labels = torch.compiler.disable(self.pseudo_labels)  # type: ignore[method-assign]
        super().compile(*args, **options)

    def pseudo_labels(self, x_t: Tensor, weak_t: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Class probabilities of target images, the images to learn them from, and whether they count already.

        Shape: (B, C, S, S), (B, C, S, S) -> (B, K), (B, C, S, S)
        """
        settings, teacher = self.settings, self.teacher
        p = (int(teacher.average.n_averaged) - 1 - self.first_step) / self.steps
        teaches = p >= settings.teacher_start
        q_t = teacher.predict(weak_t)
        if settings.teacher_views == "both":
            q_t = (q_t + teacher.predict(x_t)) / 2
        # Sure labels need less alignment, which pulls at classes that are not alike in size.
        q_t = teacher.align(q_t, settings.alignment if p < settings.alignment_until else settings.alignment_after)
        if teaches and (settings.perturbation or settings.warp):
            x_t = perturb(x_t, teacher.model, q_t, settings.perturbation, settings.warp)
        return q_t, x_t, teaches

    def forward(
        self, x_s: Tensor, y_s: Tensor, x_t: Tensor, lambda_p: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses by name, whose sum is minimised, and what else is logged.

        Shape: (B, C, S, S), (B,), (2, B, C, S, S) with the weakly augmented target images second
        """
        config, model = self.config, self.model
        q_t, x_t, teaches = self.pseudo_labels(*x_t)
        f_s, f_t = model.features(x_s, x_t)
        loss_label = F.cross_entropy(model.classifier(f_s), y_s, label_smoothing=config.label_smoothing)

        # Self-training on the labels of which the teacher is sure (French et al. 2018; FixMatch, Sohn et al. 2020).
        confidence, label = q_t.max(1)
        sure = (confidence > self.settings.confidence).float()
        loss_teacher = torch.zeros_like(loss_label)
        if teaches:
            losses = F.cross_entropy(model.classifier(f_t), label, reduction="none")
            loss_teacher = self.settings.teacher_weight * (sure * losses).mean()

        f = reverse_gradient(torch.cat((f_s, f_t)), lambda_p)
        if self.settings.adversary == "class-wise":
            classes = torch.cat((F.one_hot(y_s, q_t.shape[1]), q_t))
            d_s, d_t = model.discriminator(f, classes).split(len(x_s))
        else:
            d_s, d_t = model.discriminator(f).split(len(x_s))
        weights = None if self.class_weights is None else self.class_weights[y_s]
        loss_domain = domain_loss(d_s, d_t, weights, config.domain_loss)
        return (
            {"loss_label": loss_label, "loss_domain": loss_domain, "loss_teacher": loss_teacher},
            {"domain_accuracy": domain_accuracy(d_s, d_t), "teacher_share": sure.mean()},
        )


def modern_views(config: Config, settings: ModernConfig, steps: int) -> Views:
    """How each step changes images: strongly, and more mildly towards the end of the run.

    Strongly changed images are not what is tested; the last steps make up for it (He et al., arXiv 1909.09148).

    Args:
        steps: of an epoch.
    """
    first_mild = (settings.strong_until * config.epochs + config.warm_start_epochs) * steps
    weak = [View("weak")] if config.method == "dann" else []

    def views(epoch: int, step: int) -> list[View]:
        mild = config.augmentation == "strong" and epoch * steps + step >= first_mild
        name = "mild" if mild and epoch >= config.warm_start_epochs else config.augmentation
        return [View(name), View(name, settings.target_strong_share), *weak]

    return views
