"""Sums of upsampled features over the pixels of each class, at full resolution, for CeCo; and the
mean and variance of each channel, which its batch norm needs.

    sums[k] = Σ_{p: key_p = k} up(f)(p) = Σ_q W[k, q]·f_q    W = upᵀ onehot(keys)
    mean = Σ_q f_q / N    variance = Σ_q (f_q − mean)² / N
    df_q = Σ_k W[k, q]·dsums[k] + (dmean + 2·dvariance·(f_q − mean)) / N

W, which has an entry for each class and each pixel of the features, is never stored. Triton's
kernels compute the weights of a tile of features from the keys of the labels around it. On CPU, in
plain PyTorch, only a part of W exists at a time: some rows, which fit into the cache.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._backend import select
from .._moments import UpsampledSums, statistics_dtype
from .._shared.splats import SPLAT_UNITS, splat_axis, splat_keys, splat_of
from .._torch_state import in_transform
from .class_keys import class_keys
from .registration import Gradient, define, library, run
from .triton_launch import launcher

CACHED = 2**18  # entries of W that fit into a CPU's cache


class Part(NamedTuple):
    """The part of W for some images and some rows of the features: int64 [B, K, H·W] in units of
    1/SPLAT_UNITS."""

    images: slice
    rows: slice
    table: Tensor


def _key_dtype(num_classes: int) -> torch.dtype:
    """The smallest dtype of K classes and −1, which is 255 in uint8."""
    if num_classes < 2**8:
        return torch.uint8
    return torch.int16 if num_classes <= 2**15 else torch.int32


def _keys_of_images(keys: Tensor, num_classes: int, image_keys: int) -> Tensor:
    """int32 [B, H'·W']: image·image_keys + class, −1 where ignored."""
    first = image_keys * torch.arange(len(keys), dtype=torch.int32)[:, None]
    classes = keys.flatten(1).int()
    return torch.where((classes >= 0) & (classes < num_classes), first + classes, -1)


def _parts(keys: Tensor, size: tuple[int, int], num_classes: int) -> Iterator[Part]:
    """All parts on CPU. The last row of a part is also the first row of the next part."""
    (height, width), (batch, label_height, label_width) = size, keys.shape
    images = max(1, CACHED // max(num_classes * height * width, 1))
    step = height if images > 1 else max(1, CACHED // (num_classes * width) - 1)
    starts = range(0, height, step)
    row, below = splat_axis(label_height, height, keys.device)
    edges = [*torch.searchsorted(row, torch.tensor(starts)).tolist(), label_height]
    columns = splat_axis(label_width, width, keys.device)
    for start, (begin, end) in zip(starts, itertools.pairwise(edges), strict=True):
        rows = slice(start, min(start + step + 1, height))
        part_rows = row[begin:end] - start, below[begin:end]
        splat = splat_of(part_rows, columns, (rows.stop - start, width))
        for first in range(0, batch, images):
            some = slice(first, first + images)
            part = _keys_of_images(keys[some, begin:end], num_classes, num_classes)
            table = splat_keys(part, len(part) * num_classes, splat)
            yield Part(some, rows, table.view(len(part), num_classes, -1))


def _forward(
    features: Tensor, keys: Tensor, num_keys: int, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    _, channels, height, width = features.shape
    features = features.to(statistics_dtype(features.dtype))
    sums = features.new_zeros(num_keys // num_classes, num_classes, channels)
    if features.numel() == 0:
        mean, variance = features.new_zeros(2, channels)
        return sums.flatten(0, 1), mean, variance
    mean, variance = torch.batch_norm_update_stats(features, None, None, 0.0)
    if keys.shape[1:] == features.shape[2:]:
        moments = torch.ops.anchorops.class_moments.cpu
        image_keys = num_classes if num_keys > num_classes else 0
        pixel_keys = _keys_of_images(keys, num_classes, image_keys)
        sums, _ = moments(features, pixel_keys, None, num_keys, 1, True)
        return sums, mean, variance
    for part in _parts(keys, (height, width), num_classes):
        pixels = features[part.images, :, part.rows].flatten(2).transpose(1, 2)
        # by selection, because a feature that no valid label uses may be NaN
        pixels = torch.where(part.table.any(1)[..., None], pixels, 0)
        image_sums = part.table.to(features.dtype) @ pixels
        if num_keys > num_classes:
            sums[part.images] += image_sums
        else:
            sums += image_sums.sum(0)
    return sums.flatten(0, 1) / SPLAT_UNITS, mean, variance


def _backward(
    features: Tensor,
    keys: Tensor,
    dsums: Tensor,
    mean: Tensor,
    dmean: Tensor | None,
    dvariance: Tensor | None,
    num_classes: int,
) -> Tensor:
    batch, channels, height, width = features.shape
    if dmean is None or dvariance is None:
        dfeatures = torch.zeros_like(features, dtype=mean.dtype)
    else:
        pixels = max(batch * height * width, 1)
        slope = 2 / pixels * dvariance
        start = dmean / pixels - slope * mean
        dfeatures = torch.empty_like(features, dtype=mean.dtype)
        torch.addcmul(start[:, None, None], slope[:, None, None], features, out=dfeatures)
    if keys.shape[1:] == features.shape[2:]:
        gradient = torch.ops.anchorops.class_moments_backward.cpu
        image_keys = num_classes if len(dsums) > num_classes else 0
        pixel_keys = _keys_of_images(keys, num_classes, image_keys)
        arguments = None, pixel_keys, None, dsums, None, 1
        dfeatures += gradient(*arguments, features.shape, features.stride(), mean.dtype)
    else:
        dsums = dsums.view(-1, num_classes, channels).transpose(1, 2) / SPLAT_UNITS
        dsums = dsums.expand(batch, -1, -1)
        for part in _parts(keys, (height, width), num_classes):
            some = dfeatures[part.images, :, part.rows].view(len(part.table), channels, -1)
            some.baddbmm_(dsums[part.images], part.table.to(dsums.dtype))
    return dfeatures.to(features.dtype)


def _forward_fake(
    features: Tensor, keys: Tensor, num_keys: int, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, channels = statistics_dtype(features.dtype), features.shape[1]
    sizes = (num_keys, channels), (channels,), (channels,)
    sums, mean, variance = (features.new_empty(size, dtype=dtype) for size in sizes)
    return sums, mean, variance


def _setup_context(ctx: Any, inputs: Any, results: Any) -> None:
    features, keys, ctx.num_keys, ctx.num_classes = inputs
    ctx.save_for_backward(features, keys, results.mean)


def _gradient(operator: Any, ctx: Any, grads: Any) -> dict[str, Tensor | None]:
    features, keys, mean = ctx.saved_tensors
    dsums, dmean, dvariance = grads
    dsums = mean.new_zeros(ctx.num_keys, len(mean)) if dsums is None else dsums.contiguous()
    if dmean is not None or dvariance is not None:
        dmean, dvariance = (
            torch.zeros_like(mean) if d is None else d.contiguous() for d in (dmean, dvariance)
        )
    dfeatures = operator(features, keys, dsums, mean, dmean, dvariance, ctx.num_classes)
    return {"features": dfeatures}


# features: (B, C, H, W), dense, contiguous or channels last. keys: the class of each label, uint8,
# int16 or int32 [B, H', W']; −1, or 255 in uint8, where ignored. The sums are those of each class,
# with num_keys = K, or of each class of each image, with num_keys = B·K. Statistics are float32,
# for float64 features float64.
define(
    "upsampled_sums",
    "(Tensor features, Tensor keys, SymInt num_keys, SymInt num_classes) "
    "-> (Tensor sums, Tensor mean, Tensor variance)",
    _forward_fake,
    gradient=Gradient(
        "(Tensor features, Tensor keys, Tensor dsums, Tensor mean, Tensor? dmean, "
        "Tensor? dvariance, SymInt num_classes) -> Tensor",
        _setup_context,
        _gradient,
        triton=launcher("upsampled_sums_backward"),
    ),
    triton=launcher("upsampled_sums"),
)
library.impl("upsampled_sums.cpu", _forward, "CPU")
library.impl("upsampled_sums_backward.cpu", _backward, "CPU")


def upsampled_sums(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    per_image: bool,
    upsample: bool,
    ignore_index: int,
) -> UpsampledSums:
    """Counts and sums of each class, mean and variance of each channel, of checked features
    (B, C, H, W) and labels (B, H', W').

    With `upsample` the features are upsampled to H'×W' with align_corners=True; otherwise the
    labels are resized to H×W by nearest-neighbour interpolation.
    """
    function = "upsampled_sums"
    backend = select(function, features, num_classes)
    if backend == "reference" or in_transform(features):
        options = per_image, upsample, ignore_index
        return reference.upsampled_sums(features, labels, num_classes, *options)
    grid = labels[:, None] if upsample else features
    key_options: dict[str, Any] = {"per_image": per_image, "ignore_index": ignore_index}
    key_options |= {"class_dtype": _key_dtype(num_classes), "backend": backend}
    keys, counts = class_keys(grid, labels, num_classes, **key_options)
    keys = keys.view(features.shape[0], grid.shape[2], grid.shape[3])
    arguments = features, keys, counts.numel(), num_classes
    sums, mean, variance = run("upsampled_sums", backend, *arguments)
    return UpsampledSums(counts, sums.view(*counts.shape, features.shape[1]), mean, variance)
