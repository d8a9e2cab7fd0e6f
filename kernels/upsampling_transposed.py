"""The transpose of the upsampling (upsampling.py): gradients of pixels, summed for the logits.

A lane multiplies the gradients of its pixels by their weights, and sums them for the four logits of
its cell. A program processes a tile of cells, and one more row above it and column at its left, so
that it can gather a logit's gradient from its four cells. If cells have more than MOST_PARTS parts
along an axis, a program processes one block of parts; then the gradients of the blocks are summed.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .upsampling import (
    ROW_AXIS,
    YX,
    Upsampling,
    at_pixels,
    both,
    cells_of_lane,
    classes_contiguous,
    lanes_at,
    logits_of_image,
    strides_of,
)

MOST_PARTS = 8  # along an axis, in a program of the gradient: of 256 lanes, as it has two cells
DLOGITS = (*strides_of("dlogits", "bkhw"), "dlogits_block")


class TileAxis(NamedTuple):
    """What a program computes along an axis: `cells`, the first `edge` of them without a gradient
    of their own, and `parts` of each cell. The other parts belong to other `blocks`."""

    cells: int
    edge: int
    parts: int
    blocks: int


class Tiles(NamedTuple):
    """The tiles of an image: `blocks` programs of so many `lanes` process each of them."""

    tile: YX
    lanes: int
    down: int
    across: int
    blocks: int


def _lanes_of_tile(parts_y: int, parts_x: int, row: int, more_registers: bool) -> tuple[int, int]:
    """The shape of a program's lanes for the gradient. If a lane needs more registers, for
    gradients of class statistics, maps of pixels or options of the loss, there are fewer lanes. If
    the labels have the logits' size, `row` logits wide, no cell needs its neighbours. Otherwise the
    shape does not depend on the images' size, because each one would be compiled."""
    if row > 0:
        return 1, min(max(triton.next_power_of_2(row), 32), 256)
    if parts_y == 4 and parts_x < 4:
        return 32, 8  # eight cells along the rows, of which one has no gradient of its own
    if max(parts_y, parts_x) > 2:
        return max(16, 2 * parts_y), max(16, 2 * parts_x)
    return (8, 16) if more_registers and parts_y == 1 else (16, 16)


