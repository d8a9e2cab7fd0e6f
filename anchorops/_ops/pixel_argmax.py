"""The predicted class of every pixel, from low-resolution logits."""

import torch
from torch import Tensor

from .. import reference
from .._backend import select
from .._checks import check_flags, check_logits, describe, fail
from .registration import define


def _fake(logits: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    return logits.new_empty((logits.shape[0], height, width), dtype=torch.int64)


define(
    "pixel_argmax",
    "(Tensor logits, SymInt height, SymInt width, bool align_corners) -> Tensor",
    _fake,
)


def _is_length(n: object) -> bool:
    return isinstance(n, int | torch.SymInt) and not isinstance(n, bool) and bool(n >= 0)


def pixel_argmax(logits: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """The predicted class of each pixel: argmax_k of the upsampled logits, which are not stored.

    Equal to F.interpolate(logits.float(), size, mode="bilinear", align_corners=align_corners)
    .argmax(1), except for rounding where two classes are almost equal.

    Args:
        logits: (B, K, h, w), any strides; float32, bfloat16, float16 or float64; K from 2 to 65,536
            (16,384 on GPU).
        size: (H, W) of the result.
        align_corners: as in F.interpolate.

    Returns:
        int64 (B, H, W), not differentiable. Among equal logits the first class is returned; NaN is
        larger than all numbers.

    Raises:
        ValueError: wrong shape, dtype or size; a chosen backend that does not support the call.
    """
    function = "pixel_argmax"
    check_logits(function, logits)
    if logits.dim() != 4:
        fail(function, "logits", "a tensor (B, K, h, w)", describe(logits))
    pair = isinstance(size, list | tuple) and len(size) == 2
    if not pair or not all(_is_length(n) for n in size):
        fail(function, "size", "(H, W), two ints of at least 0", describe(size))
    check_flags(function, align_corners=align_corners)
    height, width = size
    if logits.numel() == 0 and logits.shape[0] * height * width > 0:
        fail(function, "logits", "at least one pixel per image", f"shape {tuple(logits.shape)}")
    backend = select(function, logits, logits.shape[1])
    if backend == "reference":
        return reference.pixel_argmax(logits, (height, width), align_corners=align_corners)
    operator = getattr(torch.ops.anchorops.pixel_argmax, backend)
    return operator(logits.detach(), height, width, align_corners)
