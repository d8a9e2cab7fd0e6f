"""Class moments."""

import torch
from torch import Tensor

from .._moments import ClassMoments, statistics_dtype
from .._shared.pixels import feature_rows
from .._shared.sums import sum_by_key
from .class_keys import class_keys
from .split_groups import group_counts, split_groups


def class_moments(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    anchors: Tensor | None = None,
    groups: int = 1,
    per_image: bool = False,
    seed: int | Tensor | None = None,
    ignore_index: int,
) -> ClassMoments:
    """The statistics that `ClassMoments` defines."""
    dtype = statistics_dtype(features.dtype)
    wide = torch.float32 if features.device.type == "mps" else torch.float64  # MPS has no float64
    keys, counts = class_keys(features, labels, num_classes, per_image, ignore_index)
    if groups > 1:
        assert seed is not None
        keys = split_groups(keys, counts, groups, seed)
        counts = group_counts(counts, groups)
    keys, num_keys = keys.flatten(), counts.numel()
    # Ignored pixels are removed by selection, because NaN · 0 would be NaN.
    rows = torch.where(keys[:, None] >= 0, feature_rows(features), 0).to(wide)
    sums = sum_by_key(keys, rows, num_keys).to(dtype).view(*counts.shape, features.shape[1])
    if anchors is None:
        return ClassMoments(counts, sums, None)
    nearest = anchors.to(dtype).to(wide)[keys.clamp(min=0) // groups % num_classes]
    residuals = torch.where(keys[:, None] >= 0, rows - nearest, 0)
    sqdists = sum_by_key(keys, residuals.square().sum(1), num_keys).to(dtype)
    return ClassMoments(counts, sums, sqdists.view(counts.shape))
