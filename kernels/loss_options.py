"""Label smoothing, focal factor, smallest loss and pixel weights of softmax moments, for a pixel of
class y:

    c = −log p_y
    u = Σ_k v_k·(−log p_k) = V·lse − Σ_k v_k z_k,   V = Σ_k v_k
    m = max(1 − e^−c, 2⁻²⁴)^γ, 0 if c < min_loss
    L = m·(a_y·c + u)

Without these options a = 1, v = 0, γ = 0, min_loss = −∞, so L = c. A sum has ω·L of its pixels; a
pixel that is not used, or of ω = 0, adds nothing.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .constants import LOG2_E, Constant
from .lanes import values_of_labels
from .upsampling import corner_ptrs, corners_of, loaded, next_class, upsampled

_SMALLEST_MISS = Constant(2.0**-24)  # of 1 − p_y: p_y is rounded to multiples of this


class LossOptions(NamedTuple):
    """None for what is not wanted."""

    true_weights: Any = None  # a, float32 [K], or [B, K] by stride_b
    all_weights: Any = None  # v, the same
    stride_b: int = 0
    sums_of_all_weights: Any = None  # V, float32 [], or [B] by stride_sum_b
    stride_sum_b: int = 0
    min_loss: Any = None  # float32 []
    focal_gamma: Any = None  # γ, float32 []

    @property
    def change_losses(self) -> bool:
        return any(x is not None for x in (self.true_weights, self.min_loss, self.focal_gamma))

    def most_rows(self, by_class: bool) -> int | None:
        """The largest number of rows of pixels of a lane; None: no limit. With statistics by class
        too, 16 pixels would need more registers than there are."""
        return 2 if self.change_losses and by_class else None


def loss_options_of(options: Any) -> LossOptions:
    """From Options of _moments.py."""
    true_weights: Tensor | None = options.true_weights
    numbers = options.min_loss, options.focal_gamma
    if true_weights is None:
        return LossOptions(min_loss=numbers[0], focal_gamma=numbers[1])
    true_weights, all_weights = true_weights.contiguous(), options.all_weights.contiguous()
    strides = (true_weights.stride(0), 1) if true_weights.dim() == 2 else (0, 0)
    total = all_weights.sum(-1)
    return LossOptions(true_weights, all_weights, strides[0], total, strides[1], *numbers)


@triton.jit
def weight_of_all(k, options, image):
    """v_k. Loops load it early, so that nothing waits for it."""
    if options.all_weights is None:
        return 0.0
    else:
        return tl.load(options.all_weights + image * options.stride_b + k)


@triton.jit
def add_weighted(weighted, four, v, options):
    """Σ v_k x_k of a cell's four logits x: the sum so far, and the term of a class, which is left
    out if v = 0, because x may be −inf."""
    if options.all_weights is None:
        return weighted
    else:
        return [
            tl.where(v == 0, weighted[i], tl.fma(v, four[i], weighted[i])) for i in (0, 1, 2, 3)
        ]


@triton.jit
def losses_of_all_classes(weighted, lse, lanes, labels, options, image, CELLS: tl.constexpr):
    """u of each pixel, 0 where ignored."""
    if options.all_weights is None:
        return [0.0 for _ in lse]
    else:
        total = tl.load(options.sums_of_all_weights + image * options.stride_sum_b)
        z = upsampled(weighted, lanes, CELLS)
        u = [tl.fma(total, lse[i], -z[i]) for i in () + CELLS.columns]
        ignored_or_rounded = [(labels[i] < 0) | (u[i] < 0) for i in () + CELLS.columns]
        return [tl.where(ignored_or_rounded[i], 0.0, u[i]) for i in () + CELLS.columns]


@triton.jit
def _read_losses_of_all_classes(logits, lse, lanes, labels, options, image, CELLS: tl.constexpr):
    """u of each pixel, computed with a loop of its own over the classes."""
    zero = tl.zeros(lanes.x.cell.shape, tl.float32)
    weighted = (zero, zero, zero, zero)
    if options.all_weights is not None:
        ptrs = corner_ptrs(logits.ptr, lanes, CELLS)
        for k in range(logits.num_classes):
            four, v = corners_of(loaded(ptrs), CELLS), weight_of_all(k, options, image)
            ptrs = next_class(ptrs, logits.stride_k, CELLS)
            weighted = add_weighted(weighted, four, v, options)
    return losses_of_all_classes(weighted, lse, lanes, labels, options, image, CELLS)


@triton.jit
def weights_of_labels(labels, options, image):
    """a_y of each pixel."""
    if options.true_weights is None:
        return [1.0 for _ in labels]
    else:
        return values_of_labels(options.true_weights + image * options.stride_b, 1, labels)


@triton.jit
def is_used(c, options):
    """Whether c is at least min_loss, or NaN. Both directions compute c in the same way, so they
    use the same pixels."""
    if options.min_loss is None:
        return True
    else:
        return ~(c < tl.load(options.min_loss))


@triton.jit
def share_of_pixel(w, used, options):
    """w, 0 if the pixel is not used, also for an infinite w."""
    if options.min_loss is None:
        return w
    else:
        return tl.where(used, w, 0.0)


@triton.jit
def _miss(p):
    """1 − p_y, at least _SMALLEST_MISS; NaN remains."""
    return tl.where(1 - p < _SMALLEST_MISS, _SMALLEST_MISS, 1 - p)


@triton.jit
def _factor(c, options):
    """x = max(1 − e^−c, 2⁻²⁴), x^(γ − 1) and e^−c"""
    p = tl.exp2(c * -LOG2_E)
    x = _miss(p)
    return x, tl.exp2((tl.load(options.focal_gamma) - 1) * tl.log2(x)), p


@triton.jit
def _smoothed(c, u, a, options):
    """a·c + u, where a = 0 also for an infinite c."""
    if options.true_weights is None:
        return c
    else:
        return tl.where(a == 0, 0.0, a * c) + u


@triton.jit
def loss_of_pixel(c, u, a, used, options):
    """L"""
    loss = _smoothed(c, u, a, options)
    if options.focal_gamma is not None:
        x, power, _ = _factor(c, options)
        loss = x * power * loss
    if options.min_loss is not None:
        loss = tl.where(used, loss, 0.0)
    return loss


@triton.jit
def _slopes_of_loss(c, u, a, used, options):
    """∂L/∂c = m'·(a·c + u) + m·a, with m' = γ·(1 − e^−c)^(γ − 1)·e^−c, and ∂L/∂u = m"""
    by_c, by_u = a, 1.0
    if options.focal_gamma is not None:
        x, power, e = _factor(c, options)
        by_u = x * power
        growth = tl.load(options.focal_gamma) * power * (e * _smoothed(c, u, a, options))
        # for an infinite c, 0·∞; for c = 0, the derivative of a power of γ < 1 is infinite
        by_c = tl.where((e == 0) | (x == _SMALLEST_MISS), 0.0, growth) + by_u * a
    if options.min_loss is not None:
        by_c, by_u = tl.where(used, by_c, 0.0), tl.where(used, by_u, 0.0)
    return by_c, by_u


@triton.jit
def slopes_of_losses(
    d, c, logits, lanes, labels, lse, options, image, WEIGHTED: tl.constexpr, CELLS: tl.constexpr
):
    """d·∂L/∂c and d·∂L/∂u of each pixel. WEIGHTED: d contains the weight."""
    a = weights_of_labels(labels, options, image)
    if options.focal_gamma is None and options.min_loss is None:
        return [d[i] * a[i] for i in () + CELLS.columns], d
    else:
        used = [is_used(c[i], options) for i in () + CELLS.columns]
        if WEIGHTED:
            d = [share_of_pixel(d[i], used[i], options) for i in () + CELLS.columns]
        u = _read_losses_of_all_classes(logits, lse, lanes, labels, options, image, CELLS)
        slopes = [_slopes_of_loss(c[i], u[i], a[i], used[i], options) for i in () + CELLS.columns]
        return [d[i] * slopes[i][0] for i in () + CELLS.columns], [
            d[i] * slopes[i][1] for i in () + CELLS.columns
        ]


@triton.jit
def add_sum_of_weights(x, betas, options, image, CELLS: tl.constexpr):
    """x + β·V of each pixel"""
    if options.all_weights is None:
        return x
    else:
        total = tl.load(options.sums_of_all_weights + image * options.stride_sum_b)
        return [tl.fma(betas[i], total, x[i]) for i in () + CELLS.columns]


@triton.jit
def subtract_weighted(gradient, beta, v, options):
    """gradient − β·v"""
    if options.all_weights is None:
        return gradient
    else:
        return tl.where(v == 0, gradient, tl.fma(-v, beta, gradient))
