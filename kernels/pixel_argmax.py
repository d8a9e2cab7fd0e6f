"""The predicted class of every pixel of upsampled logits, computed as in softmax moments."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lanes import INF, filled
from .launch import forward_lanes
from .upsampling import (
    SIZES,
    along_axis,
    class_planes,
    first_larger,
    logits_of_pixels,
    upsampling_of,
)


@triton.jit(do_not_specialize=(*SIZES, "lanes_x", "lanes", "tiles"))
def _pixel_argmax_kernel(
    logits_ptr,  # [B, K, h, w] by strides
    predictions_ptr,  # int64 [B, H, W]
    num_classes,
    height,
    width,
    label_height,
    label_width,
    ratio_y,
    ratio_x,
    inverse_y,
    inverse_x,
    lanes_x,
    lanes,
    tiles,
    stride_logits_b,
    stride_logits_k,
    stride_logits_h,
    stride_logits_w,
    ALIGN_CORNERS: tl.constexpr,
    SAME: tl.constexpr,
    FIRST_Y: tl.constexpr,
    FIRST_X: tl.constexpr,
    PARTS_Y: tl.constexpr,
    PARTS_X: tl.constexpr,
    SLOTS_Y: tl.constexpr,
    SLOTS_X: tl.constexpr,
    SELECT_Y: tl.constexpr,
    SELECT_X: tl.constexpr,
    EVEN_Y: tl.constexpr,
    EVEN_X: tl.constexpr,
    LANES: tl.constexpr,
):
    """Reads the logits from memory once, and from the caches for neighbours; writes 8 bytes a
    pixel."""
    PIXELS: tl.constexpr = SLOTS_Y * SLOTS_X
    image, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    lane = tile * LANES + tl.arange(0, LANES)
    lane_y, lane_x = lane // lanes_x, lane % lanes_x
    cell_y, cell_x = lane_y // PARTS_Y + FIRST_Y, lane_x // PARTS_X + FIRST_X
    start_y, stop_y, weights_y, lower_y, upper_y = along_axis(
        cell_y, lane_y % PARTS_Y, height, label_height, ratio_y, inverse_y, stride_logits_h,
        FIRST_Y, SLOTS_Y, EVEN_Y, ALIGN_CORNERS, SAME,
    )  # fmt: skip
    start_x, stop_x, weights_x, lower_x, upper_x = along_axis(
        cell_x, lane_x % PARTS_X, width, label_width, ratio_x, inverse_x, stride_logits_w,
        FIRST_X, SLOTS_X, EVEN_X, ALIGN_CORNERS, SAME,
    )  # fmt: skip

    best = filled(-INF, LANES, PIXELS, tl.float32)
    predicted = filled(0, LANES, PIXELS, tl.int32)
    ptr = logits_ptr + image * stride_logits_b
    for k in range(num_classes):
        z = logits_of_pixels(
            ptr, lower_y, upper_y, lower_x, upper_x, weights_y, weights_x, SLOTS_Y, SLOTS_X,
            SELECT_Y, SELECT_X, SAME,
        )  # fmt: skip
        new_best, new_predicted = (), ()
        for i in tl.static_range(PIXELS):
            better = first_larger(z[i], best[i])
            new_best = new_best + (tl.where(better, z[i], best[i]),)
            new_predicted = new_predicted + (tl.where(better, k, predicted[i]),)
        best, predicted = new_best, new_predicted
        ptr += stride_logits_k

    for i in tl.static_range(PIXELS):
        y, x = start_y + i // SLOTS_X, start_x + i % SLOTS_X
        at = (image * label_height + y) * label_width + x
        tl.store(predictions_ptr + at, predicted[i].to(tl.int64), mask=(y < stop_y) & (x < stop_x))


def pixel_argmax(logits: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    """logits (B, K, h, w) -> int64 (B, height, width)."""
    predictions = logits.new_empty((logits.shape[0], height, width), dtype=torch.int64)
    if predictions.numel() == 0:
        return predictions
    logits = class_planes(logits)
    upsampling = upsampling_of(logits, height, width, align_corners)
    block = forward_lanes()
    tiles = triton.cdiv(upsampling.lanes, block)
    _pixel_argmax_kernel[(logits.shape[0] * tiles,)](
        logits,
        predictions,
        logits.shape[1],
        *upsampling.arguments,
        upsampling.x.lanes,
        upsampling.lanes,
        tiles,
        *logits.stride(),
        **upsampling.constants,
        LANES=block,
        num_warps=max(block // 32, 1),
    )
    return predictions
