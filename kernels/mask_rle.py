"""Masks of upsampled logits as the pixels at which they change, bit for bit those of
csrc/cpu/mask_rle.cpp.

A program has some columns of pixels of a mask and goes down the rows of logits. Between two rows,
the upsampled values of a column change their sign at most once: they are linear, and each rounded
term is monotonic. Bisection finds where, with the formula of each pixel. A column continues the one
before it, whose last pixel is computed too. A first launch counts the changes of each column, a
second one writes them in COCO's order: column after column.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .upsampling import SIZES, coordinate, neighbours, strides_of

BLOCK_X = 64  # columns of a program, of one warp: it reduces without barriers
NO_ROW = tl.constexpr(2**31 - 1)
LOGITS = strides_of("logits", "nhw")


class Axis(NamedTuple):
    source: Any  # logits
    pixels: Any
    ratio: Any


class Box(NamedTuple):
    x0: Any
    y0: Any
    x1: Any
    y1: Any


class Row(NamedTuple):
    """A row of logits, for each column of pixels: whether the logits at its left and at its right
    are 1, and z between them."""

    left: Any
    right: Any
    z: Any


class Columns(NamedTuple):
    """Columns of pixels down to the last change: the value after it, and the number of changes; how
    many pixels are 1, if those after it are 0; the first of them, and the end of the last."""

    ones: Any
    changes: Any
    area: Any
    top: Any
    bottom: Any


@triton.jit
def axes_of(height, width, label_height, label_width, ratio_y, ratio_x):
    return Axis(height, label_height, ratio_y), Axis(width, label_width, ratio_x)


@triton.jit
def position(i, axis, ALIGN_CORNERS: tl.constexpr):
    """The logit before pixel i, and the weight of the next one."""
    at = tl.maximum(coordinate(i, axis, ALIGN_CORNERS), 0.0)
    lower = tl.minimum(at.to(tl.int32), axis.source - 1)
    weight = tl.minimum(at - lower.to(tl.float32), 1.0)
    same = axis.source == axis.pixels
    return tl.where(same, i, lower), tl.where(same, 0.0, weight)


@triton.jit
def is_one(z):
    return ~(z <= 0)  # NaN is


@triton.jit
def between(low, high, weight):
    """As in upsampling.py, but with every operation rounded."""
    return tl.where(weight == 0, low, (1 - weight) * low + weight * high)


@triton.jit
def load_row(ptr, left, right, weight, level, mask):
    low = tl.load(ptr + left, mask=mask, other=0.0).to(tl.float32) - level
    high = tl.load(ptr + right, mask=mask, other=0.0).to(tl.float32) - level
    return Row(is_one(low), is_one(high), between(low, high, weight))


@triton.jit
def ends_of(above, below):
    """Whether z is 1 at two rows. If all four logits of a cell are, or none, all of it is: there
    z is not asked, which may be rounded to 0."""
    every = above.left & above.right & below.left & below.right
    some = above.left | above.right | below.left | below.right
    return every | (some & is_one(above.z)), every | (some & is_one(below.z))


@triton.jit
def find_change(above, below, first, begin, end, axis, ALIGN_CORNERS: tl.constexpr):
    """From pixel `begin` on, the first one whose value is not `first`; `end` if all have it."""
    y = tl.zeros(first.shape, tl.int32) + begin
    remaining = end - begin
    while remaining > 0:
        half = tl.maximum(remaining // 2, 1)
        _, weight = position(y + half - 1, axis, ALIGN_CORNERS)
        same = is_one(between(above.z, below.z, weight)) == first
        y += tl.where(same, half, 0)
        remaining -= half  # of the other half there may be one less
    return y


@triton.jit
def change(columns, where, y, begins, places):
    """The columns after a change at pixel y, where there is one. It is written if there are
    places."""
    if places is not None:
        tl.store(places + columns.changes, begins + y, mask=where)
    opens, closes = where & ~columns.ones, where & columns.ones
    top = tl.where(opens, tl.minimum(columns.top, y), columns.top)
    return Columns(
        columns.ones ^ where,
        columns.changes + where.to(tl.int32),
        columns.area + tl.where(closes, y, 0) - tl.where(opens, y, 0),
        tl.where(closes & (y == 0), NO_ROW, top),  # a run of the column before, with no pixel here
        tl.where(closes, y, columns.bottom),
    )


@triton.jit
def last_pixel(
    ptr, stride_h, stride_w, x, mask, y_axis, x_axis, level, ALIGN_CORNERS: tl.constexpr
):
    """Whether the last pixel of columns x is 1."""
    lower, weight = position(x, x_axis, ALIGN_CORNERS)
    left, right = neighbours(lower, x_axis, stride_w)
    row, weight_y = position(y_axis.pixels - 1, y_axis, ALIGN_CORNERS)
    upper_row, lower_row = neighbours(row, y_axis, stride_h)
    above = load_row(ptr + upper_row, left, right, weight, level, mask)
    below = load_row(ptr + lower_row, left, right, weight, level, mask)
    first, last = ends_of(above, below)
    return mask & tl.where(first == last, first, is_one(between(above.z, below.z, weight_y)))


@triton.jit
def walk(
    ptr,  # to the logits of a mask [h, w]
    stride_h,
    stride_w,
    first_ptr,  # int32 [h + 1]
    x,
    box,
    y_axis,
    x_axis,
    level,
    places,
    ALIGN_CORNERS: tl.constexpr,
):
    """All changes of columns x. Reads each logit of the box around them once."""
    begins = x.to(tl.int64) * y_axis.pixels
    inside = (x >= box.x0) & (x < box.x1)
    # behind a column that the box has down to its last pixel
    goes_on = (x > box.x0) & (x <= box.x1) & (x < x_axis.pixels) & (box.y1 == y_axis.pixels)
    ones = last_pixel(ptr, stride_h, stride_w, x - 1, goes_on, y_axis, x_axis, level, ALIGN_CORNERS)
    zero = tl.zeros(x.shape, tl.int32)
    columns = Columns(ones, zero, zero, tl.where(ones, 0, NO_ROW), zero)
    columns = change(columns, ones & (~inside | (box.y0 > 0)), zero, begins, places)

    lower, weight = position(x, x_axis, ALIGN_CORNERS)
    left, right = neighbours(lower, x_axis, stride_w)
    start, _ = position(box.y0, y_axis, ALIGN_CORNERS)
    last_row, _ = position(box.y1 - 1, y_axis, ALIGN_CORNERS)
    stop = tl.where(tl.max(inside.to(tl.int32), 0) != 0, last_row + 1, start)
    first_row, _ = neighbours(start, y_axis, stride_h)
    above = load_row(ptr + first_row, left, right, weight, level, inside)
    for i in range(start, stop):
        _, next_row = neighbours(i, y_axis, stride_h)
        below = load_row(ptr + next_row, left, right, weight, level, inside)
        begin = tl.maximum(tl.load(first_ptr + i), box.y0)
        end = tl.minimum(tl.load(first_ptr + i + 1), box.y1)
        if begin < end:
            first, last = ends_of(above, below)
            mixed = inside & (first != last)
            other = zero + end
            if tl.max(mixed.to(tl.int32), 0) != 0:
                found = find_change(above, below, first, begin, end, y_axis, ALIGN_CORNERS)
                other = tl.where(mixed, found, other)
            starts = inside & (columns.ones != first) & (other > begin)
            columns = change(columns, starts, zero + begin, begins, places)
            ends = inside & (columns.ones == first) & (other < end)
            columns = change(columns, ends, other, begins, places)
        above = below
    ends = inside & columns.ones & (box.y1 < y_axis.pixels)
    return change(columns, ends, zero + box.y1, begins, places)


@triton.jit
def box_of(boxes_ptr, mask, y_axis, x_axis):
    """The box of a mask, or the image; if it is empty, it has no columns."""
    if boxes_ptr is None:
        zero = tl.full((), 0, tl.int32)
        return Box(zero, zero, x_axis.pixels, y_axis.pixels)
    else:
        ptr = boxes_ptr + 4 * mask
        x0, y0 = tl.load(ptr).to(tl.int32), tl.load(ptr + 1).to(tl.int32)
        x1, y1 = tl.load(ptr + 2).to(tl.int32), tl.load(ptr + 3).to(tl.int32)
        return Box(x0, y0, tl.where(y0 < y1, x1, x0), y1)


@triton.jit(do_not_specialize=["height", "label_height"])
def _first_pixels_kernel(
    first_ptr,  # int32 [h + 1]
    height,
    label_height,
    ratio,
    ALIGN_CORNERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first row of pixels whose upper logit is in row i or later, by bisection."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    axis = Axis(height, label_height, ratio)
    y, remaining = tl.zeros((BLOCK,), tl.int32), label_height
    while remaining > 0:
        half = tl.maximum(remaining // 2, 1)
        lower, _ = position(y + half - 1, axis, ALIGN_CORNERS)
        y += tl.where(lower < i, half, 0)
        remaining -= half
    tl.store(first_ptr + i, y, mask=i <= height)


@triton.jit(do_not_specialize=(*SIZES, *LOGITS, "tiles"))
def _count_changes_kernel(
    logits_ptr,  # [N, h, w]
    logits_n,
    logits_h,
    logits_w,
    height,
    width,
    label_height,
    label_width,
    ratio_y,
    ratio_x,
    level,
    boxes_ptr,  # int64 [N, 4], or None
    first_ptr,  # int32 [h + 1]
    tiles,
    counts_ptr,  # int32 [N, W]
    totals_ptr,  # int64 [6, N, tiles]
    ALIGN_CORNERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reads the logits of the box once. Writes the number of changes of each column; and of the
    program all changes, the number of pixels that are 1, and how far they reach from the right, the
    bottom, the left and the top of the image."""
    y_axis, x_axis = axes_of(height, width, label_height, label_width, ratio_y, ratio_x)
    mask, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    x = tile * BLOCK + tl.arange(0, BLOCK)
    box = box_of(boxes_ptr, mask, y_axis, x_axis)
    ptr = logits_ptr + mask * logits_n
    columns = walk(
        ptr, logits_h, logits_w, first_ptr, x, box, y_axis, x_axis, level, None, ALIGN_CORNERS
    )
    tl.store(counts_ptr + mask * label_width + x, columns.changes, mask=x < label_width)
    area = columns.area + tl.where(columns.ones, label_height, 0)
    bottom = tl.where(columns.ones, label_height, columns.bottom)
    some, programs = area > 0, tl.num_programs(0).to(tl.int64)
    totals_ptr += tl.program_id(0)
    tl.store(totals_ptr, tl.sum(columns.changes.to(tl.int64), 0))
    tl.store(totals_ptr + programs, tl.sum(area.to(tl.int64), 0))
    tl.store(totals_ptr + 2 * programs, tl.max(tl.where(some, label_width - x, 0), 0))
    tl.store(totals_ptr + 3 * programs, tl.max(tl.where(some, label_height - columns.top, 0), 0))
    tl.store(totals_ptr + 4 * programs, tl.max(tl.where(some, x + 1, 0), 0))
    tl.store(totals_ptr + 5 * programs, tl.max(tl.where(some, bottom, 0), 0))


