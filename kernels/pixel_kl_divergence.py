"""The divergence of upsampled logits from a teacher's: see _ops/pixel_kl_divergence.py.

A lane (upsampling.py) is a part of a cell of the student's logits. If the teacher's logits have the
same size, a lane reads four of them for all its pixels; otherwise four for each pixel. A first loop
over the classes finds the largest logits of each pixel, a second one the sums.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lanes import (
    INF,
    LN_2,
    LOG2_E,
    PixelMap,
    contiguous_map,
    load_labels,
    pixel_map_of,
    store_map,
    sum_of,
)
from .launch import FORWARD_LANES, architecture, without_spills
from .softmax import finite_or_zero
from .upsampling import (
    LOGITS,
    SIZES,
    YX,
    Grid,
    Logits,
    Span,
    Upsampling,
    axes_of,
    class_planes,
    coordinate,
    corner_ptrs,
    lanes_of_tile,
    logits_of_image,
    logits_of_pixels,
    neighbours,
    rows_of_lane,
    strides_of,
    upsampling_of,
    weight_of,
    zeros_of_pixels,
)

TEACHER = ("teacher_height", "teacher_width", *strides_of("teacher", "bkhw"))
VALID = strides_of("valid", "bhw")


class Upsamplings(NamedTuple):
    """`teacher_grid`: the teacher's cells, each pixel a part; None if the logits of both have
    the same size."""

    student: Upsampling
    teacher: Upsampling
    teacher_grid: Grid | None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of a kernel SIZES, the teacher's size, ratios and teacher_ratios."""
        student, teacher = self.student, self.teacher
        return *student.sizes, *teacher.sizes[:2], student.ratios, teacher.ratios


def upsamplings_of(
    logits: Tensor, teacher: Tensor, height: int, width: int, align_corners: bool
) -> Upsamplings:
    if logits.shape == teacher.shape:
        # there 16 pixels of both need more registers than a thread has
        rows = 2 if architecture() == "sm_100" else None
        both = upsampling_of(logits, height, width, align_corners, rows)
        return Upsamplings(both, both, None)
    # places of 16 pixels in the teacher's logits would need more registers than there are
    student = upsampling_of(logits, height, width, align_corners, 2, 2)
    teacher_upsampling = upsampling_of(teacher, height, width, align_corners, 1, 1)
    y, x, columns = teacher_upsampling.cells
    teacher_grid = Grid(
        y._replace(parts=1), x._replace(parts=1), columns
    )  # no kernel reads the parts
    return Upsamplings(student, teacher_upsampling, teacher_grid)


@triton.jit
def _span_of_pixel(pixel, axis, stride, CELLS: tl.constexpr):
    """A part of this pixel. Beyond the last pixel: the same as there."""
    pixel = tl.minimum(pixel, axis.pixels - 1)
    cell = tl.floor(coordinate(pixel, axis, CELLS.align_corners)).to(tl.int32)
    cell = tl.minimum(cell, axis.source - 1)
    lower, upper = neighbours(cell, axis, stride, CELLS)
    weight = weight_of(0, cell, pixel, axis, CELLS)
    return Span(cell, pixel, pixel + 1, weight, lower, upper)


@triton.jit
def _column(span):
    """Along the columns, weights are a list."""
    return Span(span.cell, span.start, span.stop, (span.weights,), span.lower, span.upper)


@triton.jit
def _with_stride(span, axis, stride, CELLS: tl.constexpr):
    """The span for logits of the same size with another stride."""
    lower, upper = neighbours(span.cell, axis, stride, CELLS)
    return Span(span.cell, span.start, span.stop, span.weights, lower, upper)


@triton.jit
def teacher_lanes(
    teacher, lanes, axes, height, width, ratios, CELLS: tl.constexpr, TEACHER_GRID: tl.constexpr
):
    """Lanes that read the teacher's logits: those of the student, or one lane for each pixel, a
    list as that of the pixels."""
    if TEACHER_GRID is None:
        y = _with_stride(lanes.y, axes.y, teacher.stride_h, CELLS.y)
        return (YX(y, _with_stride(lanes.x, axes.x, teacher.stride_w, CELLS.x)),)
    else:
        Y: tl.constexpr = TEACHER_GRID.y
        X: tl.constexpr = TEACHER_GRID.x
        teacher_axes = axes_of(height, width, axes.y.pixels, axes.x.pixels, ratios, TEACHER_GRID)
        y = _span_of_pixel(lanes.y.start + rows_of_lane(CELLS), teacher_axes.y, teacher.stride_h, Y)
        x = [
            _span_of_pixel(lanes.x.start + i, teacher_axes.x, teacher.stride_w, X)
            for i in () + CELLS.columns
        ]
        return [YX(y, _column(span)) for span in x]


