"""Histograms of the hinges of sigmoids, and losses that are functions of them, for one channel: as
probability_histograms.py for softmax.

With z the full-resolution logit and s = 1 for a pixel that is 1, otherwise −1, the error is the
hinge max(0, 1 − s·z). Hinges are not bounded: a bin is 1/512 of its error, up to errors of 2^40.
Everything is PyTorch, on every device.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .._moments import statistics_dtype
from ..reference.probability_histograms import histogram
from .registration import Gradient, define, library

# A float's exponent and the first bits of its mantissa number the bins, from 2^-20 to 2^40.
MANTISSA, EXPONENTS = 9, (-20, 40)
FIRST, LAST = ((127 + exponent) << MANTISSA for exponent in EXPONENTS)
BINS = LAST - FIRST + 1  # the first has all errors below 2^-20


class _Hinges(NamedTuple):
    """Of the pixels [B, H, W] of a channel."""

    errors: Tensor
    slopes: Tensor  # of the errors in the logits: ±1, 0 where the error is 0; NaN where it is ∞
    places: Tensor  # in a table [2, BINS], of pixels that are 1 and of others
    valid: Tensor


def upsampled_channel(logits: Tensor, labels: Tensor, align_corners: bool) -> Tensor:
    """Logits (B, 1, h, w) at full resolution, (B, 1, H, W), in the statistics' dtype."""
    z = logits.to(statistics_dtype(logits.dtype))
    if labels.numel() == 0:  # F.interpolate takes no empty size
        return z.new_zeros(labels[:, None].shape) + z[:0].sum()
    if z.shape[2:] != labels.shape[1:]:
        mode = "bilinear" if z.dim() == 4 else "trilinear"
        z = F.interpolate(z, labels.shape[1:], mode=mode, align_corners=align_corners)
    return z


def _hinges(z: Tensor, labels: Tensor, ignore_index: int) -> _Hinges:
    z, labels = z[:, 0], labels.long()
    valid = ((labels == 0) | (labels == 1)) & (labels != ignore_index)
    signs = torch.where(labels == 1, -1, 1).to(z.dtype)
    margins = torch.where(valid, 1 + signs * z, -1)
    errors = margins.clamp(min=0)
    slopes = torch.where(margins >= 0, signs, 0).where(margins < math.inf, math.nan)
    bits = errors.float().clamp(max=2.0 ** EXPONENTS[1]).view(torch.int32)
    places = (bits >> (23 - MANTISSA)).long().sub(FIRST - 1).clamp(0, BINS - 1)
    return _Hinges(errors, slopes, places + BINS * (labels != 1).long(), valid)


def hinge_histograms(z: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """A scalar, 0 if all errors are finite, otherwise NaN; and int64 [2, BINS]: how many pixels
    that are 1, and how many others, have an error in each bin. z: (B, 1, H, W)."""
    return torch.ops.anchorops.hinge_histograms.reference(z.detach(), labels, ignore_index)


def bin_edges(device: torch.device) -> Tensor:
    """float64 [BINS + 1]"""
    places = torch.arange(BINS, dtype=torch.float64, device=device)
    exponents, mantissas = places // 2**MANTISSA, places % 2**MANTISSA
    edges = torch.exp2(exponents + EXPONENTS[0]) * (1 + mantissas / 2**MANTISSA)
    return F.pad(edges, (1, 0))


def hinge_loss(
    loss: Tensor,
    z: Tensor,
    logits: Tensor,
    labels: Tensor,
    slopes: Tensor,
    *,
    ignore_index: int,
    align_corners: bool,
) -> Tensor:
    """The loss, a scalar, whose gradient for the full-resolution logits z is that of the slopes
    [2, BINS]. z is not saved: the backward pass computes it again from the logits (B, 1, h, w)."""
    operator = torch.ops.anchorops.hinge_loss.reference
    return operator(loss, z, logits, labels, slopes.to(loss.dtype), ignore_index, align_corners)


def _histograms(z: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    hinges = _hinges(z, labels, ignore_index)
    counts = histogram(hinges.places, hinges.valid, 2 * BINS)
    return (0 * hinges.errors).sum(), counts.view(2, -1)


def _histograms_fake(z: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return z.new_empty(()), z.new_empty((2, BINS), dtype=torch.int64)


def _loss(loss: Tensor, *_: Any) -> Tensor:
    return loss.clone()


def _loss_fake(loss: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(loss)


def _gradients(
    logits: Tensor, labels: Tensor, slopes: Tensor, ignore_index: int, align_corners: bool
) -> Tensor:
    """dz (B, 1, H, W)"""
    hinges = _hinges(upsampled_channel(logits, labels, align_corners), labels, ignore_index)
    return (slopes.flatten()[hinges.places] * hinges.slopes)[:, None]


def _gradients_fake(logits: Tensor, labels: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(labels[:, None].shape, dtype=statistics_dtype(logits.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, *tensors, ctx.ignore_index, ctx.align_corners = inputs
    ctx.save_for_backward(*tensors)


def _backward(operator: Any, ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    logits, labels, slopes = ctx.saved_tensors
    dz = operator(logits, labels, slopes * grad, ctx.ignore_index, ctx.align_corners)
    return grad, dz, None, None, None, None, None


define(
    "hinge_histograms",
    "(Tensor z, Tensor labels, int ignore_index) -> (Tensor, Tensor)",
    _histograms_fake,
    backends=("reference",),
)
define(
    "hinge_loss",
    "(Tensor loss, Tensor z, Tensor logits, Tensor labels, Tensor slopes, int ignore_index, "
    "bool align_corners) -> Tensor",
    _loss_fake,
    backends=("reference",),
    gradient=Gradient(
        "(Tensor logits, Tensor labels, Tensor slopes, int ignore_index, bool align_corners) "
        "-> Tensor",
        _gradients_fake,
        _setup_context,
        _backward,
        function="Lovasz",
    ),
    any_strides=True,
)
library.impl("hinge_histograms.reference", _histograms, "CompositeExplicitAutograd")
library.impl("hinge_loss.reference", _loss, "CompositeExplicitAutograd")
library.impl("hinge_loss_backward.reference", _gradients, "CompositeExplicitAutograd")
