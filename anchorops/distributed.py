"""Statistics of the whole process group, with gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._checks import describe, fail
from ._moments import ClassMoments


def _sum(x: Tensor, group: str) -> Tensor:
    # torch's public collectives work in place; these have results, which torch.compile traces
    from torch.distributed import _functional_collectives as collectives

    # all_reduce accepts the name of a group; its annotation does not say so.
    reduced = collectives.all_reduce(x.contiguous(), "sum", group)  # pyright: ignore
    return collectives.wait_tensor(reduced)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.group), None


def group_name(function: str, process_group: "dist.ProcessGroup | str | None") -> str | None:
    """The name of a process group. A module keeps the name, because it can be copied and
    pickled."""
    if process_group is None:
        return None
    name = "world" if process_group == "world" else getattr(process_group, "group_name", None)
    if name is None:  # new_group returns a number to ranks outside the group
        expected = 'None, "world" or a ProcessGroup that this rank belongs to'
        fail(function, "process_group", expected, describe(process_group))
    return name


def all_reduce(x: Tensor, group: str | None) -> Tensor:
    """Σ of x over the ranks of a group ("world", a group's name, or None for this rank alone).

    The backward pass sums the gradients in the same way, so every rank has the gradient of the sum
    of the ranks' losses. If each rank computes the same loss from global statistics, this is R
    times its gradient, and DDP's mean over R ranks gives exactly the gradient of one process on the
    concatenated batch.
    """
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return x
    if group == "world":
        group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    return _AllReduce.apply(x, group) if x.is_floating_point() else _sum(x, group)


def reduce_moments(moments: ClassMoments, group: str | None) -> ClassMoments:
    """Class moments over all ranks: sums and counts are reduced, never means. There are always two
    collectives, for the counts and for the rest, whichever classes a rank has."""
    if group is None:
        return moments
    counts, sums, sqdists = moments
    counts = all_reduce(counts, group)
    if sqdists is None:
        return ClassMoments(counts, all_reduce(sums, group), None)
    both = all_reduce(torch.cat([sums, sqdists[..., None]], -1), group)
    return ClassMoments(counts, both[..., :-1], both[..., -1])
