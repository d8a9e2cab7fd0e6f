"""Sums of upsampled features over the pixels of each class, at the labels' size, for CeCo.

Bilinear upsampling (align_corners=True) is linear: Σ_{p∈k} up(f)(p) = Σ_q W[k, q]·f_q with
W = upᵀ onehot(labels). The upsampled features are never stored. W has an entry for each class and
each pixel of the features; only a part of it exists at a time. The backward pass computes the parts
again from the labels.

The code is plain PyTorch on every device. It is an operator to save memory, and because
torch.compile would unroll the loop over the parts.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._backend import select
from .._checks import check_derivatives, in_transform
from ..reference import SPLAT_UNITS, ClassMoments
from .class_keys import class_keys
from .registration import Gradient, define, library

CACHED = 2**18  # entries of W that fit into a CPU's cache


class Part(NamedTuple):
    """The part of W for some images and some rows of the features.

    table: int64 [B, K, H·W] in units of 1/SPLAT_UNITS. counts: [B, K], the pixels of its labels;
    each label belongs to one part.
    """

    images: slice
    rows: slice
    table: Tensor
    counts: Tensor


def _parts(
    labels: Tensor,
    size: tuple[int, int],
    num_classes: int,
    channels: int,
    ignore_index: int,
    backend: str,
) -> Iterator[Part]:
    """All parts. The last row of a part is also the first row of the next part."""
    (height, width), (batch, label_height, label_width) = size, labels.shape
    entries = CACHED
    if labels.is_cuda:  # few launches, and a quarter of the features' memory
        entries = max(entries, batch * channels * height * width // 12)
    images = max(1, entries // (num_classes * height * width))
    step = height if images > 1 else max(1, entries // (num_classes * width) - 1)
    starts = range(0, height, step)
    # on the host, because reading the result from the device would synchronise
    upper, _ = reference.splat_axis(label_height, height, torch.device("cpu"))
    edges = [*torch.searchsorted(upper, torch.tensor(starts)).tolist(), label_height]
    row, below = reference.splat_axis(label_height, height, labels.device)
    columns = reference.splat_axis(label_width, width, labels.device)
    for start, (begin, end) in zip(starts, itertools.pairwise(edges), strict=True):
        rows = slice(start, min(start + step + 1, height))
        own = row[begin:end] - start, below[begin:end]
        splat = reference.splat_of(own, columns, (rows.stop - start, width))
        for first in range(0, batch, images):
            some = slice(first, first + images)
            part = labels[some, begin:end]
            keys, counts = class_keys(
                part[:, None],
                part,
                num_classes,
                per_image=True,
                ignore_index=ignore_index,
                backend=backend,
            )
            table = reference.splat_keys(keys, counts.numel(), splat)
            yield Part(some, rows, table.view(*counts.shape, -1), counts)


def _forward(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = features.shape
    sums = features.new_zeros(batch, num_classes, channels)
    counts = labels.new_zeros(batch, num_classes, dtype=torch.int64)
    for part in _parts(labels, (height, width), num_classes, channels, ignore_index, backend):
        pixels = features[part.images, :, part.rows].flatten(2).transpose(1, 2)
        sums[part.images].baddbmm_(part.table.to(features.dtype), pixels)
        counts[part.images] += part.counts
    return sums / SPLAT_UNITS, counts


def _backward(
    dsums: Tensor,
    labels: Tensor,
    height: int,
    width: int,
    channels_last: bool,
    ignore_index: int,
    backend: str,
) -> Tensor:
    num_classes, channels = dsums.shape[1:]
    dfeatures = _backward_fake(dsums, labels, height, width, channels_last).zero_()
    dsums = dsums.transpose(1, 2) / SPLAT_UNITS
    for part in _parts(labels, (height, width), num_classes, channels, ignore_index, backend):
        images = len(part.table)
        pixels = dfeatures[part.images, :, part.rows].view(images, channels, -1)
        pixels.baddbmm_(dsums[part.images], part.table.to(dsums.dtype))
    return dfeatures


def _forward_fake(
    features: Tensor, labels: Tensor, num_classes: int, *_: Any
) -> tuple[Tensor, Tensor]:
    shape = (features.shape[0], num_classes)
    counts = labels.new_empty(shape, dtype=torch.int64)
    return features.new_empty((*shape, features.shape[1])), counts


def _backward_fake(
    dsums: Tensor, labels: Tensor, height: int, width: int, channels_last: bool, *_: Any
) -> Tensor:
    shape = (dsums.shape[0], dsums.shape[2], height, width)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dsums.dtype, device=dsums.device, memory_format=layout)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, labels, _, *ctx.options = inputs
    ctx.save_for_backward(labels)
    ctx.size = features.shape[2:]
    last = features.is_contiguous(memory_format=torch.channels_last)
    ctx.channels_last = last and not features.is_contiguous()


def _gradient(operator: Any, ctx: Any, dsums: Tensor | None, dcounts: None) -> tuple[Any, ...]:
    dfeatures = None
    if dsums is not None:
        (labels,) = ctx.saved_tensors
        dfeatures = operator(dsums, labels, *ctx.size, ctx.channels_last, *ctx.options)
    return dfeatures, None, None, None, None


define(
    "upsampled_sums",
    "(Tensor features, Tensor labels, SymInt num_classes, int ignore_index, str backend) "
    "-> (Tensor sums, Tensor counts)",
    _forward_fake,
    backends=("torch",),
    gradient=Gradient(
        "(Tensor dsums, Tensor labels, SymInt height, SymInt width, bool channels_last, "
        "int ignore_index, str backend) -> Tensor",
        _backward_fake,
        _setup_context,
        _gradient,
    ),
)
library.impl("upsampled_sums.torch", _forward, "CompositeExplicitAutograd")
library.impl("upsampled_sums_backward.torch", _backward, "CompositeExplicitAutograd")


def upsampled_sums(
    features: Tensor, labels: Tensor, num_classes: int, *, ignore_index: int
) -> ClassMoments:
    """counts [B, K] and sums [B, K, C] of features (B, C, H, W), float32 or float64, upsampled with
    align_corners=True to the labels (B, H', W'). The arguments must already be checked."""
    function = "upsampled_sums"
    backend = select(function, features, num_classes)
    if backend == "reference" or in_transform(features):
        return reference.upsampled_sums(features, labels, num_classes, ignore_index=ignore_index)
    check_derivatives(function, features)
    operator = torch.ops.anchorops.upsampled_sums.torch
    sums, counts = operator(features, labels, num_classes, ignore_index, backend)
    return ClassMoments(counts, sums, None)