@lru_cache(maxsize=1024)
def tiles_of(upsampling: Upsampling, more_registers: bool) -> Tiles:
    """For more_registers see _lanes_of_tile."""
    cells_y, cells_x, _ = upsampling.cells
    height, width = upsampling.y.source, upsampling.x.source
    blocks_y, blocks_x = (triton.cdiv(cells.parts, MOST_PARTS) for cells in (cells_y, cells_x))
    parts_y, parts_x = cells_y.parts // blocks_y, cells_x.parts // blocks_x
    edge = 0 if cells_y.same else 1
    row = upsampling.x.lanes if cells_y.same else 0
    lanes_y, lanes_x = _lanes_of_tile(parts_y, parts_x, row, more_registers)
    adjacent = cells_x.pixels if cells_x.same else 1
    y = TileAxis(lanes_y // parts_y, edge, parts_y, blocks_y)
    x = TileAxis(lanes_x // parts_x * adjacent, edge, parts_x, blocks_x)
    down, across = triton.cdiv(height, y.cells - edge), triton.cdiv(width, x.cells - edge)
    return Tiles(YX(y, x), lanes_y * lanes_x, down, across, blocks_y * blocks_x)


def _in_place(dlogits: Tensor, blocks: int) -> bool:
    return blocks == 1 and not classes_contiguous(dlogits)


def gradients_of_blocks(dlogits: Tensor, blocks: int) -> Tensor:
    """[blocks, B, K, h, w], for a kernel: dlogits, if it can write there."""
    if _in_place(dlogits, blocks):
        return dlogits.unsqueeze(0)
    dtype = torch.float32 if blocks > 1 else dlogits.dtype
    return dlogits.new_empty((blocks, *dlogits.shape), dtype=dtype)


def sum_of_blocks(gradients: Tensor, dlogits: Tensor) -> Tensor:
    """dlogits, from what the kernel wrote to gradients_of_blocks."""
    if _in_place(dlogits, len(gradients)):
        return dlogits
    return dlogits.copy_(gradients.sum(0) if len(gradients) > 1 else gradients[0])


class Program(NamedTuple):
    """It writes the gradients of an image from this row and column on, for one block of parts."""

    image: Any
    block: Any
    row: Any
    column: Any


@triton.jit
def program_of(tiles_y, tiles_x, TILE: tl.constexpr):
    BLOCKS: tl.constexpr = TILE.y.blocks * TILE.x.blocks
    tile, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    row = tile // tiles_x % tiles_y * (TILE.y.cells - TILE.y.edge)
    column = tile % tiles_x * (TILE.x.cells - TILE.x.edge)
    return Program((tile // (tiles_y * tiles_x)).to(tl.int64), block, row, column)


@triton.jit
def lanes_of_program(program, axes, logits, CELLS: tl.constexpr, TILE: tl.constexpr):
    X: tl.constexpr = CELLS.x
    ADJACENT: tl.constexpr = X.pixels if X.same else tl.constexpr(1)
    LANES_X: tl.constexpr = TILE.x.cells * TILE.x.parts // ADJACENT
    lane = tl.expand_dims(tl.arange(0, TILE.y.cells * TILE.y.parts * LANES_X), ROW_AXIS)
    y, x = lane // LANES_X, lane % LANES_X
    if X.same:
        x = x * X.pixels + cells_of_lane(X)
    cell_y = program.row - TILE.y.edge + y // TILE.y.parts
    cell_x = program.column - TILE.x.edge + x // TILE.x.parts
    part_y = program.block // TILE.x.blocks * TILE.y.parts + y % TILE.y.parts
    part_x = program.block % TILE.x.blocks * TILE.x.parts + x % TILE.x.parts
    return lanes_at(YX(cell_y, cell_x), YX(part_y, part_x), axes, logits, CELLS)


@triton.jit
def cells_of_program(program, lanes, CELLS: tl.constexpr, TILE: tl.constexpr):
    """Rows and columns [cells along y, cells along x]; those of the lanes, if the sizes are the
    same."""
    if CELLS.y.same:
        return YX(lanes.y.cell, lanes.x.cell)
    else:
        y = program.row - TILE.y.edge + tl.arange(0, TILE.y.cells)[:, None]
        x = program.column - TILE.x.edge + tl.arange(0, TILE.x.cells)[None, :]
        return YX(y, x)


@triton.jit
def gradient_ptrs(dlogits, program, cells, axes, stride_block, CELLS: tl.constexpr):
    """Where the gradients of class 0 are written, and which of them this program writes."""
    ptrs = logits_of_image(dlogits, program.image).ptr + program.block.to(tl.int64) * stride_block
    ptrs += cells.y.to(tl.int64) * dlogits.stride_h
    ptrs = at_pixels(ptrs, cells.x.to(tl.int64) * dlogits.stride_w, CELLS)
    written_y = (cells.y >= program.row) & (cells.y < axes.y.source)
    written_x = (cells.x >= program.column) & (cells.x < axes.x.source)
    return ptrs, both(written_y, written_x, CELLS)


@triton.jit
def _over_columns(gradients, weights, CELLS: tl.constexpr):
    """The gradients of the lower and the upper neighbour. In even cells weights are w, w + step, …:
    the first one suffices, so that the others need no registers."""
    if CELLS.x.even:
        STEP: tl.constexpr = 1 / (CELLS.x.pixels * CELLS.x.parts)
        total, steps = gradients[0], tl.zeros(gradients[0].shape, tl.float32)
        for x in tl.static_range(1, len(gradients)):
            total += gradients[x]
            steps = tl.fma(gradients[x], x * STEP, steps)
        return tl.fma(1 - weights[0], total, -steps), tl.fma(weights[0], total, steps)
    else:
        lower, upper = 0.0, 0.0
        for x in tl.static_range(len(gradients)):
            added = tl.fma(weights[x], gradients[x], upper)
            if CELLS.x.select:  # 0 · NaN would be NaN
                added = tl.where(weights[x] == 0, upper, added)
            upper = added
            lower = tl.fma(1 - weights[x], gradients[x], lower)
        return lower, upper


@triton.jit
def _over_rows(gradient, weight, SELECT: tl.constexpr):
    """The gradients of the lower and the upper neighbour: [rows, lanes] to [1, lanes]. The lower
    one by subtraction, which needs no register for 1 − weight; its error is a rounding of the sum,
    which may be as large as the output stride times what it gets."""
    upper = weight * gradient
    if SELECT:  # 0 · NaN would be NaN
        upper = tl.where(weight == 0, 0.0, upper)
    upper = tl.sum(upper, ROW_AXIS, keep_dims=True)
    return tl.sum(gradient, ROW_AXIS, keep_dims=True) - upper, upper


@triton.jit
def _at_edges(lower, upper, cell, source):
    """In cells before the first logit and beyond the last one, both neighbours are the same logit,
    which gets both gradients."""
    first, last = cell < 0, cell == source - 1
    return tl.where(last, lower + upper, lower), tl.where(first, lower + upper, upper)


@triton.jit
def _corner_gradients(gradients, lanes, axes, CELLS: tl.constexpr):
    """The gradients of a lane's pixels, summed for each of the cell's four logits."""
    left, right = _over_columns(gradients, lanes.x.weights, CELLS)
    top_left, bottom_left = _over_rows(left, lanes.y.weights, CELLS.y.select)
    top_right, bottom_right = _over_rows(right, lanes.y.weights, CELLS.y.select)
    top_left, top_right = _at_edges(top_left, top_right, lanes.x.cell, axes.x.source)
    bottom_left, bottom_right = _at_edges(bottom_left, bottom_right, lanes.x.cell, axes.x.source)
    return top_left, top_right, bottom_left, bottom_right


@triton.jit
def _over_parts(x, TILE: tl.constexpr):
    """Sums over the parts of each cell: [1, lanes] to [cells along y, cells along x]."""
    x = tl.reshape(x, (TILE.y.cells, TILE.y.parts, TILE.x.cells, TILE.x.parts))
    return tl.sum(tl.sum(x, 3), 1)


@triton.jit
def transposed(gradients, lanes, cells, axes, CELLS: tl.constexpr, TILE: tl.constexpr):
    """The gradient of each cell's upper left logit, from those of the pixels: the sum of what the
    logit gets from the four cells around it."""
    if CELLS.y.same:
        return gradients[0]
    else:
        CELLS_Y: tl.constexpr = TILE.y.cells
        CELLS_X: tl.constexpr = TILE.x.cells
        four = _corner_gradients(gradients, lanes, axes, CELLS)
        left = tl.broadcast_to(
            tl.maximum(tl.arange(0, CELLS_X)[None, :] - 1, 0), (CELLS_Y, CELLS_X)
        )
        top = _over_parts(four[0], TILE) + tl.gather(_over_parts(four[1], TILE), left, 1)
        bottom = _over_parts(four[2], TILE) + tl.gather(_over_parts(four[3], TILE), left, 1)
        top, bottom = _at_edges(top, bottom, cells.y, axes.y.source)
        above = tl.maximum(tl.arange(0, CELLS_Y * CELLS_X) - CELLS_X, 0)
        bottom = tl.gather(tl.reshape(bottom, (CELLS_Y * CELLS_X,)), above, 0)
        return top + tl.reshape(bottom, (CELLS_Y, CELLS_X))
