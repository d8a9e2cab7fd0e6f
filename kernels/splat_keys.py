"""W = upᵀ onehot(keys). For each key and feature, W is the sum of the feature's upsampling weights
for the labels with this key."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import without_spills

BLOCK_F = 128


@triton.jit
def _upper(label, step, features):
    """The first of the two features around a label, and the weight of the second."""
    position = label.to(tl.float32) * step
    upper = tl.minimum(position.to(tl.int32), features - 1)
    return upper, tl.where(upper < features - 1, position - upper.to(tl.float32), 0.0)


@triton.jit
def _before(feature, labels_each):
    """The first label around the feature, or one of the three labels before it."""
    return tl.maximum(((feature - 1) * labels_each).to(tl.int32) - 1, 0)


@triton.jit(do_not_specialize=["label_rows", "label_columns"])
def _splat_keys_kernel(
    keys_ptr,  # int32 [B, label_height·label_width], −1 where ignored
    weights_ptr,  # float32 [num_keys, height·width], zero on entry
    label_height,
    label_width,
    height,
    width,
    step_y,  # features for each label
    labels_each_y,  # labels for each feature, or 0 if one of them has size 1
    label_rows,  # more labels than are around any feature
    step_x,
    labels_each_x,
    label_columns,
    BLOCK_F: tl.constexpr,
):
    """Reads the keys of the labels around each feature: once from memory, then from the caches.
    Each element of the result belongs to one thread, which adds to it in the order of the labels.
    The additions are atomic, because a load could otherwise happen before an earlier store."""
    features = height * width
    feature = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = feature < features
    y, x = feature // width, feature % width
    keys_ptr += tl.program_id(1).to(tl.int64) * label_height * label_width
    first_row, first_column = _before(y, labels_each_y), _before(x, labels_each_x)
    held = tl.full((BLOCK_F,), -1, tl.int32)
    total = tl.zeros((BLOCK_F,), tl.float32)
    for i in range(0, label_rows):
        row = first_row + i
        upper, below = _upper(row, step_y, height)
        weight_y = tl.where(upper == y, 1 - below, below)
        around_y = inside & (row < label_height) & ((upper == y) | (upper == y - 1))
        for j in range(0, label_columns):
            column = first_column + j
            left, right = _upper(column, step_x, width)
            weight = weight_y * tl.where(left == x, 1 - right, right)
            around = around_y & (column < label_width) & ((left == x) | (left == x - 1))
            offset = row.to(tl.int64) * label_width + column
            key = tl.load(keys_ptr + offset, mask=around, other=-1)
            changes = around & (key != held)
            weights_ptrs = weights_ptr + held.to(tl.int64) * features + feature
            tl.atomic_add(weights_ptrs, total, mask=changes & (held >= 0), sem="relaxed")
            total = tl.where(changes, 0.0, total) + tl.where(around, weight, 0.0)
            held = tl.where(changes, key, held)
    weights_ptrs = weights_ptr + held.to(tl.int64) * features + feature
    tl.atomic_add(weights_ptrs, total, mask=held >= 0, sem="relaxed")


def _axis(labels: int, features: int) -> tuple[float, float, int]:
    """Features for each label; labels for each feature; more labels than any feature has."""
    step = (features - 1) / (labels - 1) if labels > 1 else 0.0
    return (step, 1 / step, min(labels, math.ceil(2 / step) + 5)) if step else (0.0, 0.0, labels)


def splat_keys(
    keys: Tensor, num_keys: int, label_height: int, label_width: int, height: int, width: int
) -> Tensor:
    """keys int32 [B, label_height·label_width] -> float32 [num_keys, height·width]."""
    weights = keys.new_zeros((num_keys, height * width), dtype=torch.float32)
    if keys.numel() == 0 or weights.numel() == 0:
        return weights
    _splat_keys_kernel[(triton.cdiv(height * width, BLOCK_F), len(keys))](
        *(keys.contiguous(), weights, label_height, label_width, height, width),
        *_axis(label_height, height),
        *_axis(label_width, width),
        BLOCK_F=BLOCK_F,
        num_warps=4,
        enable_fp_fusion=False,  # positions as in the reference
        **without_spills(),
    )
    return weights
