"""Sums of upsampled features over the pixels of each class, at the labels' size, for CeCo.

Bilinear upsampling (align_corners=True) is linear: Σ_{p∈k} up(f)(p) = Σ_q W[k, q]·f_q with
W = upᵀ onehot(labels). The upsampled features are never stored. W has an entry for each class and
each pixel of the features; only a part of it exists at a time. The backward pass computes the parts
again from the labels.

On GPUs, a part is W of some images, computed by the operator `splat_keys`. On CPU, a part is some
rows of W, which fit into the cache, computed by the reference. The rest is plain PyTorch. It is an
operator to save memory, and because torch.compile would unroll the loop over the parts.
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
from .splat_keys import BACKENDS as GPU_BACKENDS
from .splat_keys import splat_keys

CACHED = 2**18  # entries of W that fit into a CPU's cache
FEWEST_PARTS = 2  # on a GPU: W of some images has at most the features' entries divided by this


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
    labels: Tensor, size: tuple[int, int], num_classes: int, ignore_index: int
) -> Iterator[Part]:
    """All parts on CPU. The last row of a part is also the first row of the next part."""
    (height, width), (batch, label_height, label_width) = size, labels.shape
    images = max(1, CACHED // (num_classes * height * width))
    step = height if images > 1 else max(1, CACHED // (num_classes * width) - 1)
    starts = range(0, height, step)
    row, below = reference.splat_axis(label_height, height, labels.device)
    edges = [*torch.searchsorted(row, torch.tensor(starts)).tolist(), label_height]
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
                backend="cpu",
            )
            table = reference.splat_keys(keys, counts.numel(), splat)
            yield Part(some, rows, table.view(*counts.shape, -1), counts)


def _keys(
    labels: Tensor, num_classes: int, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor]:
    """image·K + class of each label, int32 [B, H'·W'], and the counts [B, K]."""
    return class_keys(
        labels[:, None],
        labels,
        num_classes,
        per_image=True,
        ignore_index=ignore_index,
        backend=backend,
    )


def _weights(
    keys: Tensor,
    label_size: tuple[int, int],
    size: tuple[int, int],
    num_classes: int,
    channels: int,
    backend: str,
) -> Iterator[tuple[slice, Tensor]]:
    """All parts on a GPU: some images, and their W, float32 [images, K, H·W]."""
    images = max(1, int(len(keys) * channels / FEWEST_PARTS / num_classes))
    for first in range(0, len(keys), images):
        some = slice(first, first + images)
        part = keys[some] - first * num_classes if first else keys[some]
        weights = splat_keys(part, len(part) * num_classes, label_size, size, backend)
        yield some, weights.view(len(part), num_classes, -1)


def _gpu_forward(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = features.shape
    keys, counts = _keys(labels, num_classes, ignore_index, backend)
    pixels = features.flatten(2).transpose(1, 2)
    sums = features.new_empty(batch, num_classes, channels)
    sizes = (labels.shape[1], labels.shape[2]), (height, width)
    for some, weights in _weights(keys, *sizes, num_classes, channels, backend):
        torch.bmm(weights, pixels[some], out=sums[some])
    return sums, counts


def _gpu_backward(
    dsums: Tensor,
    labels: Tensor,
    height: int,
    width: int,
    channels_last: bool,
    ignore_index: int,
    backend: str,
) -> Tensor:
    num_classes, channels = dsums.shape[1:]
    keys, _ = _keys(labels, num_classes, ignore_index, backend)
    dfeatures = _backward_fake(dsums, labels, height, width, channels_last)
    pixels = dfeatures.view(len(keys), channels, -1)
    sizes = (labels.shape[1], labels.shape[2]), (height, width)
    for some, weights in _weights(keys, *sizes, num_classes, channels, backend):
        torch.bmm(dsums[some].transpose(1, 2), weights, out=pixels[some])
    return dfeatures


def _forward(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor]:
    if backend in GPU_BACKENDS:
        return _gpu_forward(features, labels, num_classes, ignore_index, backend)
    batch, channels, height, width = features.shape
    sums = features.new_zeros(batch, num_classes, channels)
    counts = labels.new_zeros(batch, num_classes, dtype=torch.int64)
    for part in _parts(labels, (height, width), num_classes, ignore_index):
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
    if backend in GPU_BACKENDS:
        return _gpu_backward(dsums, labels, height, width, channels_last, ignore_index, backend)
    num_classes, channels = dsums.shape[1:]
    dfeatures = _backward_fake(dsums, labels, height, width, channels_last).zero_()
    dsums = dsums.transpose(1, 2) / SPLAT_UNITS
    for part in _parts(labels, (height, width), num_classes, ignore_index):
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
