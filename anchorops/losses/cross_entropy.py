"""Cross-entropy with class weights, hard examples, focal factor, label smoothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import describe, fail
from ..ops.confusion import confusion
from ..ops.pixel_cross_entropy import (
    check_share,
    class_losses,
    divide,
    smoothed,
    smoothing_dtype,
    uniform_losses,
    weighted,
)
from ..ops.pixel_cross_entropy import (
    pixel_weights as weights_of_pixels,
)
from ..reference import SoftmaxMoments
from .pixel import PixelLoss, check_number, class_weight


class CrossEntropy(PixelLoss):
    """Cross-entropy of logits that are upsampled to the labels' size on the way.

        L = Σ_q v_q·(1 − p_y)^γ·L_q / Σ_q v_q·w_y
        L_q = (1 − ε)·w_y·(−log p_y) + ε/K·Σ_k w_k·(−log p_k)

    over the valid pixels q that count, with p the softmax of the upsampled logits; 0 where the
    denominator is. Without options it equals F.cross_entropy of F.interpolate(logits.float(), …).

    Args:
        weight: w, a number of at least 0 for each class; 1 if not given.
        label_smoothing: ε in [0, 1].
        focal_gamma: γ at least 0 (Lin et al., Focal Loss, arXiv 1708.02002, Eq. 4, of the softmax).
            smp's FocalLoss("multiclass") is that of K sigmoids; MONAI's divides by K, too.
        ohem: only pixels whose true class has at most this probability count (Shrivastava et al.,
            arXiv 1604.03540).
        ohem_kept: at least this number of pixels of the batch count: those with the largest losses,
            ties included. Pixels of weight 0 are left out first. Without `ohem` only these count.
            mmsegmentation's OHEMPixelSampler has the same two numbers, but its min_kept is per
            image, and the mean divides by all pixels.
        accuracy: put the share of pixels that are predicted right among `terms`.
        ignore_index: a label that is left out, 255 by default; with K > 255 it must be given.
        align_corners: of the upsampling, as in F.interpolate; that of the layer it replaces.

    Called with (logits, labels, pixel_weights=None): pixel_weights is v, floating, of the labels'
    shape; 1 if not given. `terms`: ce, accuracy where asked for.

    Class weights cost nothing: they are arithmetic on statistics of classes. Label smoothing,
    focal factor, hard examples and pixel weights take some maps of the labels' size.
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
    ) -> None:
        super().__init__(accuracy=accuracy, ignore_index=ignore_index, align_corners=align_corners)
        self._register_weight(weight)
        check_share("CrossEntropy", "label_smoothing", label_smoothing)
        check_number("CrossEntropy", "focal_gamma", focal_gamma)
        if ohem is not None:
            check_number("CrossEntropy", "ohem", ohem, above=True)
            check_share("CrossEntropy", "ohem", ohem)
        if ohem_kept is not None and (type(ohem_kept) is not int or ohem_kept < 1):
            fail("CrossEntropy", "ohem_kept", "an int of at least 1", describe(ohem_kept))
        self.label_smoothing, self.focal_gamma = label_smoothing, focal_gamma
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
            total = None if uniform is None else uniform.sum()
            loss = smoothed(losses.sum(), total, self.label_smoothing, logits)
            return {"ce": divide(loss, weights.sum())}
        ce = moments.pixel_losses
        assert ce is not None
        weights = weights_of_pixels(labels, weight, logits, ignored)
        losses = smoothed(weighted(ce, weights), uniform, self.label_smoothing, logits)
        if self.focal_gamma > 0:
            # 1 − e^{−ce}; kept above 0, where the derivative of a power below 1 is infinite
            miss = (-torch.expm1(-ce)).clamp(min=torch.finfo(ce.dtype).tiny)
            losses = losses * miss**self.focal_gamma
        if pixel_weights is not None:
            losses, weights = losses * pixel_weights, weights * pixel_weights
        if self._selects:
            hard = self._hard(ce.detach(), weights != 0)
            losses, weights = torch.where(hard, losses, 0), torch.where(hard, weights, 0)
        return {"ce": divide(losses.sum(), weights.sum())}

    def _hard(self, ce: Tensor, valid: Tensor) -> Tensor:
        """The pixels that count: bool, the labels' shape."""
        ce = ce.float()  # in which the k-th largest is found
        bound = math.inf if self.ohem is None else -math.log(self.ohem)
        bound = torch.full((), bound, device=ce.device)
        if self.ohem_kept is not None:
            bound = bound.minimum(kth_largest(ce, valid, self.ohem_kept))
        return valid & ~(ce < bound)  # NaN counts


def kth_largest(values: Tensor, valid: Tensor, k: int) -> Tensor:
    """The k-th largest of the valid values, float32 and not negative; −∞ where there are fewer.

    Without sorting, and without waiting for the device: the bits of such numbers have their order,
    so two histograms, of their upper and of their lower 16 bits, find it exactly. NaN counts as ∞.
    """
    values = values.nan_to_num(nan=torch.inf, posinf=torch.inf)
    bits = values.clamp(min=0).flatten().view(torch.int32)
    valid, rank = valid.flatten(), torch.full((), k, device=values.device)
    upper, rank = _bin_of_rank(bits >> 16, valid, rank)
    lower, rank = _bin_of_rank(bits & 0xFFFF, valid & (bits >> 16 == upper), rank)
    found = (upper << 16 | lower).to(torch.int32).view(torch.float32)
    return torch.where(rank > 0, found, -torch.inf)


def _bin_of_rank(bins: Tensor, valid: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Which of 2^16 bins holds the value of that rank, counted from 1 at the highest, and its rank
    inside the bin; a rank of 0 where there are fewer values."""
    rows = torch.where(valid, bins >> 8, -1).to(torch.int16)
    counts = confusion((bins & 0xFF).long(), rows, 256, ignore_index=-1).flatten()
    from_here = counts.flip(0).cumsum(0).flip(0)  # how many are in this bin or a higher one
    reached = from_here >= rank
    found = (reached.sum() - 1).clamp(min=0)
    rank = rank - (from_here - counts).take(found)
    return found, torch.where(reached.any(), rank, 0)
