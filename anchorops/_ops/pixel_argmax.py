"""The predicted class of each pixel and its probability, from low-resolution logits."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from .. import reference
from .._backend import select
from .._checks import check_flags, check_logits, check_size, describe, fail
from .._moments import Options
from . import volumes as volumes  # it registers the operators of volumes
from .registration import define
from .softmax_moments import moments_of, refusal


def _fake(logits: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    return logits.new_empty((logits.shape[0], height, width), dtype=torch.int64)


define(
    "pixel_argmax",
    "(Tensor logits, SymInt height, SymInt width, bool align_corners) -> Tensor",
    _fake,
    any_strides=True,
)


@overload
def pixel_argmax(
    logits: Tensor,
    size: Sequence[int],
    *,
    align_corners: bool = False,
    confidence: Literal[False] = False,
) -> Tensor: ...


@overload
def pixel_argmax(
    logits: Tensor,
    size: Sequence[int],
    *,
    align_corners: bool = False,
    confidence: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def pixel_argmax(
    logits: Tensor,
    size: Sequence[int],
    *,
    align_corners: bool = False,
    confidence: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The predicted class of each pixel: argmax_k of the upsampled logits, which are not stored.

    Equal to F.interpolate(logits.float(), size, mode="bilinear", align_corners=align_corners)
    .argmax(1), except for rounding where two classes are almost equal. With `confidence` also the
    probability of this class: the largest softmax of the upsampled logits.

    Args:
        logits: (B, K, h, w), any strides, or volumes (B, K, d, h, w), which are upsampled with
            mode="trilinear"; float32, bfloat16, float16 or float64; K from 2 to 65,536 (16,384 on
            GPU).
        size: (H, W) of the result, of volumes (D, H, W).
        align_corners: as in F.interpolate.
        confidence: also return the probabilities. The logits are then read twice.

    Returns:
        The classes, int64 (B, *size); with `confidence` (classes, probabilities), and these are
        float32 (float64 for float64 logits), of the same shape, from 1/K to 1 except for rounding.
        Neither is differentiable. Among equal logits the first class is returned; NaN is larger
        than all numbers. The probability is NaN, as in softmax, where a logit is NaN or ∞, or where
        all are −∞. If B or a size is 0, the results are empty.

    Raises:
        ValueError: wrong shape, dtype or size; a chosen backend that does not support the call.
    """
    function = "pixel_argmax"
    check_logits(function, logits)
    if logits.dim() not in (4, 5):
        fail(function, "logits", "a tensor (B, K, h, w) or (B, K, d, h, w)", describe(logits))
    check_size(function, size, logits.dim() - 2)
    check_flags(function, align_corners=align_corners, confidence=confidence)
    if logits.numel() == 0 and logits.shape[0] * math.prod(size) > 0:
        fail(function, "logits", "at least one pixel per image", f"shape {tuple(logits.shape)}")
    logits = logits.detach()
    backend = select(
        function,
        logits,
        logits.shape[1],
        refusal=partial(refusal, logits, size, Options(align_corners=align_corners)),
    )
    if backend == "reference":
        classes = reference.pixel_argmax(logits, size, align_corners=align_corners)
    else:
        name = "pixel_argmax" if logits.dim() == 4 else "volume_argmax"
        operator = getattr(getattr(torch.ops.anchorops, name), backend)
        classes = operator(logits, *size, align_corners)
    if not confidence:
        return classes
    options = Options(ignore_index=-1, align_corners=align_corners, pixel_losses=True)
    losses = moments_of(function, logits, classes, options).pixel_losses
    assert losses is not None
    return classes, losses.neg_().exp_()
