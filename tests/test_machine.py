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


def test_auto_takes_the_fastest_device_there_is(monkeypatch):
    for cuda, mps, chosen in ((1, 1, "cuda"), (1, 0, "cuda"), (0, 1, "mps"), (0, 0, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: bool(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: bool(mps))
        assert machine.choose_device("auto").type == chosen


def test_mps_trains_in_fp32():
    """Everything that asks for the kind of device: no autocast, no fused optimiser, no tensor in double precision."""
    assert machine.choose_precision("auto", MPS) == "fp32"
    with machine.autocast(MPS, "fp32"):
        pass
    assert not make_optimizer(build_network("small"), recipe_config("quick"), MPS).defaults["fused"]
    assert "MPS" in machine.describe(MPS)


def test_cuda_and_cpu_train_in_bf16_where_the_hardware_has_it(monkeypatch):
    for capability, precision in (((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert machine.choose_precision("auto", CUDA) == precision
        assert machine.choose_precision("fp32", CUDA) == "fp32"
    for instructions, precision in ((True, "bf16"), (False, "fp32")):
        for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, probe, lambda found=instructions: found, raising=False)
        assert machine.choose_precision("auto", CPU) == precision


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
