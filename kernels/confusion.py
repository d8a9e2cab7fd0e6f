"""Confusion matrix of predictions and labels."""

import triton
import triton.language as tl
from torch import Tensor

from .class_keys import BLOCK_P, add_counts


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def _confusion_kernel(
    predictions_ptr,  # int64 [B, H, W] by strides
    labels_ptr,  # integer [B, H, W] by strides
    counts_ptr,  # int64 [K, K], zero on entry
    pixels,  # B · H · W
    height,
    width,
    num_classes,
    ignore_index,
    stride_predictions_b,
    stride_predictions_h,
    stride_predictions_w,
    stride_labels_b,
    stride_labels_h,
    stride_labels_w,
):
    """Reads each prediction and label once. The counts use integer atomics, two for each pair of
    classes of a tile; their order does not matter."""
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < pixels
    row, x = pixel // width, pixel % width
    b, y = row // height, row % height
    offset = b * stride_predictions_b + y * stride_predictions_h + x * stride_predictions_w
    prediction = tl.load(predictions_ptr + offset, mask=inside, other=-1)
    offset = b * stride_labels_b + y * stride_labels_h + x * stride_labels_w
    label = tl.load(labels_ptr + offset, mask=inside, other=0).to(tl.int64)
    valid = (label >= 0) & (label < num_classes) & (label != ignore_index)
    valid &= (prediction >= 0) & (prediction < num_classes)
    add_counts(counts_ptr, tl.where(valid, label * num_classes + prediction, -1).to(tl.int32))


def confusion(predictions: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """predictions int64 and labels of one shape, up to three axes -> int64 [K, K]."""
    counts = predictions.new_zeros((num_classes, num_classes))
    if labels.numel() == 0:
        return counts
    while labels.dim() < 3:
        predictions, labels = predictions[None], labels[None]
    _confusion_kernel[(triton.cdiv(labels.numel(), BLOCK_P.value),)](
        predictions,
        labels,
        counts,
        labels.numel(),
        *labels.shape[1:],
        num_classes,
        ignore_index,
        *predictions.stride(),
        *labels.stride(),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return counts