@triton.jit
def teacher_logits(ptr, teacher_lanes, CELLS: tl.constexpr, TEACHER_GRID: tl.constexpr):
    """The teacher's logits of one class at the student's pixels."""
    if TEACHER_GRID is None:
        ptrs = corner_ptrs(ptr, teacher_lanes[0], CELLS)
        return logits_of_pixels(ptrs, teacher_lanes[0], CELLS)
    else:
        return [
            logits_of_pixels(corner_ptrs(ptr, lanes, TEACHER_GRID), lanes, TEACHER_GRID)[0]
            for lanes in teacher_lanes
        ]


@triton.jit(do_not_specialize=(*SIZES, *LOGITS, *TEACHER, *VALID, "tiles"))
def _pixel_kl_divergence_kernel(
    logits_ptr,  # [B, K, h, w]
    logits_b,
    logits_k,
    logits_h,
    logits_w,
    num_classes,
    teacher_ptr,  # the same, of any size
    teacher_b,
    teacher_k,
    teacher_h,
    teacher_w,
    valid_ptr,  # uint8 [B, H, W]: 0 or 1
    valid_b,
    valid_h,
    valid_w,
    totals_ptr,  # float32 [B · tiles]
    divergences_ptr,  # float32 [B, H, W] or None, contiguous; also the next two
    lse_ptr,
    teacher_lse_ptr,
    height,
    width,
    label_height,
    label_width,
    teacher_height,
    teacher_width,
    ratios,
    teacher_ratios,
    tiles,
    temperature,
    CELLS: tl.constexpr,
    TEACHER_GRID: tl.constexpr,
    LANES: tl.constexpr,
):
    """Reads both logits from memory once, and from the caches for the second loop and for
    neighbours. Reads `valid` once. Writes the requested maps, and a number for each tile."""
    axes = axes_of(height, width, label_height, label_width, ratios, CELLS)
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    logits = Logits(logits_ptr, num_classes, logits_b, logits_k, logits_h, logits_w)
    teacher = Logits(teacher_ptr, num_classes, teacher_b, teacher_k, teacher_h, teacher_w)
    logits, teacher = logits_of_image(logits, image), logits_of_image(teacher, image)
    lanes = lanes_of_tile(tile, axes, logits, CELLS, LANES)
    lanes_of_teacher = teacher_lanes(
        teacher, lanes, axes, teacher_height, teacher_width, teacher_ratios, CELLS, TEACHER_GRID
    )
    valid_map = PixelMap(valid_ptr, valid_b, valid_h, valid_w)
    valid = load_labels(valid_map, image, lanes, 2, 0, CELLS)

    zero = zeros_of_pixels(lanes, CELLS)
    largest = [zero - INF for _ in () + CELLS.columns]
    teacher_largest = [zero - INF for _ in () + CELLS.columns]
    ptr, teacher_ptr = logits.ptr, teacher.ptr
    for _ in range(logits.num_classes):
        s = logits_of_pixels(corner_ptrs(ptr, lanes, CELLS), lanes, CELLS)
        t = teacher_logits(teacher_ptr, lanes_of_teacher, CELLS, TEACHER_GRID)
        # tl.maximum of NaN and a number returns the number; the sum is still NaN
        largest = [tl.maximum(largest[i], s[i]) for i in () + CELLS.columns]
        teacher_largest = [tl.maximum(teacher_largest[i], t[i]) for i in () + CELLS.columns]
        ptr += logits.stride_k
        teacher_ptr += teacher.stride_k
    shift = [finite_or_zero(x) for x in largest]
    teacher_shift = [finite_or_zero(x) for x in teacher_largest]

    slope = LOG2_E / temperature
    sums, teacher_sums, differences = (  # Σ e^s, Σ e^t, Σ e^t·(t − s)
        [zero for _ in () + CELLS.columns],
        [zero for _ in () + CELLS.columns],
        [zero for _ in () + CELLS.columns],
    )
    ptr, teacher_ptr = logits.ptr, teacher.ptr
    for _ in range(logits.num_classes):
        s = logits_of_pixels(corner_ptrs(ptr, lanes, CELLS), lanes, CELLS)
        t = teacher_logits(teacher_ptr, lanes_of_teacher, CELLS, TEACHER_GRID)
        s = [s[i] - shift[i] for i in () + CELLS.columns]
        t = [t[i] - teacher_shift[i] for i in () + CELLS.columns]
        e = [tl.exp2(t[i] * slope) for i in () + CELLS.columns]
        terms = [tl.where(e[i] == 0, 0.0, e[i] * (t[i] - s[i])) for i in () + CELLS.columns]
        sums = [sums[i] + tl.exp2(s[i] * slope) for i in () + CELLS.columns]
        teacher_sums = [teacher_sums[i] + e[i] for i in () + CELLS.columns]
        differences = [differences[i] + terms[i] for i in () + CELLS.columns]
        ptr += logits.stride_k
        teacher_ptr += teacher.stride_k

    values = [
        differences[i] / teacher_sums[i] / temperature + tl.log2(sums[i] / teacher_sums[i]) * LN_2
        for i in () + CELLS.columns
    ]
    values = [tl.where(x < 0, 0.0, x) for x in values]  # negative by rounding; NaN remains
    values = [
        tl.where(valid[i] >= 0, temperature * (temperature * values[i]), 0.0)
        for i in () + CELLS.columns
    ]
    total = zero
    for i in tl.static_range(len(values)):
        total += values[i]
    tl.store(totals_ptr + tl.program_id(0), sum_of(total))
    if divergences_ptr is not None:
        store_map(contiguous_map(divergences_ptr, axes), values, image, lanes, CELLS)
    if lse_ptr is not None:
        lse = [shift[i] / temperature + tl.log2(sums[i]) * LN_2 for i in () + CELLS.columns]
        store_map(contiguous_map(lse_ptr, axes), lse, image, lanes, CELLS)
        teacher_lse = [
            teacher_shift[i] / temperature + tl.log2(teacher_sums[i]) * LN_2
            for i in () + CELLS.columns
        ]
        store_map(contiguous_map(teacher_lse_ptr, axes), teacher_lse, image, lanes, CELLS)


