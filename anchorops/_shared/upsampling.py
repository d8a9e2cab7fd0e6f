"""Bilinear and trilinear upsampling of logits, as in F.interpolate."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._moments import statistics_dtype
from .._torch_state import is_for_onnx


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


def upsample(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """F.interpolate(logits, size, mode="bilinear"), of volumes "trilinear", but terms of weight 0
    are removed by selection, because 0 · NaN and 0 · ∞ would be NaN. logits: (B, K, h, w) or
    (B, K, d, h, w); returns (B, K, *size)."""
    if is_for_onnx():
        # one operator of ONNX, Resize, which onnxruntime has for float32, not for float64
        mode = "bilinear" if logits.dim() == 4 else "trilinear"
        upsampled = F.interpolate(logits.float(), size, mode=mode, align_corners=align_corners)
        return upsampled.to(statistics_dtype(logits.dtype))
    rows, near = slice(0, size[0]), slice(0, logits.shape[2])
    return upsample_rows(logits, logits.shape[2], size, align_corners, rows, near)


def upsample_rows(
    near_logits: Tensor,
    source: int,
    size: Sequence[int],
    align_corners: bool,
    rows: slice,
    near: slice,
) -> Tensor:
    """These rows of `upsample` (slices of a volume). near_logits: of the `source` rows of the
    logits those in `near`, which are at least those of `rows_near`."""
    x = _wide(near_logits)
    sources = (source, *near_logits.shape[3:])
    for axis in range(2, x.dim()):
        lower, upper, weight = _sources_of_axis(
            axis, size, sources, align_corners, rows, near, near_logits
        )
        index = (slice(None),) * axis  # the gradient of indexing sums in a fixed order
        low, high = x[(*index, lower)], x[(*index, upper)]
        weight = weight.view(-1, *(1,) * (x.dim() - axis - 1))
        x = torch.where(weight == 0, low, (1 - weight) * low + weight * high)
    return x


def transposed_rows(
    dz: Tensor,
    near_shape: Sequence[int],
    source: int,
    size: Sequence[int],
    align_corners: bool,
    rows: slice,
    near: slice,
) -> Tensor:
    """The gradient of `upsample_rows` in near_logits, of shape near_shape; dz: that in its result.
    The sums have a fixed order."""
    x, sources = _wide(dz), (source, *near_shape[3:])
    for axis in reversed(range(2, x.dim())):
        lower, upper, weight = _sources_of_axis(axis, size, sources, align_corners, rows, near, dz)
        x = x.movedim(axis, 0)
        weight = weight.view(-1, *(1,) * (x.dim() - 1))
        total = x.new_zeros((near_shape[axis], *x.shape[1:]))
        total.index_put_((lower,), torch.where(weight == 0, x, (1 - weight) * x), accumulate=True)
        total.index_put_((upper,), torch.where(weight == 0, 0, weight * x), accumulate=True)
        x = total.movedim(0, axis)
    return x


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def _sources_of_axis(
    axis: int,
    size: Sequence[int],
    sources: Sequence[int],
    align_corners: bool,
    rows: slice,
    near: slice,
    logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`bilinear_sources` of an axis, its weights `_wide`. Coordinates are float32 as those of
    F.interpolate, for float64 logits float64."""
    dtype = statistics_dtype(logits.dtype)
    lower, upper, weight = bilinear_sources(
        size[axis - 2], sources[axis - 2], align_corners, dtype, logits.device
    )
    if axis == 2:
        lower, upper, weight = lower[rows] - near.start, upper[rows] - near.start, weight[rows]
    return lower, upper, _wide(weight)


def rows_near(rows: slice, size: int, source: int) -> slice:
    """A range of the `source` rows of the logits with all that these rows of `size` read, with and
    without aligned corners."""
    first = rows.start * (source - 1) // max(size, 1) - 1
    last = rows.stop * source // max(size - 1, 1) + 2
    return slice(max(first, 0), min(last + 1, source))
