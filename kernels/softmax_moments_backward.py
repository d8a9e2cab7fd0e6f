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
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lanes import (
    LOG2_E,
    NO_CLASS,
    PixelMap,
    load_labels,
    load_map,
    next_label,
    pixel_map_of,
    repeated,
)
from .launch import MOST_PARTS, backward_lanes, registers
from .upsampling import (
    SIZES,
    YX,
    axes_of,
    class_planes,
    classes_contiguous,
    lanes_at,
    logits_of,
    logits_of_image,
    logits_of_pixels,
    upsampling_of,
)


class ByClass(NamedTuple):
    """float32 [K] or [B, K] by strides; the pointer is None if there is no gradient."""

    ptr: Any
    stride_b: int
    stride_k: int


class Gradients(NamedTuple):
    dlosses: ByClass
    doverlaps: ByClass
    dmasses: ByClass
    dsquares: ByClass
    dpixel_losses: PixelMap
    dlse: PixelMap


class Tile(NamedTuple):
    """Of a program, along an axis: `cells`, the first `edge` of them without a gradient of their
    own, and `parts` of each cell. The other parts belong to other `blocks`."""

    cells: int
    edge: int
    parts: int
    blocks: int


@triton.jit
def of_class(gradient, image, k):
    """The number of a class; 0 if there is no gradient."""
    if gradient.ptr is None:
        return 0.0
    else:
        ptr = gradient.ptr + image * gradient.stride_b
        return tl.load(ptr + tl.cast(k, tl.int64) * gradient.stride_k)


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
def of_cells(x, TILE: tl.constexpr):
    """Sums over the parts of each cell."""
    x = tl.reshape(x, (TILE.y.cells, TILE.y.parts, TILE.x.cells, TILE.x.parts))
    return tl.sum(tl.sum(x, 3), 1)


