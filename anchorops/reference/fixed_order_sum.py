"""The sum of all numbers of a tensor, in an order that follows from its shape."""

import torch
from torch import Tensor

from .._checks import is_jit_traced

_RUN = 2**14  # torch divides a sum among threads from 2^15 numbers on


def fixed_order_sum(values: Tensor) -> Tensor:
    """Σ values, a scalar of their dtype. On a CPU the bits do not depend on the number of threads:
    a thread sums a row or a run, and these sums are added in float64.

    torch.compile and torch.jit.trace record a formula for every size. Their code may add in another
    order.
    """
    if values.device.type != "cpu":  # a GPU adds in an order that follows from the shape
        return values.sum()
    dtype = values.dtype
    if torch.compiler.is_compiling() or is_jit_traced():
        values = values if values.dim() < 2 else values.sum(-1)
        return values.sum(dtype=torch.float64).to(dtype)
    while values.numel() > _RUN:
        values = _sums_of_runs(values).double()
    return values.sum().to(dtype)


def _sums_of_runs(values: Tensor) -> Tensor:
    """Sums of rows, or of runs if there is a single axis or rows are long: [number of sums]."""
    if values.dim() > 1 and values.shape[-1] <= _RUN:
        return values.contiguous().sum(-1).flatten()
    values = values.flatten()
    rest = values.numel() % _RUN
    runs, last = values.split((values.numel() - rest, rest))
    return torch.cat([runs.view(-1, _RUN).sum(-1), last.sum()[None]])
