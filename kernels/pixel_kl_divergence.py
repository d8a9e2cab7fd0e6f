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

from .lanes import INF, LN_2, LOG2_E, load_labels, pixel_map_of, repeated, store_map
from .launch import forward_lanes, without_spills
from .upsampling import (
    SIZES,
    YX,
    Axis,
    Cells,
    Ratios,
    Upsampling,
    axes_of,
    between,
    class_planes,
    coordinate,
    lanes_of_tile,
    logits_of,
    logits_of_image,
    logits_of_pixels,
    neighbours,
    upsampling_of,
    weights_of_part,
)

TEACHER_SIZES = ("teacher_height", "teacher_width")


class Around(NamedTuple):
    """The teacher's two logits around a pixel, along an axis."""

    lower: Any  # offset
    upper: Any
    weight: Any  # of the upper one


@triton.jit
def _around_pixels(start, axis, stride, SLOTS: tl.constexpr, CELLS: tl.constexpr):
    """For each slot of the student's lanes along an axis. Beyond the last pixel: the same as
    there."""
    around = ()
    for t in tl.static_range(SLOTS):
        pixel = tl.minimum(start + t, axis.pixels - 1)
        cell = tl.floor(coordinate(pixel, axis, CELLS)).to(tl.int32)
        cell = tl.minimum(cell, axis.source - 1)
        lower, upper = neighbours(cell, axis, stride)
        around = around + (Around(lower, upper, weights_of_part(cell, pixel, axis, CELLS)[0]),)
    return around


@triton.jit
def places_of_teacher(
    teacher, lanes, same_lanes, axes, teacher_size, ratios, CELLS: tl.constexpr, OWN: tl.constexpr
):
    """Where the lanes of the student read the teacher's logits: `same_lanes`, if these have the
    student's size; otherwise each pixel at its own place."""
    if OWN is None:
        return same_lanes
    else:
        Y: tl.constexpr = OWN.y
        X: tl.constexpr = OWN.x
        SLOTS_Y: tl.constexpr = CELLS.y.slots
        SLOTS_X: tl.constexpr = CELLS.x.slots
        y = Axis(teacher_size.y, axes.y.pixels, ratios.y, ratios.inverse_y, 0)
        x = Axis(teacher_size.x, axes.x.pixels, ratios.x, ratios.inverse_x, 0)
        return YX(
            _around_pixels(lanes.y.start, y, teacher.stride_h, SLOTS_Y, Y),
            _around_pixels(lanes.x.start, x, teacher.stride_w, SLOTS_X, X),
        )


@triton.jit
def teacher_logits_of_pixels(ptr, places, CELLS: tl.constexpr, OWN: tl.constexpr):
    """The teacher's logits of one class at the pixels of the student's lanes."""
    if OWN is None:
        return logits_of_pixels(ptr, places, CELLS)
    else:
        SLOTS_Y: tl.constexpr = CELLS.y.slots
        SLOTS_X: tl.constexpr = CELLS.x.slots
        z = ()
        for i in tl.static_range(SLOTS_Y):
            y = places.y[i]
            for j in tl.static_range(SLOTS_X):
                x = places.x[j]
                x00 = tl.load(ptr + y.lower + x.lower).to(tl.float32)
                x01 = tl.load(ptr + y.lower + x.upper).to(tl.float32)
                x10 = tl.load(ptr + y.upper + x.lower).to(tl.float32)
                x11 = tl.load(ptr + y.upper + x.upper).to(tl.float32)
                left = between(x00, x10, y.weight, OWN.y.select)
                right = between(x01, x11, y.weight, OWN.y.select)
                z = z + (between(left, right, x.weight, OWN.x.select),)
        return z


@triton.jit
def _larger(largest, z):
    out = ()
    for i in tl.static_range(len(z)):
        out = out + (tl.maximum(largest[i], z[i]),)
    return out


@triton.jit
def _finite(largest):
    """0 where all logits are −inf: with a shift of −inf they would become NaN."""
    out = ()
    for i in tl.static_range(len(largest)):
        out = out + (tl.where(largest[i] == -INF, 0.0, largest[i]),)
    return out


