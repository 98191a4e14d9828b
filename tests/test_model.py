"""The networks against the layer lists they are said to have, and gradient reversal against separate gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import (
    DANN,
    NETWORKS,
    DomainDiscriminator,
    Dropout,
    FeatureExtractor,
    balancing_weights,
    domain_loss,
    predicted_target,
    reverse_gradient,
)

# Parameters of each part, a bias for each unit; batch-normed layers have two for each channel instead.
PARAMETERS = {
    ("system-a", "extractor"): (3 * 64 * 25 + 64) + (64 * 64 * 25 + 64) + (64 * 128 * 25 + 128),
    ("system-a", "classifier"): (6272 * 3072 + 3072) + (3072 * 2048 + 2048) + (2048 * 10 + 10),
    ("system-a", "discriminator"): (6272 * 1024 + 1024) + (1024 * 1024 + 1024) + (1024 * 2 + 2),
    ("system-b", "extractor"): (3 * 32 * 9 + 32)
    + (32 * 32 * 9 + 32)
    + (32 * 64 * 9 + 64)
    + (64 * 64 * 9 + 64)
    + (2304 * 512 + 512),  # 32 -> 30 -> 15 -> 13 -> 6, and 64 * 6 * 6 = 2304
    ("system-b", "classifier"): (512 * 32 + 32) + (32 * 10 + 10),
    ("system-b", "discriminator"): (512 * 512 + 512) + (512 * 32 + 32) + (32 * 2 + 2),
    ("paper-svhn", "extractor"): (3 * 64 * 25 + 64) + (64 * 64 * 25 + 64) + (64 * 128 * 25 + 128),
    ("paper-svhn", "classifier"): (8192 * 3072 + 3072) + (3072 * 2048 + 2048) + (2048 * 10 + 10),
    ("paper-svhn", "discriminator"): (8192 * 1024 + 1024) + (1024 * 1024 + 1024) + (1024 * 1 + 1),
    ("paper-mnist", "extractor"): (3 * 32 * 25 + 32) + (32 * 48 * 25 + 48),
    ("paper-mnist", "classifier"): (3072 * 100 + 100) + (100 * 100 + 100) + (100 * 10 + 10),
    ("paper-mnist", "discriminator"): (3072 * 100 + 100) + (100 * 1 + 1),
    ("quick", "extractor"): (3 * 32 * 9 + 2 * 32)
    + (32 * 48 * 9 + 2 * 48)
    + (48 * 64 * 9 + 2 * 64)
    + (1024 * 128 + 2 * 128),
    ("quick", "classifier"): 128 * 10 + 10,
    ("quick", "discriminator"): (128 * 128 + 128) + (128 * 1 + 1),
    ("modern", "extractor"): (1 * 32 * 9 + 2 * 32)
    + (32 * 64 * 9 + 2 * 64)
    + (64 * 64 * 9 + 2 * 64)
    + (64 * 128 * 9 + 2 * 128)
    + (128 * 128 * 9 + 2 * 128)
    + (128 * 256 * 9 + 2 * 256)
    + (256 * 128 + 2 * 128),
    ("modern", "classifier"): 128 * 10 + 10,
    ("modern", "discriminator"): (128 * 128 + 128) + (128 * 10 + 10),
}
FEATURES = {
    "system-a": 128 * 7 * 7,
    "system-b": 512,
    "paper-svhn": 128 * 8 * 8,
    "paper-mnist": 48 * 8 * 8,
    "quick": 128,
    "modern": 128,
}
# Probabilities of the dropout layers of (extractor, classifier, discriminator) when --dropout is 0.5.
DROPOUTS = {
    "system-a": ([0.5], [], []),
    "system-b": ([0.25, 0.25], [0.5], []),
    "paper-svhn": ([], [0.5, 0.5], [0.5, 0.5]),
    "paper-mnist": ([], [0.5, 0.5], [0.5]),
    "quick": ([0.5], [], []),
    "modern": ([0.5], [], []),
}


def images_for(network: str, count: int, dtype=torch.float32) -> torch.Tensor:
    row = NETWORKS[network]
    return torch.rand(count, row.channels, row.image_size, row.image_size, dtype=dtype)


# ---- the reversal layer


@pytest.mark.parametrize("lambda_p", [0.0, 0.25, 1.0, 3.7, torch.tensor(0.46), torch.tensor(2.0, dtype=torch.float64)])
def test_reversal_keeps_the_value_and_multiplies_the_gradient_by_minus_lambda(lambda_p):
    torch.manual_seed(0)
    x = torch.randn(5, 3, requires_grad=True)
    weights = torch.randn(5, 3)

    y = reverse_gradient(x, lambda_p)
    assert torch.equal(y, x)
    (weights * y.sin()).sum().backward()
    plain = weights * x.detach().cos()
    torch.testing.assert_close(x.grad, -float(lambda_p) * plain, rtol=1e-6, atol=1e-7)


def test_lambda_zero_cuts_the_gradient_without_losing_it():
    x = torch.randn(4, requires_grad=True)
    reverse_gradient(x, 0.0).square().sum().backward()
    assert x.grad is not None
    assert torch.count_nonzero(x.grad) == 0


def test_reversal_twice_is_lambda_squared():
    x = torch.tensor([2.0], requires_grad=True)
    reverse_gradient(reverse_gradient(x, 0.5), 3.0).square().backward()
    assert x.grad.item() == pytest.approx(0.5 * 3.0 * 2 * 2.0)


def test_double_backward():
    x = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    lambda_p = 0.7
    (first,) = torch.autograd.grad(reverse_gradient(x, lambda_p) ** 3, x, create_graph=True)
    assert first.item() == pytest.approx(-lambda_p * 3 * 1.5**2)
    # The inner value passes the layer once more on the way back, so that the factor −λ enters a second time.
    (second,) = torch.autograd.grad(first, x)
    assert second.item() == pytest.approx(lambda_p**2 * 6 * 1.5)

    values = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda v: reverse_gradient(v, lambda_p), (values,))


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(("lambda_p", "rtol"), [(0.5, 0.0), (2.0, 0.0), (0.3, 0.01)])
def test_reversal_under_bf16_autocast(lambda_p, rtol, as_tensor):
    torch.manual_seed(1)
    first, second = nn.Linear(6, 8), nn.Linear(8, 2)
    x = torch.randn(4, 6)

    def gradient(reverse):
        first.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            features = first(x)
            assert features.dtype == torch.bfloat16
            out = second(reverse(features))
        out.float().square().sum().backward()
        return first.weight.grad.clone()

    factor = torch.tensor(lambda_p) if as_tensor else lambda_p
    plain = gradient(lambda f: f)
    reversed_gradient = gradient(lambda f: reverse_gradient(f, factor))
    assert plain.abs().max() > 0.1
    # A power of two is exact in bf16; 0.3 is rounded to 8 bits.
    torch.testing.assert_close(reversed_gradient, -lambda_p * plain, rtol=rtol, atol=rtol * plain.abs().max().item())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_step_follows_lambda(backend):
    """A tensor λ that changes between the calls is an input of the compiled graph, no constant in it."""
    torch.compiler.reset()
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def step(x, weight, lambda_p):
        return (reverse_gradient(x * weight, lambda_p) ** 2).sum()

    compiled = torch.compile(step, backend=counting if backend == "eager" else backend, fullgraph=True)
    x = torch.tensor([1.0, -2.0, 3.0])
    for lambda_p in (0.0, 0.1, 0.9, 0.5):
        weight = torch.tensor(1.5, requires_grad=True)
        compiled(x, weight, torch.tensor(lambda_p)).backward()
        assert weight.grad.item() == pytest.approx(-lambda_p * 2 * 1.5 * 14.0)  # d/dw (w²·Σx²), Σx² = 14
    assert len(graphs) == (1 if backend == "eager" else 0)
    torch.compiler.reset()


# ---- the saddle point: equations 4 to 6 of the paper by separate gradients


@pytest.mark.parametrize(
    ("network", "lambda_p"),
    [
        *((network, lambda_p) for network in ("system-b", "paper-mnist", "quick") for lambda_p in (0.0, 0.3, 1.0)),
        ("system-a", 0.3),
        ("paper-svhn", 0.3),
    ],
)
def test_one_backward_gives_the_saddle_point_gradients(network, lambda_p):
    torch.manual_seed(2)
    model = DANN(network, dropout=0.0).double().eval()
    x_s, x_t = images_for(network, 3, torch.float64), images_for(network, 3, torch.float64)
    y_s = torch.tensor([7, 0, 3])
    theta_f, theta_y, theta_d = (
        list(part.parameters()) for part in (model.extractor, model.classifier, model.discriminator)
    )

    # By hand: no reversal anywhere, one loss at a time.
    f_s, f_t = model.extractor(x_s), model.extractor(x_t)
    loss_y = -model.classifier(f_s).log_softmax(1)[range(3), y_s].mean()
    d_s, d_t = model.discriminator.layers(f_s), model.discriminator.layers(f_t)
    if d_s.shape[1] == 1:
        loss_d = -(1 - d_s.sigmoid()).log().mean() - d_t.sigmoid().log().mean()
    else:
        loss_d = -d_s.softmax(1)[:, 0].log().mean() - d_t.softmax(1)[:, 1].log().mean()
    loss_y_by_f = torch.autograd.grad(loss_y, theta_f, retain_graph=True)
    loss_d_by_f = torch.autograd.grad(loss_d, theta_f, retain_graph=True)
    expected = [g_y - lambda_p * g_d for g_y, g_d in zip(loss_y_by_f, loss_d_by_f, strict=True)]
    expected += torch.autograd.grad(loss_y, theta_y)
    expected += torch.autograd.grad(loss_d, theta_d)  # whatever λ is

    # As in training: one graph, one backward.
    f_s, f_t = model.extractor(x_s), model.extractor(x_t)
    loss = F.cross_entropy(model.classifier(f_s), y_s)
    loss = (
        loss + domain_loss(model.discriminator(f_s, lambda_p), 0) + domain_loss(model.discriminator(f_t, lambda_p), 1)
    )
    loss.backward()

    for weight, gradient in zip(theta_f + theta_y + theta_d, expected, strict=True):
        assert gradient.abs().max() > 1e-9
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())
    if lambda_p:  # the test sees the domain loss: with the other sign it would fail
        wrong = loss_y_by_f[0] + lambda_p * loss_d_by_f[0]
        assert (theta_f[0].grad - wrong).norm() > 1e-3 * wrong.norm()


# ---- the architectures


@pytest.mark.parametrize("network", NETWORKS)
def test_parameter_counts_are_those_of_the_layer_lists(network):
    with torch.device("meta"):
        parts = DANN(network).parts()
    assert list(parts) == ["extractor", "classifier", "discriminator"]
    for name, part in parts.items():
        assert sum(weight.numel() for weight in part.parameters()) == PARAMETERS[network, name], name


@pytest.mark.parametrize("network", NETWORKS)
def test_dropout_sits_where_the_layer_lists_say(network):
    with torch.device("meta"):
        parts = DANN(network, dropout=0.5).parts()
    found = tuple([m.p for m in part.modules() if isinstance(m, nn.Dropout)] for part in parts.values())
    assert found == DROPOUTS[network]
    assert all(m.inplace is False for part in parts.values() for m in part.modules() if isinstance(m, nn.Dropout))


def features_by_hand(network: str, x: torch.Tensor, w: list[torch.Tensor]) -> torch.Tensor:
    """The extractors written out from the layer lists; `w`: weights and biases in order."""
    if network in ("system-a", "paper-svhn"):
        pooling = {"padding": 1} if network == "system-a" else {"ceil_mode": True}
        for i in (0, 2):
            x = F.max_pool2d(F.conv2d(x, w[i], w[i + 1], padding=2).clamp_min(0), 3, 2, **pooling)
        return F.conv2d(x, w[4], w[5], padding=2).clamp_min(0).flatten(1)
    if network == "system-b":
        for i in (0, 4):
            x = F.conv2d(x, w[i], w[i + 1], padding=1).clamp_min(0)
            x = F.max_pool2d(F.conv2d(x, w[i + 2], w[i + 3]).clamp_min(0), 2)
        return (x.flatten(1) @ w[8].T + w[9]).clamp_min(0)
    if network == "paper-mnist":
        for i in (0, 2):
            x = F.max_pool2d(F.conv2d(x, w[i], w[i + 1], padding=2).clamp_min(0), 2)
        return x.flatten(1)
    scale = (1 + 1e-5) ** -0.5  # fresh batch statistics: mean 0, variance 1
    pooled = (0, 3, 6) if network == "quick" else (0, 6, 12)
    *convolutional, last = range(0, len(w), 3)
    for i in convolutional:
        x = F.conv2d(x, w[i], padding=0 if i == 15 else 1)
        if network == "modern" and i in pooled:  # pools before it normalises
            x = F.max_pool2d(x, 2)
        x = (x * scale * w[i + 1].view(1, -1, 1, 1) + w[i + 2].view(1, -1, 1, 1)).clamp_min(0)
        if network == "quick":
            x = F.max_pool2d(x, 2)
    if network == "modern":
        assert x.shape[1:] == (256, 2, 2)
        x = x.mean((2, 3))
    return (x.flatten(1) @ w[last].T * scale * w[last + 1] + w[last + 2]).clamp_min(0)


def mlp_by_hand(f: torch.Tensor, w: list[torch.Tensor]) -> torch.Tensor:
    for i in range(0, len(w), 2):
        f = (f.clamp_min(0) if i else f) @ w[i].T + w[i + 1]
    return f


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_forward_pass_is_that_of_the_layer_lists(network):
    torch.manual_seed(3)
    model = DANN(network).eval()
    for weight in model.parameters():  # also biases and batch norm's factors get values that matter
        if weight.dim() == 1:
            weight.uniform_(0.05, 0.5)
    x = images_for(network, 2)
    w_f, w_y, w_d = (list(part.parameters()) for part in model.parts().values())
    f = features_by_hand(network, x, w_f)
    assert f.shape == (2, FEATURES[network])
    torch.testing.assert_close(model.extractor(x), f, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), mlp_by_hand(f, w_y), rtol=1e-4, atol=1e-4)
    logits = mlp_by_hand(f, w_d)
    expected = logits.mean(1, keepdim=True) if NETWORKS[network].class_wise else logits
    torch.testing.assert_close(model.discriminator(f, 0.3), expected, rtol=1e-4, atol=1e-4)


def test_dropout_acts_in_training_alone():
    torch.manual_seed(4)
    extractor = FeatureExtractor("system-a", dropout=0.5)
    x = images_for("system-a", 2)
    with torch.no_grad():
        trained, tested = extractor.train()(x), extractor.eval()(x)
    active = tested > 0
    kept = trained > 0
    torch.testing.assert_close(trained[kept], 2 * tested[kept])
    assert 0.4 < kept[active].float().mean() < 0.6


def test_extractor_lists_its_convolutions_in_order():
    channels = [(c.in_channels, c.out_channels) for c in FeatureExtractor("system-b").convolutions()]
    assert channels == [(3, 32), (32, 32), (32, 64), (64, 64)]


def test_system_a_starts_as_published():
    torch.manual_seed(5)
    model = DANN("system-a")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            deviation = 0.01
        elif isinstance(module, nn.Conv2d):
            deviation = math.sqrt(2 / (module.out_channels * 5 * 5))  # Kaiming for ReLU, fan out
        else:
            continue
        count = module.weight.numel()
        assert module.weight.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * count))
        assert abs(module.weight.mean().item()) < 5 * deviation / math.sqrt(count)
        assert torch.count_nonzero(module.bias) == 0


# ---- the domain loss


def test_domain_loss_of_two_outputs():
    logits = [[0.3, -1.2], [2.0, 0.5], [-0.7, 0.9]]
    for domain in (0, 1):
        by_hand = sum(-math.log(math.exp(row[domain]) / (math.exp(row[0]) + math.exp(row[1]))) for row in logits) / 3
        assert domain_loss(torch.tensor(logits), domain).item() == pytest.approx(by_hand, rel=1e-6)


def test_domain_loss_of_one_output():
    logits = [0.3, -1.2, 2.5]
    sigmoid = [1 / (1 + math.exp(-logit)) for logit in logits]
    source = sum(-math.log(1 - s) for s in sigmoid) / 3
    target = sum(-math.log(s) for s in sigmoid) / 3
    column = torch.tensor(logits)[:, None]
    assert domain_loss(column, 0).item() == pytest.approx(source, rel=1e-6)
    assert domain_loss(column, 1).item() == pytest.approx(target, rel=1e-6)
    # One logit a is two logits (0, a).
    both = torch.cat((torch.zeros_like(column), column), 1)
    assert domain_loss(both, 1).item() == pytest.approx(target, rel=1e-6)


@pytest.mark.parametrize("outputs", [1, 2])
def test_domain_loss_of_images_that_count_differently(outputs):
    logits, weights = torch.tensor([[0.3, -1.2], [2.0, 0.5], [-0.7, 0.9]])[:, -outputs:], torch.tensor([2.0, 0.0, 1.5])
    for domain in (0, 1):
        alone = [domain_loss(row[None], domain).item() for row in logits]
        assert domain_loss(logits, domain, weights).item() == pytest.approx((2 * alone[0] + 1.5 * alone[2]) / 3)


def test_balancing_weights_let_the_classes_count_alike():
    labels = torch.tensor([1, 1, 1, 1, 1, 1, 7, 7, 9, 1])
    weights = balancing_weights(labels)
    assert weights.tolist() == pytest.approx([0, 10 / 21, 0, 0, 0, 0, 0, 10 / 6, 0, 10 / 3])
    assert weights[labels].mean().item() == pytest.approx(1)


@pytest.mark.parametrize("outputs", [1, 2])
def test_domain_loss_at_chance_and_far_off(outputs):
    for domain in (0, 1):
        assert domain_loss(torch.zeros(6, outputs), domain).item() == pytest.approx(math.log(2))
    sure_of_target = torch.tensor([[300.0]]) if outputs == 1 else torch.tensor([[-150.0, 150.0]])
    assert domain_loss(sure_of_target, 0).item() == pytest.approx(300.0)
    assert domain_loss(sure_of_target, 1).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("outputs", [1, 2])
def test_domain_loss_of_bf16_logits_is_computed_in_fp32(outputs):
    logits = torch.tensor([[0.5], [1.75]]) if outputs == 1 else torch.tensor([[0.0, 0.5], [-0.25, 1.5]])
    with torch.autocast("cpu", torch.bfloat16):
        loss = domain_loss(logits.bfloat16(), 1)  # these values are exact in bf16
    expected = (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-1.75))) / 2
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_predicted_target():
    assert predicted_target(torch.tensor([[-0.1], [0.2], [-3.0]])).tolist() == [False, True, False]
    assert predicted_target(torch.tensor([[0.5, 0.4], [-2.0, -1.0], [3.0, 7.0]])).tolist() == [False, True, True]
    # It says target exactly where that costs less than saying source.
    torch.manual_seed(6)
    for logits in (torch.randn(50, 1), torch.randn(50, 2)):
        cheaper = [bool(domain_loss(row[None], 1) < domain_loss(row[None], 0)) for row in logits]
        assert predicted_target(logits).tolist() == cheaper


def test_discriminator_reverses_by_its_own_argument():
    """λ is an argument, no state: two calls of one layer with different λ give different gradients."""
    torch.manual_seed(7)
    discriminator = DomainDiscriminator("quick")
    gradients = []
    for lambda_p in (1.0, 0.25, 1.0):
        f = torch.ones(2, 128, requires_grad=True)
        discriminator(f, lambda_p).sum().backward()
        gradients.append(f.grad)
    assert torch.equal(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[1], 0.25 * gradients[0])
    plain = torch.ones(2, 128, requires_grad=True)
    discriminator.layers(plain).sum().backward()
    torch.testing.assert_close(gradients[0], -plain.grad)
    assert plain.grad.norm() > 0


# ---- dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_drops_a_share_and_scales_the_rest(p, layout):
    dropout = Dropout(p)
    x = torch.rand(64, 20, 9, 11).add(1).contiguous(memory_format=layout).requires_grad_()
    torch.manual_seed(0)
    out = dropout(x)
    assert out.is_contiguous(memory_format=layout)
    kept = out != 0
    count = x.numel()
    assert abs(kept.sum().item() - (1 - p) * count) < 5 * (count * p * (1 - p)) ** 0.5
    torch.testing.assert_close(out[kept], x[kept] / (1 - p), rtol=1e-4, atol=0)
    by_position = kept.float().mean(0)  # no place of the image is favoured
    assert (by_position - (1 - p)).abs().max() < 6 * (p * (1 - p) / 64) ** 0.5
    lag = torch.corrcoef(torch.stack((kept.flatten()[:-1].float(), kept.flatten()[1:].float())))[0, 1]
    assert abs(lag) < 5 / count**0.5
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, kept / (1 - p), rtol=1e-4, atol=0)
    assert not torch.equal(dropout(x), out)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), out)


def test_dropout_does_nothing_in_eval_mode_or_without_probability():
    x = torch.rand(7, 3)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert Dropout(0.999999)(x).isfinite().all()
