"""The predicted class of every pixel of upsampled logits, computed as in softmax moments."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lanes import INF, repeated, store_map
from .launch import forward_lanes
from .upsampling import (
    SIZES,
    axes_of,
    class_planes,
    lanes_of_tile,
    logits_of,
    logits_of_image,
    logits_of_pixels,
    upsampling_of,
)


@triton.jit
def largest_logits(logits, lanes, CELLS: tl.constexpr, LANES: tl.constexpr):
    """The largest logit of each pixel, and its class: the first, if several are equal. NaN is
    larger than all numbers."""
    PIXELS: tl.constexpr = CELLS.y.slots * CELLS.x.slots
    largest = repeated(tl.full((LANES,), -INF, tl.float32), PIXELS)
    classes = repeated(tl.zeros((LANES,), tl.int32), PIXELS)
    ptr = logits.ptr
    for k in range(logits.num_classes):
        z = logits_of_pixels(ptr, lanes, CELLS)
        new_largest, new_classes = (), ()
        for i in tl.static_range(PIXELS):
            is_number = largest[i] == largest[i]
            larger = (z[i] > largest[i]) | ((z[i] != z[i]) & is_number)
            new_largest = new_largest + (tl.where(larger, z[i], largest[i]),)
            new_classes = new_classes + (tl.where(larger, k, classes[i]),)
        largest, classes = new_largest, new_classes
        ptr += logits.stride_k
    return largest, classes


@triton.jit(do_not_specialize=(*SIZES, "tiles"))
def _pixel_argmax_kernel(
    logits,
    predictions_ptr,  # int64 [B, H, W]
    height,
    width,
    label_height,
    label_width,
    ratios,
    tiles,
    CELLS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Reads the logits from memory once, and from the caches for neighbours; writes 8 bytes a
    pixel."""
    axes = axes_of(height, width, label_height, label_width, ratios, CELLS)
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    lanes = lanes_of_tile(tile, axes, logits, CELLS, LANES)
    _, classes = largest_logits(logits_of_image(logits, image), lanes, CELLS, LANES)
    store_map(predictions_ptr, classes, image, lanes, axes, CELLS)


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
        logits_of(logits),
        predictions,
        *upsampling.sizes,
        upsampling.ratios,
        tiles,
        CELLS=upsampling.cells,
        LANES=block,
        num_warps=max(block // 32, 1),
        enable_fp_fusion=False,  # coordinates as in F.interpolate
    )
    return predictions
