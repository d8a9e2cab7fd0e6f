"""Cross-entropy with class weights, hard examples, focal factor, label smoothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_number, check_share, describe, fail
from .._ops.confusion import confusion
from .._ops.pixel_cross_entropy import (
    class_losses,
    divide,
    finite_where_unused,
    smoothed,
    smoothing_dtype,
    uniform_losses,
    valid_pixels,
    weighted,
)
from .._ops.pixel_cross_entropy import (
    pixel_weights as weights_of_pixels,
)
from ..reference import SoftmaxMoments, fixed_order_sum
from .pixel import PixelLoss, class_weight


class CrossEntropy(PixelLoss):
    """Cross-entropy of low-resolution logits, compared with labels at their own size.

        L = Σ_q v_q·(1 − p_y)^γ·L_q / Σ_q v_q·w_y
        L_q = (1 − ε)·w_y·(−log p_y) + ε/K·Σ_k w_k·(−log p_k)

    over the valid pixels q that are used (all, unless ohem or ohem_kept is given), with p the
    softmax of the upsampled logits. It is 0 if the denominator is 0. Without options it equals
    F.cross_entropy of F.interpolate(logits.float(), …).

    Args:
        weight: w, a number of at least 0 for each class; 1 if not given.
        label_smoothing: ε in [0, 1].
        focal_gamma: γ at least 0 (Lin et al., Focal Loss, arXiv 1708.02002, Eq. 4, of the softmax).
            smp's FocalLoss("multiclass") uses K sigmoids; MONAI additionally divides by K.
        ohem: only pixels whose true class has at most this probability are used (Shrivastava et
            al., arXiv 1604.03540).
        ohem_kept: at least this number of pixels of the batch are used: those with the largest
            losses, including ties. Pixels of weight 0 are removed first. Without `ohem` only these
            pixels are used. mmsegmentation's OHEMPixelSampler has the same two parameters, but its
            min_kept is per image, and its mean divides by all pixels.
        accuracy: add the share of correctly predicted pixels to `terms`.
        ignore_index: the label to ignore, 255 by default; with K > 255 it must be given.
        align_corners: of the upsampling, as in F.interpolate; the same as in the layer it replaces.
        check_labels: raise an error if a label is neither a class nor ignore_index; this
            synchronises with the device.

    Call it with (logits, labels, pixel_weights=None). pixel_weights is v, a floating-point tensor
    of the labels' shape; 1 if not given. A pixel of weight 0 adds nothing, even if its loss is ∞.
    (If its logits are NaN, or −∞ with label smoothing, its gradient is NaN: ignore it by label.)
    `terms`: ce, and accuracy if requested.

    Class weights need no additional time: they are applied to statistics of classes. Label
    smoothing, focal factor, hard examples and pixel weights need some maps of the labels' size.
    """

    settings = ("label_smoothing", "focal_gamma", "ohem", "ohem_kept")
    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
        ohem: float | None = None,
        ohem_kept: int | None = None,
        accuracy: bool = False,
        ignore_index: int | None = None,
        align_corners: bool = False,
        check_labels: bool = False,
    ) -> None:
        super().__init__(
            accuracy=accuracy,
            ignore_index=ignore_index,
            align_corners=align_corners,
            check_labels=check_labels,
        )
        self._register_weight(weight)
        check_share("CrossEntropy", "label_smoothing", label_smoothing)
        check_number("CrossEntropy", "focal_gamma", focal_gamma)
        if ohem is not None:
            check_number("CrossEntropy", "ohem", ohem, above=True)
            check_share("CrossEntropy", "ohem", ohem)
        if ohem_kept is not None and (type(ohem_kept) is not int or not 1 <= ohem_kept < 2**63):
            fail("CrossEntropy", "ohem_kept", "an int from 1 to 2^63 − 1", describe(ohem_kept))
        # float: comparisons of np.float64 give np.bool_
        self.label_smoothing, self.focal_gamma = float(label_smoothing), float(focal_gamma)
        self.ohem, self.ohem_kept = ohem, ohem_kept

    @property
    def _selects(self) -> bool:
        return self.ohem is not None or self.ohem_kept is not None

    def prepared(self, logits: Tensor) -> Tensor:
        return smoothing_dtype(logits, self.label_smoothing)

    def asked(self) -> dict[str, bool]:
        return {
            "masses": False,
            "lse": self.label_smoothing > 0,
            "pixel_losses": self._selects or self.focal_gamma > 0,
        }

    def parts(
        self,
        moments: SoftmaxMoments,
        logits: Tensor,
        labels: Tensor,
        pixel_weights: Tensor | None,
    ) -> dict[str, Tensor]:
        weight, ignored, uniform = class_weight(self, logits), self.ignored(logits), None
        if self.label_smoothing > 0:
            uniform = uniform_losses(logits, labels, moments, weight, ignored, self.align_corners)
        if pixel_weights is None and not self._selects and self.focal_gamma == 0:
            losses, weights = class_losses(moments, weight)
            total = None if uniform is None else fixed_order_sum(uniform)
            loss = smoothed(fixed_order_sum(losses), total, self.label_smoothing, logits)
            return {"ce": divide(loss, fixed_order_sum(weights))}
        ce = moments.pixel_losses
        assert ce is not None
        weights = weights_of_pixels(labels, weight, logits, ignored)
        if pixel_weights is not None:
            valid = valid_pixels(labels, logits.shape[1], ignored)
            pixel_weights = torch.where(valid, pixel_weights, 0)  # may be NaN where ignored
            ce = finite_where_unused(ce, pixel_weights)
            uniform = None if uniform is None else finite_where_unused(uniform, pixel_weights)
        losses = ce if weight is None else weighted(ce, weights)  # 0 where ignored
        losses = smoothed(losses, uniform, self.label_smoothing, logits)
        if self.focal_gamma > 0:
            # 1 − e^{−ce}; kept above 0, where the derivative of a power below 1 is infinite
            miss = (-torch.expm1(-ce)).clamp(min=torch.finfo(ce.dtype).tiny)
            losses = losses * _power(miss, self.focal_gamma)
        if pixel_weights is not None:
            losses, weights = losses * pixel_weights, weights * pixel_weights
        if self._selects:
            hard = self._hard(ce.detach(), weights != 0)
            losses, weights = torch.where(hard, losses, 0), torch.where(hard, weights, 0)
        return {"ce": divide(fixed_order_sum(losses), fixed_order_sum(weights))}

    def _hard(self, ce: Tensor, valid: Tensor) -> Tensor:
        """The pixels that are used: bool, the labels' shape."""
        ce = ce.float()  # kth_largest needs float32
        bound = math.inf if self.ohem is None else -math.log(self.ohem)
        bound = torch.full((), bound, device=ce.device)
        if self.ohem_kept is not None:
            bound = bound.minimum(kth_largest(ce, valid, self.ohem_kept))
        return valid & ~(ce < bound)  # includes NaN