@triton.jit
def _lanes_of_program(row, column, block, axes, logits, CELLS: tl.constexpr, TILE: tl.constexpr):
    """The program writes gradients from this row and column on."""
    LANES_X: tl.constexpr = TILE.x.cells * TILE.x.parts
    lane = tl.arange(0, TILE.y.cells * TILE.y.parts * LANES_X)
    y, x = lane // LANES_X, lane % LANES_X
    cell = YX(row - TILE.y.edge + y // TILE.y.parts, column - TILE.x.edge + x // TILE.x.parts)
    part_y = block // TILE.x.blocks * TILE.y.parts + y % TILE.y.parts
    part_x = block % TILE.x.blocks * TILE.x.parts + x % TILE.x.parts
    return lanes_at(cell, YX(part_y, part_x), axes, logits, CELLS)


@triton.jit
def _add_true_classes(slopes, gradients, image, logits, lanes, labels, lse, CELLS: tl.constexpr):
    """slope + dlosses[y] − p_y·doverlaps[y]"""
    if gradients.doverlaps.ptr is not None:
        label = next_label(labels, -1)
        while label < NO_CLASS:
            z = logits_of_pixels(logits.ptr + label.to(tl.int64) * logits.stride_k, lanes, CELLS)
            dloss = of_class(gradients.dlosses, image, label)
            doverlap = of_class(gradients.doverlaps, image, label)
            added = ()
            for i in tl.static_range(len(slopes)):
                p = tl.exp2((z[i] - lse[i]) * LOG2_E)
                new = tl.fma(-p, doverlap, slopes[i] + dloss)
                added = added + (tl.where(labels[i] == label, new, slopes[i]),)
            slopes = added
            label = next_label(labels, label)
    elif gradients.dlosses.ptr is not None:
        dlosses_ptr = gradients.dlosses.ptr + image * gradients.dlosses.stride_b
        added = ()
        for i in tl.static_range(len(slopes)):
            at = labels[i].to(tl.int64) * gradients.dlosses.stride_k
            d = tl.load(dlosses_ptr + at, mask=labels[i] >= 0, other=0.0)
            added = added + (slopes[i] + d,)
        slopes = added
    return slopes


@triton.jit
def _add_map(slopes, pixel_map, image, lanes, labels, CELLS: tl.constexpr):
    if pixel_map.ptr is not None:
        numbers = load_map(pixel_map, image, lanes, labels, CELLS)
        added = ()
        for i in tl.static_range(len(slopes)):
            added = added + (slopes[i] + numbers[i],)
        slopes = added
    return slopes


@triton.jit
def _subtract_all_classes(slopes, gradients, image, logits, lanes, lse, CELLS: tl.constexpr):
    """slope − Σ_j p_j·(dmasses[j] + 2·p_j·dsquares[j])"""
    if gradients.dmasses.ptr is not None or gradients.dsquares.ptr is not None:
        ptr = logits.ptr
        for k in range(logits.num_classes):
            z = logits_of_pixels(ptr, lanes, CELLS)
            dmass = of_class(gradients.dmasses, image, k)
            dsquare = 2 * of_class(gradients.dsquares, image, k)
            added = ()
            for i in tl.static_range(len(slopes)):
                p = tl.exp2((z[i] - lse[i]) * LOG2_E)
                added = added + (tl.fma(-p, tl.fma(p, dsquare, dmass), slopes[i]),)
            slopes = added
            ptr += logits.stride_k
    return slopes


@triton.jit
def _pixel_gradients(k, z, slopes, dpixel_losses, gradients, image, labels, lse):
    """dz_k of each pixel."""
    dloss = of_class(gradients.dlosses, image, k)
    doverlap = of_class(gradients.doverlaps, image, k)
    dmass = of_class(gradients.dmasses, image, k)
    dsquare = 2 * of_class(gradients.dsquares, image, k)
    dz = ()
    for i in tl.static_range(len(z)):
        p = tl.exp2((z[i] - lse[i]) * LOG2_E)
        factor = slopes[i]
        if gradients.dmasses.ptr is not None:
            factor += dmass
        if gradients.dsquares.ptr is not None:
            factor = tl.fma(p, dsquare, factor)
        own = -dloss
        if gradients.dpixel_losses.ptr is not None:
            own -= dpixel_losses[i]
        if gradients.doverlaps.ptr is not None:
            own = tl.fma(p, doverlap, own)
        gradient = tl.fma(p, factor, tl.where(labels[i] == k, own, 0.0))
        dz = dz + (tl.where(labels[i] >= 0, gradient, 0.0),)
    return dz


@triton.jit
def _corner_gradients(dz, lanes, source, CELLS: tl.constexpr):
    """The gradients of a lane's pixels, summed for each of the cell's four logits."""
    SLOTS_Y: tl.constexpr = CELLS.y.slots
    SLOTS_X: tl.constexpr = CELLS.x.slots
    nothing = tl.zeros(dz[0].shape, tl.float32)
    top_left, top_right, bottom_left, bottom_right = nothing, nothing, nothing, nothing
    for i in tl.static_range(SLOTS_Y):
        left, right = nothing, nothing
        for j in tl.static_range(SLOTS_X):
            weight = lanes.x.weights[j]
            left, right = divide(left, right, dz[i * SLOTS_X + j], weight, CELLS.x.select)
        weight = lanes.y.weights[i]
        top_left, bottom_left = divide(top_left, bottom_left, left, weight, CELLS.y.select)
        top_right, bottom_right = divide(top_right, bottom_right, right, weight, CELLS.y.select)
    top_left, top_right = at_edges(top_left, top_right, lanes.x.cell, source)
    bottom_left, bottom_right = at_edges(bottom_left, bottom_right, lanes.x.cell, source)
    return top_left, top_right, bottom_left, bottom_right


@triton.jit
def _gathered(four, cell_y, source, TILE: tl.constexpr):
    """The gradient of each cell's upper left logit: the sum of those in its four cells."""
    CELLS_Y: tl.constexpr = TILE.y.cells
    CELLS_X: tl.constexpr = TILE.x.cells
    above = tl.maximum(tl.arange(0, CELLS_Y * CELLS_X) - CELLS_X, 0)
    left_of = tl.maximum(tl.arange(0, CELLS_X)[None, :] - 1, 0)
    left_of = tl.broadcast_to(left_of, (CELLS_Y, CELLS_X))
    top = of_cells(four[0], TILE) + tl.gather(of_cells(four[1], TILE), left_of, 1)
    bottom = of_cells(four[2], TILE) + tl.gather(of_cells(four[3], TILE), left_of, 1)
    top, bottom = at_edges(top, bottom, cell_y, source)
    bottom = tl.gather(tl.reshape(bottom, (CELLS_Y * CELLS_X,)), above, 0)
    return top + tl.reshape(bottom, (CELLS_Y, CELLS_X))


@triton.jit(do_not_specialize=(*SIZES, "tiles_y", "tiles_x"))
def _softmax_moments_bwd_kernel(
    logits,  # Logits
    label_map,  # PixelMap of integers
    lse_map,  # PixelMap
    gradients,  # Gradients
    dlogits,  # Logits, of the first block
    stride_dlogits_block,
    height,
    width,
    label_height,
    label_width,
    ratios,
    tiles_y,
    tiles_x,
    ignore_index,
    CELLS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Reads the logits of a tile and its edge from memory once, and from the caches for each loop
    over the classes and for neighbours. Reads labels, lse and maps once, except at the edge. Writes
    dlogits once."""
    axes = axes_of(height, width, label_height, label_width, ratios, CELLS)
    pid = tl.program_id(0) // (TILE.y.blocks * TILE.x.blocks)
    block = tl.program_id(0) % (TILE.y.blocks * TILE.x.blocks)
    image = (pid // (tiles_y * tiles_x)).to(tl.int64)
    row = pid // tiles_x % tiles_y * (TILE.y.cells - TILE.y.edge)
    column = pid % tiles_x * (TILE.x.cells - TILE.x.edge)
    logits = logits_of_image(logits, image)
    lanes = _lanes_of_program(row, column, block, axes, logits, CELLS, TILE)
    labels = load_labels(label_map, image, lanes, logits.num_classes, ignore_index, CELLS)
    lse = load_map(lse_map, image, lanes, labels, CELLS)

    nothing = repeated(tl.zeros(labels[0].shape, tl.float32), len(labels))
    dpixel_losses = _add_map(nothing, gradients.dpixel_losses, image, lanes, labels, CELLS)
    slopes = _add_true_classes(dpixel_losses, gradients, image, logits, lanes, labels, lse, CELLS)
    slopes = _add_map(slopes, gradients.dlse, image, lanes, labels, CELLS)
    slopes = _subtract_all_classes(slopes, gradients, image, logits, lanes, lse, CELLS)

    cell_y = row - TILE.y.edge + tl.arange(0, TILE.y.cells)[:, None]
    cell_x = column - TILE.x.edge + tl.arange(0, TILE.x.cells)[None, :]
    written = (cell_y >= row) & (cell_y < height) & (cell_x >= column) & (cell_x < width)
    dlogits_ptrs = logits_of_image(dlogits, image).ptr + block.to(tl.int64) * stride_dlogits_block
    dlogits_ptrs += cell_y.to(tl.int64) * dlogits.stride_h
    dlogits_ptrs += cell_x.to(tl.int64) * dlogits.stride_w
    ptr = logits.ptr
    for k in range(logits.num_classes):
        z = logits_of_pixels(ptr, lanes, CELLS)
        dz = _pixel_gradients(k, z, slopes, dpixel_losses, gradients, image, labels, lse)
        if CELLS.y.same:
            gradient = of_cells(dz[0], TILE)
        else:
            gradient = _gathered(_corner_gradients(dz, lanes, width, CELLS), cell_y, height, TILE)
        tl.store(dlogits_ptrs, gradient.to(dlogits.ptr.dtype.element_ty), mask=written)
        ptr += logits.stride_k
        dlogits_ptrs += dlogits.stride_k


def _by_class(gradient: Tensor | None) -> ByClass:
    if gradient is None:
        return ByClass(None, 0, 0)
    stride_b, stride_k = (0, *gradient.stride())[-2:]
    return ByClass(gradient, stride_b, stride_k)


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
    smoothing: Tensor | None,
    min_loss: float | None,
    focal_gamma: float,
    ignore_index: int,
    align_corners: bool,
) -> Tensor:
    """See _ops/softmax_moments.py.

    In addition to the gradient it needs memory for copies of logits and gradient, if classes are
    contiguous. If cells have more than MOST_PARTS parts along an axis, it needs a float32 gradient
    for each block of parts: 4·K bytes for every 32 × 32 pixels, or 16 × 16.
    """
    if smoothing is not None or min_loss is not None or focal_gamma > 0:
        raise NotImplementedError("softmax_moments: smoothing, min_loss, focal_gamma")
    dlogits = torch.empty_like(logits)
    if labels.numel() == 0:
        return dlogits.zero_()
    logits = class_planes(logits)
    batch, _, height, width = logits.shape
    upsampling = upsampling_of(logits, *labels.shape[1:], align_corners)
    cells_y, cells_x = upsampling.cells
    same = cells_y.same
    blocks_y, blocks_x = (triton.cdiv(cells.parts, MOST_PARTS) for cells in (cells_y, cells_x))
    parts_y, parts_x = cells_y.parts // blocks_y, cells_x.parts // blocks_x
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
    tile_y = Tile(lanes_y // parts_y, edge, parts_y, blocks_y)
    tile_x = Tile(lanes_x // parts_x, edge, parts_x, blocks_x)
    _softmax_moments_bwd_kernel[(batch * tiles_y * tiles_x * blocks,)](
        logits_of(logits),
        pixel_map_of(labels),
        pixel_map_of(lse),
        Gradients(
            *map(_by_class, (dlosses, doverlaps, dmasses, dsquares)),
            pixel_map_of(dpixel_losses),
            pixel_map_of(dlse),
        ),
        logits_of(gradients[0]),
        gradients.stride(0),
        *upsampling.sizes,
        upsampling.ratios,
        tiles_y,
        tiles_x,
        ignore_index,
        CELLS=upsampling.cells,
        TILE=YX(tile_y, tile_x),
        num_warps=lanes_y * lanes_x // 32,
        enable_fp_fusion=False,  # coordinates as in F.interpolate
        # two programs on a multiprocessor, if they do not spill
        **registers(128 if cells_y.even and cells_x.even and not by_class else 255),
    )
    if in_place:
        return dlogits
    return dlogits.copy_(gradients.sum(0) if blocks > 1 else gradients[0])
