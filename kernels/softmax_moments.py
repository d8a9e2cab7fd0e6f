"""Softmax moments: see _ops/softmax_moments.py.

A lane (upsampling.py) reads its four logits class by class. For each of its pixels it keeps
Σ_k e^(z_k − m) in registers, where m is the largest logit of the cell so far. If the neighbours of
a cell differ by about 70, this underflows. Then the lanes of the program find the maximum of each
pixel in a second loop over the classes, and the sums in a third. Masses and squares need one more
loop. Statistics of the true class are summed for one label of the tile after the other.

A program adds to its own partials; torch.sum adds these in a fixed order. Hits and counts use
integer atomics.
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
    NO_CLASS,
    load_labels,
    next_label,
    pixel_map_of,
    repeated,
    store_map,
)
from .launch import PARTIALS_IN_CACHE, architecture, forward_lanes, without_spills
from .pixel_argmax import largest_logits
from .upsampling import (
    SIZES,
    axes_of,
    class_planes,
    corners,
    lanes_of_tile,
    logits_of,
    logits_of_image,
    logits_of_pixels,
    upsampled,
    upsampling_of,
)

# Below this sum, terms that matter may have underflowed.
SMALLEST_SUM = tl.constexpr(2.0**-100)


class Results(NamedTuple):
    """What the kernel writes; None if it is not wanted."""

    losses: Any  # partials: float32 [B · chunks, K], zero on entry; also the next three
    overlaps: Any
    masses: Any
    squares: Any
    counts: Any  # int64 [K] or [B, K], zero on entry
    hits: Any  # the same
    pixel_losses: Any  # float32 [B, H, W]
    lse: Any  # float32 [B, H, W]


class Softmax(NamedTuple):
    """Of the pixels of a tile: the binary logarithm of Σ_k e^(z_k − shift), and the shift. The
    shift of a cell, times −log2(e), is in cell_shift, unless each pixel has its own (by_pixel)."""

    log_sums: Any
    shifts: Any
    cell_shift: Any
    by_pixel: Any


@triton.jit
def finite_or_zero(shift):
    """The shift, or 0 if it is −inf: if all logits are −inf, a shift of −inf would give NaN."""
    return tl.where(shift == -INF, 0.0, shift)


@triton.jit
def _add_to(ptr, value):
    tl.store(ptr, tl.load(ptr) + value)


@triton.jit
def _sums_by_cell(logits, lanes, PREDICT: tl.constexpr, CELLS: tl.constexpr, LANES: tl.constexpr):
    """Σ_k e^(z_k − m) of each pixel, where m is the largest logit of the cell; −m·log2(e); and with
    PREDICT the class of the largest logit of each pixel."""
    PIXELS: tl.constexpr = CELLS.y.slots * CELLS.x.slots
    maximum = tl.full((LANES,), -INF, tl.float32)
    shift = tl.zeros((LANES,), tl.float32)
    sums = repeated(tl.zeros((LANES,), tl.float32), PIXELS)
    best = repeated(tl.full((LANES,), -INF, tl.float32), PIXELS if PREDICT else 0)
    predicted = repeated(tl.zeros((LANES,), tl.int32), PIXELS if PREDICT else 0)
    ptr = logits.ptr
    for k in range(logits.num_classes):
        four = corners(ptr, lanes, CELLS)
        z = upsampled(four, lanes, CELLS)
        # tl.maximum of NaN and a number returns the number; the sum is still NaN
        highest = tl.maximum(tl.maximum(four[0], four[1]), tl.maximum(four[2], four[3]))
        new_maximum = tl.maximum(maximum, highest)
        new_shift = finite_or_zero(new_maximum) * -LOG2_E
        scale = tl.where(maximum == -INF, 0.0, tl.exp2(new_shift - shift))
        new_sums, new_best, new_predicted = (), (), ()
        for i in tl.static_range(PIXELS):
            term = tl.exp2(tl.fma(z[i], LOG2_E, new_shift))
            new_sums = new_sums + (tl.fma(sums[i], scale, term),)
            if PREDICT:
                better = z[i] > best[i]
                new_best = new_best + (tl.where(better, z[i], best[i]),)
                new_predicted = new_predicted + (tl.where(better, k, predicted[i]),)
        maximum, shift = new_maximum, new_shift
        sums, best, predicted = new_sums, new_best, new_predicted
        ptr += logits.stride_k
    return sums, shift, predicted


@triton.jit
def _underflow(sums, labels):
    """Whether a term that matters may have underflowed, in any lane."""
    unsafe = labels[0] < -1
    for i in tl.static_range(len(sums)):
        unsafe |= (labels[i] >= 0) & ~(sums[i] >= SMALLEST_SUM)
    return tl.max(unsafe.to(tl.int32), 0) > 0


@triton.jit
def _sums_by_pixel(logits, lanes, largest, CELLS: tl.constexpr):
    """The same sums, where m is the largest logit of the pixel; and m."""
    shifts, sums = (), ()
    for i in tl.static_range(len(largest)):
        shifts = shifts + (finite_or_zero(largest[i]),)
        sums = sums + (tl.zeros(largest[i].shape, tl.float32),)
    ptr = logits.ptr
    for _ in range(logits.num_classes):
        z = logits_of_pixels(ptr, lanes, CELLS)
        new_sums = ()
        for i in tl.static_range(len(largest)):
            new_sums = new_sums + (sums[i] + tl.exp2((z[i] - shifts[i]) * LOG2_E),)
        sums = new_sums
        ptr += logits.stride_k
    return sums, shifts


@triton.jit
def _softmax(
    logits, lanes, labels, PREDICT: tl.constexpr, CELLS: tl.constexpr, LANES: tl.constexpr
):
    """Softmax, and with PREDICT the class of the largest logit of each pixel."""
    sums, cell_shift, predicted = _sums_by_cell(logits, lanes, PREDICT, CELLS, LANES)
    shifts = repeated(cell_shift * -LN_2, len(sums))
    by_pixel = _underflow(sums, labels)
    if by_pixel:
        largest, classes = largest_logits(logits, lanes, CELLS, LANES)
        sums, shifts = _sums_by_pixel(logits, lanes, largest, CELLS)
        if PREDICT:
            predicted = classes
    log_sums = ()
    for i in tl.static_range(len(sums)):
        log_sums = log_sums + (tl.log2(sums[i]),)
    return Softmax(log_sums, shifts, cell_shift, by_pixel), predicted


@triton.jit
def _lse(softmax, labels):
    """log Σ_k e^(z_k) of each pixel, 0 where ignored."""
    lse = ()
    for i in tl.static_range(len(labels)):
        value = tl.fma(softmax.log_sums[i], LN_2, softmax.shifts[i])
        lse = lse + (tl.where(labels[i] >= 0, value, 0.0),)
    return lse


@triton.jit
def _exponent(z, softmax, i):
    """The binary logarithm of a class's term of the sum at pixel i, computed as in the sum."""
    exponent = tl.fma(z, LOG2_E, softmax.cell_shift)
    return tl.where(softmax.by_pixel, (z - softmax.shifts[i]) * LOG2_E, exponent)


