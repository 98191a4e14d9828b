"""Networks of torchvision as extractors: `torchvision:resnet18`, or `torchvision:resnet18@64` for 64 × 64 pixels.

torchvision is imported where it is needed: it takes a second and a half.
"""

import difflib
import re
from pathlib import Path
from urllib.error import URLError

import torch
from torch import nn

from model import DomainBatchNorm
from utils.cli import UserError

PREFIX = "torchvision:"
IMAGE_SIZE = 224  # pixels, what most of them were made for
NO_AUXILIARY = ("googlenet", "inception_v3")  # whose training has further outputs, unless told otherwise


def parse_name(name: str) -> tuple[str, int]:
    """torchvision's name of a network and the size of its pictures, of `torchvision:NAME` or `torchvision:NAME@SIZE`.

    Raises: UserError for a name that torchvision does not know, or another size than 16 to 1024.
    """
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    found = re.fullmatch(rf"{PREFIX}([^@]+)(?:@(\d{{2,4}}))?", name)
    if not found or found[1] not in known:
        alike = difflib.get_close_matches(name.removeprefix(PREFIX), known) or ["resnet18"]
        raise UserError(f"{name} is no classification network of torchvision: take {PREFIX}{' or '.join(alike)}")
    size = int(found[2] or IMAGE_SIZE)
    if not 16 <= size <= 1024:
        raise UserError(f"{name}: the size of its pictures must be 16 to 1024 pixels, not {size}")
    return found[1], size


def backbone(name: str, pretrained: bool = False, download: bool = True) -> tuple[nn.Sequential, int]:
    """A network of torchvision without its last linear layer, each domain with batch statistics of its own.

    Args:
        name: torchvision's.
        pretrained: with its ImageNet weights, from torch's cache or, where `download` allows it, the network.

    Returns: its layers, (N, 3, S, S) -> (N, F), and the number F of features.

    Raises: UserError for a network without such a layer, and for weights that can't be had.
    """
    import torchvision.models

    options = {"aux_logits": False, "init_weights": True} if name in NO_AUXILIARY and not pretrained else {}
    model = torchvision.models.get_model(name, **options)
    if pretrained:
        model.load_state_dict(_imagenet_weights(name, download))
    linear = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if not linear:
        raise UserError(f"{PREFIX}{name} can't be cut: it has no linear layer at its end; choose another network")
    path, head = linear[-1]
    model.set_submodule(path, nn.Identity())
    return nn.Sequential(with_domain_norms(model)), head.in_features


def with_domain_norms(module: nn.Module) -> nn.Module:
    """The module with each batch norm in it replaced by one that keeps both domains' statistics."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, DomainBatchNorm(child))
        else:
            with_domain_norms(child)
    return module


def _imagenet_weights(name: str, download: bool) -> dict:
    import torchvision.models

    weights = torchvision.models.get_model_weights(name).DEFAULT
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    fix = f"run again with the network at hand, put {weights.url} there, or leave out --pretrained"
    if not file.is_file() and not download:
        raise UserError(f"there are no ImageNet weights of {name} in {file}, and --no-download is given: {fix}")
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except URLError as error:
        raise UserError(f"there are no ImageNet weights of {name} in {file} ({error.reason}): {fix}") from None
    except Exception as error:  # torch raises a dozen kinds for bytes that are no weights
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{file} holds no weights that can be loaded ({reason}): move it away, then {fix}") from None