def all_or(valid: Tensor | None, logits: Tensor, height: int, width: int) -> Tensor:
    """`valid` as uint8; by default all pixels, without memory for each."""
    if valid is None:
        return logits.new_ones(1, dtype=torch.uint8).expand(logits.shape[0], height, width)
    return valid.view(torch.uint8)


def pixel_kl_divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    valid: Tensor | None,
    height: int,
    width: int,
    temperature: float,
    align_corners: bool,
    with_divergences: bool,
    with_lse: bool,
) -> tuple[Tensor, ...]:
    """See _ops/pixel_kl_divergence.py. Logits whose classes are contiguous are copied."""
    batch = logits.shape[0]

    def pixel_map(wanted: bool) -> Tensor:
        shape = (batch, height, width) if wanted else (0,)
        return logits.new_empty(shape, dtype=torch.float32)

    maps = [pixel_map(wanted) for wanted in (with_divergences, with_lse, with_lse)]
    if batch * height * width == 0:
        return logits.new_zeros((), dtype=torch.float32), *maps
    logits, teacher_logits = class_planes(logits), class_planes(teacher_logits)
    upsamplings = upsamplings_of(logits, teacher_logits, height, width, align_corners)
    block = FORWARD_LANES
    tiles = triton.cdiv(upsamplings.student.lanes, block)
    totals = logits.new_empty(batch * tiles, dtype=torch.float32)
    _pixel_kl_divergence_kernel[(batch * tiles,)](
        logits,
        *logits.stride(),
        logits.shape[1],
        teacher_logits,
        *teacher_logits.stride(),
        *pixel_map_of(all_or(valid, logits, height, width)),
        totals,
        *(x if x.numel() else None for x in maps),
        *upsamplings.arguments,
        tiles,
        temperature,
        CELLS=upsamplings.student.cells,
        TEACHER_GRID=upsamplings.teacher_grid,
        LANES=block,
        num_warps=block // 32,
        enable_fp_fusion=False,  # coordinates as in F.interpolate
        **without_spills(),
    )
    return totals.sum(), *maps
