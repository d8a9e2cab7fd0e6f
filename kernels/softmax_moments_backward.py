"""The gradient of softmax moments.

    dz_k = p_k·(d + dlse − t + dmasses[k] + 2·p_k·dsquares[k]) + [y = k]·(p_k·doverlaps[k] − d)
    d = dlosses[y] + dpixel_losses,   t = Σ_j p_j·u_j,   0 where ignored

A lane (upsampling.py) computes dz of its pixels class by class, and sums it with the weights of the
cell's four logits. A program processes a tile of cells, with one more row above and one more column
to the left. The gradient of a logit is the sum over its four cells.
"""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import backward_lanes, registers
from .softmax_moments import LOG2_E, filled, grid_options, load_labels, own_logits
from .upsampling import axis_of, corners, neighbours, pixels_of_part, upsampled, weights_of_axis

SIZES = ("height", "width", "label_height", "label_width", "tiles_y", "tiles_x")


@triton.jit
def load_map(
    ptr, labels, start_y, start_x, stride_y, stride_x, SLOTS_Y: tl.constexpr, SLOTS_X: tl.constexpr
):  # fmt: skip
    """One value for each valid pixel."""
    out = ()
    for i in tl.static_range(SLOTS_Y):
        for j in tl.static_range(SLOTS_X):
            y, x = (start_y + i).to(tl.int64), (start_x + j).to(tl.int64)
            valid = labels[i * SLOTS_X + j] >= 0
            out = out + (tl.load(ptr + y * stride_y + x * stride_x, mask=valid, other=0.0),)
    return out


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
def of_cells(x, CELLS_Y: tl.constexpr, PARTS_Y: tl.constexpr, CELLS_X: tl.constexpr,
             PARTS_X: tl.constexpr):  # fmt: skip
    """Sums over the parts of each cell."""
    x = tl.reshape(x, (CELLS_Y, PARTS_Y, CELLS_X, PARTS_X))
    return tl.sum(tl.sum(x, 3), 1)


