"""Class statistics as people write them by hand; anchorops is compared with them.

The arguments of an alternative of class statistics are features (B, D, P), keys int64 [B, P] in
[0, num_keys] (num_keys if ignored) and the anchor of each key [num_keys, D] or None. It returns
sums [num_keys, D] and sqdists [num_keys] or None.
"""

from collections.abc import Callable
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from anchorops import reference
from anchorops._moments import ClassMoments
from anchorops._shared.pixels import feature_rows
from anchorops.catalogue.usual import lovasz as lovasz_by_sorting  # noqa: F401

Statistics = tuple[Tensor, Tensor | None]
Alternative = Callable[[Tensor, Tensor, int, Tensor | None], Statistics]


def _rows(features: Tensor) -> Tensor:
    return features.transpose(1, 2).reshape(-1, features.shape[1]).float()


def _squares(rows: Tensor, keys: Tensor, anchors: Tensor) -> Tensor:
    """‖f_p − a_p‖² of every pixel, with gathered anchors."""
    anchors = torch.cat([anchors, anchors.new_zeros(1, anchors.shape[1])])
    return (rows - anchors[keys]).square().sum(1)


def index_add(features: Tensor, keys: Tensor, num_keys: int, anchors: Tensor | None) -> Statistics:
    """Rows by permute, sums by index_add, anchors by gather: the usual formula."""
    rows, keys = _rows(features), keys.flatten()
    sums = rows.new_zeros(num_keys + 1, rows.shape[1]).index_add(0, keys, rows)[:-1]
    if anchors is None:
        return sums, None
    squares = _squares(rows, keys, anchors)
    return sums, squares.new_zeros(num_keys + 1).index_add(0, keys, squares)[:-1]


def _expanded(sums: Tensor, hot: Tensor, squares: Tensor, anchors: Tensor) -> Tensor:
    """Σ‖f‖² − 2·a·Σf + n·‖a‖²: fast, but inaccurate if anchors are far away."""
    counts = hot.sum(0, dtype=torch.float32)
    square_sums = squares @ hot.to(squares.dtype)
    return square_sums - 2 * (sums * anchors).sum(1) + counts * anchors.square().sum(1)


def one_hot_matmul(
    features: Tensor, keys: Tensor, num_keys: int, anchors: Tensor | None
) -> Statistics:
    """One float32 product of the one-hot labels of the whole batch with the rows."""
    rows = _rows(features)
    hot = F.one_hot(keys.flatten(), num_keys + 1)[:, :-1].float()
    sums = hot.T @ rows
    if anchors is None:
        return sums, None
    return sums, _expanded(sums, hot, rows.square().sum(1), anchors)


def one_hot_bmm(
    features: Tensor, keys: Tensor, num_keys: int, anchors: Tensor | None
) -> Statistics:
    """A product for each image, in the features' own dtype and layout: no permute."""
    hot = F.one_hot(keys, num_keys + 1)[..., :-1].to(features.dtype)
    sums = torch.bmm(features, hot).float().sum(0).T
    if anchors is None:
        return sums, None
    squares = features.float().square().sum(1).flatten()
    return sums, _expanded(sums, hot.flatten(0, 1), squares, anchors)


def class_loop(features: Tensor, keys: Tensor, num_keys: int, anchors: Tensor | None) -> Statistics:
    """A mask for each class, as in the released code of SAR and CeCo."""
    rows, keys = _rows(features), keys.flatten()
    members = [rows[keys == k] for k in range(num_keys)]
    sums = torch.stack([rows.sum(0) for rows in members])
    if anchors is None:
        return sums, None
    pairs = zip(members, anchors, strict=True)
    return sums, torch.stack([(rows - anchor).square().sum() for rows, anchor in pairs])


FORMULAS: dict[str, Alternative] = {
    "index_add": index_add,
    "one_hot matmul": one_hot_matmul,
    "one_hot bmm": one_hot_bmm,
    "class loop": class_loop,
}


def class_keys(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """int64 [B, P], num_classes if ignored; labels are resized by F.interpolate."""
    if features.dim() == 2:
        labels = labels[None]
    elif features.dim() == 4:
        labels = F.interpolate(labels[:, None].float(), features.shape[2:], mode="nearest").long()
    labels = labels.flatten(1)
    return torch.where((labels >= 0) & (labels < num_classes), labels, num_classes)


def class_counts(keys: Tensor, num_keys: int) -> Tensor:
    keys = keys.flatten()
    return keys.new_zeros(num_keys + 1).scatter_add(0, keys, torch.ones_like(keys))[:-1]


def class_moments(
    alternative: Alternative,
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    anchors: Tensor | None = None,
    groups: int = 1,
    per_image: bool = False,
    seed: int | Tensor | None = None,
    ignore_index: int = -1,
    with_sums: bool = True,
) -> ClassMoments:
    """`anchorops.class_moments` from an alternative's statistics; random groups are the same."""
    assert not per_image
    keys = class_keys(features, labels, num_classes)
    counts = class_counts(keys, num_classes)
    if groups > 1:
        assert seed is not None
        split = torch.where(keys < num_classes, keys, -1)
        split = reference.split_groups(split, counts, groups, seed)
        keys = torch.where(split >= 0, split, num_classes * groups)
        counts = reference.group_counts(counts, groups)
        anchors = None if anchors is None else anchors.repeat_interleave(groups, 0)
    flat = features.T[None] if features.dim() == 2 else features.flatten(2)
    sums, sqdists = alternative(flat, keys, counts.numel(), anchors)
    shape = counts.shape
    return ClassMoments(
        counts,
        sums.reshape(*shape, features.shape[1]),
        None if sqdists is None else sqdists.view(shape),
    )


def gather_mse(features: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
    """The mean squared distance to anchors gathered for each pixel."""
    keys = class_keys(features, labels, len(anchors))
    valid = (keys < len(anchors)).flatten()
    rows = feature_rows(features).float()
    nearest = torch.cat([anchors, anchors.new_zeros(1, anchors.shape[1])])[keys.flatten()]
    squares = torch.where(valid[:, None], rows - nearest, 0).square()
    return squares.sum() / (features.shape[1] * valid.sum())


def loop_mse(features: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
    """A mask for each class, as in the released code of SAR."""
    keys = class_keys(features, labels, len(anchors)).flatten()
    rows, total = feature_rows(features).float(), 0
    for k, anchor in enumerate(anchors):
        total = total + (rows[keys == k] - anchor).square().sum()
    return total / (features.shape[1] * (keys < len(anchors)).sum())


def statistics_by(alternative: Alternative):
    """Inside this context, every loss uses the class statistics of the alternative."""

    def moments(features: Tensor, labels: Tensor, num_classes: int, **options) -> ClassMoments:
        return class_moments(alternative, features, labels, num_classes, **options)

    return patch("anchorops.losses.statistics.unchecked_moments", moments)
