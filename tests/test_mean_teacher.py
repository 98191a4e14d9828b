"""The teacher averages weights and batch statistics, and its labels enter the step as written out here."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from main import Losses
from model import DANN
from tests.test_step import make_trainer
from utils.config import recipe_config
from utils.mean_teacher import MeanTeacher, warped
from utils.run_log import SilentLog

MODERN = dataclasses.replace(
    recipe_config("modern", "svhn", "mnist"), precision="fp32", batch_size=6, epochs=2, epoch_steps=3
)


def test_the_average_against_a_loop_over_its_definition():
    torch.manual_seed(0)
    model = DANN("quick", 0.0)
    teacher = MeanTeacher(model, 0.8)
    expected = {name: value.clone().double() for name, value in model.state_dict().items()}
    for step in range(1, 60):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(torch.rand_like(value.float()).to(value.dtype))
        teacher.follow(model)
        decay = min(0.8, step / (step + 9))
        for name, value in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    found = teacher.model.state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(found[name], value)
        else:
            assert torch.equal(found[name], value)  # the number of batches


def test_it_predicts_in_eval_mode_and_takes_no_gradient():
    model = DANN("modern", 0.5).train()
    teacher = MeanTeacher(model, 0.9)
    weak, strong = torch.randn(2, 4, 1, 32, 32)
    q, same = teacher.label(weak, strong)
    assert same is strong
    assert torch.equal(q, teacher.label(weak, torch.zeros_like(strong))[0])
    assert not q.requires_grad
    torch.testing.assert_close(q, model.eval()(weak).softmax(1))
    torch.testing.assert_close(q.sum(1), torch.ones(4))


@pytest.mark.parametrize("radius", [0.0, 0.1])
def test_two_views_are_labelled_by_the_mean_of_the_answers(radius):
    teacher = MeanTeacher(DANN("modern", 0.0), 0.9, "both")
    weak, strong = torch.randn(2, 5, 1, 32, 32)
    expected = (teacher.model(weak).softmax(1) + teacher.model(strong).softmax(1)) / 2
    q, x = teacher.label(weak, strong, radius)
    torch.testing.assert_close(q, expected)
    assert not q.requires_grad
    assert torch.equal(x, strong) == (radius == 0)


@pytest.mark.parametrize("views", ["weak", "both"])
def test_the_perturbation_has_its_radius_and_worsens_what_the_teacher_reads(views):
    torch.manual_seed(3)
    teacher = MeanTeacher(DANN("modern", 0.0).double(), 0.9, views)
    weak, x = torch.randn(2, 7, 1, 32, 32).double()
    q, moved = teacher.label(weak, x, 0.5)

    def losses(images):
        return nn.functional.cross_entropy(teacher.model(images), q, reduction="none")

    torch.testing.assert_close((moved - x).flatten(1).norm(dim=1), torch.full((7,), 0.5).double())
    assert not moved.requires_grad
    assert not x.requires_grad
    assert all(weight.grad is None for weight in teacher.model.parameters())
    assert (losses(moved) > losses(x)).all()
    # The steepest way up: no direction of the same length, but tiny, gains more.
    tiny = losses(teacher.label(weak, x, 1e-4)[1]) - losses(x)
    for _ in range(20):
        other = torch.randn_like(x)
        other *= 1e-4 / other.flatten(1).norm(dim=1)[:, None, None, None]
        assert (losses(x + other) - losses(x) < tiny).all()


def test_the_warp_is_the_map_that_the_teacher_reads_worst():
    torch.manual_seed(4)
    teacher = MeanTeacher(DANN("modern", 0.0).double(), 0.9, "both")
    weak, x = nn.functional.interpolate(torch.randn(14, 1, 8, 8), 32, mode="bicubic").double().split(7)
    q, moved = teacher.label(weak, x, 0.5, 0.05)
    assert moved.shape == x.shape
    assert not moved.requires_grad
    torch.testing.assert_close(q, teacher.label(weak, x)[0])
    torch.testing.assert_close(teacher.label(weak, x, 0.5, 1e-9)[1], teacher.label(weak, x, 0.5)[1])

    def losses(images):
        return nn.functional.cross_entropy(teacher.model(images), q, reduction="none")

    # Up, and on average further than any other change of the map of the same length; not for each image, because at
    # whole pixels bilinear sampling has a slope to the right and another to the left.
    worst = losses(teacher.label(weak, x, 0.0, 0.05)[1])
    assert worst.mean() > losses(x).mean()
    for _ in range(50):
        change = torch.randn(7, 2, 3).double()
        change *= 0.05 / change.flatten(1).norm(dim=1)[:, None, None]
        assert losses(warped(x, torch.eye(2, 3) + change)).mean() < worst.mean()


def test_a_warp_moves_the_image_as_its_map_says():
    """A map that looks four pixels further right: what was there moves left, and the edge goes on."""
    x = torch.arange(32.0).expand(2, 1, 32, 32)
    affine = torch.eye(2, 3).repeat(2, 1, 1)
    affine[1, 0, 2] = 0.25
    still, moved = warped(x, affine)
    torch.testing.assert_close(still, x[0])
    torch.testing.assert_close(moved, (x[1] + 4).clamp_max(31))


def test_the_step_moves_target_images_where_the_teacher_teaches(monkeypatch, tmp_path):
    trainer = make_trainer(dataclasses.replace(MODERN, perturbation=2.0, warp=0.0), tmp_path)
    seen = []
    forward = trainer.losses.forward
    monkeypatch.setattr(trainer.losses, "forward", lambda *x: seen.append(x[2]) or forward(*x))
    x_s, y_s, x_t = next(iter(trainer.loader.epoch(0)))
    for teaches in (False, True):
        trainer.train_step(x_s, y_s, x_t, 0.1, 0.01, teaches)
    assert torch.equal(seen[0], x_t[0])
    torch.testing.assert_close((seen[1] - x_t[0]).flatten(1).norm(dim=1), torch.full((6,), 2.0))


@pytest.mark.parametrize("views", ["weak", "both"])
def test_the_step_gives_the_teacher_the_views_that_were_asked_for(monkeypatch, tmp_path, views):
    trainer = make_trainer(dataclasses.replace(MODERN, teacher_views=views, perturbation=3.0, warp=0.3), tmp_path)
    assert trainer.teacher.views == views
    labelled = []
    label = trainer.teacher.label
    monkeypatch.setattr(trainer.teacher, "label", lambda *x: labelled.append(x) or label(*x))
    x_s, y_s, x_t = next(iter(trainer.loader.epoch(0)))
    trainer.train_step(x_s, y_s, x_t, 0.1, 0.01)
    ((weak, strong),) = labelled  # and nothing by which they move: the teacher does not teach yet
    assert torch.equal(weak, x_t[1])
    assert torch.equal(strong, x_t[0])
    trainer.train_step(x_s, y_s, x_t, 0.1, 0.01, teaches=True)
    assert labelled[1][2:] == (trainer.config.perturbation, trainer.config.warp) == (3.0, 0.3)


@pytest.mark.parametrize("kappa", [0.5, 1.0])
def test_alignment_against_its_formula_and_a_lost_class_comes_back(kappa):
    """A network that likes class 3 and hardly ever says 7 has its labels drawn towards equal shares."""

    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(10))

        def forward(self, x):
            return x + self.bias

    torch.manual_seed(0)
    model = Biased()
    with torch.no_grad():
        model.bias[3], model.bias[7] = 2.0, -3.0
    teacher = MeanTeacher(model, 0.9, alignment=kappa)
    mean = torch.full((10,), 0.1)
    for _ in range(400):
        x = torch.randn(64, 10)
        q = (x + model.bias).softmax(1)
        mean = 0.98 * mean + 0.02 * q.mean(0)
        expected = q * (0.1 / mean) ** kappa
        found, _ = teacher.label(x, x)
        torch.testing.assert_close(found, expected / expected.sum(1, keepdim=True), rtol=1e-3, atol=1e-5)
    assert q.mean(0)[7] < 0.02
    assert found.mean(0)[7] > 2 * q.mean(0)[7]
    assert found.mean(0)[3] < q.mean(0)[3]
    if kappa == 1:
        assert (found.mean(0) - 0.1).abs().max() < 0.06


def test_a_restored_teacher_goes_on_alike():
    torch.manual_seed(1)
    model = DANN("quick", 0.0)
    teacher = MeanTeacher(model, 0.8, alignment=0.5)
    for _ in range(3):
        teacher.follow(DANN("quick", 0.0))
        teacher.label(*torch.randn(2, 8, 3, 32, 32))
    other = MeanTeacher(model, 0.8, alignment=0.5)
    other.load_state_dict(copy.deepcopy(teacher.state_dict()))
    later, x = DANN("quick", 0.0), torch.randn(8, 3, 32, 32)
    for one in (teacher, other):
        one.follow(later)
    assert torch.equal(teacher.label(x, x)[0], other.label(x, x)[0])
    for mine, theirs in zip(teacher.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def class_wise_batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    x_s, x_t = torch.randn(2, 6, 1, 32, 32, generator=generator, dtype=dtype)
    q_t = torch.randn(6, 10, generator=generator, dtype=dtype).mul(4).softmax(1)
    return x_s, torch.tensor([3, 1, 4, 1, 5, 9]), x_t, q_t


@pytest.mark.parametrize("teaches", [False, True])
def test_the_losses_against_loops_and_the_reversed_gradient_against_separate_ones(teaches):
    torch.manual_seed(2)
    confidence, smoothing, lambda_p, weight = 0.6, 0.1, 0.35, 0.7
    config = dataclasses.replace(MODERN, confidence=confidence, label_smoothing=smoothing, teacher_weight=weight)
    model = DANN("modern", 0.0).double().train()
    x_s, y_s, x_t, q_t = class_wise_batch()
    f = model.extractor(torch.cat((x_s, x_t)))
    log_s, log_t = model.classifier(f).log_softmax(1).split(6)
    label = (
        sum(-(1 - smoothing) * row[y] - smoothing * row.mean() for row, y in zip(log_s, y_s.tolist(), strict=True)) / 6
    )
    sure = [i for i in range(6) if q_t[i].max() > confidence]
    assert 0 < len(sure) < 6
    taught = sum(-log_t[i, q_t[i].argmax()] for i in sure) / 6 if teaches else torch.zeros(())
    logits = model.discriminator.layers(f)
    domain, hits = 0, 0
    for i in range(6):  # σ(d) is the probability of the target, d the logit of the image's class
        d = logits[i, y_s[i]]
        domain = domain - (1 - d.sigmoid()).log() / 6
        hits += (d < 0).item()
        d = (logits[6 + i] * q_t[i]).sum()
        domain = domain - d.sigmoid().log() / 6
        hits += (d > 0).item()

    found = Losses(model, config)(x_s, y_s, x_t, lambda_p, q_t, teaches)
    expected = [label.item(), domain.item(), hits / 12, taught.item(), len(sure) / 6]
    assert [value.item() for value in found] == pytest.approx(expected, rel=1e-5)

    theta_f, theta_d = list(model.extractor.parameters()), list(model.discriminator.parameters())
    (found[0] + found[1] + weight * found[3]).backward()
    straight = torch.autograd.grad(label + weight * taught, theta_f, retain_graph=True)
    adversarial = torch.autograd.grad(domain, theta_f, retain_graph=True)
    for parameter, one, other in zip(theta_f, straight, adversarial, strict=True):
        torch.testing.assert_close(parameter.grad, one - lambda_p * other, rtol=1e-5, atol=1e-9)
    for parameter, gradient in zip(theta_d, torch.autograd.grad(domain, theta_d), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-9)


def test_the_teacher_starts_when_it_should_and_is_what_is_tested(tmp_path, monkeypatch):
    trainer = make_trainer(dataclasses.replace(MODERN, teacher_start=0.5), tmp_path)
    seen = []
    step = trainer.train_step

    def watched(x_s, y_s, x_t, lambda_p, mu_p, teaches):
        seen.append((len(x_t), teaches))
        return step(x_s, y_s, x_t, lambda_p, mu_p, teaches)

    monkeypatch.setattr(trainer, "train_step", watched)

    for epoch in range(2):
        trainer.epoch, trainer.step = epoch, 0
        trainer.train_epoch(SilentLog())
    assert seen == [(2, False)] * 3 + [(2, True)] * 3  # two views of the target
    assert trainer.tested_model is trainer.teacher.model
    assert not any(
        torch.equal(mine, theirs)
        for mine, theirs in zip(trainer.teacher.model.parameters(), trainer.model.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("until", "after", "expected"),
    [(1.0, 0.3, [0.7] * 6), (0.5, 0.0, [0.7] * 3 + [0.0] * 3), (0.5, 0.3, [0.7] * 3 + [0.3] * 3)],
)
def test_alignment_changes_when_it_should(until, after, expected, tmp_path, monkeypatch):
    settings = {"alignment": 0.7, "alignment_until": until, "alignment_after": after}
    trainer = make_trainer(dataclasses.replace(MODERN, **settings), tmp_path)
    seen = []
    align = trainer.teacher.align
    monkeypatch.setattr(trainer.teacher, "align", lambda q: seen.append(trainer.teacher.alignment) or align(q))

    for epoch in range(2):
        trainer.epoch, trainer.step = epoch, 0
        trainer.train_epoch(SilentLog())
    assert seen == expected


@pytest.mark.parametrize("method", ["source-only", "target-only"])
def test_the_bounds_are_averaged_too_but_learn_from_labels_alone(method, tmp_path):
    trainer = make_trainer(dataclasses.replace(MODERN, method=method), tmp_path)
    x_s, y_s, x_t = next(trainer.loader.epoch(0))
    assert x_t.shape == x_s.shape
    outcome = trainer.train_step(x_s, y_s, x_t, 0.5, 0.01)
    assert outcome[1:].tolist() == [0.0] * 4
    assert isinstance(trainer.tested_model, nn.Module)
    assert trainer.tested_model is not trainer.model
    assert trainer.outcomes == ("loss_label",)
