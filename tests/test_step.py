"""The training step against the algorithm of the paper with every gradient, sign and update written out."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import compiled_for_all_lambdas
from small_run import SmallRun
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import data_loader
import main
from data_loader import seed_of
from methods.recipes import recipe_config
from model import reverse_gradient
from utils.cli import UserError
from watch import watcher


class ByHand:
    """The step of the paper (section 3, equations 4 to 6) with neither reversal layer nor optimiser."""

    def __init__(self, model, config):
        self.model, self.config = copy.deepcopy(model), config
        self.velocity = dict.fromkeys(self.model.parameters(), 0.0)

    def losses(self, x_s, y_s, x_t):
        """−log of the probability of the right label of source images, and of the right domain of each image."""
        f_s, f_t = self.model.extractor(torch.cat((x_s, x_t))).split(len(x_s))
        label = self.model.classifier(f_s).softmax(1)[range(len(y_s)), y_s]
        target_s, target_t = self.model.discriminator(f_s).sigmoid(), self.model.discriminator(f_t).sigmoid()
        return -label.log().mean(), -(1 - target_s).log().mean() - target_t.log().mean()

    def gradients(self, batch, lambda_p):
        loss_y, loss_d = self.losses(*batch)
        grad = partial(torch.autograd.grad, retain_graph=True)
        theta_f, theta_y, theta_d = (list(part.parameters()) for part in self.model.parts().values())
        down, up = grad(loss_y, theta_f), grad(loss_d, theta_f)
        of_f = [y - lambda_p * d for y, d in zip(down, up, strict=True)]  # equation 4: down one loss, up the other
        of_y, of_d = grad(loss_y, theta_y), grad(loss_d, theta_d)  # equations 5 and 6: without λ
        return dict(zip([*theta_f, *theta_y, *theta_d], [*of_f, *of_y, *of_d], strict=True))

    def step(self, batch, lambda_p, mu_p):
        gradients = self.gradients(batch, lambda_p)
        with torch.no_grad():
            for weight, gradient in gradients.items():
                self.update(weight, gradient, mu_p)

    def update(self, weight, gradient, mu_p):
        decayed = gradient + self.config.weight_decay * weight  # of ½·decay·|w|²
        self.velocity[weight] = self.config.momentum * self.velocity[weight] + decayed
        weight -= mu_p * self.velocity[weight]


class Variant(ByHand):
    """What recipes change in it."""

    def __init__(self, model, config, labels):
        super().__init__(model, config)
        self.labels, self.number = labels.tolist(), 0
        self.norms, self.scales = [], []  # of each step's whole gradient; by which rows were scaled down
        self.first, self.second = dict(self.velocity), dict(self.velocity)

    def losses(self, x_s, y_s, x_t):
        model = self.model
        if self.config.network == "small":  # batch norm sees one after the other
            f_s, f_t = model.extractor(x_s, "source"), model.extractor(x_t, "target")
        else:
            f_s, f_t = model.extractor(torch.cat((x_s, x_t))).split(len(x_s))
        log_probabilities = model.classifier(f_s).log_softmax(1)
        loss_y = -sum(row[y] for row, y in zip(log_probabilities, y_s, strict=True)) / len(y_s)
        d_s, d_t = model.discriminator(f_s), model.discriminator(f_t)
        losses_s, losses_t = -(1 - d_s.sigmoid()).log(), -d_t.sigmoid().log()
        if self.config.balance_classes:  # each class has a tenth of the whole weight
            losses_s = losses_s * torch.tensor([len(self.labels) / 10 / self.labels.count(y) for y in y_s.tolist()])
        loss_d = losses_s.mean() + losses_t.mean()
        if self.config.domain_loss == "mean":  # over all images, of which half are of the source
            loss_d = torch.cat((losses_s, losses_t)).mean()
        accuracy = torch.cat((d_s < 0, d_t > 0)).double().mean()
        self.values = {"loss_label": loss_y.item(), "loss_domain": loss_d.item(), "domain_accuracy": accuracy.item()}
        return loss_y, loss_d

    def gradients(self, batch, lambda_p):
        gradients = super().gradients(batch, lambda_p)
        self.norms.append(math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values())))
        scale = min(1.0, self.config.clip_norm / self.norms[-1]) if self.config.clip_norm else 1.0
        return {weight: scale * gradient for weight, gradient in gradients.items()}

    def step(self, batch, lambda_p, mu_p):
        self.number += 1
        super().step(batch, lambda_p, mu_p)
        rows = [row for layer in self.model.modules() if isinstance(layer, nn.Linear) for row in layer.weight.detach()]
        for row in rows if self.config.max_norm else ():
            self.scales.append(min(1.0, self.config.max_norm / row.square().sum().sqrt().item()))
            row *= self.scales[-1]

    def update(self, weight, gradient, mu_p):
        if self.config.optimizer == "sgd":
            super().update(weight, gradient, mu_p)
        else:  # AdamW
            weight *= 1 - mu_p * self.config.weight_decay
            beta = self.config.momentum
            self.first[weight] = beta * self.first[weight] + (1 - beta) * gradient
            self.second[weight] = 0.999 * self.second[weight] + 0.001 * gradient**2
            mean, square = self.first[weight] / (1 - beta**self.number), self.second[weight] / (1 - 0.999**self.number)
            weight -= mu_p * mean / (square.sqrt() + 1e-8)


class LabelsAlone(ByHand):
    """What does not adapt learns nothing of the target, but for its batch statistics."""

    def gradients(self, batch, lambda_p):
        x_s, y_s, x_t = batch
        self.model(x_t, "target")
        loss = -self.model(x_s, "source").log_softmax(1)[range(len(y_s)), y_s].mean()
        weights = [*self.model.extractor.parameters(), *self.model.classifier.parameters()]
        return dict(zip(weights, torch.autograd.grad(loss, weights), strict=True))


def assert_same_changes(actual: dict, expected: dict, before: dict, share: float) -> None:
    """Every weight moved alike, up to a share of the farthest move in its tensor."""
    assert actual.keys() == expected.keys()
    for name, start in before.items():
        farthest = (expected[name] - start).abs().max().item()
        assert (actual[name] - expected[name]).abs().max().item() <= share * farthest, name


SMALL = replace(
    recipe_config("system-a"), network="paper-mnist", dropout=0.0, batch_size=5, weight_decay=0.01, epochs=2
)
PAPER = replace(recipe_config("paper", "mnist", "usps"), dropout=0.0, batch_size=4, max_norm=0.575, weight_decay=0.003)
QUICK = replace(recipe_config("quick"), batch_size=6)
WARM = replace(recipe_config("cnn-grl"), warm_start_epochs=1, epochs=2, batch_size=4, dropout=0.0)
CASES = {
    "dann": SMALL,
    "paper": PAPER,
    "quick": QUICK,
    "two outputs": replace(SMALL, network="system-b", domain_loss="mean"),
    "balanced": replace(SMALL, balance_classes=True),
    "clipped": replace(SMALL, clip_norm=1.1),
    "joint batch statistics": replace(QUICK, network="modern", optimizer="sgd", weight_decay=0.0),
}
STEPS = [(0.3, 0.01), (0.0, 0.004), (1.0, 0.02)]  # λ_p and μ_p of three steps


def test_the_step_is_that_of_the_paper():
    small = SmallRun(SMALL, double=True)
    before, by_hand, wrong_sign = small.weights(), ByHand(small.model, SMALL), ByHand(small.model, SMALL)
    for number, (lambda_p, mu_p) in enumerate(STEPS):
        batch = small.batch(number)
        small.step(batch, lambda_p, mu_p)
        by_hand.step(batch, lambda_p, mu_p)
        wrong_sign.step(batch, -lambda_p, mu_p)
    assert_same_changes(small.weights(), by_hand.model.state_dict(), before, 1e-4)
    with pytest.raises(AssertionError, match="extractor"):  # so the comparison does see the sign in front of λ
        assert_same_changes(small.weights(), wrong_sign.model.state_dict(), before, 1e-2)


@pytest.mark.parametrize("case", CASES)
def test_steps_and_losses_of_every_variant(case):
    config = CASES[case]
    small = SmallRun(config, double=True)
    before, by_hand = small.weights(), Variant(small.model, config, small.loader.labels_s)
    for number, (lambda_p, mu_p) in enumerate(STEPS):
        batch = small.batch(number)
        values = small.step(batch, lambda_p, mu_p)
        by_hand.step(batch, lambda_p, mu_p)
        assert values == pytest.approx(by_hand.values, rel=1e-5)
    if config.clip_norm:  # the bounds bind in some places and not in others
        assert min(by_hand.norms) < config.clip_norm < max(by_hand.norms)
    if config.max_norm:
        assert 10 < sum(scale < 1 for scale in by_hand.scales) < len(by_hand.scales) - 10
    assert_same_changes(small.weights(), by_hand.model.state_dict(), before, 1e-4)


@pytest.mark.parametrize("network", ["system-a", "paper-svhn"])
def test_gradients_of_the_large_networks(network):
    small = SmallRun(
        replace(recipe_config("system-a"), network=network, dropout=0.0, batch_size=2), steps=1, double=True
    )
    losses, _ = small.objective()(*small.batch(0), 0.3)
    sum(losses.values()).backward()
    by_hand = ByHand(small.model, small.config)
    expected = by_hand.gradients(small.batch(0), 0.3)
    for weight, twin in zip(small.model.parameters(), by_hand.model.parameters(), strict=True):
        assert expected[twin].abs().max() > 1e-9
        torch.testing.assert_close(weight.grad, expected[twin], rtol=1e-5, atol=1e-6 * weight.grad.abs().max().item())


def test_the_plain_sum_of_the_losses_is_minimised():
    small = SmallRun(SMALL)
    bias = small.model.classifier.layers[-1].bias
    before = bias.detach().clone()
    main.step(small.run, SMALL, {"loss_one": bias.square().sum(), "loss_other": 3 * bias.sum()}, 0.5)
    torch.testing.assert_close(bias.grad, 2 * before + 3)


@pytest.mark.parametrize("method", ["source-only", "target-only"])
def test_the_bounds_take_label_gradients_alone(method):
    config = replace(QUICK, method=method, optimizer="sgd", clip_norm=1e-3)  # which is for the reversed gradient alone
    small = SmallRun(config, double=True)
    before, by_hand = small.weights(), LabelsAlone(small.model, config)
    for number in range(2):
        assert list(small.step(small.batch(number), 0.7, 0.01)) == ["loss_label"]
        by_hand.step(small.batch(number), 0.7, 0.01)
    assert_same_changes(small.weights(), by_hand.model.state_dict(), before, 1e-4)
    # Several processes would wait for gradients of a discriminator that the objective held.
    held = {id(weight) for weight in small.objective().parameters()}
    *learning, discriminator = small.model.parts().values()
    assert held == {id(weight) for part in learning for weight in part.parameters()}
    assert all(weight.grad is None for weight in discriminator.parameters())


def test_warm_start_then_adaptation_with_frozen_convolutions():
    small = SmallRun(WARM, steps=2)
    start = small.weights()
    warm, _, end = small.train().saved
    modules = small.model.named_modules()
    convolutions = [name for name, module in modules if isinstance(module, nn.Conv2d)]
    frozen = tuple(f"{convolutions[number - 1]}." for number in (2, 3, 4))
    for name, value in warm.items():  # the discriminator has not begun, all else has
        assert torch.equal(value, start[name]) == name.startswith("discriminator"), name
        assert torch.equal(value, end[name]) == name.startswith(frozen), name


def test_adaptation_after_a_warm_start_has_no_old_momentum():
    config = replace(WARM, frozen_convolutions=(), lr=0.1)
    small = SmallRun(config, steps=1)
    warm, after, _ = small.train().saved
    small.model.load_state_dict(warm)
    by_hand = Variant(small.model, config, small.loader.labels_s)
    by_hand.step(next(small.loader.epoch(1)), 0.0, 0.1)
    assert_same_changes(after, by_hand.model.state_dict(), warm, 1e-2)


def annealed(p: float) -> float:
    return 0.01 / (1 + 10 * p) ** 0.75


def rising(p: float) -> float:
    return 2 / (1 + math.exp(-10 * p)) - 1


SIXTHS = [step / 6 for step in range(6)]
RATES, DECAYED = [annealed(p) for p in SIXTHS], [1e-3 / (1 + 1e-5 * step) for step in range(6)]
WARM_ANNEALED = replace(WARM, lr_schedule="annealed", lr=0.01)
HALF = replace(SMALL, lambda_max=0.5, lr_schedule="constant")
LOOPS = {  # two epochs of three steps: (settings, λ_p of each step, μ_p of each step)
    "every step": (SMALL, [rising(p) for p in SIXTHS], RATES),
    "every epoch": (replace(SMALL, lambda_update="epoch"), [0.0] * 3 + [rising(0.5)] * 3, RATES),
    "lambda_max": (HALF, [rising(p) / 2 for p in SIXTHS], [0.01] * 6),
    "source only": (replace(SMALL, method="source-only"), [0.0] * 6, RATES),
    # Three steps on labels alone, then two epochs that change λ once.
    "warm start": (WARM, [0.0] * 6 + [rising(0.5)] * 3, DECAYED[:3] + DECAYED),
    "warm start, annealed": (WARM_ANNEALED, [0.0] * 6 + [rising(0.5)] * 3, RATES[:1] * 3 + RATES),
}


@pytest.mark.parametrize("case", LOOPS)
def test_the_loop_follows_the_schedules_and_logs_what_it_does(case, monkeypatch):
    config, lambdas, rates = LOOPS[case]
    small, logged, reversed_by, stepped = SmallRun(config), [], [], []
    reverse = lambda f, lambda_p: reversed_by.append(lambda_p) or reverse_gradient(f, lambda_p)  # noqa: E731
    monkeypatch.setattr(main, "reverse_gradient", reverse)
    monkeypatch.setattr(main, "step", lambda run, config, losses, mu_p: stepped.append((mu_p, losses)))
    monkeypatch.setattr(watcher, "LOG_EVERY_STEPS", 1)
    monkeypatch.setattr(small.watcher.log, "scalars", lambda step, values: logged.append(values))
    small.train()

    assert [mu_p for mu_p, _ in stepped] == pytest.approx(rates, rel=1e-12)
    adapting = 0 if case == "source only" else 6  # steps
    assert reversed_by == pytest.approx(lambdas[len(lambdas) - adapting :], abs=1e-12)
    for name, expected in (("schedule/lambda_p", lambdas), ("schedule/learning_rate", rates)):
        assert [values[name] for values in logged if name in values] == pytest.approx(expected, abs=1e-12)
    means = [sum(losses["loss_label"].item() for _, losses in stepped[i : i + 3]) / 3 for i in range(0, len(rates), 3)]
    assert [mean["loss_label"] for mean in small.means] == pytest.approx(means, rel=1e-5)
    assert sum("loss_domain" in mean for mean in small.means) == adapting / 3


@pytest.mark.parametrize(("part", "label", "domain"), [("classifier", "nan", "1."), ("discriminator", "2.", "nan")])
def test_a_loss_that_is_not_finite_stops_the_run(part, label, domain):
    small = SmallRun(SMALL)
    small.run.epoch = small.run.step = 1  # the second of three steps in the second of two epochs: p = 4/6
    with torch.no_grad():
        next(getattr(small.model, part).parameters()).fill_(math.nan)
    with pytest.raises(UserError) as caught:
        small.train()
    schedule = f"lambda_p {rising(4 / 6):.4g}", f"learning rate {annealed(4 / 6):.4g}"
    for words in ("step 4 (epoch 2)", f"label loss {label}", f"domain loss {domain}", *schedule, "--lr"):
        assert words in str(caught.value)


@compiled_for_all_lambdas
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_compiled_steps_are_the_plain_ones(monkeypatch, config):
    """Traced and differentiated by the compiler, then run without machine code, which would take a minute to make."""
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    plain, compiled = (SmallRun(replace(config, epochs=1)).train(flag) for flag in (False, True))
    torch.testing.assert_close(compiled.weights(), plain.weights(), rtol=1e-3, atol=1e-5)
    assert compiled.means[0] == pytest.approx(plain.means[0], rel=1e-4)
    assert 1 <= backend.frame_count <= 2  # for the first λ_p, and for all others
    torch.compiler.reset()


def test_every_random_stream_has_a_seed_of_its_own(monkeypatch):
    """Weights, the order of each domain, augmentation and dropout, in each epoch."""
    seeds = []

    def spied(*parts):
        seeds.append(seed_of(*parts))
        return seeds[-1]

    monkeypatch.setattr(main, "seed_of", spied)
    monkeypatch.setattr(data_loader, "seed_of", spied)
    SmallRun(SMALL).train()
    assert len(seeds) == len(set(seeds)) == 1 + 2 * 4