@triton.jit(do_not_specialize=(*SIZES, *TEACHER_SIZES, "tiles"))
def _pixel_kl_divergence_kernel(
    logits,  # Logits
    teacher,  # Logits
    valid_map,  # PixelMap of uint8: 0 or 1
    totals_ptr,  # float32 [B · tiles]
    divergences_ptr,  # float32 [B, H, W], or None; also the next two
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
    OWN: tl.constexpr,
    LANES: tl.constexpr,
):
    """Reads both logits from memory once, and from the caches for the second loop and for
    neighbours. Reads `valid` once. Writes the requested maps, and a number for each tile."""
    PIXELS: tl.constexpr = CELLS.y.slots * CELLS.x.slots
    axes = axes_of(height, width, label_height, label_width, ratios, CELLS)
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    logits, teacher = logits_of_image(logits, image), logits_of_image(teacher, image)
    lanes = lanes_of_tile(tile, axes, logits, CELLS, LANES)
    same_lanes = lanes_of_tile(tile, axes, teacher, CELLS, LANES)
    size = YX(teacher_height, teacher_width)
    places = places_of_teacher(teacher, lanes, same_lanes, axes, size, teacher_ratios, CELLS, OWN)
    valid = load_labels(valid_map, image, lanes, 2, 0, CELLS)

    largest = repeated(tl.full((LANES,), -INF, tl.float32), PIXELS)
    teacher_largest = largest
    ptr, teacher_ptr = logits.ptr, teacher.ptr
    for _ in range(logits.num_classes):
        largest = _larger(largest, logits_of_pixels(ptr, lanes, CELLS))
        t = teacher_logits_of_pixels(teacher_ptr, places, CELLS, OWN)
        teacher_largest = _larger(teacher_largest, t)
        ptr += logits.stride_k
        teacher_ptr += teacher.stride_k
    shift, teacher_shift = _finite(largest), _finite(teacher_largest)

    slope = LOG2_E / temperature
    sums = repeated(tl.zeros((LANES,), tl.float32), PIXELS)  # Σ e^s
    teacher_sums, differences = sums, sums  # Σ e^t, Σ e^t·(t − s)
    ptr, teacher_ptr = logits.ptr, teacher.ptr
    for _ in range(logits.num_classes):
        s = logits_of_pixels(ptr, lanes, CELLS)
        t = teacher_logits_of_pixels(teacher_ptr, places, CELLS, OWN)
        new_sums, new_teacher_sums, new_differences = (), (), ()
        for i in tl.static_range(PIXELS):
            of_student, of_teacher = s[i] - shift[i], t[i] - teacher_shift[i]
            e = tl.exp2(of_teacher * slope)
            new_sums = new_sums + (sums[i] + tl.exp2(of_student * slope),)
            new_teacher_sums = new_teacher_sums + (teacher_sums[i] + e,)
            term = tl.where(e == 0, 0.0, e * (of_teacher - of_student))
            new_differences = new_differences + (differences[i] + term,)
        sums, teacher_sums, differences = new_sums, new_teacher_sums, new_differences
        ptr += logits.stride_k
        teacher_ptr += teacher.stride_k

    total = tl.zeros((LANES,), tl.float32)
    divergences, lse, teacher_lse = (), (), ()
    for i in tl.static_range(PIXELS):
        log_ratio = tl.log2(sums[i] / teacher_sums[i]) * LN_2
        value = differences[i] / teacher_sums[i] / temperature + log_ratio
        value = tl.where(value < 0, 0.0, value)  # negative by rounding; NaN remains
        value = tl.where(valid[i] >= 0, temperature * (temperature * value), 0.0)
        total += value
        divergences = divergences + (value,)
        lse = lse + (shift[i] / temperature + tl.log2(sums[i]) * LN_2,)
        of_teacher = teacher_shift[i] / temperature + tl.log2(teacher_sums[i]) * LN_2
        teacher_lse = teacher_lse + (of_teacher,)
    tl.store(totals_ptr + tl.program_id(0), tl.sum(total, 0))
    if divergences_ptr is not None:
        store_map(divergences_ptr, divergences, image, lanes, axes, CELLS)
    if lse_ptr is not None:
        store_map(lse_ptr, lse, image, lanes, axes, CELLS)
        store_map(teacher_lse_ptr, teacher_lse, image, lanes, axes, CELLS)


class Grids(NamedTuple):
    """The upsampling of the student, the ratios of the teacher's, and its cells of which each pixel
    finds its own: None if the logits of both have the same size."""

    student: Upsampling
    ratios: Ratios
    own: YX | None


def _with_smaller_parts(axis: Axis, cells: Cells) -> tuple[Axis, Cells]:
    """Half as many pixels for each lane."""
    if cells.slots == 1:
        return axis, cells
    halved = cells._replace(parts=2 * cells.parts, slots=triton.cdiv(cells.slots, 2), even=False)
    return axis._replace(lanes=2 * axis.lanes), halved


def grids_of(logits: Tensor, teacher: Tensor, height: int, width: int, align: bool) -> Grids:
    upsampling = upsampling_of(logits, height, width, align)
    of_teacher = upsampling_of(teacher, height, width, align)
    if logits.shape == teacher.shape:
        return Grids(upsampling, of_teacher.ratios, None)
    # places of 16 pixels in the teacher's logits would need more registers than there are
    y, cells_y = _with_smaller_parts(upsampling.y, upsampling.cells.y)
    x, cells_x = _with_smaller_parts(upsampling.x, upsampling.cells.x)
    own = (cells._replace(parts=1, slots=1, even=False, same=False) for cells in of_teacher.cells)
    return Grids(Upsampling(y, x, YX(cells_y, cells_x)), of_teacher.ratios, YX(*own))


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
    grids = grids_of(logits, teacher_logits, height, width, align_corners)
    upsampling = grids.student
    block = forward_lanes()
    tiles = triton.cdiv(upsampling.lanes, block)
    totals = logits.new_empty(batch * tiles, dtype=torch.float32)
    _pixel_kl_divergence_kernel[(batch * tiles,)](
        logits_of(logits),
        logits_of(teacher_logits),
        pixel_map_of(all_or(valid, logits, height, width)),
        totals,
        *(x if x.numel() else None for x in maps),
        *upsampling.sizes,
        *teacher_logits.shape[2:],
        upsampling.ratios,
        grids.ratios,
        tiles,
        temperature,
        CELLS=upsampling.cells,
        OWN=grids.own,
        LANES=block,
        num_warps=max(block // 32, 1),
        enable_fp_fusion=False,  # coordinates as in F.interpolate
        **without_spills(),
    )
    return totals.sum(), *maps
