"""Gradient reversal, the networks against the layer lists they are said to have, and the domain loss."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import compiled_for_all_lambdas
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from methods.networks import NETWORKS, Dropout, build_network
from methods.optimisation import balancing_weights
from model import DomainBatchNorm, GradientReversal, domain_accuracy, domain_loss, reverse_gradient
from utils.cli import UserError

# ---- the reversal layer


@pytest.mark.parametrize("lambda_p", [0.0, 0.25, 1.0, 3.7])
def test_reversal_keeps_the_value_and_multiplies_the_gradient_by_minus_lambda(lambda_p):
    torch.manual_seed(0)
    x, weights = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    y = reverse_gradient(x, lambda_p)
    assert torch.equal(y, x)
    (weights * y.sin()).sum().backward()
    torch.testing.assert_close(x.grad, -lambda_p * weights * x.detach().cos())


def test_reversal_is_static_and_keeps_no_tensor():
    methods = (vars(GradientReversal)[name] for name in ("forward", "setup_context", "backward"))
    assert all(isinstance(method, staticmethod) for method in methods)
    assert reverse_gradient(torch.ones(3, requires_grad=True), 0.5).grad_fn.saved_tensors == ()


def test_reversal_can_be_differentiated_twice():
    x = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(reverse_gradient(x, 0.7) ** 3, x, create_graph=True)
    assert first.item() == pytest.approx(-0.7 * 3 * 1.5**2)
    # The inner value passes the layer once more on the way back, so that the factor −λ enters a second time.
    (second,) = torch.autograd.grad(first, x)
    assert second.item() == pytest.approx(0.7**2 * 6 * 1.5)
    values = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda v: reverse_gradient(v, 0.7), (values,))


@pytest.mark.parametrize(("lambda_p", "rtol"), [(0.5, 0.0), (2.0, 0.0), (0.3, 0.01)])
def test_reversal_under_bf16_autocast(lambda_p, rtol):
    torch.manual_seed(1)
    first, second, x = nn.Linear(6, 8), nn.Linear(8, 2), torch.randn(4, 6)

    def gradient(reverse):
        with torch.autocast("cpu", torch.bfloat16):
            features = reverse(first(x))
            assert features.dtype == torch.bfloat16
            out = second(features)
        return torch.autograd.grad(out.float().square().sum(), first.weight)[0]

    plain = gradient(lambda f: f)
    assert plain.abs().max() > 0.1
    # A power of two is exact in bf16; 0.3 is rounded to 8 bits.
    reversed_gradient = gradient(lambda f: reverse_gradient(f, lambda_p))
    torch.testing.assert_close(reversed_gradient, -lambda_p * plain, rtol=rtol, atol=rtol * plain.abs().max().item())


@compiled_for_all_lambdas
@pytest.mark.parametrize(("dynamic", "most_graphs"), [(None, 2), (True, 1)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_reversal_follows_a_lambda_that_changes(dynamic, most_graphs):
    """Compiled for the first value, then at most once more for all others."""
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=backend, fullgraph=True, dynamic=dynamic)
    def loss(x, weight, lambda_p):
        return (reverse_gradient(x * weight, lambda_p) ** 2).sum()

    x = torch.tensor([1.0, -2.0, 3.0])
    for lambda_p in (0.0, 0.1, 0.33, 1.0, 2.0, 0.5, 0.77):
        weight = torch.tensor(1.5, requires_grad=True)
        loss(x, weight, lambda_p).backward()
        assert weight.grad.item() == pytest.approx(-lambda_p * 2 * 1.5 * 14.0)  # d/dw (w²·Σx²), Σx² = 14
    assert 1 <= backend.frame_count <= most_graphs
    torch.compiler.reset()


def test_reversal_under_torch_func_grad():
    x = torch.randn(4)
    gradient = torch.func.grad(lambda v: (reverse_gradient(v, 0.3) ** 2).sum())(x)
    torch.testing.assert_close(gradient, -0.3 * 2 * x)


def test_gradients_of_each_sample_by_vmap_are_those_of_a_loop():
    torch.manual_seed(2)
    weight, samples = torch.randn(3, 5), torch.randn(6, 5)

    def loss(weight, x):
        return reverse_gradient(weight @ x, 0.3).sigmoid().prod()

    expected = []
    for x in samples:
        free = weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((free @ x).sigmoid().prod(), free)
        expected.append(-0.3 * gradient)
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, samples)
    torch.testing.assert_close(found, torch.stack(expected))


# ---- the architectures


def conv(inputs: int, outputs: int, size: int) -> int:
    return inputs * outputs * size**2 + outputs


def normed(inputs: int, outputs: int, size: int = 3) -> int:
    return inputs * outputs * size**2 + 2 * outputs  # batch norm's factor and term instead of a bias


def mlp(*sizes: int) -> int:
    return sum((inputs + 1) * outputs for inputs, outputs in pairwise(sizes))


SVHN_CONVOLUTIONS = conv(3, 64, 5) + conv(64, 64, 5) + conv(64, 128, 5)
PARAMETERS = {  # of extractor, classifier and discriminator
    "system-a": (SVHN_CONVOLUTIONS, mlp(6272, 3072, 2048, 10), mlp(6272, 1024, 1024, 2)),
    "system-b": (  # 32 -> 30 -> 15 -> 13 -> 6, and 64 * 6 * 6 = 2304
        conv(3, 32, 3) + conv(32, 32, 3) + conv(32, 64, 3) + conv(64, 64, 3) + mlp(2304, 512),
        mlp(512, 32, 10),
        mlp(512, 512, 32, 2),
    ),
    "paper-svhn": (SVHN_CONVOLUTIONS, mlp(8192, 3072, 2048, 10), mlp(8192, 1024, 1024, 1)),
    "paper-mnist": (conv(3, 32, 5) + conv(32, 48, 5), mlp(3072, 100, 100, 10), mlp(3072, 100, 1)),
    "small": (
        normed(3, 32) + normed(32, 48) + normed(48, 64) + normed(1024, 128, 1),
        mlp(128, 10),
        mlp(128, 128, 1),
    ),
    "modern": (
        sum(map(normed, (1, 32, 64, 64, 128, 128), (32, 64, 64, 128, 128, 256))) + normed(256, 128, 1),
        mlp(128, 10),
        mlp(128, 128, 10),
    ),
}
PARAMETERS["small-64"] = (PARAMETERS["small"][0] + 3 * normed(1024, 128, 1) - 3 * 2 * 128, *PARAMETERS["small"][1:])
PARAMETERS["modern-64"] = PARAMETERS["modern"]
FEATURES = {"system-a": 6272, "system-b": 512, "paper-svhn": 8192, "paper-mnist": 3072}
DROPOUTS = {  # probabilities of the dropout layers of (extractor, classifier, discriminator) when --dropout is 0.5
    "system-a": ([0.5], [], []),
    "system-b": ([0.25, 0.25], [0.5], []),
    "paper-svhn": ([], [0.5, 0.5], [0.5, 0.5]),
    "paper-mnist": ([], [0.5, 0.5], [0.5]),
    "small": ([0.5], [], []),
    "modern": ([0.5], [], []),
}
DROPOUTS |= {"small-64": DROPOUTS["small"], "modern-64": DROPOUTS["modern"]}


def images_for(network: str, count: int) -> torch.Tensor:
    row = NETWORKS[network]
    return torch.rand(count, row.channels, row.image_size, row.image_size)


@pytest.mark.parametrize("network", NETWORKS)
def test_parameters_and_dropout_are_those_of_the_layer_lists(network):
    with torch.device("meta"):
        parts = build_network(network, dropout=0.5).parts()
    assert list(parts) == ["extractor", "classifier", "discriminator"]
    counts = tuple(sum(weight.numel() for weight in part.parameters()) for part in parts.values())
    assert counts == PARAMETERS[network]
    dropouts = [[m for m in part.modules() if isinstance(m, nn.Dropout)] for part in parts.values()]
    assert tuple([m.p for m in part] for part in dropouts) == DROPOUTS[network]
    assert not any(m.inplace for part in dropouts for m in part)


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
    pooled = (0, 3, 6) if network.startswith("small") else (0, 6, 12)
    *convolutional, last = range(0, len(w), 3)
    for i in convolutional:
        x = F.conv2d(x, w[i], padding=0 if i == 15 else 1)
        if i in pooled:  # before it normalises
            x = F.max_pool2d(x, 2)
        x = (x * scale * w[i + 1].view(1, -1, 1, 1) + w[i + 2].view(1, -1, 1, 1)).clamp_min(0)
    if network.startswith("modern"):
        assert x.shape[1:] == (256, 6, 6) if network == "modern-64" else (256, 2, 2)
        x = x.mean((2, 3))
    return (x.flatten(1) @ w[last].T * scale * w[last + 1] + w[last + 2]).clamp_min(0)


def mlp_by_hand(f: torch.Tensor, w: list[torch.Tensor]) -> torch.Tensor:
    for i in range(0, len(w), 2):
        f = (f.clamp_min(0) if i else f) @ w[i].T + w[i + 1]
    return f


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_forward_pass_is_that_of_the_layer_lists(network):
    """Of each discriminator comes one logit an image: the only one, the difference of two, or the mean over classes."""
    torch.manual_seed(3)
    model = build_network(network, 0.5).eval()
    for weight in model.parameters():  # also biases and batch norm's factors get values that matter
        if weight.dim() == 1:
            weight.uniform_(0.05, 0.5)
    x = images_for(network, 2)
    w_f, w_y, w_d = (list(part.parameters()) for part in model.parts().values())
    f = features_by_hand(network, x, w_f)
    assert f.shape == (2, FEATURES.get(network, 128))
    torch.testing.assert_close(model.extractor(x), f, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), mlp_by_hand(f, w_y), rtol=1e-4, atol=1e-4)
    logits = mlp_by_hand(f, w_d)
    expected = {1: lambda: logits[:, 0], 2: lambda: logits[:, 1] - logits[:, 0], 10: lambda: logits.mean(1)}
    torch.testing.assert_close(model.discriminator(f), expected[logits.shape[1]](), rtol=1e-4, atol=1e-4)


def test_system_a_starts_as_published():
    torch.manual_seed(5)
    for module in build_network("system-a").modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        kaiming = isinstance(module, nn.Conv2d)  # for ReLU, fan out
        deviation = math.sqrt(2 / (module.out_channels * 5 * 5)) if kaiming else 0.01
        count = module.weight.numel()
        assert module.weight.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * count))
        assert abs(module.weight.mean().item()) < 5 * deviation / math.sqrt(count)
        assert torch.count_nonzero(module.bias) == 0


def test_system_b_starts_as_published():
    """Keras draws from ±√(6 / (fan in + fan out)), biases are zero."""
    torch.manual_seed(5)
    for module in build_network("system-b").modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        fans, count = sum(module.weight.shape[:2]) * module.weight[0, 0].numel(), module.weight.numel()
        bound = math.sqrt(6 / fans)
        assert bound * (1 - 20 / count) < module.weight.abs().max() <= bound
        assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(count))
        assert torch.count_nonzero(module.bias) == 0


# ---- the domain loss


@pytest.mark.parametrize("network", ["system-a", "system-b"])
def test_domain_loss_of_a_two_way_softmax_is_its_cross_entropy(network):
    torch.manual_seed(6)
    discriminator = build_network(network).discriminator.double()
    f_s, f_t = torch.rand(2, 5, FEATURES[network], dtype=torch.float64)
    logits = mlp_by_hand(torch.cat((f_s, f_t)), list(discriminator.parameters()))
    assert logits.shape == (10, 2)
    both = F.cross_entropy(logits, torch.tensor([0] * 5 + [1] * 5), reduction="none")
    d_s, d_t = discriminator(f_s), discriminator(f_t)
    torch.testing.assert_close(domain_loss(d_s, d_t), both[:5].mean() + both[5:].mean(), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(domain_loss(d_s, d_t, reduction="mean"), both.mean(), rtol=1e-12, atol=0.0)


def test_domain_loss_by_hand_at_chance_and_far_off():
    d_s, d_t, weights = [0.3, -1.2, 2.5], [0.7, -0.4, 0.0], [2.0, 0.0, 1.5]
    losses_s = [-math.log(1 - 1 / (1 + math.exp(-d))) for d in d_s]
    losses_t = [-math.log(1 / (1 + math.exp(-d))) for d in d_t]
    weighted = sum(w * loss for w, loss in zip(weights, losses_s, strict=True)) / 3 + sum(losses_t) / 3
    d_s, d_t, weights = map(torch.tensor, (d_s, d_t, weights))
    assert domain_loss(d_s, d_t).item() == pytest.approx(sum(losses_s) / 3 + sum(losses_t) / 3)
    assert domain_loss(d_s, d_t, weights).item() == pytest.approx(weighted)
    assert domain_loss(d_s, d_t, weights, "mean").item() == pytest.approx(weighted / 2)

    zero, sure = torch.zeros(6), torch.tensor([300.0])
    assert domain_loss(zero, zero, reduction="sum").item() == pytest.approx(2 * math.log(2))
    assert domain_loss(zero, zero, reduction="mean").item() == pytest.approx(math.log(2))
    assert domain_loss(sure, -sure).item() == pytest.approx(600.0)
    assert domain_loss(-sure, sure).item() == pytest.approx(0.0, abs=1e-12)


def test_domain_loss_of_bf16_logits_is_computed_in_fp32():
    with torch.autocast("cpu", torch.bfloat16):
        loss = domain_loss(torch.tensor([-0.5]).bfloat16(), torch.tensor([1.75]).bfloat16())  # exact in bf16
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-1.75)), rel=1e-6)


def test_the_predicted_domain_is_the_one_that_costs_less():
    torch.manual_seed(7)
    d_s, d_t = torch.randn(2, 50)
    cost = F.softplus  # of an image whose domain is not the one that the logit is of
    hits = torch.cat((cost(d_s) < cost(-d_s), cost(-d_t) < cost(d_t)))
    assert domain_accuracy(d_s, d_t).item() == pytest.approx(hits.double().mean().item())
    assert domain_accuracy(torch.tensor([-0.1, 0.2]), torch.tensor([-3.0, -1.0])).item() == 0.25


def test_balancing_weights_let_the_classes_count_alike():
    labels = torch.tensor([1, 1, 1, 1, 1, 1, 7, 7, 9, 1])
    weights = balancing_weights(labels)
    assert weights.tolist() == pytest.approx([0, 10 / 21, 0, 0, 0, 0, 0, 10 / 6, 0, 10 / 3])
    assert weights[labels].mean().item() == pytest.approx(1)


# ---- dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_drops_a_share_and_scales_the_rest(p, layout):
    dropout = Dropout(p)
    x = torch.rand(64, 20, 9, 11).add(1).contiguous(memory_format=layout).requires_grad_()
    torch.manual_seed(0)
    out = dropout(x)
    assert out.is_contiguous(memory_format=layout)
    kept, count = out != 0, x.numel()
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


@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (6, 3)), (nn.BatchNorm2d, (6, 3, 4, 5))])
def test_each_domain_has_a_batch_norm_but_for_scale_and_shift(kind, shape):
    norm, twins = DomainBatchNorm(kind(3)), {name: kind(3, momentum=0.03) for name in ("source", "target")}
    nn.init.normal_(norm.norm.weight)
    nn.init.normal_(norm.norm.bias)
    for twin in twins.values():
        twin.weight, twin.bias = norm.norm.weight, norm.norm.bias
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        norm.train(number < 4)
        for domain, offset in (("source", 5), ("target", -2)):
            x = torch.randn(shape, generator=generator) * (1 + number) + offset
            norm.domain = domain
            torch.testing.assert_close(norm(x), twins[domain].train(number < 4)(x))
    torch.testing.assert_close(norm.source_mean, twins["source"].running_mean)
    torch.testing.assert_close(norm.source_var, twins["source"].running_var)
    assert [weight.shape for weight in norm.parameters()] == [(3,), (3,)]


def test_a_network_takes_the_statistics_of_the_domain_it_is_given():
    torch.manual_seed(0)
    model = build_network("small")
    assert len(model.extractor.domain_norms) == 4
    x_s, x_t = images_for("small", 8), images_for("small", 8) * 0.1
    f_s, f_t = model.features(x_s, x_t)
    torch.testing.assert_close(f_s, model.extractor(x_s, "source"))  # in training, a batch's own
    assert not torch.allclose(f_s, model.extractor(torch.cat((x_s, x_t)))[:8], atol=0.1)
    for _ in range(400):
        model.features(x_s, x_t)
    f_s, f_t = (f.detach() for f in model.features(x_s, x_t))
    model.eval()
    for x, f, domain, other in ((x_s, f_s, "source", "target"), (x_t, f_t, "target", "source")):
        own, foreign = ((model.extractor(x, name) - f).abs().mean().item() for name in (domain, other))
        assert own < 0.1 < foreign
        assert torch.equal(model(x, domain), model.classifier(model.extractor(x, domain)))
    assert torch.equal(model(x_t), model(x_t, "target"))
    assert not build_network("modern").extractor.domain_norms


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_has_as_many_classes_as_it_is_asked_for(network):
    model, x = build_network(network, classes=26).eval(), images_for(network, 2)
    assert model(x).shape == (2, 26)
    assert model.discriminator(model.extractor(x)).shape == (2,)
    assert model.discriminator.layers(model.extractor(x)).shape[1:] == ((26,) if network.startswith("modern") else ())


# ---- networks of torchvision


BACKBONES = {"resnet18": 512, "vgg11_bn": 4096, "mobilenet_v3_small": 1024, "densenet121": 1024, "swin_t": 768,
             "efficientnet_b0": 1280, "googlenet": 1024}  # fmt: skip


@pytest.mark.parametrize("name", BACKBONES)
def test_a_network_of_torchvision_is_cut_before_its_head(name):
    with torch.device("meta"):
        model, x = build_network(f"torchvision:{name}@64", classes=17), torch.zeros(2, 3, 64, 64)
        assert model.extractor(x).shape == (2, BACKBONES[name])
        assert model(x, "source").shape == (2, 17)
        assert model.discriminator(model.extractor(x)).shape == (2,)
        assert model.discriminator.layers(model.extractor(x)).shape == (2, 17)
    assert not any(type(part) is nn.BatchNorm2d for part in model.modules() if not isinstance(part, DomainBatchNorm)
                   and part not in [norm.norm for norm in model.extractor.domain_norms])  # fmt: skip


def test_imagenet_weights_come_from_the_cache_and_both_domains_start_from_their_statistics(monkeypatch, tmp_path):
    torch.manual_seed(5)
    theirs = torchvision.models.resnet18()
    theirs.train()(torch.randn(8, 3, 64, 64))  # statistics that are not those of a new network
    theirs.eval()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    with pytest.raises(UserError, match=rf"{file}.*leave out --pretrained"):
        build_network("torchvision:resnet18@64", pretrained=True, download=False)
    file.parent.mkdir(parents=True)
    torch.save(theirs.state_dict(), file)
    model, x = (
        build_network("torchvision:resnet18@64", pretrained=True, download=False).eval(),
        torch.randn(3, 3, 64, 64),
    )
    theirs.fc = nn.Identity()
    for domain in ("source", "target"):
        torch.testing.assert_close(model.extractor(x, domain), theirs(x))
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="no weights that can be loaded"):
        build_network("torchvision:resnet18@64", pretrained=True, download=False)
    with pytest.raises(UserError, match="not of small"):
        build_network("small", pretrained=True)
