"""The gradient of softmax moments.

    dz_k = p_k·(d + dlse − t + dmasses[k] + 2·p_k·dsquares[k]) + [y = k]·(p_k·doverlaps[k] − d)
    d = dlosses[y] + dpixel_losses,   t = Σ_j p_j·u_j,   0 where ignored

A lane (upsampling.py) computes dz of its pixels, one class after the other, and sums it with the
weights of the cell's four logits. A program processes a tile of cells, and one more row above it
and column at its left, so that it can gather a logit's gradient from its four cells. If cells have
more than MOST_PARTS parts along an axis, a program processes one block of parts; then the gradients
of the blocks are summed.
"""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lanes import LOG2_E, NO_CLASS, filled, load_labels, load_map, next_label
from .launch import MOST_PARTS, backward_lanes, registers
from .upsampling import (
    SIZES,
    along_axis,
    class_planes,
    classes_contiguous,
    logits_of_pixels,
    upsampling_of,
)


@triton.jit
def number(ptr, k, stride):
    """The number of class k; 0 if the pointer is None."""
    if ptr is None:
        return 0.0
    else:
        return tl.load(ptr + tl.cast(k, tl.int64) * stride)


@triton.jit
def divide(lower, upper, dz, weight, SELECT: tl.constexpr):
    """Add a gradient to those of the lower and the upper neighbour."""
    if SELECT:  # 0 · NaN would be NaN
        upper = tl.where(weight == 0, upper, tl.fma(weight, dz, upper))
    else:
        upper = tl.fma(weight, dz, upper)
    return tl.fma(1 - weight, dz, lower), upper


@triton.jit
def at_edges(lower, upper, cell, source):
    """In cells before the first logit and beyond the last one, both neighbours are the same logit,
    which gets both gradients."""
    first, last = cell < 0, cell == source - 1
    return tl.where(last, lower + upper, lower), tl.where(first, lower + upper, upper)


@triton.jit
def of_cells(
    x, CELLS_Y: tl.constexpr, BLOCK_Y: tl.constexpr, CELLS_X: tl.constexpr, BLOCK_X: tl.constexpr
):
    """Sums over the parts of each cell."""
    x = tl.reshape(x, (CELLS_Y, BLOCK_Y, CELLS_X, BLOCK_X))
    return tl.sum(tl.sum(x, 3), 1)


