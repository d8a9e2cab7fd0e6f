"""The processes of a run: one, or those that torchrun started."""

import os
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..signals import launched

Result = TypeVar("Result")


class Ranks(NamedTuple):
    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.world == 1:
            return flag
        shared = torch.tensor(int(flag))  # over gloo, which does not synchronise with a GPU
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return bool(shared)

    def synchronize(self, module: nn.Module) -> None:
        """Copy the buffers of the first rank to all ranks: statistics of batch normalisation."""
        if self.world > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def from_first(self, make: Callable[[], Result]) -> Result:
        """The result of `make` on the first rank, returned on all ranks. A ValueError or OSError is
        raised on all ranks: the others would only see that a connection was closed."""
        if self.world == 1:
            return make()
        result = error = None
        if self.first:
            try:
                result = make()
            except (ValueError, OSError) as raised:
                error = raised
        shared = [(result, error)]
        dist.broadcast_object_list(shared, device=torch.device("cpu"))
        result, error = shared[0]
        if error is not None:
            raise error
        return result  # pyright: ignore[reportReturnType]


def start_ranks(device: str | None) -> Ranks:
    """Join the process group if torchrun started this process (NCCL for tensors on GPUs, gloo for
    others). Raises ValueError if there is no such device."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if launched() and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=device).item()  # the device meta exists, but has no values
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used: {reason}") from None
    if not launched():
        return Ranks(0, 1, torch.device(device))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device(device))


def lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has ended: NCCL's errors have a type, those
    of gloo only a place in its sources."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def stop_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
