"""The training step against the algorithm of the paper with every gradient, sign and update written out."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch._dynamo import lookup_backend

from data_loader import DigitSet, preprocessing_for
from main import Pair, Trainer
from utils.cli import UserError
from utils.config import Config, recipe_config

CPU = torch.device("cpu")


class SilentLog:
    """Stands in for the run log and keeps what it is told: {tag: [(step, value), …]}."""

    def __init__(self):
        self.values = {}

    def scalars(self, step, values):
        for tag, value in values.items():
            self.values.setdefault(tag, []).append((step, value))

    def images(self, tag, step, x):
        self.values.setdefault(tag, []).append((step, len(x)))


def random_digits(domain: str, count: int, size: int, seed: int) -> DigitSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return DigitSet(domain, "train", images, torch.arange(count) % 10, domain, {})


def make_trainer(
    config: Config, folder, steps: int = 3, target_seed: int = 2, double: bool = False, compiled: bool = False
) -> Trainer:
    """A trainer on random images, fp32 or, for close comparisons, all in float64."""
    config = dataclasses.replace(config, precision="fp32")
    count = steps * config.batch_size
    source = random_digits("svhn", count, config.image_size, 1)
    target = random_digits("mnist", count, config.image_size, target_seed)
    pair = Pair(source, target.images, source, target, {}, {}, steps)
    trainer = Trainer(config, pair, preprocessing_for(config), CPU, folder, compiled=compiled)
    if double:
        trainer.model.double()
    trainer.model.train()
    return trainer


def random_batch(config: Config, seed: int, dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (config.batch_size, 3, config.image_size, config.image_size)
    x_s, x_t = torch.rand(2, *shape, generator=generator, dtype=dtype)
    return x_s, torch.randint(0, 10, (config.batch_size,), generator=generator), x_t.square()


class ByHand:
    """The step without reversal layer and optimiser: separate gradients, then the update rules as published."""

    def __init__(self, model: nn.Module, config: Config, adapts: bool = True, labels=()):
        self.model, self.config, self.adapts = copy.deepcopy(model), config, adapts
        self.labels = list(map(int, labels))  # of the whole source
        self.step_number, self.first, self.second, self.norms = 0, {}, {}, []  # norms: of each step's whole gradient

    def losses(self, x_s, y_s, x_t):
        model = self.model
        if not self.adapts:
            f_s, f_t = model.extractor(x_s), None
        elif self.config.separate_domains:
            f_s = model.extractor(x_s)
            f_t = model.extractor(x_t)
        else:
            both = model.extractor(torch.cat((x_s, x_t)))
            f_s, f_t = both[: len(x_s)], both[len(x_s) :]
        loss_y = -model.classifier(f_s).log_softmax(1)[range(len(y_s)), y_s].mean()
        if not self.adapts:
            return loss_y, None, None
        d_s, d_t = model.discriminator.layers(f_s), model.discriminator.layers(f_t)
        if d_s.shape[1] == 1:
            target_s, target_t = d_s[:, 0].sigmoid(), d_t[:, 0].sigmoid()
        else:
            target_s, target_t = d_s.softmax(1)[:, 1], d_t.softmax(1)[:, 1]
        loss_s = -(1 - target_s).log()
        if self.config.balance_classes:  # each class has a tenth of the whole weight
            loss_s = sum(
                loss * len(self.labels) / 10 / self.labels.count(y)
                for loss, y in zip(loss_s, y_s.tolist(), strict=True)
            ) / len(y_s)
        loss_d = loss_s.mean() - target_t.log().mean()
        if self.config.domain_loss == "mean":  # over all images, of which half are of the source
            loss_d = torch.cat(((1 - target_s).log(), target_t.log())).mean().neg()
        right = (target_s < 0.5).sum() + (target_t > 0.5).sum()
        return loss_y, loss_d, right.item() / (2 * len(x_s))

    def step(self, x_s, y_s, x_t, lambda_p, mu_p):
        loss_y, loss_d, accuracy = self.losses(x_s, y_s, x_t)
        theta_f, theta_y, theta_d = (list(part.parameters()) for part in self.model.parts().values())
        gradients = dict(zip(theta_f, torch.autograd.grad(loss_y, theta_f, retain_graph=True), strict=True))
        gradients.update(zip(theta_y, torch.autograd.grad(loss_y, theta_y, retain_graph=True), strict=True))
        if self.adapts:
            for weight, gradient in zip(theta_f, torch.autograd.grad(loss_d, theta_f, retain_graph=True), strict=True):
                gradients[weight] = gradients[weight] - lambda_p * gradient  # equation 4: the extractor climbs
            gradients.update(zip(theta_d, torch.autograd.grad(loss_d, theta_d), strict=True))  # equation 6: no λ
        self.step_number += 1
        self.norms.append(math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values())))
        if self.adapts and self.config.clip_norm:
            scale = min(1.0, self.config.clip_norm / self.norms[-1])
            gradients = {weight: scale * gradient for weight, gradient in gradients.items()}
        with torch.no_grad():
            for weight, gradient in gradients.items():
                getattr(self, self.config.optimizer)(weight, gradient, mu_p)
            if self.config.max_norm:
                for layer in self.model.modules():
                    for row in layer.weight if isinstance(layer, nn.Linear) else ():
                        row *= min(1.0, self.config.max_norm / row.square().sum().sqrt().item())
        return loss_y, loss_d, accuracy

    def sgd(self, weight, gradient, mu_p):
        gradient = gradient + self.config.weight_decay * weight  # of ½·decay·|w|²
        self.first[weight] = self.config.momentum * self.first.get(weight, 0.0) + gradient
        weight -= mu_p * self.first[weight]

    def adamw(self, weight, gradient, mu_p):
        t = self.step_number
        weight *= 1 - mu_p * self.config.weight_decay
        self.first[weight] = 0.9 * self.first.get(weight, 0.0) + 0.1 * gradient
        self.second[weight] = 0.999 * self.second.get(weight, 0.0) + 0.001 * gradient**2
        mean, square = self.first[weight] / (1 - 0.9**t), self.second[weight] / (1 - 0.999**t)
        weight -= mu_p * mean / (square.sqrt() + 1e-8)


def changes(model: nn.Module, before: dict) -> dict[str, torch.Tensor]:
    return {name: (value - before[name]).detach() for name, value in model.state_dict().items()}


def assert_same_changes(actual: dict, expected: dict, share: float) -> None:
    """Every weight moved alike, up to a share of the farthest move in its tensor."""
    assert actual.keys() == expected.keys()
    for name, change in expected.items():
        farthest = change.abs().max().item()
        assert (actual[name] - change).abs().max().item() <= share * farthest, name


SMALL_A = dataclasses.replace(
    recipe_config("dann"), network="paper-mnist", image_size=32, dropout=0.0, batch_size=5, weight_decay=0.01
)
PAPER = dataclasses.replace(
    recipe_config("paper", "mnist", "usps"), dropout=0.0, batch_size=4, max_norm=0.575, weight_decay=0.003
)
QUICK = dataclasses.replace(recipe_config("quick"), batch_size=6)
CASES = {
    "dann": SMALL_A,
    "paper": PAPER,
    "quick": QUICK,
    "two outputs": dataclasses.replace(SMALL_A, network="system-b", domain_loss="mean"),
    "balanced": dataclasses.replace(SMALL_A, balance_classes=True),
    "clipped": dataclasses.replace(SMALL_A, clip_norm=1.1),
    "joint batch statistics": dataclasses.replace(QUICK, separate_domains=False, optimizer="sgd", weight_decay=0.0),
}
STEPS = [(0.3, 0.01), (0.8, 0.004), (1.0, 0.02)]  # λ_p and μ_p of three steps


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_written_out(case, tmp_path):
    config = CASES[case]
    trainer = make_trainer(config, tmp_path, double=True)
    before = copy.deepcopy(trainer.model.state_dict())
    labels = trainer.pair.labelled.labels
    by_hand, wrong_sign = (ByHand(trainer.model, config, labels=labels) for _ in range(2))
    for i, (lambda_p, mu_p) in enumerate(STEPS):
        batch = random_batch(config, i, torch.float64)
        loss_label, loss_domain, accuracy, *teaching = trainer.train_step(*batch, lambda_p, mu_p).tolist()
        expected = by_hand.step(*batch, lambda_p, mu_p)
        wrong_sign.step(*batch, -lambda_p, mu_p)
        assert loss_label == pytest.approx(expected[0].item(), rel=1e-5)
        assert loss_domain == pytest.approx(expected[1].item(), rel=1e-5)
        assert accuracy == pytest.approx(expected[2])
        assert teaching == [0, 0]
    if config.clip_norm:  # the bound binds in some steps and not in others
        assert min(by_hand.norms) < config.clip_norm < max(by_hand.norms)
    actual = changes(trainer.model, before)
    assert_same_changes(actual, changes(by_hand.model, before), 1e-4)
    wrong = changes(wrong_sign.model, before)  # and the comparison does see the sign in front of λ
    assert any((actual[k] - wrong[k]).abs().max() > 1e-2 * wrong[k].abs().max() for k in actual if "extractor" in k)


def test_the_real_system_a(tmp_path):
    config = dataclasses.replace(recipe_config("dann"), dropout=0.0, batch_size=2)
    trainer = make_trainer(config, tmp_path)
    before = copy.deepcopy(trainer.model.state_dict())
    by_hand = ByHand(trainer.model, config)
    batch = random_batch(config, 0, torch.float32)
    losses = trainer.train_step(*batch, 0.5, 1.0).tolist()  # a large rate, so that fp32 weights keep what was added
    expected = by_hand.step(*batch, 0.5, 1.0)
    assert losses == pytest.approx([expected[0].item(), expected[1].item(), expected[2], 0, 0], rel=1e-5)
    assert_same_changes(changes(trainer.model, before), changes(by_hand.model, before), 1e-3)


def test_max_norm_limits_what_exceeds_it_and_nothing_else(tmp_path):
    trainer = make_trainer(PAPER, tmp_path, double=True)
    trainer.train_step(*random_batch(PAPER, 0, torch.float64), 0.5, 0.01)
    unlimited = make_trainer(dataclasses.replace(PAPER, max_norm=0.0), tmp_path, double=True)
    unlimited.train_step(*random_batch(PAPER, 0, torch.float64), 0.5, 0.01)
    limited_rows = free_rows = 0
    for name, free in unlimited.model.state_dict().items():
        limited = trainer.model.state_dict()[name]
        if free.dim() != 2:  # convolutions and biases
            assert torch.equal(limited, free), name
            continue
        norms = [math.sqrt(sum(value * value for value in row)) for row in free.tolist()]
        for norm, row, free_row in zip(norms, limited, free, strict=True):
            scale = 0.575 / norm if norm > 0.575 else 1.0
            torch.testing.assert_close(row, scale * free_row, rtol=1e-6, atol=0.0)
            limited_rows, free_rows = limited_rows + (scale < 1), free_rows + (scale == 1)
    assert limited_rows > 10
    assert free_rows > 10


# ---- what does not adapt


@pytest.mark.parametrize("method", ["source-only", "target-only"])
def test_the_bounds_take_label_gradients_alone(method, tmp_path):
    config = dataclasses.replace(QUICK, method=method, clip_norm=1e-3)  # which is for the reversed gradient alone
    trainer = make_trainer(config, tmp_path, double=True)
    before = copy.deepcopy(trainer.model.state_dict())
    by_hand = ByHand(trainer.model, config, adapts=False)
    for i in range(2):
        batch = random_batch(config, i, torch.float64)
        outcome = trainer.train_step(*batch, 0.7, 0.01)
        assert outcome[1:].tolist() == [0.0] * 4
        by_hand.step(*batch, 0.7, 0.01)
    assert_same_changes(changes(trainer.model, before), changes(by_hand.model, before), 1e-4)
    for weight in trainer.model.discriminator.parameters():
        assert weight.grad is None


def weights_after_an_epoch(config: Config, folder, target_seed: int) -> dict[str, torch.Tensor]:
    trainer = make_trainer(config, folder, target_seed=target_seed)
    trainer.train_epoch(SilentLog())
    return trainer.model.state_dict()


def test_target_images_matter_to_dann_alone(tmp_path):
    config = dataclasses.replace(SMALL_A, method="source-only")
    start = make_trainer(config, tmp_path).model.state_dict()
    first, second = (weights_after_an_epoch(config, tmp_path, seed) for seed in (2, 3))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert torch.equal(value, start[name]) == name.startswith("discriminator"), name
    first, second = (weights_after_an_epoch(SMALL_A, tmp_path, seed) for seed in (2, 3))
    assert all(not torch.equal(value, second[name]) for name, value in first.items() if "classifier" not in name)


WARM = dataclasses.replace(
    recipe_config("cnn-grl"), warm_start_epochs=1, epochs=2, batch_size=4, dropout=0.0, precision="fp32"
)


def test_warm_start_then_adaptation_with_frozen_convolutions(tmp_path):
    trainer = make_trainer(WARM, tmp_path, steps=2)
    start = copy.deepcopy(trainer.model.state_dict())

    assert not trainer.adapts
    trainer.train_epoch(SilentLog())
    warm = copy.deepcopy(trainer.model.state_dict())
    for name, value in warm.items():  # the discriminator has not begun, all else has
        assert torch.equal(value, start[name]) == name.startswith("discriminator"), name

    for epoch in (1, 2):
        trainer.epoch, trainer.step = epoch, 0
        assert trainer.adapts
        trainer.train_epoch(SilentLog())
    frozen = {f"{conv}.{kind}" for conv in frozen_names(trainer.model, {2, 3, 4}) for kind in ("weight", "bias")}
    assert len(frozen) == 6
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, warm[name]) == (name in frozen), name


def frozen_names(model: nn.Module, numbers: set[int]) -> list[str]:
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return [name for number, name in enumerate(convolutions, 1) if number in numbers]


def test_adaptation_after_a_warm_start_has_no_old_momentum(tmp_path):
    config = dataclasses.replace(WARM, frozen_convolutions=(), lr=0.1)
    trainer = make_trainer(config, tmp_path, steps=1, double=True)
    batches = {epoch: random_batch(config, epoch, torch.float64) for epoch in (0, 1)}
    trainer.loader.epoch = lambda epoch, *_: iter([batches[epoch]])
    trainer.train_epoch(SilentLog())

    before = copy.deepcopy(trainer.model.state_dict())
    by_hand = ByHand(trainer.model, config)
    trainer.epoch, trainer.step = 1, 0
    trainer.train_epoch(SilentLog())
    by_hand.step(*batches[1], 0.0, 0.1)
    assert_same_changes(changes(trainer.model, before), changes(by_hand.model, before), 1e-6)


# ---- the schedules as the loop applies them


def annealed(p: float) -> float:
    return 0.01 / (1 + 10 * p) ** 0.75


def tanh(p: float) -> float:
    return math.tanh(5 * p)  # λ_p with γ = 10


SIXTHS = [step / 6 for step in range(6)]
DECAYED = [1e-3 / (1 + 1e-5 * step) for step in range(6)]
LOOPS = {  # two epochs of three steps: (settings, λ_p of each step, μ_p of each step)
    "every step": (SMALL_A, [tanh(p) for p in SIXTHS], [annealed(p) for p in SIXTHS]),
    "every epoch": (
        dataclasses.replace(SMALL_A, lambda_update="epoch"),
        [0.0] * 3 + [tanh(0.5)] * 3,
        [annealed(p) for p in SIXTHS],
    ),
    "lambda_max and gamma": (
        dataclasses.replace(SMALL_A, lambda_max=0.3, gamma=4.0, lr_schedule="constant"),
        [0.3 * math.tanh(2 * p) for p in SIXTHS],
        [0.01] * 6,
    ),
    "source only": (dataclasses.replace(SMALL_A, method="source-only"), [0.0] * 6, [annealed(p) for p in SIXTHS]),
    "warm start": (
        WARM,
        [0.0] * 6 + [tanh(0.5)] * 3,  # three warm steps, then two epochs that change λ once
        DECAYED[:3] + DECAYED,
    ),
}


@pytest.mark.parametrize("case", LOOPS)
def test_the_loop_follows_the_schedules(case, tmp_path, monkeypatch):
    config, lambdas, rates = LOOPS[case]
    trainer = make_trainer(dataclasses.replace(config, epochs=2), tmp_path)
    seen = []

    def step(x_s, y_s, x_t, lambda_p, mu_p, teaches):
        seen.append((lambda_p, mu_p))
        return torch.tensor([0.5, 1.25, 0.75, 0, 0]) * len(seen)

    monkeypatch.setattr(trainer, "train_step", step)
    log = SilentLog()
    for epoch in range(trainer.epochs):
        trainer.epoch, trainer.step = epoch, 0
        trainer.train_epoch(log)
        done = 3 * epoch + 1 + 3 * epoch + 2 + 3 * epoch + 3  # the sum of this epoch's three numbers
        assert trainer.sums.tolist() == pytest.approx([0.5 * done, 1.25 * done, 0.75 * done, 0, 0, 3])
    assert [lambda_p for lambda_p, _ in seen] == pytest.approx(lambdas, abs=1e-12)
    assert [mu_p for _, mu_p in seen] == pytest.approx(rates, rel=1e-12)
    assert log.values["train/loss_label"] == [(0, 0.5)]
    assert log.values["schedule/learning_rate"] == [(0, rates[0])]


# ---- losses that are not finite


@pytest.mark.parametrize("part", ["classifier", "discriminator"])
def test_a_loss_that_is_not_finite_stops_the_run(part, tmp_path):
    trainer = make_trainer(dataclasses.replace(SMALL_A, epochs=2), tmp_path)
    trainer.epoch = trainer.step = 1  # the second of three steps in the second of two epochs: p = 4/6
    with torch.no_grad():
        next(getattr(trainer.model, part).parameters()).fill_(math.nan)
    with pytest.raises(UserError) as caught:
        trainer.train_epoch(SilentLog())
    message = str(caught.value)
    assert "\n" not in message
    assert "step 4 (epoch 2)" in message
    label, domain = ("nan", None) if part == "classifier" else (None, "nan")
    assert f"label loss {label or '2.'}" in message
    assert f"domain loss {domain or '1.'}" in message
    assert f"lambda_p {math.tanh(10 / 3):.4g}" in message
    assert f"learning rate {0.01 / (1 + 20 / 3) ** 0.75:.4g}" in message
    assert "--lr" in message


def test_a_rate_that_is_far_too_high_stops_the_run(tmp_path):
    trainer = make_trainer(dataclasses.replace(SMALL_A, lr=1e30, epochs=1), tmp_path, steps=4)
    with pytest.raises(UserError, match=r"not finite at step [123] \(epoch 1\).* learning rate [0-9.]+e\+(29|30);"):
        trainer.train_epoch(SilentLog())


def test_images_that_are_not_finite_stop_the_run(tmp_path):
    trainer = make_trainer(dataclasses.replace(SMALL_A, epochs=1), tmp_path)
    images = trainer.loader.batch
    trainer.loader.batch = lambda *args: images(*args) * math.nan
    with pytest.raises(UserError, match="not finite at step 0"):
        trainer.train_epoch(SilentLog())


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_compiled_step_is_the_plain_step(monkeypatch, tmp_path, config):
    """Traced and differentiated by the compiler, then run without machine code, which would take a minute to make."""
    graphs = []

    def count_graphs(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    compile_really = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compile_really(module, backend=count_graphs))
    plain, compiled = (make_trainer(config, tmp_path, compiled=flag) for flag in (False, True))
    for number in range(3):
        batch = random_batch(config, number, torch.float32)
        outcomes = [trainer.train_step(*batch, 0.1 + 0.3 * number, 0.01) for trainer in (plain, compiled)]
        torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled.model.state_dict(), plain.model.state_dict(), rtol=1e-3, atol=1e-5)
    assert len(graphs) == 1  # one graph, whatever λ_p is
