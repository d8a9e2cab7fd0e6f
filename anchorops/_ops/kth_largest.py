"""The k-th largest of many numbers, for OHEM with a minimum number of pixels."""

import torch
from torch import Tensor

from .. import reference
from .._backend import select
from .class_keys import class_keys
from .registration import define, run


def _fake(values: Tensor, k: int) -> Tensor:
    return values.new_empty(())


define("kth_largest", "(Tensor values, int k) -> Tensor", _fake, backends=("cpu",))


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of the values, float32 and not negative, for k ≥ 1; 0 if there are fewer.

    It neither sorts nor synchronises. The bits of non-negative floats, read as integers, have the
    same order as the floats. Therefore three histograms find the value exactly: each is of the
    next digit of the numbers whose higher digits are those already found. NaN is treated as ∞.
    """
    values = values.flatten()
    backend = select("kth_largest", values[:, None], 1)
    if backend == "cpu":
        return run("kth_largest", "cpu", values, k)
    bits = values.view(torch.int32) & 0x7FFFFFFF  # without the sign of −0 and of −NaN
    rank = torch.full((), k, device=values.device)
    prefix = torch.zeros_like(rank)  # the higher digits of the value
    for start, width in ((20, 11), (10, 10), (0, 10)):  # the digits: where they start, their bits
        # not in [0, 2^width) if a higher one differs
        digits = (bits >> start).sub_(prefix << width)
        counts = _counts(digits, 2**width, backend)
        from_here = counts.flip(0).cumsum(0).flip(0)  # how many have this digit or a larger one
        digit = ((from_here >= rank).sum() - 1).clamp(min=0)
        rank = rank - (from_here - counts).take(digit)
        prefix = prefix << width | digit
    return prefix.to(torch.int32).view(torch.float32).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _counts(labels: Tensor, num_classes: int, backend: str) -> Tensor:
    points = labels[:, None]
    if backend == "reference":
        return reference.class_keys(points, labels, num_classes, False, -1)[1]
    return class_keys(points, labels, num_classes, ignore_index=-1, backend=backend)[1]
