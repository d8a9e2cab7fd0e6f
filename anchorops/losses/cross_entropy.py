"""Cross-entropies with class weights, hard examples, focal factor, label smoothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import check_int, check_number, check_share
from .._moments import Options, SoftmaxMoments, Wanted, as_scalar, statistics_dtype
from .._ops.kth_largest import kth_largest
from .._ops.softmax_moments import moments_of
from .pixel import MomentsLoss, class_weight
from .pixel_cross_entropy import (
    label_weights,
    number_of_pixels,
    smoothed,
    weighted_loss,
)


class BaseCrossEntropy(MomentsLoss):
    """What the cross-entropies of a softmax and of sigmoids share: all but the weights."""

    divides_by_weight = True  # whether the mean divides by the class weights of the used pixels

    def __init__(
        self,
        label_smoothing: float,
        focal_gamma: float,
        ohem_threshold: float | None,
        ohem_min_kept: int | None,
        *common: Any,
    ) -> None:
        super().__init__(*common)
        name = type(self).__name__
        self.label_smoothing = check_share(name, "label_smoothing", label_smoothing)
        self.focal_gamma = check_number(name, "focal_gamma", focal_gamma)
        if ohem_threshold is not None:
            check_number(name, "ohem_threshold", ohem_threshold, above=True)
            ohem_threshold = check_share(name, "ohem_threshold", ohem_threshold)
        if ohem_min_kept is not None:
            expected = "an int from 1 to 2^63 − 1"
            ohem_min_kept = check_int(name, "ohem_min_kept", ohem_min_kept, expected, minimum=1)
        self.ohem_threshold, self.ohem_min_kept = ohem_threshold, ohem_min_kept

    def class_weight(self, logits: Tensor) -> Tensor | None:
        """The weight of each class: [K], or [C, 2] of C sigmoids; None if all are 1."""
        raise NotImplementedError

    def smoothed(
        self, weight: Tensor | None, logits: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The options true_weights and all_weights."""
        raise NotImplementedError

    def options(self, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None) -> Options:
        weight = min_loss = None
        if self.label_smoothing > 0 or self.ohem_min_kept is not None:
            weight = self.class_weight(logits)
        if self.ohem_threshold is not None:
            # not log: torch.compile would compile again with each number
            min_loss = -math.log2(self.ohem_threshold) * math.log(2)
        if self.ohem_min_kept is not None:
            with torch.no_grad():  # Dynamo of torch 2.14 does not inline a decorated method in vmap
                used = self._largest(logits, labels, pixel_weights, weight, min_loss)
            ones = used.new_ones((), dtype=statistics_dtype(logits.dtype))
            pixel_weights = torch.where(used, ones if pixel_weights is None else pixel_weights, 0)
            min_loss = None  # pixels of smaller losses may be used
        true_weights, all_weights = self.smoothed(weight, logits)
        return Options(
            true_weights=true_weights,
            all_weights=all_weights,
            pixel_weights=pixel_weights,
            min_loss=min_loss,
            focal_gamma=self.focal_gamma if self.focal_gamma > 0 else None,
        )

    def parts(self, moments: SoftmaxMoments, logits: Tensor) -> dict[str, Tensor]:
        weight = self.class_weight(logits)
        used = None
        if weight is not None and (
            self.ohem_threshold is not None or self.ohem_min_kept is not None
        ):
            used = (weight != 0).to(weight.dtype)
        divisor = number_of_pixels(moments, weight if self.divides_by_weight else used)
        return {"ce": weighted_loss(moments, used if self.label_smoothing else weight, divisor)}

    def _largest(
        self,
        logits: Tensor,
        labels: Tensor,
        pixel_weights: Tensor | None,
        weight: Tensor | None,
        min_loss: float | None,
    ) -> Tensor:
        """Which pixels have one of the ohem_min_kept largest −log p_y, or at least min_loss:
        bool, the labels' shape. Any value where the label is ignored or its class has weight 0."""
        options = Options(ignore_index=self.ignored(logits), align_corners=self.align_corners)
        arguments = logits, labels, options, Wanted(pixel_losses=True)
        ce = moments_of(type(self).__name__, *arguments, sigmoid=self.sigmoid).pixel_losses
        assert ce is not None and self.ohem_min_kept is not None
        ce = ce.float()  # kth_largest needs float32
        if pixel_weights is not None:
            ce = torch.where(pixel_weights == 0, 0, ce)
        if weight is not None:
            valid = self.valid(logits, labels)
            ce = torch.where(label_weights(labels, weight, valid) == 0, 0, ce)
        bound = kth_largest(ce, self.ohem_min_kept)
        if min_loss is not None:
            bound = bound.minimum(as_scalar(min_loss, ce))
        used = ~(ce < bound)  # includes NaN
        return used if pixel_weights is None else used & (pixel_weights != 0)