@triton.jit(do_not_specialize=SIZES)
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
    dlogits_ptr,  # [B, K, h, w] by strides
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
    LANES_Y: tl.constexpr,
    LANES_X: tl.constexpr,
):
    """Reads the logits of a tile and its edge from memory once, and from the caches for each loop
    over the classes and for neighbours. Reads labels, lse and maps once, except at the edge. Writes
    dlogits once."""
    PIXELS: tl.constexpr = SLOTS_Y * SLOTS_X
    CELLS_Y: tl.constexpr = LANES_Y // PARTS_Y
    CELLS_X: tl.constexpr = LANES_X // PARTS_X
    EDGE: tl.constexpr = 1 - SAME
    pid = tl.program_id(0)
    image = (pid // (tiles_y * tiles_x)).to(tl.int64)
    # the first row and column of logits whose gradient the tile writes
    row = pid // tiles_x % tiles_y * (CELLS_Y - EDGE)
    column = pid % tiles_x * (CELLS_X - EDGE)
    logits_ptr += image * stride_logits_b

    lane = tl.arange(0, LANES_Y * LANES_X)
    lane_y, lane_x = lane // LANES_X, lane % LANES_X
    cell_y, cell_x = row - EDGE + lane_y // PARTS_Y, column - EDGE + lane_x // PARTS_X
    start_y, stop_y = pixels_of_part(
        cell_y, lane_y % PARTS_Y, height, label_height, ratio_y, inverse_y, FIRST_Y, SLOTS_Y,
        ALIGN_CORNERS, SAME,
    )  # fmt: skip
    start_x, stop_x = pixels_of_part(
        cell_x, lane_x % PARTS_X, width, label_width, ratio_x, inverse_x, FIRST_X, SLOTS_X,
        ALIGN_CORNERS, SAME,
    )  # fmt: skip
    weights_y = weights_of_axis(cell_y, start_y, height, ratio_y, SLOTS_Y, EVEN_Y, ALIGN_CORNERS)
    weights_x = weights_of_axis(cell_x, start_x, width, ratio_x, SLOTS_X, EVEN_X, ALIGN_CORNERS)
    lower_y, upper_y = neighbours(cell_y, height, stride_logits_h)
    lower_x, upper_x = neighbours(cell_x, width, stride_logits_w)
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
    if doverlaps_ptr is not None:
        doverlaps_ptr += image * stride_doverlaps_b
        own_z = own_logits(
            logits_ptr, labels, stride_logits_k, lower_y, upper_y, lower_x, upper_x, weights_y,
            weights_x, SLOTS_Y, SLOTS_X, SELECT_Y, SELECT_X, SAME,
        )  # fmt: skip
        added = ()
        for i in tl.static_range(PIXELS):
            at = labels[i].to(tl.int64) * stride_doverlaps_k
            u = tl.load(doverlaps_ptr + at, mask=labels[i] >= 0, other=0.0)
            p = tl.exp2((own_z[i] - lse[i]) * LOG2_E)
            added = added + (common[i] - p * u,)
        common = added
    if dmasses_ptr is not None:
        dmasses_ptr += image * stride_dmasses_b
    if dsquares_ptr is not None:
        dsquares_ptr += image * stride_dsquares_b
    if dmasses_ptr is not None or dsquares_ptr is not None:
        ptr = logits_ptr
        for k in range(num_classes):
            x00, x01, x10, x11 = corners(ptr, lower_y, upper_y, lower_x, upper_x, SAME)
            z = upsampled(
                x00, x01, x10, x11, weights_y, weights_x, SLOTS_Y, SLOTS_X, SELECT_Y, SELECT_X, SAME
            )
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
    dlogits_ptrs = dlogits_ptr + image * stride_dlogits_b + y.to(tl.int64) * stride_dlogits_h
    dlogits_ptrs += x.to(tl.int64) * stride_dlogits_w
    above = tl.maximum(tl.arange(0, CELLS_Y * CELLS_X) - CELLS_X, 0)
    left_of = tl.maximum(tl.arange(0, CELLS_X)[None, :] - 1, 0)
    left_of = tl.broadcast_to(left_of, (CELLS_Y, CELLS_X))
    ptr = logits_ptr
    for k in range(num_classes):
        x00, x01, x10, x11 = corners(ptr, lower_y, upper_y, lower_x, upper_x, SAME)
        z = upsampled(
            x00, x01, x10, x11, weights_y, weights_x, SLOTS_Y, SLOTS_X, SELECT_Y, SELECT_X, SAME
        )
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
            gradient = of_cells(dz[0], CELLS_Y, PARTS_Y, CELLS_X, PARTS_X)
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
            gradient = of_cells(top_left, CELLS_Y, PARTS_Y, CELLS_X, PARTS_X)
            top_right = of_cells(top_right, CELLS_Y, PARTS_Y, CELLS_X, PARTS_X)
            bottom = of_cells(bottom_left, CELLS_Y, PARTS_Y, CELLS_X, PARTS_X)
            bottom_right = of_cells(bottom_right, CELLS_Y, PARTS_Y, CELLS_X, PARTS_X)
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
    """See ops/softmax_moments.py. It needs no memory except the gradient."""
    dlogits = torch.empty_like(logits)
    if labels.numel() == 0:
        return dlogits.zero_()
    batch, num_classes, height, width = logits.shape
    label_height, label_width = labels.shape[1:]
    same = (height, width) == (label_height, label_width)
    y, x = (axis_of(logits.shape[i], labels.shape[i - 1], align_corners) for i in (2, 3))
    edge = 0 if same else 1

    def tiles(lanes: tuple[int, int]) -> tuple[int, int]:
        down = triton.cdiv(height, lanes[0] // y.parts - edge)
        return down, triton.cdiv(width, lanes[1] // x.parts - edge)

    by_class = any(gradient is not None for gradient in (doverlaps, dmasses, dsquares))
    shapes = backward_lanes(y.parts, x.parts, width if same else 0, by_class)
    lanes_y, lanes_x = min(shapes, key=lambda lanes: prod(tiles(lanes)))
    tiles_y, tiles_x = tiles((lanes_y, lanes_x))
    _softmax_moments_bwd_kernel[(batch * tiles_y * tiles_x,)](
        logits,
        labels,
        lse,
        dlosses,
        doverlaps,
        dmasses,
        dsquares,
        dpixel_losses,
        dlse,
        dlogits,
        num_classes,
        height,
        width,
        label_height,
        label_width,
        y.ratio,
        x.ratio,
        y.inverse,
        x.inverse,
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
        *dlogits.stride(),
        **grid_options(y, x, same, align_corners),
        LANES_Y=lanes_y,
        LANES_X=lanes_x,
        num_warps=lanes_y * lanes_x // 32,
        enable_fp_fusion=False,  # as softmax_moments
        # two programs on a multiprocessor, if they do not spill
        **registers(128 if y.even and x.even and not by_class else 255),
    )
    return dlogits
