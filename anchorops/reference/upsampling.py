"""Bilinear and trilinear upsampling of logits, as in F.interpolate."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._moments import statistics_dtype


def bilinear_sources(
    size: int, source: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """For each row (column, slice) of the upsampled logits: the two rows of the logits around it,
    and the weight of the second, as in F.interpolate. int64, int64 and `dtype`, [size]."""
    if size == source:  # float32 coordinates would be rounded beyond 2^23
        same = torch.arange(size, device=device)
        return same, same, torch.zeros(size, device=device, dtype=dtype)
    at = torch.arange(size, device=device, dtype=dtype)
    # filled on the device, because copying a number to it would synchronise
    ratio = (source - 1) / max(size - 1, 1) if align_corners else source / max(size, 1)
    ratio = torch.full((), ratio, dtype=dtype, device=device)
    at = at * ratio if align_corners else ((at + 0.5) * ratio - 0.5).clamp(min=0)
    lower = at.floor().clamp(max=source - 1)
    weight = (at - lower).clamp(max=1)
    lower = lower.long()
    return lower, (lower + 1).clamp(max=source - 1), weight


def upsample(
    logits: Tensor, size: Sequence[int], align_corners: bool, rows: slice = slice(None)
) -> Tensor:
    """F.interpolate(logits, size, mode="bilinear"), of volumes "trilinear", but terms of weight 0
    are removed by selection, because 0 · NaN and 0 · ∞ would be NaN. logits: (B, K, h, w) or
    (B, K, d, h, w); returns (B, K, *size), or these rows of it (slices of a volume)."""
    # as F.interpolate: coordinates are float32, for float64 logits float64
    dtype = statistics_dtype(logits.dtype)
    x = logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)
    for axis, length in enumerate(size, 2):
        lower, upper, weight = bilinear_sources(
            length, logits.shape[axis], align_corners, dtype, logits.device
        )
        if axis == 2:
            lower, upper, weight = lower[rows], upper[rows], weight[rows]
        index = (slice(None),) * axis  # the gradient of indexing sums in a fixed order
        low, high, weight = x[(*index, lower)], x[(*index, upper)], weight.to(x.dtype)
        weight = weight.view(-1, *(1,) * (x.dim() - axis - 1))
        x = torch.where(weight == 0, low, (1 - weight) * low + weight * high)
    return x
