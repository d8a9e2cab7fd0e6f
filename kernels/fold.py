"""Sums within a thread."""

import triton
import triton.language as tl


@triton.jit
def fold(x, LANES: tl.constexpr, PIXELS_CONTIGUOUS: tl.constexpr):
    """The part of a sum over pixels within each thread: [BLOCK_D, BLOCK_P] to […, LANES]."""
    BLOCK_D: tl.constexpr = x.shape[0]
    PER_LANE: tl.constexpr = x.shape[1] // LANES
    if PIXELS_CONTIGUOUS:
        return tl.sum(tl.reshape(x, (BLOCK_D, LANES, PER_LANE)), 2)
    else:
        return tl.sum(tl.reshape(x, (BLOCK_D, PER_LANE, LANES)), 1)
