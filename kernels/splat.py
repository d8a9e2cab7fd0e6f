"""The weights of the labels around a tile of features, for upsampling with align_corners=True."""

import math

import triton
import triton.language as tl

NO_KEY = tl.constexpr(2**31 - 1)


@triton.jit
def _upper(label, step, features):
    """The first of the two features around a label, and the weight of the second."""
    position = label.to(tl.float32) * step
    upper = tl.minimum(position.to(tl.int32), features - 1)
    return upper, tl.where(upper < features - 1, position - upper.to(tl.float32), 0.0)


@triton.jit
def _weights(label, feature, labels, features, step):
    """Whether the label is around the feature, and its weight there."""
    upper, below = _upper(label, step, features)
    around = (label < labels) & ((upper == feature) | (upper == feature - 1))
    return around, tl.where(upper == feature, 1 - below, below)


@triton.jit
def labels_around(feature, labels, features, step, labels_each, BLOCK_L: tl.constexpr):
    """The labels around the features of a tile, in one axis: [BLOCK_P, BLOCK_L]. Their weights, and
    whether a label is around its feature."""
    first = tl.maximum(((feature - 1) * labels_each).to(tl.int32) - 1, 0)
    label = first[:, None] + tl.arange(0, BLOCK_L)[None, :]
    around, weights = _weights(label, feature[:, None], labels, features, step)
    return label, around, weights


@triton.jit
def as_int32(keys):
    """−1 where ignored."""
    wide = keys.to(tl.int32)
    return tl.where(wide == 255, -1, wide) if keys.dtype == tl.uint8 else wide


@triton.jit
def splat_key(
    keys_ptr,  # [label_height, label_width], −1, or 255 in uint8, where ignored
    key,
    first,
    y,
    columns,  # [BLOCK_P, BLOCK_L], as from labels_around
    around,
    weights,
    label_height,
    label_width,
    height,
    step,
    labels_each,
    label_rows,  # more rows of labels than are around any feature
):
    """The sum of the weights of the labels with this key, for each feature of a tile in row y:
    [BLOCK_P]. And the next key of the labels around the tile, or NO_KEY: after `first` comes the
    smallest one, after another key the next larger one that is not `first`."""
    after = tl.where(key == first, -1, key)
    total = tl.zeros((weights.shape[0],), tl.float32)
    larger = tl.full(weights.shape, NO_KEY, tl.int32)
    first_row = tl.maximum(((y - 1) * labels_each).to(tl.int32) - 1, 0)
    for i in range(0, label_rows):
        row = first_row + i + tl.arange(0, 1)  # not a scalar, which no mask in the interpreter is
        inside, weight = _weights(row, y, label_height, height, step)
        offset = row.to(tl.int64)[:, None] * label_width + columns
        mask = around & inside[:, None]
        keys = tl.where(mask, as_int32(tl.load(keys_ptr + offset, mask=mask, other=0)), -1)
        total += weight * tl.sum(tl.where(keys == key, weights, 0.0), 1)
        larger = tl.minimum(larger, tl.where((keys > after) & (keys != first), keys, NO_KEY))
    return total, tl.min(tl.min(larger, 1), 0)


def axis(labels: int, features: int) -> tuple[float, float, int]:
    """Features for each label; labels for each feature; more labels than any feature has."""
    step = (features - 1) / (labels - 1) if labels > 1 else 0.0
    return (step, 1 / step, min(labels, math.ceil(2 / step) + 5)) if step else (0.0, 0.0, labels)