@triton.jit
def _add_true_classes(
    results, row, counted, logits, lanes, labels, softmax, predicted, CELLS: tl.constexpr
):
    """Adds the statistics of the true class, for one label of the tile after the other. Returns the
    losses of the pixels, if they are wanted."""
    PIXELS: tl.constexpr = CELLS.y.slots * CELLS.x.slots
    nothing = tl.zeros(labels[0].shape, tl.float32)
    pixel_losses = repeated(nothing, PIXELS if results.pixel_losses is not None else 0)
    label = next_label(labels, -1)
    while label < NO_CLASS:
        z = logits_of_pixels(logits.ptr + label.to(tl.int64) * logits.stride_k, lanes, CELLS)
        losses, overlaps = nothing, nothing
        count, hits = tl.zeros(labels[0].shape, tl.int32), tl.zeros(labels[0].shape, tl.int32)
        new_losses = ()
        for i in tl.static_range(PIXELS):
            mine = labels[i] == label
            exponent = _exponent(z[i], softmax, i)
            loss = (softmax.log_sums[i] - exponent) * LN_2
            loss = tl.where(loss < 0, 0.0, loss)  # negative by rounding; NaN remains
            losses += tl.where(mine, loss, 0.0)
            count += mine.to(tl.int32)
            if results.pixel_losses is not None:
                new_losses = new_losses + (tl.where(mine, loss, pixel_losses[i]),)
            if results.overlaps is not None:
                p = tl.exp2(exponent - softmax.log_sums[i])
                overlaps += tl.where(mine, p, 0.0)
            if results.hits is not None:
                hits += (mine & (predicted[i] == label)).to(tl.int32)
        pixel_losses = new_losses
        _add_to(results.losses + row + label, tl.sum(losses, 0))
        if results.overlaps is not None:
            _add_to(results.overlaps + row + label, tl.sum(overlaps, 0))
        total = tl.sum(count, 0).to(tl.int64)
        tl.atomic_add(results.counts + counted + label, total, sem="relaxed")
        if results.hits is not None:
            right = tl.sum(hits, 0).to(tl.int64)
            tl.atomic_add(results.hits + counted + label, right, sem="relaxed")
        label = next_label(labels, label)
    return pixel_losses


@triton.jit
def _add_all_classes(results, row, logits, lanes, labels, lse, CELLS: tl.constexpr):
    """Adds Σ p and Σ p² of each class."""
    ptr = logits.ptr
    for k in range(logits.num_classes):
        z = logits_of_pixels(ptr, lanes, CELLS)
        mass = tl.zeros(labels[0].shape, tl.float32)
        square = tl.zeros(labels[0].shape, tl.float32)
        for i in tl.static_range(len(labels)):
            p = tl.exp2((z[i] - lse[i]) * LOG2_E)
            p = tl.where(labels[i] >= 0, p, 0.0)
            mass += p
            square = tl.fma(p, p, square)
        if results.masses is not None:
            _add_to(results.masses + row + k, tl.sum(mass, 0))
        if results.squares is not None:
            _add_to(results.squares + row + k, tl.sum(square, 0))
        ptr += logits.stride_k


