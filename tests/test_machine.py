"""What a device is given: precision, optimiser and autocast, also for devices and Pythons that this machine has not."""

import hashlib

import pytest
import torch

from methods.networks import build_network
from methods.optimisation import make_optimizer
from methods.recipes import recipe_config
from utils import machine
from utils.files import checksum

CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))


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
    assert machine.choose_precision("auto", MPS) == "fp32"
    with machine.autocast(MPS, "fp32"):
        pass
    assert not make_optimizer(build_network("quick"), recipe_config("quick"), MPS).defaults["fused"]
    assert "MPS" in machine.describe(MPS)


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_cuda_trains_in_bf16_where_the_hardware_has_it(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert machine.choose_precision("auto", CUDA) == precision
    assert machine.choose_precision("fp32", CUDA) == "fp32"


@pytest.mark.parametrize("instructions", [True, False])
def test_cpu_trains_in_bf16_where_it_has_the_instructions(monkeypatch, instructions):
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: instructions, raising=False)
    assert machine.choose_precision("auto", CPU) == ("bf16" if instructions else "fp32")


def test_cuda_gets_tf32_and_the_fastest_convolutions_and_the_cpu_is_left_alone():
    backends = torch.backends
    flags = ((backends.cuda.matmul, "allow_tf32"), (backends.cudnn, "allow_tf32"), (backends.cudnn, "benchmark"))
    before = [getattr(*flag) for flag in flags]
    try:
        for device, expected in ((CPU, False), (CUDA, True)):
            for flag in flags:
                setattr(*flag, False)
            machine.prepare(device)
            assert [getattr(*flag) for flag in flags] == [expected] * 3
    finally:
        for flag, value in zip(flags, before, strict=True):
            setattr(*flag, value)


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_checksums_do_without_what_python_3_10_has_not(monkeypatch, tmp_path, algorithm):
    monkeypatch.delattr(hashlib, "file_digest", raising=False)
    content = bytes(range(256)) * 5000  # more than is read at once
    (tmp_path / "file").write_bytes(content)
    assert checksum(tmp_path / "file", algorithm) == hashlib.new(algorithm, content).hexdigest()
