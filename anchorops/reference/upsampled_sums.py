"""Sums of upsampled features over the pixels of each class, for CeCo."""

import torch
from torch import Tensor

from .._moments import UpsampledSums, statistics_dtype
from .._shared.splats import SPLAT_UNITS, splat_axis, splat_keys, splat_of
from .class_keys import class_keys


def upsampled_sums(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    per_image: bool,
    upsample: bool,
    ignore_index: int,
) -> UpsampledSums:
    """n_k and s_k = Σ_{p∈k} up(f)(p) = Σ_q W[k, q]·f_q, where `up` upsamples to full resolution,
    or is the identity without `upsample`: then the labels are resized to the features."""
    size, dtype = (features.shape[2], features.shape[3]), statistics_dtype(features.dtype)
    grid = labels[:, None] if upsample else features
    label_size = (grid.shape[2], grid.shape[3])
    rows, columns = (splat_axis(label_size[i], size[i], labels.device) for i in (0, 1))
    keys, counts = class_keys(grid, labels, num_classes, True, ignore_index)
    table = splat_keys(keys, counts.numel(), splat_of(rows, columns, size))
    weights = (table.to(dtype) / SPLAT_UNITS).view(*counts.shape, size[0] * size[1])
    wide = features.to(dtype)
    # Features that no valid label uses are removed by selection, because NaN · 0 would be NaN.
    used = torch.where((weights != 0).any(1, keepdim=True), wide.flatten(2), 0)
    sums = (used @ weights.transpose(1, 2)).transpose(1, 2)
    variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    if not per_image:
        counts, sums = counts.sum(0), sums.sum(0)
    return UpsampledSums(counts, sums, mean, variance)
