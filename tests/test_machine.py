"""What a device is given: precision, optimiser and autocast, also for devices that this machine has not."""

import pytest
import torch

from model import DANN
from utils import machine
from utils.config import recipe_config
from utils.optimisation import make_optimizer


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_fastest_device_there_is(monkeypatch, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert machine.choose_device("auto").type == chosen


def test_mps_trains_in_fp32():
    """Everything that asks for the kind of device: no autocast, no fused optimiser, no tensor in double precision."""
    mps = torch.device("mps")
    assert machine.choose_precision("auto", mps) == "fp32"
    with machine.autocast(mps, "fp32"):
        pass
    config = recipe_config("quick")
    assert not make_optimizer(DANN("quick"), config, mps).defaults["fused"]
    assert "MPS" in machine.describe(mps)


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_cuda_trains_in_bf16_where_the_hardware_has_it(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda = torch.device("cuda")
    assert machine.choose_precision("auto", cuda) == precision
    assert machine.choose_precision("fp32", cuda) == "fp32"


@pytest.mark.parametrize("instructions", [True, False])
def test_cpu_trains_in_bf16_where_it_has_the_instructions(monkeypatch, instructions):
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: instructions, raising=False)
    assert machine.choose_precision("auto", torch.device("cpu")) == ("bf16" if instructions else "fp32")
