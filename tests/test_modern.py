"""The recipe modern: its objective as written out here, when its teacher teaches, and how its images change."""

import dataclasses

import pytest
import torch
from small_run import SmallRun

import methods.modern
from digits.augmentation import View
from methods.modern import ModernObjective
from methods.networks import build_network
from methods.options import with_settings
from methods.recipes import Config, recipe_config
from methods.teacher import Teacher, perturb
from utils.distributed import ALONE

MODERN = dataclasses.replace(recipe_config("modern", "svhn", "mnist"), batch_size=6, epochs=2, epoch_steps=3)


def modern(**settings) -> Config:
    return with_settings(MODERN, settings)


@pytest.mark.parametrize("teaches", [False, True])
def test_the_losses_against_loops_and_the_reversed_gradient_against_separate_ones(teaches, monkeypatch):
    torch.manual_seed(2)
    confidence, smoothing, lambda_p, weight = 0.6, 0.1, 0.35, 0.7
    model = build_network("modern").double().train()
    x_s, x_t = torch.randn(2, 6, 1, 32, 32, dtype=torch.float64)
    y_s, q_t = torch.tensor([3, 1, 4, 1, 5, 9]), torch.randn(6, 10, dtype=torch.float64).mul(4).softmax(1)
    f = model.extractor(torch.cat((x_s, x_t)))
    log_s, log_t = model.classifier(f).log_softmax(1).split(6)
    label = sum(-(1 - smoothing) * row[y] - smoothing * row.mean() for row, y in zip(log_s, y_s, strict=True)) / 6
    sure = [i for i in range(6) if q_t[i].max() > confidence]
    assert 0 < len(sure) < 6
    taught = weight * sum(-log_t[i, q_t[i].argmax()] for i in sure) / 6 if teaches else torch.zeros(())
    logits, domain, hits = model.discriminator.layers(f), 0, 0
    for i in range(6):  # σ(d) is the probability of the target, d the logit of the image's class
        d_s, d_t = logits[i, y_s[i]], (logits[6 + i] * q_t[i]).sum()
        domain = domain - (1 - d_s.sigmoid()).log() / 6 - d_t.sigmoid().log() / 6
        hits += (d_s < 0).item() + (d_t > 0).item()

    config = modern(confidence=confidence, label_smoothing=smoothing, teacher_weight=weight)
    objective = ModernObjective(model, Teacher(model, 0.9, 10, ALONE), config, None, 0, 6)
    monkeypatch.setattr(objective, "pseudo_labels", lambda x_t, weak_t: (q_t, x_t, teaches))
    losses, others = objective(x_s, y_s, torch.stack((x_t, -x_t)), lambda_p)
    expected = {"loss_label": label.item(), "loss_domain": domain.item(), "loss_teacher": taught.item()}
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-5)
    expected = {"domain_accuracy": hits / 12, "teacher_share": len(sure) / 6}
    assert {name: value.item() for name, value in others.items()} == pytest.approx(expected)

    theta_f, theta_d = list(model.extractor.parameters()), list(model.discriminator.parameters())
    sum(losses.values()).backward()
    straight = torch.autograd.grad(label + taught, theta_f, retain_graph=True)
    adversarial = torch.autograd.grad(domain, theta_f, retain_graph=True)
    expected = [one - lambda_p * other for one, other in zip(straight, adversarial, strict=True)]
    expected += torch.autograd.grad(domain, theta_d)
    for parameter, gradient in zip([*theta_f, *theta_d], expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("views", ["weak", "both"])
@pytest.mark.parametrize("begun", [False, True])
def test_pseudo_labels_come_from_the_views_asked_for_and_images_move_once_they_teach(views, begun):
    config = modern(teacher_views=views, perturbation=2.0, warp=0.1, alignment=0.0, teacher_start=0.0)
    torch.manual_seed(0)
    model = build_network("modern")
    teacher = Teacher(model, 0.9, 10, ALONE)
    strong, weak = torch.randn(2, 5, 1, 32, 32)
    q, moved, teaches = ModernObjective(model, teacher, config, None, 0 if begun else 1, 6).pseudo_labels(strong, weak)
    expected = teacher.model(weak).softmax(1)
    if views == "both":
        expected = (expected + teacher.model(strong).softmax(1)) / 2
    torch.testing.assert_close(q, expected)
    assert not q.requires_grad
    assert teaches is begun
    assert torch.equal(moved, perturb(strong, teacher.model, q, 2.0, 0.1) if begun else strong)


@pytest.mark.parametrize("warm", [0, 1])
def test_the_teacher_starts_when_it_should_and_is_what_is_tested(warm, monkeypatch):
    """Progress counts from where reversal begins, after a warm start; the images that move are those of the step."""
    small = SmallRun(modern(teacher_start=0.5, confidence=0.0, warm_start_epochs=warm, perturbation=2.0, warp=0.0))
    moves, taught = [], []

    def watch(x, logits_of, q, *sizes):
        moves.append((small.run.steps_done, sizes))
        return perturb(x, logits_of, q, *sizes)

    monkeypatch.setattr(methods.modern, "perturb", watch)
    monkeypatch.setattr(small.watcher, "step", lambda run, values, *_: taught.append(values.get("loss_teacher")))
    small.train()
    first = 3 * warm + 3  # the second of two epochs
    assert moves == [(step, (2.0, 0.0)) for step in range(first, first + 3)]
    assert [None if loss is None else bool(loss) for loss in taught] == [None] * 3 * warm + [False] * 3 + [True] * 3
    assert small.run.tested_model is small.run.teacher.model
    weights = zip(small.run.teacher.model.parameters(), small.model.parameters(), strict=True)
    assert not any(torch.equal(mine, theirs) for mine, theirs in weights)


@pytest.mark.parametrize(("until", "expected"), [(1.0, [0.7] * 6), (0.5, [0.7] * 3 + [0.3] * 3)])
def test_alignment_changes_when_it_should(until, expected, monkeypatch):
    small = SmallRun(modern(alignment=0.7, alignment_until=until, alignment_after=0.3))
    seen, align = [], small.run.teacher.align
    monkeypatch.setattr(small.run.teacher, "align", lambda q, kappa: seen.append(kappa) or align(q, kappa))
    small.train()
    assert seen == expected


@pytest.mark.parametrize("method", ["source-only", "target-only"])
def test_the_bounds_are_averaged_too_but_learn_from_labels_alone(method):
    small = SmallRun(modern(method=method))
    x_s, _, x_t = next(small.loader.epoch(0))
    assert x_t.shape == x_s.shape  # one view
    assert [list(means) for means in small.train().means] == [["loss_label"]] * 2
    assert small.run.tested_model is small.run.teacher.model


def augmentations(**settings) -> list[list[View]]:
    """The views of each step of a run: of the source, of the target, and the teacher's."""
    small = SmallRun(modern(epoch_steps=5, **settings))
    return [list(small.loader.views(epoch, step)) for epoch in range(small.watcher.epochs) for step in range(5)]


def test_strong_augmentation_gives_way_to_mild():
    """After 60 % of the steps with reversal, in the middle of an epoch; other augmentations stay."""
    strong, mild, affine, none = (
        [View(name), View(name, 0.25), View("weak")] for name in ("strong", "mild", "affine", "none")
    )
    timing = {"epochs": 4, "warm_start_epochs": 1, "strong_until": 0.6}
    assert augmentations(**timing) == [strong] * 17 + [mild] * 8  # 5 + 0.6 · 20
    assert augmentations(**timing, augmentation="affine") == [affine] * 25
    assert augmentations(**timing, augmentation="none") == [none] * 25
    assert augmentations(warm_start_epochs=1, strong_until=0.0) == [strong] * 5 + [mild] * 10
    assert augmentations(strong_until=1.0) == [strong] * 10
    assert augmentations(strong_until=0.5, method="source-only") == [strong[:2]] * 5 + [mild[:2]] * 5
