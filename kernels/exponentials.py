"""Exponentials of the pixels of lanes, and whether they underflow. In even cells the pixels of a
row are equally spaced, so their exponentials are a geometric sequence."""

import triton
import triton.language as tl

from .constants import INF, LOG2_E, Constant
from .upsampling import ROW_AXIS, upsampled

# Below every logit and exponent. Finite, so that differences are numbers.
LOWEST = Constant(-1e36)
# Below this sum, terms that matter may have underflowed.
SMALLEST_SUM = Constant(2.0**-100)
# If the first exponential of a row underflows, below 2^-126, so do the others. With this spread
# they are below 2^(-126 + 3/4 · 80) = 2^-66.
LARGEST_SPREAD = Constant(80.0)
# The same for gradients, where a lane has one shift, and also along a column. Pixels of a lane
# differ by at most 3/2 of it, so that e^(z − m) and e^(m − lse) are at most 2^60, also where
# ignored. If the first exponential of a row underflows, p is below 2^(-126 + 3/4 · 40 + 60).
LARGEST_SPREAD_OF_GRADIENT = Constant(40.0)


@triton.jit
def probability(z, lse):
    """p = e^(z − lse)"""
    return tl.exp2((z - lse) * LOG2_E)


@triton.jit
def probabilities(four, lse, lanes, CELLS: tl.constexpr):
    """p of a lane's pixels, from the four logits of its cell."""
    z = upsampled(four, lanes, CELLS)
    return [probability(z[i], lse[i]) for i in () + CELLS.columns]


@triton.jit
def finite_or_zero(shift):
    """The shift, or 0 if it is −inf: if all logits are −inf, a shift of −inf would give NaN."""
    return tl.where(shift == -INF, 0.0, shift)


@triton.jit
def underflow(sums, labels, SMALLEST: tl.constexpr = SMALLEST_SUM):
    """For each row of pixels, whether a term that matters may have underflowed; or overflowed, by
    the rounding error of a shift beyond 2^30."""
    unsafe = (labels[0] >= 0) & ~((sums[0] >= SMALLEST) & (sums[0] < INF))
    for i in tl.static_range(1, len(sums)):
        unsafe |= (labels[i] >= 0) & ~((sums[i] >= SMALLEST) & (sums[i] < INF))
    return unsafe


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
    """−m of each lane, where m is the largest log2 Σ_k e^(z_k/T) of valid pixels; −∞ if it has
    none, so that all e^(z/T)·2^−m are 0. And a spread: ∞ if m has a rounding error that might let
    them overflow, otherwise 0."""
    largest = tl.full(log_sums[0].shape, -INF, tl.float32)
    for i in tl.static_range(len(log_sums)):
        largest = tl.maximum(largest, tl.where(labels[i] >= 0, log_sums[i], -INF))
    largest = tl.max(largest, ROW_AXIS, keep_dims=True)
    inexact = (largest != -INF) & (tl.abs(largest) > 2.0**20)
    shift = tl.where(largest == -INF, -INF, -largest)
    return shift, tl.where(inexact, INF, 0.0)


@triton.jit
def exponentials_of_lane(four, log2e, shift, spread, lanes, CELLS: tl.constexpr):
    """e^(z/T)·2^shift of a lane's pixels in an even cell, where log2e = log2(e)/T; and the larger
    of `spread` and that of this class, NaN if two ends overflow. A logit that is NaN gives 0: where
    it matters, lse is NaN too."""
    ends = [tl.maximum(tl.fma(x, log2e, shift), LOWEST) for x in four]
    exponentials, across, down = exponentials_of_rows(ends, lanes, CELLS)
    of_class = tl.maximum(across, down, tl.PropagateNan.ALL)
    return exponentials, tl.maximum(spread, of_class, tl.PropagateNan.ALL)


@triton.jit
def scales_of(log_sums, labels, CELLS: tl.constexpr):
    """2^m / Σ_k e^(z_k/T) of each pixel, from log2 of its inverse; 0 where ignored."""
    return [tl.where(labels[i] >= 0, tl.exp2(-log_sums[i]), 0.0) for i in () + CELLS.columns]


@triton.jit
def products(x, y, CELLS: tl.constexpr):
    return [x[i] * y[i] for i in () + CELLS.columns]
