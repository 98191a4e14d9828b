"""The EMA teacher averages weights and batch statistics, and images change to where it predicts them worst."""

import pytest
import torch
from torch import nn

from methods.networks import build_network
from methods.teacher import Teacher, perturb, warped
from utils.distributed import ALONE


def teacher_of(model: nn.Module) -> Teacher:
    return Teacher(model, 0.8, 10, ALONE)


def test_the_average_against_a_loop_over_its_definition():
    torch.manual_seed(0)
    model = build_network("small")
    teacher = teacher_of(model)
    expected = {name: value.clone().double() for name, value in model.state_dict().items()}
    for n in range(1, 60):
        share = 1 - min(0.8, n / (n + 9))
        for name, value in model.state_dict().items():
            value.add_(torch.rand_like(value.float()).add(0.6).to(value.dtype))
            expected[name] += share * (value.double() - expected[name])
            if not value.is_floating_point():
                expected[name] = value.double()  # the number of batches
        teacher.follow(model)
        for name, value in teacher.model.state_dict().items():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-5)
    assert all(not torch.allclose(expected[name], value.double()) for name, value in model.named_parameters())


def test_it_predicts_in_eval_mode_and_takes_no_gradient():
    model = build_network("modern", 0.5).train()
    teacher, x = teacher_of(model), torch.randn(4, 1, 32, 32)
    q = teacher.predict(x)
    assert not q.requires_grad
    assert not any(weight.requires_grad for weight in teacher.model.parameters())
    torch.testing.assert_close(q, model.eval()(x).softmax(1))


@pytest.mark.parametrize("kappa", [0.5, 1.0])
def test_alignment_against_its_formula_and_a_lost_class_comes_back(kappa):
    """A network that likes class 3 and hardly ever predicts 7 has its labels drawn towards equal shares."""
    torch.manual_seed(0)
    teacher, mean, bias = teacher_of(build_network("small")), torch.full((10,), 0.1), torch.zeros(10)
    bias[3], bias[7] = 2.0, -3.0
    for _ in range(400):
        q = (torch.randn(64, 10) + bias).softmax(1)
        mean = 0.98 * mean + 0.02 * q.mean(0)
        expected = q * (0.1 / mean) ** kappa
        found = teacher.align(q, kappa)
        torch.testing.assert_close(found, expected / expected.sum(1, keepdim=True), rtol=1e-3, atol=1e-5)
    before, after = q.mean(0), found.mean(0)
    assert before[7] < 0.02
    assert after[7] > 2 * before[7]
    assert after[3] < before[3]
    if kappa == 1:
        assert (after - 0.1).abs().max() < 0.06
    assert torch.equal(teacher.align(q, 0.0), q)


def losses(model: nn.Module, x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(x), q, reduction="none")


def of_norm(x: torch.Tensor, norm: float) -> torch.Tensor:
    """Each image's tensor, made so long."""
    return x * norm / x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize("views", [1, 2])  # those that the label comes from
def test_a_perturbation_has_its_radius_and_worsens_what_is_predicted(views):
    torch.manual_seed(3)
    model = teacher_of(build_network("modern").double()).model
    weak, x = torch.randn(2, 7, 1, 32, 32).double()
    q = torch.stack([model(view).softmax(1) for view in (weak, x)[:views]]).mean(0).detach()
    moved = perturb(x, model, q, 0.5, 0.0)
    torch.testing.assert_close((moved - x).flatten(1).norm(dim=1), torch.full((7,), 0.5).double())
    assert not moved.requires_grad
    assert not x.requires_grad
    assert all(weight.grad is None for weight in model.parameters())
    before = losses(model, x, q)
    assert (losses(model, moved, q) > before).all()
    # The steepest way up: no direction of the same length, but tiny, gains more.
    tiny = losses(model, perturb(x, model, q, 1e-4, 0.0), q)
    for _ in range(20):
        assert (losses(model, x + of_norm(torch.randn_like(x), 1e-4), q) < tiny).all()


def test_the_warp_is_the_map_by_which_images_are_predicted_worst(monkeypatch):
    torch.manual_seed(4)
    model = teacher_of(build_network("modern").double()).model
    weak, x = nn.functional.interpolate(torch.randn(14, 1, 8, 8), 32, mode="bicubic").double().split(7)
    q = (model(weak).softmax(1) + model(x).softmax(1)).detach() / 2
    torch.testing.assert_close(perturb(x, model, q, 0.5, 1e-9), perturb(x, model, q, 0.5, 0.0))
    maps, identity = [], torch.eye(2, 3)
    monkeypatch.setattr("methods.teacher.warped", lambda x, affine: maps.append(affine) or warped(x, affine))
    moved = perturb(x, model, q, 0.0, 0.05)
    assert moved.shape == x.shape
    assert not moved.requires_grad
    torch.testing.assert_close((maps[-1] - identity).flatten(1).norm(dim=1), torch.full((7,), 0.05).double())
    # Up, and on average further than any other change of the map of the same length; not for each image, because at
    # whole pixels bilinear sampling has a slope to the right and another to the left.
    worst = losses(model, moved, q).mean()
    assert worst > losses(model, x, q).mean()
    for _ in range(50):
        change = of_norm(torch.randn(7, 2, 3).double(), 0.05)
        assert losses(model, warped(x, identity + change), q).mean() < worst


def test_a_warp_moves_the_image_as_its_map_says():
    """A map that looks four pixels further right: what was there moves left, and the edge goes on."""
    x, affine = torch.arange(32.0).expand(2, 1, 32, 32), torch.eye(2, 3).repeat(2, 1, 1)
    affine[1, 0, 2] = 0.25
    still, moved = warped(x, affine)
    torch.testing.assert_close(still, x[0])
    torch.testing.assert_close(moved, (x[1] + 4).clamp_max(31))
