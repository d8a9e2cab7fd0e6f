"""Softmax moments: see _ops/softmax_moments.py.

A program goes through some tiles of an image; a tile is LANES lanes (upsampling.py). For each tile
it computes Σ_k e^(z_k) of the pixels, in one loop over the classes (softmax.py). Then it adds the
statistics of the true class, for one label of the tile after the other; probability_sums and
squares need another loop over the classes.

A program adds to its own partials; one torch.sum adds those of all statistics, in a fixed order.
counts, correct, used and labels_out_of_range are sums of all programs, by integer atomics.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lanes import (
    LABELS,
    NO_CLASS,
    PixelMap,
    contiguous_map,
    label_of_cell,
    load_labels,
    load_map,
    next_label,
    number_of,
    pixel_map_of,
    probability,
    relative,
    store_map,
    sum_of,
)
from .launch import FORWARD_LANES, PARTIALS_IN_CACHE, ceil_div, most_rows, without_spills
from .loss_options import (
    cross_entropy,
    is_used,
    loss_of_pixel,
    loss_options_of,
    losses_of_all_classes,
    share_of_pixel,
    weight_of_class,
)
from .softmax import probabilities, softmax_of
from .upsampling import (
    LOGITS,
    SIZES,
    Logits,
    axes_of,
    class_planes,
    corner_ptrs,
    corners_of,
    corners_of_class,
    following,
    lanes_of_tile,
    loaded,
    logits_of_image,
    strides_of,
    upsampled,
    upsampling_of,
)


class Results(NamedTuple):
    """What the kernel adds to, zero on entry; None if it is not wanted."""

    losses: Any  # partials: float32 [B · chunks, K]; also the next three
    intersections: Any
    probability_sums: Any
    squares: Any
    counts: Any  # int64 [K] or [B, K]; also the next two
    correct: Any
    used: Any  # with pixel weights partials, as `losses`
    labels_out_of_range: Any  # int64 []


@triton.jit
def _add(ptr, values):
    """To a number of this program."""
    tl.store(ptr, tl.load(ptr) + sum_of(values))


@triton.jit
def _add_where(mask, ptr, values):
    total = tl.zeros(mask[0].shape, tl.float32)
    for i in tl.static_range(len(mask)):
        total += tl.where(mask[i], values[i], 0.0)
    _add(ptr, total)


@triton.jit
def _count_where(mask, ptr):
    """Adds the number of pixels to a number of all programs."""
    tl.atomic_add(ptr, number_of(mask), sem="relaxed")


@triton.jit
def _add_true_classes(
    results, row, counted, logits, lanes, labels, softmax, u, weight_map, options, image,
    KEEP: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Adds the statistics of the true class, for one label of the tile after the other. With KEEP
    it returns the losses of the pixels."""
    if weight_map.ptr is not None:
        weights = load_map(weight_map, image, lanes, labels, CELLS)
    pixel_losses = [tl.zeros(label.shape, tl.float32) for label in labels]
    label = next_label(labels, -1)
    while label < NO_CLASS:
        four = corners_of_class(logits, label, lanes, CELLS)
        z = upsampled(relative(four, softmax.reference), lanes, CELLS)
        mine = [labels[i] == label for i in () + CELLS.columns]
        c = [cross_entropy(z[i], softmax.lse[i]) for i in () + CELLS.columns]
        a = weight_of_class(label, options, image)
        used = [is_used(c[i], options) for i in () + CELLS.columns]
        losses = [loss_of_pixel(c[i], u[i], a, used[i], options) for i in () + CELLS.columns]
        summed = losses
        if weight_map.ptr is not None:
            shares = [share_of_pixel(weights[i], used[i], options) for i in () + CELLS.columns]
            _add_where(mine, results.used + row + label, shares)
            summed = [
                tl.where(shares[i] == 0, 0.0, shares[i] * losses[i]) for i in () + CELLS.columns
            ]
        _add_where(mine, results.losses + row + label, summed)
        if KEEP:
            pixel_losses = [
                tl.where(mine[i], losses[i], pixel_losses[i]) for i in () + CELLS.columns
            ]
        if results.intersections is not None:
            p = [probability(z[i], softmax.lse[i]) for i in () + CELLS.columns]
            _add_where(mine, results.intersections + row + label, p)
        _count_where(mine, results.counts + counted + label)
        if results.correct is not None:
            right = [mine[i] & (softmax.predicted[i] == label) for i in () + CELLS.columns]
            _count_where(right, results.correct + counted + label)
        if results.used is not None and weight_map.ptr is None:
            kept = [mine[i] & used[i] for i in () + CELLS.columns]
            _count_where(kept, results.used + counted + label)
        label = next_label(labels, label)
    return pixel_losses


