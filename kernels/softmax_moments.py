"""Softmax moments: see ops/softmax_moments.py.

A lane (upsampling.py) reads its four logits class by class. For each of its pixels it keeps
Σ_k e^(z_k − m) in registers, where m is the largest logit of the cell so far. If the neighbours of
a cell differ by about 70, this underflows. Then the lanes of the program find the maximum of each
pixel in a second loop over the classes, and the sums in a third. Masses and squares need one more
loop. Statistics of the true class are summed for one label of the tile after the other.

A program adds to its own partials; torch.sum adds these in a fixed order. Hits and counts use
integer atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lanes import INF, LN_2, LOG2_E, NO_CLASS, filled, load_labels, next_label
from .launch import PARTIALS_IN_CACHE, architecture, forward_lanes, without_spills
from .upsampling import (
    SIZES,
    along_axis,
    class_planes,
    corners,
    first_larger,
    logits_of_pixels,
    upsampled,
    upsampling_of,
)

# Below this sum, terms that matter may have underflowed.
SMALLEST_SUM = tl.constexpr(2.0**-100)


@triton.jit
def finite_or_zero(shift):
    """The shift, or 0 if it is −inf: if all logits are −inf, a shift of −inf would give NaN."""
    return tl.where(shift == -INF, 0.0, shift)


@triton.jit
def _add_to(ptr, value):
    tl.store(ptr, tl.load(ptr) + value)


@triton.jit(do_not_specialize=(*SIZES, "lanes_x", "lanes", "chunks", "tiles_per_chunk"))
def _softmax_moments_kernel(
    logits_ptr,  # [B, K, h, w] by strides
    labels_ptr,  # integer [B, H, W] by strides
    losses_ptr,  # partials: float32 [B · chunks, K], zero on entry; also the next three
    overlaps_ptr,
    masses_ptr,
    squares_ptr,
    pixel_losses_ptr,  # float32 [B, H, W]
    lse_ptr,  # float32 [B, H, W]
    counts_ptr,  # int64 [K] or [B, K], zero on entry
    hits_ptr,  # the same
    num_classes,
    height,
    width,
    label_height,
    label_width,
    ratio_y,
    ratio_x,
    inverse_y,
    inverse_x,
    lanes_x,
    lanes,
    chunks,
    tiles_per_chunk,
    ignore_index,
    stride_logits_b,
    stride_logits_k,
    stride_logits_h,
    stride_logits_w,
    stride_labels_b,
    stride_labels_h,
    stride_labels_w,
    stride_counts_b,
    HAS_HITS: tl.constexpr,
    HAS_MASSES: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    HAS_PIXEL_LOSSES: tl.constexpr,
    HAS_LSE: tl.constexpr,
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
    LANES: tl.constexpr,
):
    """Reads the logits of a tile once from memory, and again from the caches for each further loop
    and for neighbours. Reads each label once. Writes the requested maps. For each tile it writes
    one number per class for masses and for squares, and one per label of the tile for the other
    statistics."""
    PIXELS: tl.constexpr = SLOTS_Y * SLOTS_X
    image, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    row = tl.program_id(0).to(tl.int64) * num_classes
    counted = image.to(tl.int64) * stride_counts_b
    logits_ptr += image.to(tl.int64) * stride_logits_b
    labels_ptr += image.to(tl.int64) * stride_labels_b
    first_label = image.to(tl.int64) * label_height * label_width

    tiles = tl.cdiv(lanes, LANES)
    for tile in range(chunk * tiles_per_chunk, tl.minimum((chunk + 1) * tiles_per_chunk, tiles)):
        lane = tile * LANES + tl.arange(0, LANES)
        lane_y, lane_x = lane // lanes_x, lane % lanes_x
        cell_y, cell_x = lane_y // PARTS_Y + FIRST_Y, lane_x // PARTS_X + FIRST_X
        start_y, stop_y, weights_y, lower_y, upper_y = along_axis(
            cell_y, lane_y % PARTS_Y, height, label_height, ratio_y, inverse_y, stride_logits_h,
            FIRST_Y, SLOTS_Y, EVEN_Y, ALIGN_CORNERS, SAME,
        )  # fmt: skip
        start_x, stop_x, weights_x, lower_x, upper_x = along_axis(
            cell_x, lane_x % PARTS_X, width, label_width, ratio_x, inverse_x, stride_logits_w,
            FIRST_X, SLOTS_X, EVEN_X, ALIGN_CORNERS, SAME,
        )  # fmt: skip
        labels = load_labels(
            labels_ptr, start_y, stop_y, start_x, stop_x, stride_labels_h, stride_labels_w,
            num_classes, ignore_index, SLOTS_Y, SLOTS_X,
        )  # fmt: skip

        maximum = tl.full((LANES,), -INF, tl.float32)
        shift = tl.zeros((LANES,), tl.float32)
        sums = filled(0.0, LANES, PIXELS, tl.float32)
        best = filled(-INF, LANES, PIXELS if HAS_HITS else 0, tl.float32)
        predicted = filled(0, LANES, PIXELS if HAS_HITS else 0, tl.int32)
        ptr = logits_ptr
        for k in range(num_classes):
            x00, x01, x10, x11 = corners(ptr, lower_y, upper_y, lower_x, upper_x, SAME)
            z = upsampled(
                x00, x01, x10, x11, weights_y, weights_x, SLOTS_Y, SLOTS_X, SELECT_Y, SELECT_X, SAME
            )
            # tl.maximum of NaN and a number returns the number; the sum is still NaN
            new = tl.maximum(maximum, tl.maximum(tl.maximum(x00, x01), tl.maximum(x10, x11)))
            new_shift = finite_or_zero(new) * -LOG2_E
            scale = tl.where(maximum == -INF, 0.0, tl.exp2(new_shift - shift))
            new_sums, new_best, new_predicted = (), (), ()
            for i in tl.static_range(PIXELS):
                term = tl.exp2(tl.fma(z[i], LOG2_E, new_shift))
                new_sums = new_sums + (tl.fma(sums[i], scale, term),)
                if HAS_HITS:
                    better = z[i] > best[i]
                    new_best = new_best + (tl.where(better, z[i], best[i]),)
                    new_predicted = new_predicted + (tl.where(better, k, predicted[i]),)
            maximum, shift = new, new_shift
            sums, best, predicted = new_sums, new_best, new_predicted
            ptr += stride_logits_k

        unsafe = lane < 0
        shifts = ()  # Σ e^(z − shift)
        for i in tl.static_range(PIXELS):
            unsafe |= (labels[i] >= 0) & ~(sums[i] >= SMALLEST_SUM)
            shifts = shifts + (shift * -LN_2,)
        by_pixel = tl.max(unsafe.to(tl.int32), 0) > 0
        if by_pixel:
            largest = filled(-INF, LANES, PIXELS, tl.float32)
            ptr = logits_ptr
            for k in range(num_classes):
                z = logits_of_pixels(
                    ptr, lower_y, upper_y, lower_x, upper_x, weights_y, weights_x, SLOTS_Y, SLOTS_X,
                    SELECT_Y, SELECT_X, SAME,
                )  # fmt: skip
                new_largest, new_predicted = (), ()
                for i in tl.static_range(PIXELS):
                    better = first_larger(z[i], largest[i])
                    new_largest = new_largest + (tl.where(better, z[i], largest[i]),)
                    if HAS_HITS:
                        unlike = tl.where(k == 0, 0, predicted[i])  # start again
                        new_predicted = new_predicted + (tl.where(better, k, unlike),)
                largest, predicted = new_largest, new_predicted
                ptr += stride_logits_k
            shifts, sums = (), filled(0.0, LANES, PIXELS, tl.float32)
            for i in tl.static_range(PIXELS):
                shifts = shifts + (finite_or_zero(largest[i]),)
            ptr = logits_ptr
            for _ in range(num_classes):
                z = logits_of_pixels(
                    ptr, lower_y, upper_y, lower_x, upper_x, weights_y, weights_x, SLOTS_Y, SLOTS_X,
                    SELECT_Y, SELECT_X, SAME,
                )  # fmt: skip
                new_sums = ()
                for i in tl.static_range(PIXELS):
                    new_sums = new_sums + (sums[i] + tl.exp2((z[i] - shifts[i]) * LOG2_E),)
                sums = new_sums
                ptr += stride_logits_k

        lse, logarithms, places, insides = (), (), (), ()
        for i in tl.static_range(PIXELS):
            logarithm = tl.log2(sums[i])
            value = tl.fma(logarithm, LN_2, shifts[i])
            logarithms = logarithms + (logarithm,)
            lse = lse + (tl.where(labels[i] >= 0, value, 0.0),)
            if HAS_LSE or HAS_PIXEL_LOSSES:
                y, x = start_y + i // SLOTS_X, start_x + i % SLOTS_X
                places = places + (first_label + y.to(tl.int64) * label_width + x,)
                insides = insides + ((y < stop_y) & (x < stop_x),)
        if HAS_LSE:
            for i in tl.static_range(PIXELS):
                tl.store(lse_ptr + places[i], lse[i], mask=insides[i])

        losses = filled(0.0, LANES, PIXELS if HAS_PIXEL_LOSSES else 0, tl.float32)
        label = next_label(labels, -1, PIXELS)
        while label < NO_CLASS:
            z = logits_of_pixels(
                logits_ptr + label.to(tl.int64) * stride_logits_k, lower_y, upper_y, lower_x,
                upper_x, weights_y, weights_x, SLOTS_Y, SLOTS_X, SELECT_Y, SELECT_X, SAME,
            )  # fmt: skip
            losses_of_lane = tl.zeros((LANES,), tl.float32)
            overlaps_of_lane = tl.zeros((LANES,), tl.float32)
            count = tl.zeros((LANES,), tl.int32)
            hits = tl.zeros((LANES,), tl.int32)
            new_losses = ()
            for i in tl.static_range(PIXELS):
                mine = labels[i] == label
                # log2 of the term of its own class, computed as in the sum
                exponent = tl.fma(z[i], LOG2_E, shift)
                exponent = tl.where(by_pixel, (z[i] - shifts[i]) * LOG2_E, exponent)
                loss = (logarithms[i] - exponent) * LN_2
                loss = tl.where(loss < 0, 0.0, loss)  # negative by rounding; NaN remains
                losses_of_lane += tl.where(mine, loss, 0.0)
                count += mine.to(tl.int32)
                if HAS_PIXEL_LOSSES:
                    new_losses = new_losses + (tl.where(mine, loss, losses[i]),)
                if HAS_MASSES:
                    p = tl.exp2(exponent - logarithms[i])
                    overlaps_of_lane += tl.where(mine, p, 0.0)
                if HAS_HITS:
                    hits += (mine & (predicted[i] == label)).to(tl.int32)
            losses = new_losses
            _add_to(losses_ptr + row + label, tl.sum(losses_of_lane, 0))
            if HAS_MASSES:
                _add_to(overlaps_ptr + row + label, tl.sum(overlaps_of_lane, 0))
            total = tl.sum(count, 0).to(tl.int64)
            tl.atomic_add(counts_ptr + counted + label, total, sem="relaxed")
            if HAS_HITS:
                right = tl.sum(hits, 0).to(tl.int64)
                tl.atomic_add(hits_ptr + counted + label, right, sem="relaxed")
            label = next_label(labels, label, PIXELS)
        if HAS_PIXEL_LOSSES:
            for i in tl.static_range(PIXELS):
                tl.store(pixel_losses_ptr + places[i], losses[i], mask=insides[i])

        if HAS_MASSES or HAS_SQUARES:
            ptr = logits_ptr
            for k in range(num_classes):
                z = logits_of_pixels(
                    ptr, lower_y, upper_y, lower_x, upper_x, weights_y, weights_x, SLOTS_Y, SLOTS_X,
                    SELECT_Y, SELECT_X, SAME,
                )  # fmt: skip
                mass = tl.zeros((LANES,), tl.float32)
                square = tl.zeros((LANES,), tl.float32)
                for i in tl.static_range(PIXELS):
                    p = tl.exp2((z[i] - lse[i]) * LOG2_E)
                    p = tl.where(labels[i] >= 0, p, 0.0)
                    mass += p
                    square = tl.fma(p, p, square)
                if HAS_MASSES:
                    _add_to(masses_ptr + row + k, tl.sum(mass, 0))
                if HAS_SQUARES:
                    _add_to(squares_ptr + row + k, tl.sum(square, 0))
                ptr += stride_logits_k


def softmax_moments(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    align_corners: bool,
    per_image: bool,
    with_hits: bool,
    with_masses: bool,
    with_squares: bool,
    with_pixel_losses: bool,
    with_lse: bool,
) -> tuple[Tensor, ...]:
    """See ops/softmax_moments.py.

    In addition to the results it needs memory for the partials: for each statistic one row [K] for
    each tile of lanes, or fewer rows if these would take more than 16 MiB and 1/8 of the logits.
    Logits whose classes are contiguous are copied.
    """
    batch, num_classes = logits.shape[:2]
    shape = (batch, num_classes) if per_image else (num_classes,)

    def zeros(wanted: bool) -> Tensor:
        return logits.new_zeros(shape if wanted else (0,), dtype=torch.int64)

    def pixel_map(wanted: bool) -> Tensor:
        return logits.new_empty(labels.shape if wanted else (0,), dtype=torch.float32)

    counts, hits = zeros(True), zeros(with_hits)
    pixel_losses, lse = pixel_map(with_pixel_losses), pixel_map(with_lse)
    wanted = (True, with_masses, with_masses, with_squares)  # losses, overlaps, masses, squares
    if labels.numel() == 0:
        return *(zeros(a).float() for a in wanted), pixel_losses, lse, counts, hits

    logits = class_planes(logits)
    upsampling = upsampling_of(logits, *labels.shape[1:], align_corners)
    lanes, block = upsampling.lanes, forward_lanes()
    row_bytes = 4 * sum(wanted) * batch * num_classes
    budget = max(PARTIALS_IN_CACHE, logits.numel() * logits.element_size() // 8)
    tiles = triton.cdiv(lanes, block)
    tiles_per_chunk = triton.cdiv(tiles, min(tiles, max(budget // row_bytes, 1)))
    chunks = triton.cdiv(tiles, tiles_per_chunk)
    partials = [
        logits.new_zeros((batch, chunks, num_classes) if a else (0,), dtype=torch.float32)
        for a in wanted
    ]
    _softmax_moments_kernel[(batch * chunks,)](
        logits,
        labels,
        *partials,
        pixel_losses,
        lse,
        counts,
        hits,
        num_classes,
        *upsampling.arguments,
        upsampling.x.lanes,
        lanes,
        chunks,
        tiles_per_chunk,
        ignore_index,
        *logits.stride(),
        *labels.stride(),
        num_classes if per_image else 0,
        HAS_HITS=with_hits,
        HAS_MASSES=with_masses,
        HAS_SQUARES=with_squares,
        HAS_PIXEL_LOSSES=with_pixel_losses,
        HAS_LSE=with_lse,
        **upsampling.constants,
        LANES=block,
        num_warps=max(block // 32, 1),
        # with 128 registers (two programs on a multiprocessor) it spills on sm_8x only
        **(without_spills() if architecture().startswith("sm_8") else {}),
    )
    over = 1 if per_image else (0, 1)
    sums = (p.sum(over) if a else p for p, a in zip(partials, wanted, strict=True))
    return *sums, pixel_losses, lse, counts, hits
