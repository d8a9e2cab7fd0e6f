"""Softmax moments: see _ops/softmax_moments.py.

A program goes through some tiles of an image; a tile is LANES lanes (upsampling.py). For each tile
it computes Σ_k e^(z_k) of the pixels, in one loop over the classes (softmax.py). Then it adds the
statistics of the true class, for one label of the tile after the other; probability_sums and
squares need another loop over the classes.

A program adds to partials of its own, which it sets to 0 first. A second kernel adds those of all
programs, in a fixed order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .constants import Constant
from .exponentials import probabilities, probability
from .lanes import (
    LABELS,
    NO_CLASS,
    PixelMap,
    contiguous_map,
    load_labels,
    load_map,
    next_label,
    number_of,
    pixel_map_of,
    store_map,
    sum_of,
)
from .launch import PARTIALS_IN_CACHE, ceil_div, programs, registers
from .loss_options import (
    is_used,
    loss_of_pixel,
    loss_options_of,
    losses_of_all_classes,
    share_of_pixel,
    weights_of_labels,
)
from .softmax import losses_of_labels, softmax_of
from .upsampling import (
    FORWARD_LANES,
    LOGITS,
    SIZES,
    Logits,
    axes_of,
    class_planes,
    corners_of,
    following,
    lanes_of_tile,
    loaded,
    logits_of_image,
    strides_of,
    upsampling_of,
)

CLASSES_OF_SUM = Constant(8)  # of a program that adds partials: 32 bytes or more of a row


class Partials(NamedTuple):
    """What a program adds to, a row of each; None if it is not wanted."""

    losses: Any  # float32 [B · chunks, K]; also the next three
    intersections: Any
    probability_sums: Any
    squares: Any
    counts: Any  # int64 [B · chunks, K]; also the next two
    correct: Any
    used: Any  # float32 with pixel weights


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
    tl.store(ptr, tl.load(ptr) + number_of(mask))


@triton.jit
def _clear(ptr, row, num_classes):
    if ptr is not None:
        for first in range(0, num_classes, 32):
            k = first + tl.arange(0, 32)
            tl.store(ptr + row + k, 0, mask=k < num_classes)


@triton.jit
def _losses(c, u, weight_map, image, lanes, labels, options, CELLS: tl.constexpr):
    """L of each pixel, 0 where ignored; what is added to the sum; and whether the pixel is used, or
    ω of a used one."""
    a, used = weights_of_labels(labels, options, image), [is_used(x, options) for x in c]
    losses = [loss_of_pixel(c[i], u[i], a[i], used[i], options) for i in () + CELLS.columns]
    if weight_map.ptr is None:
        return losses, losses, used
    else:
        weights = load_map(weight_map, image, lanes, labels, CELLS)
        shares = [share_of_pixel(weights[i], used[i], options) for i in () + CELLS.columns]
        summed = [tl.where(shares[i] == 0, 0.0, shares[i] * losses[i]) for i in () + CELLS.columns]
        return losses, summed, shares


@triton.jit
def _add_true_classes(
    partials, row, logits, lanes, labels, softmax, u, weight_map, options, image,
    CELLS: tl.constexpr,
):  # fmt: skip
    """Adds the statistics of the true class, for one label of the tile after the other. Returns the
    losses of the pixels, 0 where ignored."""
    c = losses_of_labels(logits, softmax.ptrs, softmax.lse, lanes, labels, CELLS)
    losses, summed, used = _losses(c, u, weight_map, image, lanes, labels, options, CELLS)
    p = [probability(0.0, x) for x in c]
    label = next_label(labels, -1)
    while label < NO_CLASS:
        mine = [labels[i] == label for i in () + CELLS.columns]
        _add_where(mine, partials.losses + row + label, summed)
        _count_where(mine, partials.counts + row + label)
        if partials.intersections is not None:
            _add_where(mine, partials.intersections + row + label, p)
        if partials.correct is not None:
            right = [mine[i] & (softmax.predicted[i] == label) for i in () + CELLS.columns]
            _count_where(right, partials.correct + row + label)
        if weight_map.ptr is not None:
            _add_where(mine, partials.used + row + label, used)
        elif partials.used is not None:
            kept = [mine[i] & used[i] for i in () + CELLS.columns]
            _count_where(kept, partials.used + row + label)
        label = next_label(labels, label)
    return losses


@triton.jit
def _add_all_classes(partials, row, logits, lanes, labels, softmax, CELLS: tl.constexpr):
    """Adds Σ p and Σ p² of each class. To numbers that are loaded before the exponentials, so that
    nothing waits for them."""
    sums, squares, ptrs = partials.probability_sums, partials.squares, softmax.ptrs
    stored = loaded(ptrs)
    for k in range(logits.num_classes):
        p = probabilities(corners_of(stored, CELLS), softmax.lse, lanes, CELLS)
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
    partials,  # Partials
    valid_ptr,  # int64 [B · chunks]: the number of valid pixels
    outside_ptr,  # int64 [B · chunks] or None: that of labels out of range
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
    program = tl.program_id(0)
    image, chunk = program // chunks, program % chunks
    row = program.to(tl.int64) * num_classes
    _clear(partials.losses, row, num_classes)
    _clear(partials.intersections, row, num_classes)
    _clear(partials.probability_sums, row, num_classes)
    _clear(partials.squares, row, num_classes)
    _clear(partials.counts, row, num_classes)
    _clear(partials.correct, row, num_classes)
    _clear(partials.used, row, num_classes)
    _clear(outside_ptr, program, 1)
    valid = tl.full((), 0, tl.int64)
    tl.debug_barrier()  # other threads may add to these numbers
    logits = Logits(logits_ptr, num_classes, logits_b, logits_k, logits_h, logits_w)
    logits = logits_of_image(logits, image)
    label_map = PixelMap(labels_ptr, labels_b, labels_h, labels_w)
    weight_map = PixelMap(weights_ptr, weights_b, weights_h, weights_w)
    tiles = tl.cdiv(axes.y.lanes * axes.x.lanes, LANES)
    for tile in range(chunk * tiles_per_chunk, tl.minimum((chunk + 1) * tiles_per_chunk, tiles)):
        lanes = lanes_of_tile(tile, axes, logits, CELLS, LANES)
        labels = load_labels(
            label_map, image, lanes, num_classes, ignore_index, CELLS, outside_ptr, program
        )
        valid += number_of([label >= 0 for label in labels])
        softmax = softmax_of(
            logits, lanes, labels, loss_options, image, partials.correct is not None, CELLS
        )
        if lse_ptr is not None:
            store_map(contiguous_map(lse_ptr, axes), softmax.lse, image, lanes, CELLS)
        u = losses_of_all_classes(
            softmax.weighted, softmax.lse, lanes, labels, loss_options, image, CELLS
        )
        if partials.probability_sums is not None or partials.squares is not None:
            _add_all_classes(partials, row, logits, lanes, labels, softmax, CELLS)
        pixel_losses = _add_true_classes(
            partials, row, logits, lanes, labels, softmax, u, weight_map, loss_options, image, CELLS
        )
        if pixel_losses_ptr is not None:
            pixel_losses_map = contiguous_map(pixel_losses_ptr, axes)
            store_map(pixel_losses_map, pixel_losses, image, lanes, CELLS)
        tl.debug_barrier()  # other threads may add the next tile to these numbers
    tl.store(valid_ptr + program, valid)


@triton.jit
def _sum_programs(
    partials, sums, FIRST: tl.constexpr, image, rows, num_classes, ROWS: tl.constexpr
):
    """sums[i][image, k] = Σ partials[i][image, row, k], of some classes; i: the number of the
    program's statistic, less FIRST."""
    statistic = tl.program_id(2) - FIRST
    ptrs, sums_ptrs = partials[0], sums[0]
    for i in tl.static_range(1, len(partials)):
        ptrs = tl.where(statistic == i, partials[i], ptrs)
        sums_ptrs = tl.where(statistic == i, sums[i], sums_ptrs)
    k = tl.program_id(1) * CLASSES_OF_SUM + tl.arange(0, CLASSES_OF_SUM)
    row = tl.arange(0, ROWS)
    ptrs += image.to(tl.int64) * rows * num_classes + k
    total = tl.zeros((ROWS, CLASSES_OF_SUM), sums_ptrs.dtype.element_ty)
    for first in range(0, rows, ROWS):
        offsets = (first + row).to(tl.int64)[:, None] * num_classes
        inside = (first + row < rows)[:, None] & (k < num_classes)
        total += tl.load(ptrs + offsets, mask=inside, other=0)
    sums_ptrs += image.to(tl.int64) * num_classes + k
    tl.store(sums_ptrs, tl.sum(total, 0), mask=k < num_classes)


