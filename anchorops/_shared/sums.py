"""Sums whose bits follow from the shape, and sums by key."""

import torch
from torch import Tensor

from .._torch_state import is_for_onnx, is_traced

_RUN = 2**14  # torch divides a sum among threads from 2^15 numbers on


def fixed_order_sum(values: Tensor) -> Tensor:
    """Σ values, a scalar of their dtype. On a CPU the bits do not depend on the number of threads:
    a thread sums a row or a run, and these sums are added in float64.

    torch.compile and torch.jit.trace record a formula for every size. Their code may add in another
    order.
    """
    if not values.is_cpu:  # a GPU adds in an order that follows from the shape
        return values.sum()
    if is_traced():
        values = values if values.dim() < 2 else values.sum(-1)
        return values.sum(dtype=torch.float64).to(values.dtype)
    if values.numel() <= _RUN:
        return values.sum()
    dtype = values.dtype
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


def sum_by_key(keys: Tensor, values: Tensor, num_keys: int) -> Tensor:
    """Σ of values [N, …] for each key [N]; values with key −1 are ignored."""
    keys = torch.where(keys >= 0, keys, num_keys)
    out = values.new_zeros(num_keys + 1, *values.shape[1:])
    if is_for_onnx():  # its index_add forgets all but one value of a key
        columns = keys.view(-1, *(1,) * (values.dim() - 1)).expand_as(values)
        out = out.scatter_add(0, columns, values)
    elif values.is_cuda:  # index_put sorts, and so sums in a fixed order; index_add uses atomics
        out = out.index_put((keys,), values, accumulate=True)
    else:
        out = out.index_add(0, keys, values)
    return out[:-1]


def histogram(places: Tensor, valid: Tensor, length: int) -> Tensor:
    """int64 [length]: how often each place occurs where it is valid. The shapes do not depend on
    the values, and integers have the same sum in every order."""
    places = torch.where(valid, places, length).flatten()
    counts = places.new_zeros(length + 1)
    return counts.index_add(0, places, places.new_ones(1).expand_as(places))[:length]
