"""The predicted class of every pixel of upsampled logits, computed as in softmax moments."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lanes import contiguous_map, store_map
from .softmax import largest_logits
from .upsampling import (
    FORWARD_LANES,
    LOGITS,
    SIZES,
    Logits,
    axes_of,
    class_planes,
    corner_ptrs,
    lanes_of_tile,
    logits_of_image,
    rows_of_lane,
    upsampling_of,
)


@triton.jit
def _joined(x):
    """[rows, lanes, 4], from four columns [rows, lanes]."""
    four = tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3]))
    return tl.reshape(four, (x[0].shape[0], x[0].shape[1], 4))


@triton.jit
def _store_rows(pixel_map, values, image, lanes, CELLS: tl.constexpr):
    """store_map for lanes of four columns, of which the first is an even one: neighbouring threads
    store neighbouring pixels."""
    values = [x.to(pixel_map.ptr.dtype.element_ty) for x in values]
    column = tl.expand_dims(lanes.x.start, 2) + tl.arange(0, 4)[None, None, :]
    row = tl.expand_dims(lanes.y.start + rows_of_lane(CELLS), 2)
    inside = (row < tl.expand_dims(lanes.y.stop, 2)) & (column < tl.expand_dims(lanes.x.stop, 2))
    ptrs = pixel_map.ptr + image.to(tl.int64) * pixel_map.stride_b
    ptrs = ptrs + (row.to(tl.int64) * pixel_map.stride_h + column)
    BYTES: tl.constexpr = 2 * ptrs.dtype.element_ty.primitive_bitwidth // 8
    ptrs = tl.max_contiguous(tl.multiple_of(ptrs, (1, 1, BYTES)), (1, 1, 2))
    inside = tl.max_constancy(inside, (1, 1, 2))
    tl.store(ptrs, _joined(values), mask=inside)


@triton.jit(do_not_specialize=(*SIZES, *LOGITS, "tiles"))
def _pixel_argmax_kernel(
    logits_ptr,  # [B, K, h, w]
    logits_b,
    logits_k,
    logits_h,
    logits_w,
    num_classes,
    predictions_ptr,  # integers [B, H, W]
    height,
    width,
    label_height,
    label_width,
    ratios,
    tiles,
    CELLS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Reads the logits from memory once, and from the caches for neighbours; writes the
    predictions."""
    axes = axes_of(height, width, label_height, label_width, ratios, CELLS)
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    logits = Logits(logits_ptr, num_classes, logits_b, logits_k, logits_h, logits_w)
    lanes = lanes_of_tile(tile, axes, logits, CELLS, LANES)
    logits = logits_of_image(logits, image)
    _, classes, _ = largest_logits(logits, corner_ptrs(logits.ptr, lanes, CELLS), lanes, CELLS)
    predictions = contiguous_map(predictions_ptr, axes)
    if CELLS.x.even and CELLS.x.pixels == 4:
        _store_rows(predictions, classes, image, lanes, CELLS)
    else:
        store_map(predictions, classes, image, lanes, CELLS)


def pixel_argmax(
    logits: Tensor, height: int, width: int, align_corners: bool, dtype: torch.dtype
) -> Tensor:
    """logits (B, K, h, w) -> integers (B, height, width)."""
    predictions = logits.new_empty((logits.shape[0], height, width), dtype=dtype)
    if predictions.numel() == 0:
        return predictions
    logits = class_planes(logits)
    upsampling = upsampling_of(logits, height, width, align_corners, maps=())
    block = FORWARD_LANES
    tiles = triton.cdiv(upsampling.lanes, block)
    _pixel_argmax_kernel[(logits.shape[0] * tiles,)](
        logits,
        *logits.stride(),
        logits.shape[1],
        predictions,
        *upsampling.sizes,
        upsampling.ratios,
        tiles,
        CELLS=upsampling.cells,
        LANES=block,
        num_warps=block // 32,
        enable_fp_fusion=False,  # coordinates as in F.interpolate
    )
    return predictions