class CrossEntropy(BaseCrossEntropy):
    """Cross-entropy of low-resolution logits, compared with labels at their own size.

        L = Σ_q ω_q·(1 − p_y)^γ·L_q / Σ_q ω_q·w_y
        L_q = (1 − ε)·w_y·(−log p_y) + ε/K·Σ_k w_k·(−log p_k)

    over the valid pixels q that are used (all, unless ohem_threshold or ohem_min_kept is given),
    with p the softmax of the upsampled logits. It is 0 if the denominator is 0. Without options it
    equals F.cross_entropy of F.interpolate(logits.float(), …).

    Args:
        weight: w, a number of at least 0 for each class; 1 if not given.
        label_smoothing: ε in [0, 1].
        focal_gamma: γ at least 0 (Lin et al., Focal Loss, arXiv 1708.02002, Eq. 4, of the softmax).
            smp's FocalLoss("multiclass") uses K sigmoids; MONAI additionally divides by K. The
            factor's 1 − p_y is at least 2⁻²⁴.
        ohem_threshold: only pixels whose true class has at most this probability, and not weight 0,
            are used (Shrivastava et al., arXiv 1604.03540).
        ohem_min_kept: at least this number of pixels of the batch are used: those with the largest
            losses, including ties. Pixels of weight 0 are removed first. Without
            `ohem_threshold` only these pixels are used. mmsegmentation's OHEMPixelSampler has the
            same two parameters, but its min_kept is per image, and its mean divides by all pixels.
        accuracy: add the share of correctly predicted pixels to `terms`.
        ignore_index: the label to ignore, 255 by default; with K > 255 it must be given.
        align_corners: of the upsampling, as in F.interpolate; the same as in the layer it replaces.
        check_labels: raise an error if a label is neither a class nor ignore_index, or if labels of
            two classes are 0 and 255 alone and 255 is ignored, as in masks of 0 and 255 that need
            `mask > 0`; this synchronises with the device.

    Call it with (logits, labels, pixel_weights=None). pixel_weights is ω, a floating-point tensor
    of the labels' shape, at least 0 (not checked); 1 if not given. A pixel of weight 0 adds
    nothing, even if its loss is ∞. (If its logits are NaN, its gradient is NaN: ignore it by
    label.) ω may have a gradient, but not where the loss is ∞ or OHEM does not use the pixel.
    `terms`: ce, labels_out_of_range, labels_ignored, and accuracy if requested.

    All of it is part of the passes over the logits, without full-resolution maps. Exceptions,
    which need some maps, are ohem_min_kept, with one more pass, and the gradient of pixel weights.
    """

    if TYPE_CHECKING:  # torch.jit.script reads annotations
        weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
        ohem_threshold: float | None = None,
        ohem_min_kept: int | None = None,
        accuracy: bool = False,
        ignore_index: int | None = None,
        align_corners: bool = False,
        check_labels: bool = False,
    ) -> None:
        common = accuracy, ignore_index, align_corners, check_labels
        super().__init__(label_smoothing, focal_gamma, ohem_threshold, ohem_min_kept, *common)
        self._register_weight(weight)

    def class_weight(self, logits: Tensor) -> Tensor | None:
        return class_weight(self, logits)

    def smoothed(
        self, weight: Tensor | None, logits: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        return smoothed(weight, self.label_smoothing, logits.shape[1], logits)