@triton.jit
def _sum_numbers(ptr, size, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.int64)
    for first in range(0, size, ROWS):
        total += tl.load(ptr + first + row, mask=first + row < size, other=0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=("images", "rows", "num_classes"))
def _sums_of_programs_kernel(
    floats,  # partials [images, rows, K]; also the integers
    float_sums,  # [images, K] each; also those of the integers
    integers,
    integer_sums,
    valid_ptr,  # int64 [images, rows]; also the next one, or None
    outside_ptr,
    divisor_ptr,  # int64 []; also the next one
    labels_out_of_range_ptr,
    images,
    rows,
    num_classes,
    ROWS: tl.constexpr,
):
    """Reads each partial once. A program adds those of some classes of an image, of one statistic;
    the last one adds the numbers of pixels."""
    image, statistic = tl.program_id(0), tl.program_id(2)
    if statistic < len(floats):
        _sum_programs(floats, float_sums, 0, image, rows, num_classes, ROWS)
    elif statistic < len(floats) + len(integers):
        _sum_programs(integers, integer_sums, len(floats), image, rows, num_classes, ROWS)
    elif (tl.program_id(1) == 0) & (image == 0):
        tl.store(divisor_ptr, tl.maximum(_sum_numbers(valid_ptr, images * rows, ROWS), 1))
        if outside_ptr is not None:
            outside = _sum_numbers(outside_ptr, images * rows, ROWS)
            tl.store(labels_out_of_range_ptr, outside)