@triton.jit(do_not_specialize=(*SIZES, "tiles_y", "tiles_x"))
def _softmax_moments_bwd_kernel(
    logits_ptr,  # [B, K, h, w] by strides
    labels_ptr,  # integer [B, H, W] by strides
    lse_ptr,  # float32 [B, H, W] by strides
    dlosses_ptr,  # float32 [K] or [B, K] by strides; also the next three
    doverlaps_ptr,
    dmasses_ptr,
    dsquares_ptr,
    dpixel_losses_ptr,  # float32 [B, H, W] by strides
    dlse_ptr,  # the same
    dlogits_ptr,  # [blocks, B, K, h, w] by strides
    num_classes,
    height,
    width,
    label_height,
    label_width,
    ratio_y,
    ratio_x,
    inverse_y,
    inverse_x,
    tiles_y,
    tiles_x,
    ignore_index,
    stride_logits_b,
    stride_logits_k,
    stride_logits_h,
    stride_logits_w,
    stride_labels_b,
    stride_labels_h,
    stride_labels_w,
    stride_lse_b,
    stride_lse_h,
    stride_lse_w,
    stride_dlosses_b,
    stride_dlosses_k,
    stride_doverlaps_b,
    stride_doverlaps_k,
    stride_dmasses_b,
    stride_dmasses_k,
    stride_dsquares_b,
    stride_dsquares_k,
    stride_dpixel_losses_b,
    stride_dpixel_losses_h,
    stride_dpixel_losses_w,
    stride_dlse_b,
    stride_dlse_h,
    stride_dlse_w,
    stride_dlogits_block,
    stride_dlogits_b,
    stride_dlogits_k,
    stride_dlogits_h,
    stride_dlogits_w,
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
    BLOCKS_Y: tl.constexpr,
    BLOCKS_X: tl.constexpr,
    LANES_Y: tl.constexpr,
    LANES_X: tl.constexpr,
):
    """Reads the logits of a tile and its edge from memory once, and from the caches for each loop
    over the classes and for neighbours. Reads labels, lse and maps once, except at the edge. Writes
    dlogits once."""
    PIXELS: tl.constexpr = SLOTS_Y * SLOTS_X
    BLOCK_Y: tl.constexpr = PARTS_Y // BLOCKS_Y
    BLOCK_X: tl.constexpr = PARTS_X // BLOCKS_X
    CELLS_Y: tl.constexpr = LANES_Y // BLOCK_Y
    CELLS_X: tl.constexpr = LANES_X // BLOCK_X
    EDGE: tl.constexpr = 1 - SAME
    pid = tl.program_id(0) // (BLOCKS_Y * BLOCKS_X)
    block = tl.program_id(0) % (BLOCKS_Y * BLOCKS_X)
    image = (pid // (tiles_y * tiles_x)).to(tl.int64)
    # the first row and column of logits whose gradient the tile writes
    row = pid // tiles_x % tiles_y * (CELLS_Y - EDGE)
    column = pid % tiles_x * (CELLS_X - EDGE)
    logits_ptr += image * stride_logits_b

    lane = tl.arange(0, LANES_Y * LANES_X)
    lane_y, lane_x = lane // LANES_X, lane % LANES_X
    cell_y, cell_x = row - EDGE + lane_y // BLOCK_Y, column - EDGE + lane_x // BLOCK_X
    part_y = block // BLOCKS_X * BLOCK_Y + lane_y % BLOCK_Y
    part_x = block % BLOCKS_X * BLOCK_X + lane_x % BLOCK_X
    start_y, stop_y, weights_y, lower_y, upper_y = along_axis(
        cell_y, part_y, height, label_height, ratio_y, inverse_y, stride_logits_h,
        FIRST_Y, SLOTS_Y, EVEN_Y, ALIGN_CORNERS, SAME,
    )  # fmt: skip
    start_x, stop_x, weights_x, lower_x, upper_x = along_axis(
        cell_x, part_x, width, label_width, ratio_x, inverse_x, stride_logits_w,
        FIRST_X, SLOTS_X, EVEN_X, ALIGN_CORNERS, SAME,
    )  # fmt: skip
    labels = load_labels(
        labels_ptr + image * stride_labels_b, start_y, stop_y, start_x, stop_x, stride_labels_h,
        stride_labels_w, num_classes, ignore_index, SLOTS_Y, SLOTS_X,
    )  # fmt: skip
    lse = load_map(
        lse_ptr + image * stride_lse_b, labels, start_y, start_x, stride_lse_h, stride_lse_w,
        SLOTS_Y, SLOTS_X,
    )  # fmt: skip

    # per pixel: common = d + dlse − t
    own_gradients = filled(0.0, LANES_Y * LANES_X, PIXELS, tl.float32)
    if dpixel_losses_ptr is not None:
        own_gradients = load_map(
            dpixel_losses_ptr + image * stride_dpixel_losses_b, labels, start_y, start_x,
            stride_dpixel_losses_h, stride_dpixel_losses_w, SLOTS_Y, SLOTS_X,
        )  # fmt: skip
    common = own_gradients
    if dlosses_ptr is not None:
        dlosses_ptr += image * stride_dlosses_b
    if doverlaps_ptr is not None:
        doverlaps_ptr += image * stride_doverlaps_b
        label = next_label(labels, -1, PIXELS)
        while label < NO_CLASS:
            z = logits_of_pixels(
                logits_ptr + label.to(tl.int64) * stride_logits_k, lower_y, upper_y, lower_x,
                upper_x, weights_y, weights_x, SLOTS_Y, SLOTS_X, SELECT_Y, SELECT_X, SAME,
            )  # fmt: skip
            dloss = number(dlosses_ptr, label, stride_dlosses_k)
            doverlap = number(doverlaps_ptr, label, stride_doverlaps_k)
            added = ()
            for i in tl.static_range(PIXELS):
                p = tl.exp2((z[i] - lse[i]) * LOG2_E)
                new = tl.fma(-p, doverlap, common[i] + dloss)
                added = added + (tl.where(labels[i] == label, new, common[i]),)
            common = added
            label = next_label(labels, label, PIXELS)
    elif dlosses_ptr is not None:
        added = ()
        for i in tl.static_range(PIXELS):
            at = labels[i].to(tl.int64) * stride_dlosses_k
            d = tl.load(dlosses_ptr + at, mask=labels[i] >= 0, other=0.0)
            added = added + (common[i] + d,)
        common = added
    if dlse_ptr is not None:
        dlse = load_map(
            dlse_ptr + image * stride_dlse_b, labels, start_y, start_x, stride_dlse_h,
            stride_dlse_w, SLOTS_Y, SLOTS_X,
        )  # fmt: skip
        added = ()
        for i in tl.static_range(PIXELS):
            added = added + (common[i] + dlse[i],)
        common = added
    if dmasses_ptr is not None:
        dmasses_ptr += image * stride_dmasses_b
    if dsquares_ptr is not None:
        dsquares_ptr += image * stride_dsquares_b
    if dmasses_ptr is not None or dsquares_ptr is not None:
        ptr = logits_ptr
        for k in range(num_classes):
            z = logits_of_pixels(
                ptr, lower_y, upper_y, lower_x, upper_x, weights_y, weights_x, SLOTS_Y, SLOTS_X,
                SELECT_Y, SELECT_X, SAME,
            )  # fmt: skip
            dmass = number(dmasses_ptr, k, stride_dmasses_k)
            dsquare = 2 * number(dsquares_ptr, k, stride_dsquares_k)
            added = ()
            for i in tl.static_range(PIXELS):
                p = tl.exp2((z[i] - lse[i]) * LOG2_E)
                added = added + (tl.fma(-p, tl.fma(p, dsquare, dmass), common[i]),)
            common = added
            ptr += stride_logits_k

    cell = tl.arange(0, CELLS_Y)[:, None]
    y, x = row - EDGE + cell, column - EDGE + tl.arange(0, CELLS_X)[None, :]
    written = (y >= row) & (y < height) & (x >= column) & (x < width)
    dlogits_ptr += block.to(tl.int64) * stride_dlogits_block + image * stride_dlogits_b
    dlogits_ptrs = dlogits_ptr + y.to(tl.int64) * stride_dlogits_h
    dlogits_ptrs += x.to(tl.int64) * stride_dlogits_w
    above = tl.maximum(tl.arange(0, CELLS_Y * CELLS_X) - CELLS_X, 0)
    left_of = tl.maximum(tl.arange(0, CELLS_X)[None, :] - 1, 0)
    left_of = tl.broadcast_to(left_of, (CELLS_Y, CELLS_X))
    ptr = logits_ptr
    for k in range(num_classes):
        z = logits_of_pixels(
            ptr, lower_y, upper_y, lower_x, upper_x, weights_y, weights_x, SLOTS_Y, SLOTS_X,
            SELECT_Y, SELECT_X, SAME,
        )  # fmt: skip
        dloss = number(dlosses_ptr, k, stride_dlosses_k)
        doverlap = number(doverlaps_ptr, k, stride_doverlaps_k)
        dmass = number(dmasses_ptr, k, stride_dmasses_k)
        dsquare = 2 * number(dsquares_ptr, k, stride_dsquares_k)
        dz = ()
        for i in tl.static_range(PIXELS):
            p = tl.exp2((z[i] - lse[i]) * LOG2_E)
            factor = common[i]
            if dmasses_ptr is not None:
                factor += dmass
            if dsquares_ptr is not None:
                factor = tl.fma(p, dsquare, factor)
            own = -dloss
            if dpixel_losses_ptr is not None:
                own -= own_gradients[i]
            if doverlaps_ptr is not None:
                own = tl.fma(p, doverlap, own)
            gradient = tl.fma(p, factor, tl.where(labels[i] == k, own, 0.0))
            dz = dz + (tl.where(labels[i] >= 0, gradient, 0.0),)
        if SAME:
            gradient = of_cells(dz[0], CELLS_Y, BLOCK_Y, CELLS_X, BLOCK_X)
        else:
            nothing = tl.zeros((LANES_Y * LANES_X,), tl.float32)
            top_left, top_right, bottom_left, bottom_right = nothing, nothing, nothing, nothing
            for i in tl.static_range(SLOTS_Y):
                left, right = nothing, nothing
                for j in tl.static_range(SLOTS_X):
                    left, right = divide(left, right, dz[i * SLOTS_X + j], weights_x[j], SELECT_X)
                top_left, bottom_left = divide(top_left, bottom_left, left, weights_y[i], SELECT_Y)
                top_right, bottom_right = divide(
                    top_right, bottom_right, right, weights_y[i], SELECT_Y
                )
            top_left, top_right = at_edges(top_left, top_right, cell_x, width)
            bottom_left, bottom_right = at_edges(bottom_left, bottom_right, cell_x, width)
            gradient = of_cells(top_left, CELLS_Y, BLOCK_Y, CELLS_X, BLOCK_X)
            top_right = of_cells(top_right, CELLS_Y, BLOCK_Y, CELLS_X, BLOCK_X)
            bottom = of_cells(bottom_left, CELLS_Y, BLOCK_Y, CELLS_X, BLOCK_X)
            bottom_right = of_cells(bottom_right, CELLS_Y, BLOCK_Y, CELLS_X, BLOCK_X)
            gradient += tl.gather(top_right, left_of, 1)
            bottom += tl.gather(bottom_right, left_of, 1)
            gradient, bottom = at_edges(gradient, bottom, y, height)
            bottom = tl.gather(tl.reshape(bottom, (CELLS_Y * CELLS_X,)), above, 0)
            gradient += tl.reshape(bottom, (CELLS_Y, CELLS_X))
        tl.store(dlogits_ptrs, gradient.to(dlogits_ptr.dtype.element_ty), mask=written)
        ptr += stride_logits_k
        dlogits_ptrs += stride_dlogits_k


def _strides_by_class(gradient: Tensor | None) -> tuple[int, int]:
    if gradient is None:
        return 0, 0
    return (0, *gradient.stride())[-2:]  # pyright: ignore[reportReturnType]


def softmax_moments_backward(
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    dlosses: Tensor | None,
    doverlaps: Tensor | None,
    dmasses: Tensor | None,
    dsquares: Tensor | None,
    dpixel_losses: Tensor | None,
    dlse: Tensor | None,
    ignore_index: int,
    align_corners: bool,
) -> Tensor:
    """See ops/softmax_moments.py.

    In addition to the gradient it needs memory for copies of logits and gradient, if classes are
    contiguous. If cells have more than MOST_PARTS parts along an axis, it needs a float32 gradient
    for each block of parts: 4·K bytes for every 32 × 32 pixels, or 16 × 16.
    """
    dlogits = torch.empty_like(logits)
    if labels.numel() == 0:
        return dlogits.zero_()
    logits = class_planes(logits)
    batch, _, height, width = logits.shape
    upsampling = upsampling_of(logits, *labels.shape[1:], align_corners)
    y, x, same = upsampling.y, upsampling.x, upsampling.same
    blocks_y, blocks_x = (triton.cdiv(axis.parts, MOST_PARTS) for axis in (y, x))
    parts_y, parts_x = y.parts // blocks_y, x.parts // blocks_x
    edge = 0 if same else 1

    def tiles(lanes: tuple[int, int]) -> tuple[int, int]:
        down = triton.cdiv(height, lanes[0] // parts_y - edge)
        return down, triton.cdiv(width, lanes[1] // parts_x - edge)

    by_class = any(gradient is not None for gradient in (doverlaps, dmasses, dsquares))
    shapes = backward_lanes(parts_y, parts_x, width if same else 0, by_class)
    lanes_y, lanes_x = min(shapes, key=lambda lanes: prod(tiles(lanes)))
    tiles_y, tiles_x = tiles((lanes_y, lanes_x))
    blocks = blocks_y * blocks_x
    in_place = blocks == 1 and not classes_contiguous(dlogits)
    if in_place:
        gradients = dlogits[None]
    else:
        dtype = torch.float32 if blocks > 1 else logits.dtype
        gradients = logits.new_empty((blocks, *logits.shape), dtype=dtype)
    _softmax_moments_bwd_kernel[(batch * tiles_y * tiles_x * blocks,)](
        logits,
        labels,
        lse,
        dlosses,
        doverlaps,
        dmasses,
        dsquares,
        dpixel_losses,
        dlse,
        gradients,
        logits.shape[1],
        *upsampling.arguments,
        tiles_y,
        tiles_x,
        ignore_index,
        *logits.stride(),
        *labels.stride(),
        *lse.stride(),
        *_strides_by_class(dlosses),
        *_strides_by_class(doverlaps),
        *_strides_by_class(dmasses),
        *_strides_by_class(dsquares),
        *((0, 0, 0) if dpixel_losses is None else dpixel_losses.stride()),
        *((0, 0, 0) if dlse is None else dlse.stride()),
        *gradients.stride(),
        **upsampling.constants,
        BLOCKS_Y=blocks_y,
        BLOCKS_X=blocks_x,
        LANES_Y=lanes_y,
        LANES_X=lanes_x,
        num_warps=lanes_y * lanes_x // 32,
        # two programs on a multiprocessor, if they do not spill
        **registers(128 if y.even and x.even and not by_class else 255),
    )
    if in_place:
        return dlogits
    return dlogits.copy_(gradients.sum(0) if blocks > 1 else gradients[0])
