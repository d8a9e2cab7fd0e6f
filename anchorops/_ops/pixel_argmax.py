"""The predicted class of each pixel and its probability, from low-resolution logits."""

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import reference
from .._backend import select
from .._checks import (
    check_axes,
    check_flags,
    check_logits,
    check_not_empty,
    check_size,
    check_threshold,
    describe,
    fail,
)
from .._moments import Options, Wanted, statistics_dtype
from .registration import define, run
from .sigmoid import two_classes
from .softmax_moments import moments_of
from .triton_launch import launcher

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64)


def fake(logits: Tensor, *arguments: Any) -> Tensor:
    """Logits of any strides. On the CPU they may have one channel: those of class 1 of two, where
    those of class 0 are 0."""
    *size, _, dtype = arguments  # of an image, or of a volume
    return logits.new_empty((logits.shape[0], *size), dtype=dtype)


define(
    "pixel_argmax",
    "(Tensor logits, SymInt height, SymInt width, bool align_corners, ScalarType dtype) -> Tensor",
    fake,
    triton=launcher("pixel_argmax"),
    any_strides=True,
)


@overload
def pixel_argmax(
    logits: Tensor,
    size: Sequence[int],
    *,
    align_corners: bool = False,
    confidence: Literal[False] = False,
    dtype: torch.dtype = torch.int64,
    sigmoid: bool = False,
    threshold: float = 0.5,
) -> Tensor: ...


@overload
def pixel_argmax(
    logits: Tensor,
    size: Sequence[int],
    *,
    align_corners: bool = False,
    confidence: Literal[True],
    dtype: torch.dtype = torch.int64,
    sigmoid: bool = False,
    threshold: float = 0.5,
) -> tuple[Tensor, Tensor]: ...


def pixel_argmax(
    logits: Tensor,
    size: Sequence[int],
    *,
    align_corners: bool = False,
    confidence: bool = False,
    dtype: torch.dtype = torch.int64,
    sigmoid: bool = False,
    threshold: float = 0.5,
) -> Tensor | tuple[Tensor, Tensor]:
    """The predicted class of each pixel: argmax_k of the upsampled logits, which are not stored.

    Equal to F.interpolate(logits.float(), size, mode="bilinear", align_corners=align_corners)
    .argmax(1), except for rounding where two classes are almost equal. With `sigmoid` each channel
    is a class of its own, which a pixel has or not: sigmoid of the upsampled logits > threshold.
    With `confidence` also the probability of what is predicted: the largest softmax of the
    upsampled logits; of a sigmoid p where the class is predicted, 1 − p where it is not.

    Args:
        logits: images or volumes as in `softmax_moments`; with `sigmoid` K is at least 1.
        size: (H, W) of the result, of volumes (D, H, W): a sequence or an array. Here as in all of
            anchorops an int may be anything that operator.index takes, except a bool: of NumPy, of
            torch.export's symbolic sizes, or a tensor of one integer. To read such a tensor of a
            GPU synchronises with it; in torch.jit.trace its value becomes a constant.
        align_corners: as in F.interpolate.
        confidence: also return the probabilities. The logits are then read twice.
        dtype: of the classes: uint8, int8, int16, uint16, int32 or int64; all K must fit. Except on
            the reference, no int64 map of all pixels exists on the way.
        sigmoid: the channels are independent classes.
        threshold: of the probability, in (0, 1); with `sigmoid` alone.

    Returns:
        The classes, of `dtype`, (B, *size); with `sigmoid` (B, K, *size) of 0 and 1. With
        `confidence` (classes, probabilities), and these are float32 (float64 for float64 logits),
        of the same shape, from 1/K to 1 (of sigmoids from 0) except for rounding. Neither is
        differentiable. Among equal logits the first class is returned; NaN is larger than all
        numbers, so of a sigmoid it gives 1. The probability is NaN, as in softmax, where a logit is
        NaN or ∞, or where all are −∞. If B or a size is 0, the results are empty.

    Raises:
        ValueError: wrong shape, dtype, size or threshold; a dtype that does not hold K classes; a
            chosen backend that does not support the call.
    """
    function = "pixel_argmax"
    check_flags(function, align_corners=align_corners, confidence=confidence, sigmoid=sigmoid)
    check_logits(function, logits, sigmoid=sigmoid, points=False)
    size = check_size(function, size, logits.dim() - 2)
    check_class_dtype(function, dtype, 2 if sigmoid else logits.shape[1])
    threshold = check_threshold(function, threshold)
    if threshold != 0.5 and not sigmoid:
        fail(function, "threshold", "0.5 without sigmoid=True", describe(threshold))
    check_not_empty(function, "logits", logits, logits.shape[0] * math.prod(size))
    logits = logits.detach()
    shape = (*logits.shape[: 2 if sigmoid else 1], *size)
    images = logits.flatten(0, 1)[:, None] if sigmoid else logits
    classes = _classes(_relative(images, threshold), size, align_corners, dtype)
    if not confidence:
        return classes.view(shape)
    options = Options(ignore_index=-1, align_corners=align_corners)
    losses = moments_of(function, images, classes, options, Wanted(pixel_losses=True)).pixel_losses
    assert losses is not None
    return classes.view(shape), losses.neg_().exp_().view(shape)


def check_class_dtype(function: str, dtype: torch.dtype, num_classes: int) -> None:
    if dtype not in INTEGERS:
        fail(function, "dtype", "uint8, int8, int16, uint16, int32 or int64", repr(dtype))
    most = torch.iinfo(dtype).max
    if num_classes - 1 > most:
        expected = f"a dtype that holds {num_classes} classes"
        fail(function, "dtype", expected, f"{dtype}, whose largest number is {most}")


def _relative(logits: Tensor, threshold: float) -> Tensor:
    """The logits of a sigmoid, minus that of the threshold."""
    if threshold == 0.5:
        return logits
    # not log1p: torch.compile would compile again with each number
    level = (math.log2(threshold) - math.log2(1 - threshold)) * math.log(2)
    return logits.to(statistics_dtype(logits.dtype)) - level


def _classes(
    logits: Tensor, size: Sequence[int], align_corners: bool, dtype: torch.dtype
) -> Tensor:
    """(B, *size). Logits may have one channel."""
    check_axes("pixel_argmax", logits, size)
    backend = select("pixel_argmax", logits, logits.shape[1])
    if backend != "cpu":
        logits = two_classes(logits)
    if backend == "reference":
        return reference.pixel_argmax(logits, size, align_corners=align_corners).to(dtype)
    name = "pixel_argmax" if logits.dim() == 4 else "volume_argmax"
    return run(name, backend, logits, *size, align_corners, dtype)
