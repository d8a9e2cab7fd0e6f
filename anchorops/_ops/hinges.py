"""Histograms of the hinges of sigmoids, and the Lovász loss of one channel, a function of them: as
probability_histograms.py for softmax. It is an operator, because a compiled interpolate may round
in another way, and put a pixel in another bin than the gradient does.

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
from .._shared.sums import histogram
from .._shared.upsampling import transposed_rows
from .probability_histograms import GRADIENT, results_of
from .registration import define, library, run

# A float's exponent and the first bits of its mantissa number the bins, from 2^-20 to 2^40.
MANTISSA, EXPONENTS = 9, (-20, 40)
FIRST, LAST = ((127 + exponent) << MANTISSA for exponent in EXPONENTS)
BINS = LAST - FIRST + 1  # the first has all errors below 2^-20


class _Hinges(NamedTuple):
    """Hinge errors of the pixels of a channel; each field is [B, H, W]."""

    errors: Tensor
    slopes: Tensor  # of the errors in the logits: ±1, 0 where the error is 0; NaN where it is ∞
    places: Tensor  # in a table [2, BINS], of pixels that are 1 and of others
    valid: Tensor


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


def _bin_edges(device: torch.device) -> Tensor:
    """float64 [BINS + 1]"""
    places = torch.arange(BINS, dtype=torch.float64, device=device)
    exponents, mantissas = places // 2**MANTISSA, places % 2**MANTISSA
    edges = torch.exp2(exponents + EXPONENTS[0]) * (1 + mantissas / 2**MANTISSA)
    return F.pad(edges, (1, 0))


def _gradients(
    logits: Tensor, labels: Tensor, slopes: Tensor, ignore_index: int, align_corners: bool
) -> Tensor:
    """The gradient of the logits (B, 1, h, w) for the slopes [1, 2, BINS] of the loss in each
    error. The full-resolution logits are computed again."""
    if labels.numel() == 0:
        return torch.zeros_like(logits)
    z = _upsampled(logits, labels, align_corners)
    hinges = _hinges(z, labels, ignore_index)
    dz = (slopes.flatten()[hinges.places] * hinges.slopes)[:, None]
    size, shape = dz.shape[2:], logits.shape
    if dz.shape != shape and dz.device.type != "cpu":  # torch's does not sum in a fixed order there
        rows, near = slice(0, size[0]), slice(0, shape[2])
        dz = transposed_rows(dz, shape, shape[2], size, align_corners, rows, near)
    elif dz.shape != shape:
        aten, volume = torch.ops.aten, dz.dim() == 5
        back = aten.upsample_trilinear3d_backward if volume else aten.upsample_bilinear2d_backward
        dz = back(dz, size, shape, align_corners)
    return torch.empty_like(logits).copy_(dz)


def _upsampled(logits: Tensor, labels: Tensor, align_corners: bool) -> Tensor:
    """(B, 1, H, W), in the statistics' dtype."""
    z = logits.to(statistics_dtype(logits.dtype))
    if labels.numel() == 0:  # F.interpolate takes no empty size
        return z.new_zeros(labels[:, None].shape)
    if z.shape[2:] != labels.shape[1:]:
        mode = "bilinear" if z.dim() == 4 else "trilinear"
        z = F.interpolate(z, labels.shape[1:], mode=mode, align_corners=align_corners)
    return z


def _loss(
    backend: str, logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool
) -> Any:
    hinges = _hinges(_upsampled(logits, labels, align_corners), labels, ignore_index)
    counts = histogram(hinges.places, hinges.valid, 2 * BINS).view(2, -1)
    dtype = statistics_dtype(logits.dtype)
    losses, slopes, _ = results_of(counts[None], _bin_edges(logits.device), dtype)
    not_finite = (0 * hinges.errors).sum()  # NaN if an error is ∞ or NaN, otherwise 0
    return losses.to(dtype) + not_finite, slopes, counts.sum(1)


def _fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    slopes = logits.new_empty((1, 2, BINS), dtype=statistics_dtype(logits.dtype))
    return slopes[:, 0, 0].clone(), slopes, slopes.new_empty(2, dtype=torch.int64)


define(
    "hinge_loss",
    "(Tensor logits, Tensor labels, SymInt ignore_index, bool align_corners) "
    "-> (Tensor losses, Tensor slopes, Tensor counts)",
    _fake,
    backends=("reference",),
    gradient=GRADIENT,
    in_python=_loss,
    any_strides=True,
)
library.impl("hinge_loss_backward.reference", _gradients, "CompositeExplicitAutograd")


def hinge_loss(
    logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """The loss [1] of a channel (B, 1, h, w), NaN if an error is not finite, and its numbers of
    pixels that are 1, and that are 0, int64 [2]."""
    arguments = logits, labels, ignore_index, align_corners
    losses, _, counts = run("hinge_loss", "reference", *arguments)
    return losses, counts
