"""Σ_k e^(z_k) of the pixels of a tile, in the forward direction of softmax moments.

The logits are read class by class. Σ_k e^(z_k − m) of each pixel stays in registers, where m is the
largest logit of the pixel's cell so far. If the neighbours of a cell differ by about 70 (by 28 in
even cells, where a row's terms are a geometric sequence), this may underflow. Then the maximum of
each pixel is found in a second loop over the classes, and the sums in a third.

lse = log Σ_k e^(z_k) is the one number of a pixel: losses and probabilities are computed from it
and z in both directions, and have the errors of their roundings.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .constants import INF, LN_2, LOG2_E, Constant
from .exponentials import (
    LARGEST_SPREAD,
    LOWEST,
    SMALLEST_SUM,
    exponentials_of_rows,
    finite_or_zero,
    probability,
    underflow,
)
from .lanes import NO_CLASS, any_of, next_label
from .loss_options import add_weighted, weight_of_all
from .upsampling import (
    at_first_class,
    corner_ptrs,
    corners_of,
    corners_of_class,
    following,
    loaded,
    upsampled,
    zeros_of_pixels,
)

# In even cells, where LARGEST_SPREAD leaves terms below 2^-66, this sum does not feel them.
_SMALLEST_SUM_OF_ROWS = Constant(2.0**-40)


class Softmax(NamedTuple):
    """What the first pass over the classes computes for the pixels of a tile."""

    lse: Any  # log Σ_k e^(z_k), 0 where ignored
    ptrs: Any  # corner_ptrs of class 0
    predicted: Any  # the class of the largest logit
    weighted: Any  # Σ_k v_k x_k of the four logits x of a cell: see loss_options.py


@triton.jit
def largest_logits(logits, ptrs, lanes, CELLS: tl.constexpr):
    """The largest logit of each pixel, and its class: the first, if several are equal. NaN is
    larger than all numbers. ptrs: corner_ptrs of class 0; also returned."""
    zero = zeros_of_pixels(lanes, CELLS)
    largest = [zero - INF for _ in () + CELLS.columns]
    classes = [zero.to(tl.int32) for _ in () + CELLS.columns]
    stored = loaded(ptrs)
    for k in range(logits.num_classes):
        z = upsampled(corners_of(stored, CELLS), lanes, CELLS)
        ptrs = following(ptrs, k, logits, CELLS)
        stored = loaded(ptrs)
        for_nan = [(z[i] != z[i]) & (largest[i] == largest[i]) for i in () + CELLS.columns]
        larger = [(z[i] > largest[i]) | for_nan[i] for i in () + CELLS.columns]
        largest = [tl.where(larger[i], z[i], largest[i]) for i in () + CELLS.columns]
        classes = [tl.where(larger[i], k, classes[i]) for i in () + CELLS.columns]
    return largest, classes, at_first_class(ptrs, logits, CELLS)


@triton.jit
def _terms_of_lane(four, shift, spread, lanes, CELLS: tl.constexpr):
    """e^(z − m) of a lane's pixels, from the four logits of its cell, where shift = −m·log2(e); and
    the larger of `spread` and |log2| of the quotient of both ends of a row."""
    # The weights of a pixel's four logits add up to 1, so exponents can be upsampled.
    exponents = [tl.fma(x, LOG2_E, shift) for x in four]
    if CELLS.x.even:
        # The limit is for −∞, so that two of them have a difference.
        ends = [tl.maximum(x, LOWEST, tl.PropagateNan.ALL) for x in exponents]
        exponentials, across, _ = exponentials_of_rows(ends, lanes, CELLS)
        return exponentials, tl.maximum(spread, across)
    else:
        return [tl.exp2(x) for x in upsampled(exponents, lanes, CELLS)], spread


@triton.jit
def _sums_by_cell(logits, lanes, options, image, PREDICT: tl.constexpr, CELLS: tl.constexpr):
    """For each pixel Σ_k e^(z_k − m), where m is the largest logit of the cell, and with PREDICT
    the class of its largest logit; for each cell m, and Σ_k v_k x_k of its four logits x; the
    largest spread of _terms_of_lane; and corner_ptrs of class 0."""
    zero = tl.zeros(lanes.x.cell.shape, tl.float32)
    maximum, shift = zero + LOWEST, zero + LOWEST * -LOG2_E
    zeros = zeros_of_pixels(lanes, CELLS)
    sums, best = [zeros for _ in () + CELLS.columns], [zeros - INF for _ in () + CELLS.columns]
    predicted = [zeros.to(tl.int32) for _ in () + CELLS.columns]
    weighted, spread = (zero, zero, zero, zero), zero
    ptrs = corner_ptrs(logits.ptr, lanes, CELLS)
    stored, next_v = loaded(ptrs), weight_of_all(0, options, image)
    for k in range(logits.num_classes):
        four, v = corners_of(stored, CELLS), next_v
        # before the exponentials, so that v's register is free for the next one
        weighted = add_weighted(weighted, four, v, options)
        ptrs = following(ptrs, k, logits, CELLS)
        stored = loaded(ptrs)
        next_v = weight_of_all(tl.minimum(k + 1, logits.num_classes - 1), options, image)
        # tl.maximum of NaN and a number returns the number; the sum is still NaN
        highest = tl.maximum(tl.maximum(four[0], four[1]), tl.maximum(four[2], four[3]))
        maximum = tl.maximum(maximum, highest)
        new_shift = maximum * -LOG2_E
        scale = tl.exp2(new_shift - shift)
        shift = new_shift
        exponentials, spread = _terms_of_lane(four, shift, spread, lanes, CELLS)
        sums = [tl.fma(sums[i], scale, exponentials[i]) for i in () + CELLS.columns]
        if PREDICT:
            z = upsampled(four, lanes, CELLS)
            predicted = [tl.where(z[i] > best[i], k, predicted[i]) for i in () + CELLS.columns]
            best = [tl.where(z[i] > best[i], z[i], best[i]) for i in () + CELLS.columns]
    ptrs = at_first_class(ptrs, logits, CELLS)
    return sums, maximum, predicted, weighted, spread, ptrs


@triton.jit
def _sums_by_pixel(logits, ptrs, lanes, shifts, CELLS: tl.constexpr):
    """Σ_k e^(z_k − shift) of each pixel; and ptrs."""
    sums = [tl.zeros(x.shape, tl.float32) for x in shifts]
    stored = loaded(ptrs)
    for k in range(logits.num_classes):
        z = upsampled(corners_of(stored, CELLS), lanes, CELLS)
        ptrs = following(ptrs, k, logits, CELLS)
        stored = loaded(ptrs)
        sums = [sums[i] + probability(z[i], shifts[i]) for i in () + CELLS.columns]
    return sums, at_first_class(ptrs, logits, CELLS)


@triton.jit
def softmax_of(logits, lanes, labels, options, image, PREDICT: tl.constexpr, CELLS: tl.constexpr):
    """Softmax; `predicted` only with PREDICT."""
    sums, maximum, predicted, weighted, spread, ptrs = _sums_by_cell(
        logits, lanes, options, image, PREDICT, CELLS
    )
    SMALLEST: tl.constexpr = _SMALLEST_SUM_OF_ROWS if CELLS.x.even else SMALLEST_SUM
    by_pixel = any_of((spread > LARGEST_SPREAD) | underflow(sums, labels, SMALLEST))
    rounding = tl.fma(maximum, LOG2_E, maximum * -LOG2_E)  # of the shift
    lse = [tl.fma(tl.log2(x) - rounding, LN_2, maximum) for x in sums]
    if by_pixel:
        largest, classes, ptrs = largest_logits(logits, ptrs, lanes, CELLS)
        shifts = [finite_or_zero(x) for x in largest]
        sums, ptrs = _sums_by_pixel(logits, ptrs, lanes, shifts, CELLS)
        lse = [tl.fma(tl.log2(sums[i]), LN_2, shifts[i]) for i in () + CELLS.columns]
        if PREDICT:
            predicted = classes
    lse = [tl.where(labels[i] >= 0, lse[i], 0.0) for i in () + CELLS.columns]
    return Softmax(lse, ptrs, predicted, weighted)


@triton.jit
def losses_of_labels(logits, ptrs, lse, lanes, labels, CELLS: tl.constexpr):
    """c = −log p_y = lse − z_y of each pixel, 0 where ignored. The logits are read for one label of
    the tile after the other. ptrs: corner_ptrs of class 0."""
    c = [tl.zeros(label.shape, tl.float32) for label in labels]
    label = next_label(labels, -1)
    while label < NO_CLASS:
        z = upsampled(corners_of_class(ptrs, label, logits, CELLS), lanes, CELLS)
        c = [tl.where(labels[i] == label, lse[i] - z[i], c[i]) for i in () + CELLS.columns]
        label = next_label(labels, label)
    return [tl.where(x < 0, 0.0, x) for x in c]  # negative by rounding; NaN remains
