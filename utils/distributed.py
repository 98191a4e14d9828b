"""Several processes that train as one (`torchrun`): who this one is, its device, and batch norm over all of them.

Every process holds whole sets, takes its share of each batch of both domains, and averages gradients with the others.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.cli import UserError

TIMEOUT = timedelta(minutes=30)  # the others wait that long while the first one tests or downloads


@dataclass(frozen=True)
class Processes:
    """This process among those that train together: `rank` in 0…count − 1; rank 0 alone writes."""

    rank: int = 0
    count: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes logs, checkpoints and results."""
        return self.rank == 0

    def share(self, length: int) -> slice:
        """The part of a batch of `length` images that this process takes; `length` is a multiple of `count`."""
        size = length // self.count
        return slice(self.rank * size, (self.rank + 1) * size)

    @property
    def launcher(self) -> str:
        """What starts so many processes on the command line."""
        return "python" if self.count == 1 else f"torchrun --nproc_per_node={self.count}"

    @property
    def own_seed(self) -> tuple[int, ...]:
        """What a seed of random draws that should differ between processes has besides: nothing in a lone process."""
        return (self.rank,) if self.count > 1 else ()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.count == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=_host_group())
        return bool(flags)

    def mean_(self, values: Tensor) -> Tensor:
        """Replace values by their mean over the processes; does not wait for the device."""
        if self.count > 1:
            dist.all_reduce(values)
            values /= self.count
        return values

    def gather(self, value: object) -> list:
        """Every process's value by rank, in the process that writes; elsewhere an empty list."""
        if self.count == 1:
            return [value]
        values = [None] * self.count if self.writes else None
        dist.gather_object(value, values, group=_host_group())
        return values or []

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self.any(False)

    def first_alone(self, job: Callable[[], object]) -> object:
        """Let rank 0 do a job before the others do it: what it has downloaded, they find."""
        if self.writes:
            try:
                return job()
            finally:
                self.wait()
        self.wait()
        return job()


ALONE = Processes()
_groups: dict[str, dist.ProcessGroup] = {}


def _host_group() -> dist.ProcessGroup:
    """A group that exchanges values in memory, whatever the backend of the gradients is."""
    return _groups["host"]


def gradient_group() -> dist.ProcessGroup:
    """The group for DistributedDataParallel, which never lets go of its group.

    On CPUs no other exchange may use it: destroying a group ends gloo's threads, but not while somebody holds it, and a
    thread that still holds the tensor of the last exchange when Python ends aborts the process.
    """
    return _groups["gradients"]


def started_by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def join(device: torch.device) -> Iterator[Processes]:
    """Meet the other processes that torchrun has started, and part at the end: NCCL between GPUs, gloo between CPUs.

    Raises: UserError for a device that several processes can't share, or more processes than GPUs.
    """
    if not started_by_torchrun():
        yield Processes()
        return
    rank, count, local = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"this machine has {torch.cuda.device_count()} GPUs: run torchrun with at most as many "
                "--nproc_per_node, or with --device cpu"
            )
        torch.cuda.set_device(local)
    elif device.type != "cpu":
        raise UserError(f"several processes train on CUDA or CPUs, not on {device.type}: give --device cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    world, other = ("gradients", "host") if device.type == "cuda" else ("host", "gradients")
    _groups[world] = dist.group.WORLD
    _groups[other] = dist.new_group(backend="gloo", timeout=TIMEOUT)
    try:
        yield Processes(rank, count)
    finally:
        dist.destroy_process_group()
        _groups.clear()


class SumOverProcesses(torch.autograd.Function):
    """Σ over the processes of a tensor; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> Tensor:
        return SumOverProcesses.apply(grad_output)


class JoinedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose batch is that of all processes, on any device (torch's SyncBatchNorm knows only GPUs).

    In eval mode it is ordinary batch norm. Every process brings a batch of the same size.

    Shape: (N, C, *) -> (N, C, *)
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, not {x.dim()}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        rest = [0, *range(2, x.dim())]  # all but the channels
        wide = x.float()
        sums = SumOverProcesses.apply(torch.stack((wide.mean(rest), wide.square().mean(rest)))) / dist.get_world_size()
        mean, variance = sums[0], sums[1] - sums[0].square()
        count = x.numel() // x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        shape = (1, -1, *[1] * (x.dim() - 2))
        return (wide * scale.view(shape) + (self.bias - mean * scale).view(shape)).to(x.dtype)


def join_batch_norms(module: nn.Module) -> None:
    """Replace every batch norm inside by one over all processes; names and values of its weights stay."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            joined = JoinedBatchNorm(child.num_features, child.eps, child.momentum)
            joined.load_state_dict(child.state_dict())
            joined.weight, joined.bias = child.weight, child.bias
            joined.running_mean, joined.running_var = child.running_mean, child.running_var
            joined.num_batches_tracked = child.num_batches_tracked
            setattr(module, name, joined.train(child.training))
        else:
            join_batch_norms(child)