def _power(x: Tensor, exponent: float) -> Tensor:
    """x**exponent for x > 0. On CPUs torch's general power has other bits at the end of a thread's
    part of the numbers than inside it; its square root, square and cube, exp and log do not."""
    if exponent in (0.5, 1.0, 2.0, 3.0):
        return x**exponent
    return (exponent * x.log()).exp()


def kth_largest(values: Tensor, valid: Tensor, k: int) -> Tensor:
    """The k-th largest of the valid values, float32 and not negative; −∞ if there are fewer.

    It neither sorts nor synchronises. The bits of non-negative floats, read as integers, have the
    same order as the floats. Therefore two histograms, of the upper and of the lower 16 bits, find
    the value exactly. NaN is treated as ∞.
    """
    values = values.nan_to_num(nan=torch.inf, posinf=torch.inf)
    bits = values.clamp(min=0).flatten().view(torch.int32)
    valid, rank = valid.flatten(), torch.full((), k, device=values.device)
    upper, rank = _bin_of_rank(bits >> 16, valid, rank)
    lower, rank = _bin_of_rank(bits & 0xFFFF, valid & (bits >> 16 == upper), rank)
    found = (upper << 16 | lower).to(torch.int32).view(torch.float32)
    return torch.where(rank > 0, found, -torch.inf)


def _bin_of_rank(bins: Tensor, valid: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Which of 2^16 bins contains the value of this rank (1 is the highest), and its rank inside
    the bin; a rank of 0 if there are fewer values."""
    rows = torch.where(valid, bins >> 8, -1).to(torch.int16)
    counts = confusion((bins & 0xFF).long(), rows, 256, ignore_index=-1).flatten()
    from_here = counts.flip(0).cumsum(0).flip(0)  # how many are in this bin or a higher one
    reached = from_here >= rank
    found = (reached.sum() - 1).clamp(min=0)
    rank = rank - (from_here - counts).take(found)
    return found, torch.where(reached.any(), rank, 0)