@triton.jit(do_not_specialize=(*SIZES, "chunks", "tiles_per_chunk"))
def _softmax_moments_kernel(
    logits,  # Logits
    label_map,  # PixelMap of integers
    results,  # Results
    height,
    width,
    label_height,
    label_width,
    ratios,
    chunks,
    tiles_per_chunk,
    ignore_index,
    stride_counts_b,
    CELLS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Reads the logits of a tile once from memory, and again from the caches for each further loop
    and for neighbours. Reads each label once. Writes the requested maps. For each tile it writes
    one number per class for masses and for squares, and one per label of the tile for the other
    statistics."""
    axes = axes_of(height, width, label_height, label_width, ratios, CELLS)
    image, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    row = tl.program_id(0).to(tl.int64) * logits.num_classes
    counted = image.to(tl.int64) * stride_counts_b
    logits = logits_of_image(logits, image)
    tiles = tl.cdiv(axes.y.lanes * axes.x.lanes, LANES)
    for tile in range(chunk * tiles_per_chunk, tl.minimum((chunk + 1) * tiles_per_chunk, tiles)):
        lanes = lanes_of_tile(tile, axes, logits, CELLS, LANES)
        labels = load_labels(label_map, image, lanes, logits.num_classes, ignore_index, CELLS)
        softmax, predicted = _softmax(logits, lanes, labels, results.hits is not None, CELLS, LANES)
        lse = _lse(softmax, labels)
        if results.lse is not None:
            store_map(results.lse, lse, image, lanes, axes, CELLS)
        losses = _add_true_classes(
            results, row, counted, logits, lanes, labels, softmax, predicted, CELLS
        )
        if results.pixel_losses is not None:
            store_map(results.pixel_losses, losses, image, lanes, axes, CELLS)
        if results.masses is not None or results.squares is not None:
            _add_all_classes(results, row, logits, lanes, labels, lse, CELLS)


def softmax_moments(
    logits: Tensor,
    labels: Tensor,
    smoothing: Tensor | None,
    min_loss: float | None,
    focal_gamma: float,
    ignore_index: int,
    align_corners: bool,
    per_image: bool,
    with_hits: bool,
    with_masses: bool,
    with_squares: bool,
    with_pixel_losses: bool,
    with_lse: bool,
) -> tuple[Tensor, ...]:
    """See _ops/softmax_moments.py.

    In addition to the results it needs memory for the partials: for each statistic one row [K] for
    each tile of lanes, or fewer rows if these would take more than 16 MiB and 1/8 of the logits.
    Logits whose classes are contiguous are copied.
    """
    if smoothing is not None or min_loss is not None or focal_gamma > 0:
        raise NotImplementedError("softmax_moments: smoothing, min_loss, focal_gamma")
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
        return *(zeros(a).float() for a in wanted), pixel_losses, lse, counts, hits, zeros(False)

    logits = class_planes(logits)
    upsampling = upsampling_of(logits, *labels.shape[1:], align_corners)
    block = forward_lanes()
    row_bytes = 4 * sum(wanted) * batch * num_classes
    budget = max(PARTIALS_IN_CACHE, logits.numel() * logits.element_size() // 8)
    tiles = triton.cdiv(upsampling.lanes, block)
    tiles_per_chunk = triton.cdiv(tiles, min(tiles, max(budget // row_bytes, 1)))
    chunks = triton.cdiv(tiles, tiles_per_chunk)
    partials = [
        logits.new_zeros((batch, chunks, num_classes), dtype=torch.float32) if a else None
        for a in wanted
    ]
    more = with_hits or with_masses or with_squares or with_pixel_losses
    _softmax_moments_kernel[(batch * chunks,)](
        logits_of(logits),
        pixel_map_of(labels),
        Results(
            *partials,
            counts,
            hits if with_hits else None,
            pixel_losses if with_pixel_losses else None,
            lse if with_lse else None,
        ),
        *upsampling.sizes,
        upsampling.ratios,
        chunks,
        tiles_per_chunk,
        ignore_index,
        num_classes if per_image else 0,
        CELLS=upsampling.cells,
        LANES=block,
        num_warps=max(block // 32, 1),
        enable_fp_fusion=False,  # coordinates as in F.interpolate
        # ptxas would spill a few, except for the cross-entropy alone on sm_90 and later
        **(without_spills() if more or architecture().startswith("sm_8") else {}),
    )
    over = 1 if per_image else (0, 1)
    sums = (
        logits.new_empty(0, dtype=torch.float32) if p is None else p.sum(over) for p in partials
    )
    return *sums, pixel_losses, lse, counts, hits, zeros(False)
