"""Histograms of the errors of softmax probabilities. In chunks of the rows of full resolution, so
that the memory does not depend on the number of pixels. Errors have no derivative here: the
gradient of a loss with given slopes is a function of its own."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .._moments import statistics_dtype
from .._shared.sums import histogram
from .._shared.upsampling import rows_near, transposed_rows, upsample_rows

CHUNK = 2**21  # probabilities at a time


def probability_histograms(
    logits: Tensor, labels: Tensor, bins: int, ignore_index: int, align_corners: bool
) -> Tensor:
    """logits (B, K, h, w) or (B, K, d, h, w), labels (B, H, W) or (B, D, H, W) -> int64
    [K, 2, bins]: how many pixels of each class, and how many others, have an error in
    [i/bins, (i + 1)/bins). The error is 1 − p_k of the pixels of class k, and p_k of others."""
    num_classes = logits.shape[1]
    counts = labels.new_zeros(num_classes * 2 * bins, dtype=torch.int64)
    size, source = labels.shape[1:], logits.shape[2]
    for rows, near in _chunks(logits, labels):
        x = logits.detach()[:, :, near]
        p = upsample_rows(x, source, size, align_corners, rows, near).softmax(1)
        index, _, valid = _places(p, labels[:, rows], bins, ignore_index)
        counts = counts + histogram(index, valid[:, None], len(counts))  # vmap needs a new tensor
    return counts.view(num_classes, 2, bins)


def error_gradients(
    logits: Tensor, labels: Tensor, slopes: Tensor, ignore_index: int, align_corners: bool
) -> Tensor:
    """The gradient of the logits for the slopes [K, 2, bins] of the loss in each error:
    dz_k = p_k·(u_k − Σ_j p_j·u_j), with u_k the slope, with a minus for the pixel's class."""
    dlogits = torch.zeros_like(logits, dtype=statistics_dtype(logits.dtype))
    size, source = labels.shape[1:], logits.shape[2]
    for rows, near in _chunks(logits, labels):
        x = logits.detach()[:, :, near].to(dlogits.dtype)
        z = upsample_rows(x, source, size, align_corners, rows, near)
        p = z.softmax(1)
        index, sign, valid = _places(p, labels[:, rows], slopes.shape[2], ignore_index)
        u = sign * slopes.to(p.dtype).flatten()[index]
        dz = torch.where(valid[:, None], p * (u - (p * u).sum(1, keepdim=True)), 0)
        dlogits[:, :, near] += transposed_rows(dz, x.shape, source, size, align_corners, rows, near)
    return dlogits.to(logits.dtype)


def _chunks(logits: Tensor, labels: Tensor) -> Iterator[tuple[slice, slice]]:
    """Ranges along the first axis of the labels, each with that of the logits which they read."""
    row_probabilities, size = logits.shape[1] * labels[:, :1].numel(), labels.shape[1]
    step = max(1, CHUNK // max(row_probabilities, 1))
    for first in range(0, size, step) if labels.numel() > 0 else ():
        rows = slice(first, min(first + step, size))
        yield rows, rows_near(rows, size, logits.shape[2])


def _places(
    p: Tensor, labels: Tensor, bins: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For each class and pixel its place in [K, 2, bins], and −1 for the pixel's class, otherwise
    1; for each pixel whether it is valid. NaN is an error of 1 for the pixel's class, of 0 for
    others."""
    classes = torch.arange(p.shape[1], device=p.device).view(-1, *[1] * (p.dim() - 2))
    labels = labels.long()
    valid = (labels >= 0) & (labels < p.shape[1]) & (labels != ignore_index)
    is_class = labels[:, None] == classes
    errors = torch.where(is_class, (1 - p).nan_to_num(nan=1.0), p.nan_to_num(nan=0.0))
    bin_index = (errors * bins).long().clamp(0, bins - 1)
    return (2 * classes + ~is_class) * bins + bin_index, torch.where(is_class, -1, 1), valid
