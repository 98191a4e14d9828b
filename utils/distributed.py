"""Several processes that train as one (`torchrun`): who this one is, its device, and batch norm over all of them.

Every process holds whole sets, takes its share of each batch of both domains, and averages gradients with the others.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.cli import UserError, started_by_torchrun

T = TypeVar("T")
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

    def part(self, length: int) -> slice:
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

    def means(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The means over the processes of values without dimensions, by name."""
        if self.count == 1:
            return {name: value.detach() for name, value in values.items()}
        stacked = torch.stack([value.detach().float() for value in values.values()])
        return dict(zip(values, self.mean_(stacked).unbind(), strict=True))

    def from_first(self, value: T) -> T:
        """The value of the process that writes, in all of them."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values, group=_host_group())
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Every process's value by rank, in the process that writes; elsewhere an empty list."""
        if self.count == 1:
            return [value]
        values: list | None = [None] * self.count if self.writes else None
        dist.gather_object(value, values, group=_host_group())
        return values or []

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self.any(False)

    def first_alone(self, job: Callable[[], T]) -> T:
        """Let rank 0 do a job before the others do it: what it has downloaded, they find."""
        if self.writes:
            try:
                return job()
            finally:
                self.wait()
        self.wait()
        return job()

    def wrap(self, objective: nn.Module) -> nn.Module:
        """The objective with gradients that are averaged over the processes."""
        if self.count == 1:
            return objective
        return DistributedDataParallel(objective, process_group=gradient_group())


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
    _groups[world] = dist.distributed_c10d._get_default_group()
    _groups[other] = dist.new_group(backend="gloo", timeout=TIMEOUT)  # type: ignore[assignment]
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


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean over the processes of a tensor, with its gradient."""
    return SumOverProcesses.apply(x) / dist.get_world_size()


class JoinedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose batch is that of all processes, between CPUs (torch's SyncBatchNorm knows only GPUs).

    In eval mode it is ordinary batch norm. Every process brings a batch of the same size.

    Shape: (N, C, *) -> (N, C, *)
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, not {x.dim()}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        rest = [0, *range(2, x.dim())]  # all but the channels
        shape = (1, -1, *[1] * (x.dim() - 2))
        wide = x.float()
        mean = mean_over_processes(wide.mean(rest))
        # Of the deviations, not E[x²] − E[x]², which cancels to below zero where the mean is large.
        variance = mean_over_processes((wide - mean.view(shape)).square().mean(rest))
        count = x.numel() // x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return ((wide - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


def join_batch_norms(module: nn.Module, device: torch.device) -> None:
    """Replace every batch norm inside by one over all processes; names and values of its weights stay."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            joined = JoinedBatchNorm(child.num_features, child.eps, child.momentum, device=child.weight.device)
            joined.load_state_dict(child.state_dict())
            setattr(module, name, joined.train(child.training))
        else:
            join_batch_norms(child, device)