@triton.jit(do_not_specialize=(*SIZES, *LOGITS, "tiles"))
def _write_changes_kernel(
    logits_ptr,  # [N, h, w]
    logits_n,
    logits_h,
    logits_w,
    height,
    width,
    label_height,
    label_width,
    ratio_y,
    ratio_x,
    level,
    boxes_ptr,  # int64 [N, 4], or None
    first_ptr,  # int32 [h + 1]
    tiles,
    counts_ptr,  # int32 [N, W]
    ends_ptr,  # int64 [N, tiles], where the changes of each program end
    changes_ptr,  # int64
    ALIGN_CORNERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reads the counts once. A program with changes reads the logits of the box, and writes the
    positions x·H + y of its changes."""
    y_axis, x_axis = axes_of(height, width, label_height, label_width, ratio_y, ratio_x)
    mask, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    x = tile * BLOCK + tl.arange(0, BLOCK)
    counts = tl.load(counts_ptr + mask * label_width + x, mask=x < label_width, other=0)
    counts = counts.to(tl.int64)
    total = tl.sum(counts, 0)
    if total != 0:
        end = tl.load(ends_ptr + tl.program_id(0))
        places = changes_ptr + (end - total + tl.cumsum(counts, 0) - counts)
        box = box_of(boxes_ptr, mask, y_axis, x_axis)
        ptr = logits_ptr + mask * logits_n
        walk(
            ptr, logits_h, logits_w, first_ptr, x, box, y_axis, x_axis, level, places, ALIGN_CORNERS
        )


def mask_rle(
    logits: Tensor,
    height: int,
    width: int,
    level: float,
    boxes: Tensor | None,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits (N, h, w); level: the largest logit that is not set; boxes: int64 [N, 4] on any device
    -> changes, int64: the positions x·H + y of each mask, one mask after another; offsets, int64
    [N + 1] on the CPU: where those of each mask begin; areas, int64 [N]; boxes, int64 [N, 4].

    It synchronises with the GPU once, for the offsets."""
    count, h, w = logits.shape
    if count == 0 or height * width == 0:
        offsets = torch.zeros(count + 1, dtype=torch.int64, device="cpu")
        areas, own_boxes = (logits.new_zeros(x, dtype=torch.int64) for x in (count, (count, 4)))
        return areas[:0], offsets, areas, own_boxes
    inner = int(align_corners)  # from the first to the last logit
    ratios = [(m - inner) / max(n - inner, 1) for m, n in ((h, height), (w, width))]
    options: dict[str, Any] = {"ALIGN_CORNERS": align_corners, "BLOCK": BLOCK_X, "num_warps": 1}
    options["enable_fp_fusion"] = False  # as on the CPU
    first = logits.new_empty((h + 1,), dtype=torch.int32)
    grid = (triton.cdiv(h + 1, BLOCK_X),)
    _first_pixels_kernel[grid](first, h, height, ratios[0], **options)
    boxes = None if boxes is None else boxes.contiguous().to(logits.device, non_blocking=True)
    tiles = triton.cdiv(width, BLOCK_X)
    arguments: list[Any] = [logits, *logits.stride(), h, w, height, width, *ratios, level]
    arguments += [boxes, first, tiles]
    counts = logits.new_empty((count, width), dtype=torch.int32)
    # zeros: a program that only compiles the kernels (bench/kernels_report.py) needs a total
    totals = logits.new_zeros((6, count, tiles), dtype=torch.int64)
    grid = (count * tiles,)
    _count_changes_kernel[grid](*arguments, counts_ptr=counts, totals_ptr=totals, **options)
    ends = totals[0].flatten().cumsum(0)
    offsets = F.pad(ends[tiles - 1 :: tiles], (1, 0)).cpu()
    changes = logits.new_empty((int(offsets[-1]),), dtype=torch.int64)
    _write_changes_kernel[grid](
        *arguments, counts_ptr=counts, ends_ptr=ends, changes_ptr=changes, **options
    )
    areas = totals[1].sum(1)
    from_right, from_bottom, x1, y1 = totals[2:].amax(2)
    own_boxes = torch.stack([width - from_right, height - from_bottom, x1, y1], 1)
    return changes, offsets, areas, own_boxes * (areas > 0)[:, None]
