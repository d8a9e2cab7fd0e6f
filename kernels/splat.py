"""The weights of the labels around a tile of features, for upsampling with align_corners=True."""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .class_keys import as_int32
from .upsampling import Axis, coordinate

NO_KEY = tl.constexpr(2**31 - 1)


def most_labels(axis: Axis) -> int:
    """More labels than are around any feature."""
    return min(axis.pixels, math.ceil(2 / axis.ratio) + 5) if axis.ratio else axis.pixels


class RowTile(NamedTuple):
    """A part of a row of features."""

    y: Any
    first: Any  # column
    x: Any  # columns [BLOCK_P]
    inside: Any


class LabelsAround(NamedTuple):
    """Labels around the features of a tile, in one axis: [BLOCK_P, BLOCK_L]."""

    label: Any
    inside: Any  # whether the label is around its feature
    weight: Any


@triton.jit
def tile_at(tile, axes, BLOCK_P: tl.constexpr):
    row_tiles = tl.cdiv(axes.x.source, BLOCK_P)
    y, first = tile // row_tiles, tile % row_tiles * BLOCK_P
    x = first + tl.arange(0, BLOCK_P)
    return RowTile(y, first, x, x < axes.x.source)


@triton.jit
def _upper(label, axis):
    """The first of the two features around a label, and the weight of the second."""
    position = coordinate(label, axis, True)
    upper = tl.minimum(position.to(tl.int32), axis.source - 1)
    return upper, tl.where(upper < axis.source - 1, position - upper.to(tl.float32), 0.0)


@triton.jit
def _weights(label, feature, axis):
    """Whether the label is around the feature, and its weight there."""
    upper, below = _upper(label, axis)
    around = (label < axis.pixels) & ((upper == feature) | (upper == feature - 1))
    return around, tl.where(upper == feature, 1 - below, below)


@triton.jit
def columns_around(tile, axis, BLOCK_L: tl.constexpr):
    first = tl.maximum(((tile.x - 1) * axis.inverse).to(tl.int32) - 1, 0)
    label = first[:, None] + tl.arange(0, BLOCK_L)[None, :]
    around, weights = _weights(label, tile.x[:, None], axis)
    return LabelsAround(label, around & tile.inside[:, None], weights)


@triton.jit
def _label_at(feature, axis):
    """A label near the feature. If there is one label only, axis.inverse may be up to 1."""
    return tl.minimum((feature * axis.inverse).to(tl.int32), axis.pixels - 1)


@triton.jit
def first_key(keys_ptr, tile, axes):
    """The key of a label near the tile's first feature."""
    row = _label_at(tile.y, axes.y).to(tl.int64) * axes.x.pixels
    return as_int32(tl.load(keys_ptr + row + _label_at(tile.first, axes.x)))


@triton.jit
def splat_key(
    keys_ptr,  # [rows, columns] of labels, −1, or 255 in uint8, where ignored
    key,
    first,
    tile,
    columns,  # LabelsAround, from columns_around
    axes,  # YX of Axis
    label_rows,  # more rows of labels than are around any feature
):
    """The sum of the weights of the labels with this key, for each feature of a tile: [BLOCK_P].
    And the next key of the labels around the tile, or NO_KEY: after `first` comes the smallest one,
    after another key the next larger one that is not `first`."""
    after = tl.where(key == first, -1, key)
    total = tl.zeros(tile.x.shape, tl.float32)
    larger = tl.full(columns.weight.shape, NO_KEY, tl.int32)
    first_row = tl.maximum(((tile.y - 1) * axes.y.inverse).to(tl.int32) - 1, 0)
    for i in range(0, label_rows):
        row = first_row + i + tl.arange(0, 1)  # [1], as _weights takes it
        inside, weight = _weights(row, tile.y, axes.y)
        offset = row.to(tl.int64)[:, None] * axes.x.pixels + columns.label
        mask = columns.inside & inside[:, None]
        keys = tl.where(mask, as_int32(tl.load(keys_ptr + offset, mask=mask, other=0)), -1)
        total += weight * tl.sum(tl.where(keys == key, columns.weight, 0.0), 1)
        larger = tl.minimum(larger, tl.where((keys > after) & (keys != first), keys, NO_KEY))
    return total, tl.min(tl.min(larger, 1), 0)
