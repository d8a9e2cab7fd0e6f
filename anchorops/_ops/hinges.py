"""Histograms of the hinges of sigmoids, and the gradient of losses that are functions of them, for
one channel: as probability_histograms.py for softmax.

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


def hinge_histograms(
    logits: Tensor, labels: Tensor, *, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """A scalar, 0 if all errors are finite, otherwise NaN; and int64 [2, BINS]: how many pixels
    that are 1, and how many others, have an error in each bin. logits: (B, 1, h, w)."""
    arguments = logits.detach(), labels, ignore_index, align_corners
    return run("hinge_histograms", "reference", *arguments)


def bin_edges(device: torch.device) -> Tensor:
    """float64 [BINS + 1]"""
    places = torch.arange(BINS, dtype=torch.float64, device=device)
    exponents, mantissas = places // 2**MANTISSA, places % 2**MANTISSA
    edges = torch.exp2(exponents + EXPONENTS[0]) * (1 + mantissas / 2**MANTISSA)
    return F.pad(edges, (1, 0))


def hinge_gradients(
    logits: Tensor, labels: Tensor, slopes: Tensor, ignore_index: int, align_corners: bool
) -> Tensor:
    """The gradient of the logits (B, 1, h, w) for the slopes [2, BINS] of the loss in each error.
    The full-resolution logits are computed again."""
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


def _histograms(
    logits: Tensor, labels: Tensor, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    hinges = _hinges(_upsampled(logits, labels, align_corners), labels, ignore_index)
    counts = histogram(hinges.places, hinges.valid, 2 * BINS)
    return (0 * hinges.errors).sum(), counts.view(2, -1)


def _histograms_fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(logits.dtype)
    return logits.new_empty((), dtype=dtype), logits.new_empty((2, BINS), dtype=torch.int64)


# An operator, although it is plain PyTorch: as the backward pass, it must not be compiled, because
# a compiled interpolate may round differently, and put a pixel in another bin.
define(
    "hinge_histograms",
    "(Tensor logits, Tensor labels, SymInt ignore_index, bool align_corners) -> (Tensor, Tensor)",
    _histograms_fake,
    backends=("reference",),
)
library.impl("hinge_histograms.reference", _histograms, "CompositeExplicitAutograd")
