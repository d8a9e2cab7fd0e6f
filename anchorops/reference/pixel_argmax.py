"""The predicted class of every pixel, from low-resolution logits."""

from collections.abc import Sequence

from torch import Tensor

from .._shared.upsampling import upsample


def pixel_argmax(logits: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """argmax of the upsampled logits, int64 (B, *size). It is the first of equal logits; NaN is
    larger than all numbers."""
    return upsample(logits, size, align_corners).argmax(1)
