"""The divergence of upsampled logits from a teacher's: see _ops/pixel_kl_divergence.py.

A lane (upsampling.py) is a part of a cell of the student's logits. If the teacher's logits have the
same size, a lane reads four of them for all its pixels; otherwise four for each pixel. A first loop
over the classes finds the largest logits of each cell, a second one the sums. They may underflow,
if the neighbours of a cell differ by about 70·T (by 21·T where a lane's rows have four equally
spaced pixels, whose exponentials are a geometric sequence). Then, and if the teacher has another
size, the largest logits of each pixel are found, and the sums again.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .constants import INF, LN_2, LOG2_E, Constant
from .exponentials import (
    LARGEST_SPREAD,
    LOWEST,
    SMALLEST_SUM,
    exponentials_of_rows,
    finite_or_zero,
    underflow,
)
from .lanes import (
    PixelMap,
    any_of,
    contiguous_map,
    inside_of,
    load_labels,
    pixel_map_of,
    store_map,
    sum_of,
)
from .launch import without_spills
from .upsampling import (
    FORWARD_LANES,
    LOGITS,
    SIZES,
    YX,
    Grid,
    Logits,
    Span,
    Upsampling,
    axes_of,
    class_after,
    class_planes,
    coordinate,
    corner_ptrs,
    corners_of,
    following,
    lanes_of_tile,
    loaded,
    logits_of_image,
    neighbours_of_lane,
    rows_of_lane,
    strides_of,
    upsampled,
    upsampling_of,
    weight_of,
    zeros_of_pixels,
)

TEACHER = ("teacher_height", "teacher_width", *strides_of("teacher", "bkhw"))
VALID = strides_of("valid", "bhw")
# In even cells exponentials below 2^-66 may be lost (exponentials.py); with this sum p below 2^-36.
# And t − s is at most 2^13 (_add_class_of_rows), so a term of the divergence is below 2^-23.
_SMALLEST_SUM_OF_ROWS = Constant(2.0**-30)


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
    logits: Tensor,
    teacher: Tensor,
    height: int,
    width: int,
    align_corners: bool,
    maps: tuple[Tensor | None, ...],
) -> Upsamplings:
    """maps: see upsampling_of."""
    if logits.shape == teacher.shape:
        both = upsampling_of(logits, height, width, align_corners, maps=(teacher, *maps))
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
    lower, upper = neighbours_of_lane(cell, axis, stride, CELLS)
    weight = weight_of(0, cell, 0, pixel, axis, CELLS)
    return Span(cell, pixel, pixel + 1, weight, lower, upper)


@triton.jit
def _column(span):
    """Along the columns, weights are a list."""
    return Span(span.cell, span.start, span.stop, (span.weights,), span.lower, span.upper)


@triton.jit
def _with_stride(span, axis, stride, CELLS: tl.constexpr):
    """The span for logits of the same size with another stride."""
    lower, upper = neighbours_of_lane(span.cell, axis, stride, CELLS)
    return Span(span.cell, span.start, span.stop, span.weights, lower, upper)


@triton.jit
def teacher_lanes(
    teacher, lanes, axes, height, width, ratios, CELLS: tl.constexpr, TEACHER_GRID: tl.constexpr
):
    """Lanes that read the teacher's logits: those of the student, or one lane for each pixel, a
    list as that of the pixels."""
    if TEACHER_GRID is None:
        CELLS_Y: tl.constexpr = CELLS.y
        CELLS_X: tl.constexpr = CELLS.x
        y = _with_stride(lanes.y, axes.y, teacher.stride_h, CELLS_Y)
        return (YX(y, _with_stride(lanes.x, axes.x, teacher.stride_w, CELLS_X)),)
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
def load_valid(valid_map, image, lanes, CELLS: tl.constexpr):
    """1 where valid, −1 elsewhere; without a map all pixels are valid."""
    if valid_map.ptr is None:
        return [tl.where(inside, 1, -1) for inside in inside_of(lanes, CELLS)]
    else:
        return load_labels(valid_map, image, lanes, 2, 0, CELLS)


@triton.jit
def loaded_of_both(
    ptr, teacher_ptr, lanes, teacher_lanes, CELLS: tl.constexpr, TEACHER_GRID: tl.constexpr
):
    """What a lane reads of one class, of the student's logits and of the teacher's. The pointers
    are computed for each class: there are many, if the teacher has another size."""
    stored = loaded(corner_ptrs(ptr, lanes, CELLS))
    if TEACHER_GRID is None:
        return stored, loaded(corner_ptrs(teacher_ptr, teacher_lanes[0], CELLS))
    else:
        return stored, [loaded(corner_ptrs(teacher_ptr, x, TEACHER_GRID)) for x in teacher_lanes]


@triton.jit
def _exponents(stored, lanes, log2e, shift, CELLS: tl.constexpr):
    """log2e·z − shift of a lane's pixels. The weights of a pixel's four logits add up to 1, so this
    can be upsampled."""
    four = [tl.fma(x, log2e, -shift) for x in corners_of(stored, CELLS)]
    return upsampled(four, lanes, CELLS)


@triton.jit
def exponents_of_both(
    stored, lanes, teacher_lanes, log2e, shifts, CELLS: tl.constexpr, TEACHER_GRID: tl.constexpr
):
    """log2 e^(z/T) of the student and the teacher at the student's pixels, less a shift of each
    lane. log2e = log2(e)/T"""
    s = _exponents(stored[0], lanes, log2e, shifts[0], CELLS)
    if TEACHER_GRID is None:
        return s, _exponents(stored[1], teacher_lanes[0], log2e, shifts[1], CELLS)
    else:
        t = [
            upsampled(corners_of(stored[1][i], TEACHER_GRID), teacher_lanes[i], TEACHER_GRID)[0]
            for i in () + CELLS.columns
        ]
        return s, [x * log2e for x in t]


@triton.jit
def _largest_of_cells(logits, teacher, lanes, teacher_lanes, log2e, CELLS: tl.constexpr):
    """The largest exponents of each cell."""
    largest = tl.zeros(lanes.x.cell.shape, tl.float32) - INF
    teacher_largest = largest
    ptrs = corner_ptrs(logits.ptr, lanes, CELLS)
    teacher_ptrs = corner_ptrs(teacher.ptr, teacher_lanes[0], CELLS)
    stored, teacher_stored = loaded(ptrs), loaded(teacher_ptrs)
    for k in range(logits.num_classes):
        four, teacher_four = corners_of(stored, CELLS), corners_of(teacher_stored, CELLS)
        ptrs = following(ptrs, k, logits, CELLS)
        teacher_ptrs = following(teacher_ptrs, k, teacher, CELLS)
        stored, teacher_stored = loaded(ptrs), loaded(teacher_ptrs)
        # tl.maximum of NaN and a number returns the number; the sum is still NaN
        for i in tl.static_range(4):
            largest = tl.maximum(largest, four[i])
            teacher_largest = tl.maximum(teacher_largest, teacher_four[i])
    return finite_or_zero(largest) * log2e, finite_or_zero(teacher_largest) * log2e


@triton.jit
def _largest_of_pixels(
    logits, teacher, lanes, teacher_lanes, log2e, CELLS: tl.constexpr, TEACHER_GRID: tl.constexpr
):
    """The largest exponents of each pixel."""
    none = zeros_of_pixels(lanes, CELLS) - INF
    largest = [none for _ in () + CELLS.columns]
    teacher_largest = [none for _ in () + CELLS.columns]
    ptr, teacher_ptr = logits.ptr, teacher.ptr
    for _ in range(logits.num_classes):
        stored = loaded_of_both(ptr, teacher_ptr, lanes, teacher_lanes, CELLS, TEACHER_GRID)
        s, t = exponents_of_both(
            stored, lanes, teacher_lanes, log2e, (0.0, 0.0), CELLS, TEACHER_GRID
        )
        largest = [tl.maximum(largest[i], s[i]) for i in () + CELLS.columns]
        teacher_largest = [tl.maximum(teacher_largest[i], t[i]) for i in () + CELLS.columns]
        ptr += logits.stride_k
        teacher_ptr += teacher.stride_k
    return [finite_or_zero(x) for x in largest], [finite_or_zero(x) for x in teacher_largest]


@triton.jit
def _add_class(sums, s, t, CELLS: tl.constexpr):
    e = [tl.exp2(x) for x in t]
    terms = [tl.where(e[i] == 0, 0.0, e[i] * (t[i] - s[i])) for i in () + CELLS.columns]
    return (
        [sums[0][i] + tl.exp2(s[i]) for i in () + CELLS.columns],
        [sums[1][i] + e[i] for i in () + CELLS.columns],
        [sums[2][i] + terms[i] for i in () + CELLS.columns],
    )


@triton.jit
def _no_sums(lanes, CELLS: tl.constexpr):
    """Of Σ 2^s, Σ 2^t and Σ 2^t·(t − s), with the exponents s and t of a pixel."""
    zero = zeros_of_pixels(lanes, CELLS)
    return (
        [zero for _ in () + CELLS.columns],
        [zero for _ in () + CELLS.columns],
        [zero for _ in () + CELLS.columns],
    )


@triton.jit
def _add_class_of_rows(sums, spread, stored, lanes, log2e, shifts, CELLS: tl.constexpr):
    """_add_class in an even cell, whose rows are geometric sequences. And the larger of `spread`
    and that of this class, which also exceeds LARGEST_SPREAD if t − s exceeds 2^13."""
    # The limit is for −∞, so that two of them have a difference.
    four, teacher_four = corners_of(stored[0], CELLS), corners_of(stored[1], CELLS)
    ends = [tl.maximum(tl.fma(x, log2e, -shifts[0]), LOWEST, tl.PropagateNan.ALL) for x in four]
    teacher_ends = [
        tl.maximum(tl.fma(x, log2e, -shifts[1]), LOWEST, tl.PropagateNan.ALL) for x in teacher_four
    ]
    students, across, _ = exponentials_of_rows(ends, lanes, CELLS)
    teachers, teacher_across, _ = exponentials_of_rows(teacher_ends, lanes, CELLS)
    four = [teacher_ends[i] - ends[i] for i in (0, 1, 2, 3)]
    differences = upsampled(four, lanes, CELLS)
    spread = tl.maximum(spread, tl.maximum(across, teacher_across))
    spread = tl.maximum(spread, tl.maximum(four[0], four[2]) * 0.01)
    sums = (
        [sums[0][i] + students[i] for i in () + CELLS.columns],
        [sums[1][i] + teachers[i] for i in () + CELLS.columns],
        [tl.fma(teachers[i], differences[i], sums[2][i]) for i in () + CELLS.columns],
    )
    return sums, spread


@triton.jit
def _sums_by_cell(logits, teacher, lanes, teacher_lanes, log2e, CELLS: tl.constexpr):
    """The sums, less the shifts; the shifts of each lane, which are the largest exponents; and the
    largest spread. Rows of two pixels would need as many exponentials as now."""
    shifts = _largest_of_cells(logits, teacher, lanes, teacher_lanes, log2e, CELLS)
    sums, spread = _no_sums(lanes, CELLS), tl.zeros(lanes.x.cell.shape, tl.float32)
    ptr, teacher_ptr = logits.ptr, teacher.ptr
    stored = loaded_of_both(ptr, teacher_ptr, lanes, teacher_lanes, CELLS, None)
    for k in range(logits.num_classes):
        now = stored
        ptr, teacher_ptr = class_after(ptr, k, logits), class_after(teacher_ptr, k, teacher)
        if CELLS.x.even and CELLS.x.pixels == 4:
            stored = loaded_of_both(ptr, teacher_ptr, lanes, teacher_lanes, CELLS, None)
            sums, spread = _add_class_of_rows(sums, spread, now, lanes, log2e, shifts, CELLS)
        else:
            s, t = exponents_of_both(now, lanes, teacher_lanes, log2e, shifts, CELLS, None)
            stored = loaded_of_both(ptr, teacher_ptr, lanes, teacher_lanes, CELLS, None)
            sums = _add_class(sums, s, t, CELLS)
    return sums, shifts, spread


@triton.jit
def _results(sums, shifts, CELLS: tl.constexpr):
    """(lse s)·log2(e), (lse t)·log2(e) and the divergence of each pixel, with its sums and their
    shifts. The logarithms are to base 2, as the exponents of which the gradient subtracts them: if
    one class has all, the difference is 0, however large both are."""
    students, teachers, differences = sums
    return (
        [shifts[0][i] + tl.log2(students[i]) for i in () + CELLS.columns],
        [shifts[1][i] + tl.log2(teachers[i]) for i in () + CELLS.columns],
        [
            (differences[i] / teachers[i] + tl.log2(students[i] / teachers[i])) * LN_2
            for i in () + CELLS.columns
        ],
    )


@triton.jit
def _results_by_pixel(
    logits, teacher, lanes, teacher_lanes, log2e, CELLS: tl.constexpr, TEACHER_GRID: tl.constexpr
):
    """_results, with shifts of each pixel. Registers do not suffice to load one class ahead."""
    largest, teacher_largest = _largest_of_pixels(
        logits, teacher, lanes, teacher_lanes, log2e, CELLS, TEACHER_GRID
    )
    sums = _no_sums(lanes, CELLS)
    ptr, teacher_ptr = logits.ptr, teacher.ptr
    for _ in range(logits.num_classes):
        stored = loaded_of_both(ptr, teacher_ptr, lanes, teacher_lanes, CELLS, TEACHER_GRID)
        s, t = exponents_of_both(
            stored, lanes, teacher_lanes, log2e, (0.0, 0.0), CELLS, TEACHER_GRID
        )
        s = [s[i] - largest[i] for i in () + CELLS.columns]
        t = [t[i] - teacher_largest[i] for i in () + CELLS.columns]
        sums = _add_class(sums, s, t, CELLS)
        ptr += logits.stride_k
        teacher_ptr += teacher.stride_k
    return _results(sums, (largest, teacher_largest), CELLS)


@triton.jit
def _divergences(
    logits, teacher, lanes, teacher_lanes, valid, log2e,
    CELLS: tl.constexpr, TEACHER_GRID: tl.constexpr,
):  # fmt: skip
    """_results: they need fewer registers than the sums and shifts."""
    if TEACHER_GRID is None:
        sums, cell_shifts, spread = _sums_by_cell(
            logits, teacher, lanes, teacher_lanes, log2e, CELLS
        )
        shifts = [[shift for _ in () + CELLS.columns] for shift in cell_shifts]
        results = _results(sums, shifts, CELLS)
        ROWS: tl.constexpr = CELLS.x.even and CELLS.x.pixels == 4
        SMALLEST: tl.constexpr = _SMALLEST_SUM_OF_ROWS if ROWS else SMALLEST_SUM
        unsafe = underflow(sums[0], valid, SMALLEST) | underflow(sums[1], valid, SMALLEST)
        by_pixel = any_of((spread > LARGEST_SPREAD) | unsafe)
        if by_pixel:
            results = _results_by_pixel(logits, teacher, lanes, teacher_lanes, log2e, CELLS, None)
        return results
    else:
        return _results_by_pixel(logits, teacher, lanes, teacher_lanes, log2e, CELLS, TEACHER_GRID)


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
    valid_ptr,  # uint8 [B, H, W]: 0 or 1, or None
    valid_b,
    valid_h,
    valid_w,
    totals_ptr,  # float32 [B · tiles]
    divergences_ptr,  # float32 [B, H, W] or None, contiguous; also the next two
    lse_ptr,  # to base 2; also the next one
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
    temperature_ptr,  # float32 []
    CELLS: tl.constexpr,
    TEACHER_GRID: tl.constexpr,
    LANES: tl.constexpr,
):
    """Reads both logits from memory once, and from the caches for further loops and for
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
    valid = load_valid(valid_map, image, lanes, CELLS)

    temperature = tl.load(temperature_ptr)
    lse, teacher_lse, values = _divergences(
        logits, teacher, lanes, lanes_of_teacher, valid, LOG2_E / temperature, CELLS, TEACHER_GRID
    )
    if lse_ptr is not None:
        store_map(contiguous_map(lse_ptr, axes), lse, image, lanes, CELLS)
        store_map(contiguous_map(teacher_lse_ptr, axes), teacher_lse, image, lanes, CELLS)
    values = [tl.where(x < 0, 0.0, x) for x in values]  # negative by rounding; NaN remains
    values = [
        tl.where(valid[i] >= 0, temperature * (temperature * values[i]), 0.0)
        for i in () + CELLS.columns
    ]
    total = zeros_of_pixels(lanes, CELLS)
    for i in tl.static_range(len(values)):
        total += values[i]
    tl.store(totals_ptr + tl.program_id(0), sum_of(total))
    if divergences_ptr is not None:
        store_map(contiguous_map(divergences_ptr, axes), values, image, lanes, CELLS)


def valid_map_of(valid: Tensor | None) -> PixelMap:
    return pixel_map_of(None if valid is None else valid.view(torch.uint8))


def pixel_kl_divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    valid: Tensor | None,
    height: int,
    width: int,
    temperature: Tensor,
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
    upsamplings = upsamplings_of(
        logits, teacher_logits, height, width, align_corners, maps=(valid,)
    )
    block = FORWARD_LANES
    tiles = triton.cdiv(upsamplings.student.lanes, block)
    totals = logits.new_empty((batch * tiles,), dtype=torch.float32)
    _pixel_kl_divergence_kernel[(batch * tiles,)](
        logits,
        *logits.stride(),
        logits.shape[1],
        teacher_logits,
        *teacher_logits.stride(),
        *valid_map_of(valid),
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
