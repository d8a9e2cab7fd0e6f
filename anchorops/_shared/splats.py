"""The transpose of upsampling with align_corners=True, of keys, in integers."""

from typing import NamedTuple

import torch
from torch import Tensor

from .upsampling import bilinear_sources

SPLAT_UNITS = 2**30  # the integer that represents a weight of 1


class Splat(NamedTuple):
    """The four features around each of N labels, for upsampling with align_corners=True.

    first: [N], the index of the upper left feature of each label in the row of key 0 of a flat
        table [1 + num_keys, H·W], whose first row is that of key −1.
    corners: for each of the four features the offset from the upper left one, and the weights [N]
        in units of 1/SPLAT_UNITS.
    size: (H, W) of the features.
    """

    first: Tensor
    corners: list[tuple[int, Tensor]]
    size: tuple[int, int]


def splat_axis(size: int, source: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each of `size` label rows (or columns): the upper one of the two feature rows around it,
    int64, and the weight of the lower one, float32. If there is no lower row, the weight is 0."""
    upper, lower, weight = bilinear_sources(size, source, True, torch.float32, device)
    return upper, torch.where(upper < lower, weight, 0)


def splat_of(
    rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], size: tuple[int, int]
) -> Splat:
    (row, below), (column, right) = rows, columns
    corners = []
    for down, row_weight in enumerate((1 - below, below)):
        for across, column_weight in enumerate((1 - right, right)):
            weight = (row_weight[:, None] * column_weight * SPLAT_UNITS).round().long()
            corners.append((down * size[1] + across, weight.flatten()))
    first = (row[:, None] + size[0]) * size[1] + column
    return Splat(first.flatten(), corners, size)


def splat_keys(keys: Tensor, num_keys: int, splat: Splat) -> Tensor:
    """W = upᵀ onehot(keys), int64 [num_keys, H·W] in units of 1/SPLAT_UNITS. W has integers, so
    that the order of its sums does not matter. keys: [B, N]; −1 is ignored."""
    cells, width = splat.size[0] * splat.size[1], splat.size[1]
    first = torch.add(splat.first, keys, alpha=cells).flatten()
    # for weights of 0 the index may be beyond the last feature
    table = keys.new_zeros((num_keys + 1) * cells + width + 1, dtype=torch.int64)
    for offset, weight in splat.corners:
        table[offset:].index_add_(0, first, weight.expand_as(keys).flatten())
    return table[cells : (num_keys + 1) * cells].view(num_keys, cells)