@triton.jit
def _add_all_classes(results, row, logits, lanes, labels, softmax, CELLS: tl.constexpr):
    """Adds Σ p and Σ p² of each class. To numbers that are loaded before the exponentials, so that
    nothing waits for them."""
    sums, squares = results.probability_sums, results.squares
    ptrs = corner_ptrs(logits.ptr, lanes, CELLS)
    stored = loaded(ptrs)
    for k in range(logits.num_classes):
        p = probabilities(corners_of(stored, CELLS), softmax.lse, softmax.reference, lanes, CELLS)
        ptrs = following(ptrs, k, logits, CELLS)
        stored = loaded(ptrs)
        sum_before = tl.load(sums + row + k) if sums is not None else 0.0
        square_before = tl.load(squares + row + k) if squares is not None else 0.0
        probability_sum = tl.zeros(labels[0].shape, tl.float32)
        square = tl.zeros(labels[0].shape, tl.float32)
        for i in tl.static_range(len(labels)):
            added = tl.where(labels[i] >= 0, p[i], 0.0)
            probability_sum += added
            square = tl.fma(added, added, square)
        if sums is not None:
            tl.store(sums + row + k, sum_before + sum_of(probability_sum))
        if squares is not None:
            tl.store(squares + row + k, square_before + sum_of(square))


