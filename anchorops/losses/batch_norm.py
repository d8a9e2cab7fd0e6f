"""Batch norm of values that are not stored, from their mean and variance in each channel.

Batch norm is affine in each channel, and so are upsampling and means over pixels. Therefore it can
be applied to means.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import fail
from ..distributed import all_reduce, group_name


class BatchNorm(NamedTuple):
    """γ·(x − mean)/√(variance + ε) + β in each channel."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor
    eps: float

    def of(self, x: Tensor) -> Tensor:
        weight, bias, mean, variance = (y.to(x.dtype) for y in self[:4])
        return (x - mean) * (weight * (variance + self.eps).rsqrt()) + bias


def batch_norm(
    function: str, norm: object, mean: Tensor, variance: Tensor, pixels: int, group: str | None
) -> BatchNorm:
    """The batch norm of `function`'s module `norm`. In training, this updates its running
    statistics.

    mean, variance: of this rank's values, [C] each; pixels: their number in each channel. group:
    the statistics are those of its ranks.
    """
    if not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) or not norm.affine:
        fail(function, "norm", "a BatchNorm2d or SyncBatchNorm with affine=True", norm)
    if norm.num_features != len(mean):
        fail(function, "norm", f"a batch norm of {len(mean)} channels", norm)
    if norm.running_mean is None or norm.running_var is None or norm.momentum is None:
        expected = "running statistics and a momentum that is a number"
        fail(function, "norm", f"a batch norm with {expected}", norm)
    assert norm.num_batches_tracked is not None  # as the running statistics
    if isinstance(norm, nn.SyncBatchNorm):
        group = group_name(function, norm.process_group or "world")
    if not norm.training or (pixels == 0 and group is None):
        here = norm.running_mean.to(mean), norm.running_var.to(mean)
        return BatchNorm(norm.weight, norm.bias, *here, norm.eps)
    size: Tensor | int = pixels
    if group is not None:
        if pixels == 0:  # NaN of the reference
            mean, variance = mean.nan_to_num(0.0), variance.nan_to_num(0.0)
        total = torch.cat([mean * pixels, mean.new_full((1,), pixels)])
        total = all_reduce(total, group)
        size = total[-1]
        some = size.clamp(min=1)
        shift = mean - total[:-1] / some
        mean = total[:-1] / some
        variance = all_reduce(pixels * (variance + shift.square()), group) / some
    elif pixels == 1:
        fail(function, "features", "more than one pixel in training, for batch norm", pixels)
    with torch.no_grad():
        running = [norm.running_mean, norm.running_var]
        unbiased = variance * (size / (size - 1))
        here = [x.to(running[0].dtype) for x in (mean, unbiased)]
        if isinstance(size, Tensor):  # of all ranks there may be no pixel, or one, and no variance
            here = [torch.where(size > 1, *x) for x in zip(here, running, strict=True)]
        torch._foreach_lerp_(running, here, norm.momentum)  # pyright: ignore
        norm.num_batches_tracked.add_(1)
    return BatchNorm(norm.weight, norm.bias, mean, variance, norm.eps)