def softmax_moments(
    logits: Tensor, labels: Tensor, options: Any, wanted: Any
) -> tuple[Tensor | None, ...]:
    """See _ops/softmax_moments.py; options, wanted: Options and Wanted of _moments.py. Returns the
    results in the order of the operator, None for those that were not requested.

    In addition to the results it needs memory for the partials: for each statistic one row [K] for
    each program. There are at most some 4·programs() programs, of one warp each, and fewer if the
    partials would take more than 16 MiB and 1/8 of the logits. Logits whose classes are contiguous
    are copied.
    """
    batch, num_classes = logits.shape[:2]
    images = batch if wanted.per_image else 1
    shape = (batch, num_classes) if wanted.per_image else (num_classes,)
    loss_options = loss_options_of(options)
    weighted = options.pixel_weights is not None
    by_class = wanted.probability_sums or wanted.squares
    dtypes = Partials(
        losses=torch.float32,
        intersections=torch.float32 if wanted.probability_sums else None,
        probability_sums=torch.float32 if wanted.probability_sums else None,
        squares=torch.float32 if wanted.squares else None,
        counts=torch.int64,
        correct=torch.int64 if wanted.correct else None,
        used=torch.float32 if weighted else torch.int64 if options.counts_used() else None,
    )

    def tensors(new: Any, shape: tuple[int, ...]) -> Partials:
        return Partials(*(x if x is None else new(shape, dtype=x) for x in dtypes))

    def pixel_map(requested: bool) -> Tensor | None:
        return logits.new_empty(labels.shape, dtype=torch.float32) if requested else None

    pixel_losses, lse = pixel_map(wanted.pixel_losses), pixel_map(wanted.with_lse)
    new = logits.new_empty if labels.numel() > 0 else logits.new_zeros
    sums, divisor = tensors(new, shape), new((), dtype=torch.int64)
    outside = new((), dtype=torch.int64) if wanted.labels_out_of_range else None
    results = *sums[:4], pixel_losses, lse, *sums[4:], divisor, outside
    if labels.numel() == 0:
        divisor.fill_(1)
        return results
    logits = class_planes(logits)
    most = loss_options.most_rows(by_class)
    upsampling = upsampling_of(
        logits, *labels.shape[1:], options.align_corners, most, maps=(labels, options.pixel_weights)
    )
    pixels = upsampling.cells.y.pixels * upsampling.cells.x.pixels  # of a lane
    more_registers = by_class or weighted or wanted.correct or loss_options.change_losses
    row_bytes = sum(x.itemsize for x in dtypes if x is not None) * batch * num_classes
    budget = max(PARTIALS_IN_CACHE, logits.numel() * logits.element_size() // 8)
    tiles = ceil_div(upsampling.lanes, FORWARD_LANES)
    chunks = min(tiles, max(budget // row_bytes, 1), ceil_div(4 * programs(), batch))
    tiles_per_chunk = ceil_div(tiles, chunks)
    chunks = ceil_div(tiles, tiles_per_chunk)
    partials = tensors(logits.new_empty, (batch * chunks, num_classes))
    valid = logits.new_empty(batch * chunks, dtype=torch.int64)
    programs_outside = None if outside is None else torch.empty_like(valid)
    _softmax_moments_kernel[(batch * chunks,)](
        logits,
        *logits.stride(),
        num_classes,
        labels,
        *labels.stride(),
        loss_options,
        partials,
        valid,
        programs_outside,
        pixel_losses,
        lse,
        *upsampling.sizes,
        upsampling.ratios,
        chunks,
        tiles_per_chunk,
        options.ignore_index,
        *pixel_map_of(options.pixel_weights),
        CELLS=upsampling.cells,
        LANES=FORWARD_LANES,
        num_warps=FORWARD_LANES // 32,
        enable_fp_fusion=False,  # coordinates as in F.interpolate
        # the loops need no more, and ptxas would take them
        **registers(255 if more_registers else 128 if pixels > 4 else 80),
    )
    operands = [
        tuple(x for x in statistics if x is not None and x.is_floating_point() == is_float)
        for is_float in (True, False)
        for statistics in (partials, sums)
    ]
    blocks = ceil_div(num_classes, CLASSES_OF_SUM.value)
    statistics = sum(x is not None for x in partials)
    _sums_of_programs_kernel[images, blocks, statistics + 1](  # only the first may exceed 2^16
        *operands,
        valid,
        programs_outside,
        divisor,
        outside,
        images,
        batch * chunks // images,
        num_classes,
        ROWS=512,
        num_warps=8,
    )
    return results