@triton.jit(
    do_not_specialize=(
        *(*SIZES, *LOGITS, *LABELS, "chunks", "tiles_per_chunk"),
        *strides_of("weights", "bhw"),
    )
)
def _softmax_moments_kernel(
    logits_ptr,  # [B, K, h, w]
    logits_b,
    logits_k,
    logits_h,
    logits_w,
    num_classes,
    labels_ptr,  # integers [B, H, W]
    labels_b,
    labels_h,
    labels_w,
    loss_options,  # LossOptions
    results,  # Results
    pixel_losses_ptr,  # float32 [B, H, W] or None, contiguous; also the next one
    lse_ptr,
    height,
    width,
    label_height,
    label_width,
    ratios,
    chunks,
    tiles_per_chunk,
    ignore_index,
    stride_counts_b,
    weights_ptr,  # float32 [B, H, W], or None
    weights_b,
    weights_h,
    weights_w,
    CELLS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Reads the logits of a tile once from memory, and again from the caches for each further loop
    and for neighbours. Reads each label and weight once. Writes the requested maps. For each tile
    it writes one number per class for probability_sums and for squares, and one per label of the
    tile for the other statistics."""
    axes = axes_of(height, width, label_height, label_width, ratios, CELLS)
    image, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    row = tl.program_id(0).to(tl.int64) * num_classes
    counted = image.to(tl.int64) * stride_counts_b
    logits = Logits(logits_ptr, num_classes, logits_b, logits_k, logits_h, logits_w)
    logits = logits_of_image(logits, image)
    label_map = PixelMap(labels_ptr, labels_b, labels_h, labels_w)
    weight_map = PixelMap(weights_ptr, weights_b, weights_h, weights_w)
    tiles = tl.cdiv(axes.y.lanes * axes.x.lanes, LANES)
    for tile in range(chunk * tiles_per_chunk, tl.minimum((chunk + 1) * tiles_per_chunk, tiles)):
        lanes = lanes_of_tile(tile, axes, logits, CELLS, LANES)
        labels = load_labels(
            label_map, image, lanes, num_classes, ignore_index, CELLS, results.labels_out_of_range
        )
        cell_label = label_of_cell(
            label_map, image, axes, lanes, labels, num_classes, ignore_index, CELLS
        )
        softmax = softmax_of(
            logits,
            lanes,
            labels,
            cell_label,
            loss_options,
            image,
            results.correct is not None,
            CELLS,
        )
        if lse_ptr is not None:
            store_map(contiguous_map(lse_ptr, axes), softmax.lse, image, lanes, CELLS)
        u = losses_of_all_classes(
            softmax.weighted, softmax.lse, softmax.reference, lanes, loss_options, image, CELLS
        )
        pixel_losses = _add_true_classes(
            results, row, counted, logits, lanes, labels, softmax, u, weight_map,
            loss_options, image, pixel_losses_ptr is not None, CELLS,
        )  # fmt: skip
        if pixel_losses_ptr is not None:
            pixel_losses_map = contiguous_map(pixel_losses_ptr, axes)
            store_map(pixel_losses_map, pixel_losses, image, lanes, CELLS)
        if results.probability_sums is not None or results.squares is not None:
            _add_all_classes(results, row, logits, lanes, labels, softmax, CELLS)
        tl.debug_barrier()  # other threads may add the next tile to these numbers


def softmax_moments(
    logits: Tensor, labels: Tensor, options: Any, wanted: Any
) -> tuple[Tensor | None, ...]:
    """See _ops/softmax_moments.py; options, wanted: Options and Wanted of _moments.py. Returns the
    results in the order of the operator, None for those that were not requested.

    In addition to the results it needs memory for the partials: for each statistic one row [K] for
    each tile, or fewer rows if these would take more than 16 MiB and 1/8 of the logits. Logits
    whose classes are contiguous are copied.
    """
    batch, num_classes = logits.shape[:2]
    shape = (batch, num_classes) if wanted.per_image else (num_classes,)
    weights = options.pixel_weights
    loss_options = loss_options_of(options)
    by_class = wanted.probability_sums or wanted.squares
    counts_used = weights is None and loss_options.min_loss is not None
    summed = (True, wanted.probability_sums, wanted.probability_sums, wanted.squares)
    summed = *summed, weights is not None

    def zeros(requested: bool, shape: tuple[int, ...] = shape) -> Tensor | None:
        return logits.new_zeros(shape, dtype=torch.int64) if requested else None

    def pixel_map(requested: bool) -> Tensor | None:
        return logits.new_empty(labels.shape, dtype=torch.float32) if requested else None

    counts = logits.new_zeros(shape, dtype=torch.int64)
    correct, used = zeros(wanted.correct), zeros(counts_used)
    outside = zeros(wanted.labels_out_of_range, ())
    pixel_losses, lse = pixel_map(wanted.pixel_losses), pixel_map(wanted.with_lse)
    if labels.numel() == 0:
        sums = [logits.new_zeros(shape, dtype=torch.float32) if x else None for x in summed]
    else:
        logits = class_planes(logits)
        rows = most_rows(loss_options.change_losses, by_class)
        maps = labels, weights
        upsampling = upsampling_of(
            logits, *labels.shape[1:], options.align_corners, rows, maps=maps
        )
        block = FORWARD_LANES
        row_bytes = 4 * sum(summed) * batch * num_classes
        budget = max(PARTIALS_IN_CACHE, logits.numel() * logits.element_size() // 8)
        tiles = ceil_div(upsampling.lanes, block)
        tiles_per_chunk = ceil_div(tiles, min(tiles, max(budget // row_bytes, 1)))
        # of four, so that the partials of each statistic begin at 16 bytes: otherwise Triton would
        # compile again for some sizes
        chunks = ceil_div(ceil_div(tiles, tiles_per_chunk), 4) * 4
        size = sum(summed), batch, chunks, num_classes
        parts = iter(logits.new_zeros(size, dtype=torch.float32).unbind())
        partials = [next(parts) if x else None for x in summed]
        *floats, partial_used = partials
        _softmax_moments_kernel[(batch * chunks,)](
            logits,
            *logits.stride(),
            num_classes,
            labels,
            *labels.stride(),
            loss_options,
            Results(*floats, counts, correct, partial_used if used is None else used, outside),
            pixel_losses,
            lse,
            *upsampling.sizes,
            upsampling.ratios,
            chunks,
            tiles_per_chunk,
            options.ignore_index,
            num_classes if wanted.per_image else 0,
            *pixel_map_of(weights),
            CELLS=upsampling.cells,
            LANES=block,
            num_warps=block // 32,
            enable_fp_fusion=False,  # coordinates as in F.interpolate
            **without_spills(),
        )
        axes = -2 if wanted.per_image else (-3, -2)
        sums = [None if x is None else x.sum(axes) for x in partials]
    *floats, weights_used = sums
    used = weights_used if used is None else used
    divisor = counts.sum().clamp_(min=1)
    return *floats, pixel_losses, lse, counts, correct, used, divisor, outside
