"""Σ_k e^(z_k) of the pixels of a tile, in the forward direction of softmax moments; and the
exponentials of even cells, which the divergence and gradients take over.

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
from .lanes import probability, sum_of
from .loss_options import add_weighted, weight_of_all
from .pixel_argmax import largest_logits
from .upsampling import (
    ROW_AXIS,
    at_first_class,
    corner_ptrs,
    corners_of,
    following,
    loaded,
    upsampled,
    zeros_of_pixels,
)

# Below this sum, terms that matter may have underflowed.
SMALLEST_SUM = Constant(2.0**-100)
# If the first exponential of a row underflows, below 2^-126, so do the others. With this spread
# they are below 2^(-126 + 3/4 · 80) = 2^-66, and this sum does not feel them.
LARGEST_SPREAD, _SMALLEST_SUM_OF_ROWS = Constant(80.0), Constant(2.0**-40)
# The same for gradients, where a lane has one shift, and also along a column. Pixels of a lane
# differ by at most 3/2 of it, so that e^(z − m) and e^(m − lse) are at most 2^60, also where
# ignored. If the first exponential of a row underflows, p is below 2^(-126 + 3/4 · 40 + 60).
LARGEST_SPREAD_OF_GRADIENT = Constant(40.0)
# Below every logit and exponent. Finite, so that differences are numbers.
LOWEST = Constant(-1e36)


class Softmax(NamedTuple):
    """What the first pass over the classes computes for the pixels of a tile."""

    lse: Any  # log Σ_k e^(z_k), 0 where ignored
    ptrs: Any  # corner_ptrs of class 0
    predicted: Any  # the class of the largest logit
    weighted: Any  # Σ_k v_k x_k of the four logits x of a cell: see loss_options.py


@triton.jit
def finite_or_zero(shift):
    """The shift, or 0 if it is −inf: if all logits are −inf, a shift of −inf would give NaN."""
    return tl.where(shift == -INF, 0.0, shift)


@triton.jit
def _exponents(four, shift):
    """log2 e^(x − m) of a cell's four logits x, where shift = −m·log2(e). The weights of a pixel's
    four logits add up to 1, so this can be upsampled."""
    return [tl.fma(x, LOG2_E, shift) for x in four]


@triton.jit
def exponentials_of_rows(ends, lanes, CELLS: tl.constexpr):
    """2^z of a lane's pixels in an even cell, whose four logits are `ends`; and by how much z
    changes across the cell along its upper and lower edge, and along its first column. The pixels
    of a row are equally spaced, so two exponentials serve all of them."""
    STEP: tl.constexpr = 1 / (CELLS.x.pixels * CELLS.x.parts)
    top, bottom = ends[1] - ends[0], ends[3] - ends[2]
    first_top = tl.fma(top, lanes.x.weights[0], ends[0])
    down = tl.fma(bottom, lanes.x.weights[0], ends[2]) - first_top
    factor = tl.exp2(tl.fma((bottom - top) * STEP, lanes.y.weights, top * STEP))
    exponentials = (tl.exp2(tl.fma(down, lanes.y.weights, first_top)),)
    for i in tl.static_range(1, len(CELLS.columns)):
        exponentials = exponentials + (exponentials[i - 1] * factor,)
    return exponentials, tl.maximum(tl.abs(top), tl.abs(bottom)), tl.abs(down)


@triton.jit
def shift_of_lane(log_sums, labels):
    """−m of each lane, where m is the largest log2 Σ_k 2^(slope·z_k) of valid pixels; −∞ if it has
    none, so that all 2^(slope·z − m) are 0. And a spread: ∞ if m has a rounding error that might
    let them overflow, otherwise 0."""
    largest = tl.full(log_sums[0].shape, -INF, tl.float32)
    for i in tl.static_range(len(log_sums)):
        largest = tl.maximum(largest, tl.where(labels[i] >= 0, log_sums[i], -INF))
    largest = tl.max(largest, ROW_AXIS, keep_dims=True)
    inexact = (largest != -INF) & (tl.abs(largest) > 2.0**20)
    shift = tl.where(largest == -INF, -INF, -largest)
    return shift, tl.where(inexact, INF, 0.0)


@triton.jit
def exponentials_of_lane(four, slope, shift, spread, lanes, CELLS: tl.constexpr):
    """2^(slope·z + shift) of a lane's pixels in an even cell; and the larger of `spread` and that
    of this class, NaN if two ends overflow. A logit that is NaN gives 0: where it matters, lse is
    NaN too."""
    ends = [tl.maximum(tl.fma(x, slope, shift), LOWEST) for x in four]
    exponentials, across, down = exponentials_of_rows(ends, lanes, CELLS)
    of_class = tl.maximum(across, down, tl.PropagateNan.ALL)
    return exponentials, tl.maximum(spread, of_class, tl.PropagateNan.ALL)


@triton.jit
def scales_of(log_sums, labels, CELLS: tl.constexpr):
    """1 / Σ_k 2^(slope·z_k − m) of each pixel, from its logarithm; 0 where ignored."""
    return [tl.where(labels[i] >= 0, tl.exp2(-log_sums[i]), 0.0) for i in () + CELLS.columns]


@triton.jit
def products(x, y, CELLS: tl.constexpr):
    return [x[i] * y[i] for i in () + CELLS.columns]


@triton.jit
def _exponentials(four, shift, spread, lanes, CELLS: tl.constexpr):
    """e^(z − m) of a lane's pixels; and the larger of `spread` and |log2| of the quotient of both
    ends of a row."""
    if CELLS.x.even:
        # The limit is for −∞, so that two of them have a difference.
        ends = [tl.maximum(x, LOWEST, tl.PropagateNan.ALL) for x in _exponents(four, shift)]
        exponentials, across, _ = exponentials_of_rows(ends, lanes, CELLS)
        return exponentials, tl.maximum(spread, across)
    else:
        exponents = upsampled(_exponents(four, shift), lanes, CELLS)
        return [tl.exp2(x) for x in exponents], spread


@triton.jit
def _sums_by_cell(logits, lanes, options, image, PREDICT: tl.constexpr, CELLS: tl.constexpr):
    """For each pixel Σ_k e^(z_k − m), where m is the largest logit of the cell, and with PREDICT
    the class of its largest logit; for each cell m, and Σ_k v_k x_k of its four logits x; the
    largest spread of _exponentials; and corner_ptrs of class 0."""
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
        exponentials, spread = _exponentials(four, shift, spread, lanes, CELLS)
        sums = [tl.fma(sums[i], scale, exponentials[i]) for i in () + CELLS.columns]
        if PREDICT:
            z = upsampled(four, lanes, CELLS)
            predicted = [tl.where(z[i] > best[i], k, predicted[i]) for i in () + CELLS.columns]
            best = [tl.where(z[i] > best[i], z[i], best[i]) for i in () + CELLS.columns]
    ptrs = at_first_class(ptrs, logits, CELLS)
    return sums, maximum, predicted, weighted, spread, ptrs


@triton.jit
def underflow(sums, labels, SMALLEST: tl.constexpr = SMALLEST_SUM):
    """For each row of pixels, whether a term that matters may have underflowed; or overflowed, by
    the rounding error of a shift beyond 2^30."""
    unsafe = (labels[0] >= 0) & ~((sums[0] >= SMALLEST) & (sums[0] < INF))
    for i in tl.static_range(1, len(sums)):
        unsafe |= (labels[i] >= 0) & ~((sums[i] >= SMALLEST) & (sums[i] < INF))
    return unsafe


@triton.jit
def any_of(mask):
    """Whether it is true in any lane."""
    return sum_of(mask.to(tl.int32)) > 0


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
def probabilities(four, lse, lanes, CELLS: tl.constexpr):
    """p of a lane's pixels, from the four logits of its cell."""
    z = upsampled(four, lanes, CELLS)
    return [probability(z[i], lse[i]) for i in () + CELLS.columns]
