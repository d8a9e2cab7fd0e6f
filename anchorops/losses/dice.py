"""Dice, Jaccard and Tversky losses, alone or with cross-entropy in the same pass."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .._checks import check_choice, check_flags, check_ignore_index, check_number, describe, fail
from .._moments import Options, SoftmaxMoments, Wanted, as_scalar
from .._shared.sums import fixed_order_sum
from ..distributed import all_reduce, group_name
from .binary_cross_entropy import BinaryCrossEntropy
from .cross_entropy import CrossEntropy
from .pixel import (
    MomentsLoss,
    check_chosen_classes,
    chosen_classes,
    class_weight,
)
from .pixel_cross_entropy import divide, divisor_or_0


class Dice(MomentsLoss):
    """Overlap loss of low-resolution logits, compared with labels at their own size.

        score_k = (o_k + s_n) / (o_k + α·(m_k − o_k) + β·(c_k − o_k) + s_d)
        L = (Σ_k w_k·(1 − score_k) / Σ_k w_k)^γ

    with p the softmax of the upsampled logits, and o_k = Σ_{y = k} p_k, m_k = Σ p_k, c_k = #{y = k}
    over the valid pixels of the batch. α = β = ½ is Dice, 2o / (m + c) (Milletari et al.,
    arXiv 1606.04797); α = β = 1 is Jaccard, or IoU; others are Tversky (Salehi et al.,
    arXiv 1706.05721).

    With sigmoid=True, p_k = sigmoid(z_k) and c_k = #{y_k = 1}, for C independent channels k, labels
    (B, C, H, W), or (B, H, W) if C = 1, of 0, 1 and ignore_index; bool is possible, too. K is C.

    Args:
        alpha, beta: α of false positives, β of false negatives, at least 0.
        smooth, smooth_denominator: s_n, s_d, at least 0; s_d = s_n if not given. If the
            denominator is 0, the score is 0.
        squared: Σ p_k² instead of m_k, as in V-Net and MONAI's squared_pred.
        per_image: compute a score for each image and class, then the mean over both.
        classes: the classes to use; all if not given.
        absent: a class (of an image) without pixels in the labels is omitted from the mean
            ("skip"), adds 0 to it ("zero"), or is treated as by the formula ("keep").
        weight: w, a number of at least 0 for each of the K classes; 1 if not given.
        log: −log score_k instead of 1 − score_k.
        gamma: γ above 0, the power of the mean, as in smp's TverskyLoss (Abraham & Khan, arXiv
            1810.07842, apply it to each class). If it is not 1, the mean must not be negative, so
            no score may exceed 1: smooth is at most smooth_denominator, and with squared alpha is
            at most beta.
        sigmoid: each channel is a binary problem of its own; `accuracy` is over all channels.
        process_group: "world" or a ProcessGroup for the statistics of all its ranks. With DDP, the
            gradients are then those of one process on the concatenated batch. Not with per_image.
            The accuracy in `terms` remains that of the rank.
        accuracy, ignore_index, align_corners, check_labels: as in `CrossEntropy`.

    Comparison with other libraries, for the same logits at full resolution:
        segmentation_models.pytorch: DiceLoss("multiclass", smooth=s) is Dice(smooth=s,
            absent="zero"); the same holds for TverskyLoss and JaccardLoss. smp clamps denominators
            at 1e-7, and with log_loss also scores; here −log of a score of 0 is about 87.
        MONAI: DiceLoss(softmax=True, to_onehot_y=True) is Dice(per_image=True, smooth=0.5e-5,
            absent="keep"): its smooth_nr and smooth_dr, 1e-5, are added to 2·o and m + c. With
            batch=True it is per_image=False. Its weights are not divided by their sum.
        nnU-Net's trainer: −score of Dice(classes=range(1, K), smooth=0.5e-5, absent="keep"), so the
            loss here is larger by 1.

    Call it with (logits, labels). `terms`: dice, labels_out_of_range, labels_ignored, and accuracy
    if requested.
    """

    if TYPE_CHECKING:  # torch.jit.script reads annotations
        weight: Tensor | None

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        beta: float = 0.5,
        smooth: float = 0.0,
        smooth_denominator: float | None = None,
        squared: bool = False,
        per_image: bool = False,
        classes: Sequence[int] | None = None,
        absent: str = "skip",
        weight: Tensor | None = None,
        log: bool = False,
        gamma: float = 1.0,
        sigmoid: bool = False,
        process_group: ProcessGroup | str | None = None,
        accuracy: bool = False,
        ignore_index: int | None = None,
        align_corners: bool = False,
        check_labels: bool = False,
    ) -> None:
        super().__init__(accuracy, ignore_index, align_corners, check_labels)
        if smooth_denominator is None:
            smooth_denominator = smooth
        alpha, beta = check_number("Dice", "alpha", alpha), check_number("Dice", "beta", beta)
        smooth = check_number("Dice", "smooth", smooth)
        smooth_denominator = check_number("Dice", "smooth_denominator", smooth_denominator)
        gamma = check_number("Dice", "gamma", gamma, above=True)
        check_flags("Dice", squared=squared, per_image=per_image, log=log, sigmoid=sigmoid)
        # score_k ≤ 1 is s_n ≤ s_d + α·(m_k − o_k) + β·(c_k − o_k). With squares, a pixel of class k
        # adds (1 − p_k)·(β − α·p_k) to the right side; everything else adds at least 0.
        if gamma != 1 and (smooth > smooth_denominator or (squared and alpha > beta)):
            expected = (
                "1 with smooth above smooth_denominator, or with squared and alpha above beta: a "
                "score may exceed 1, and a negative mean has no power"
            )
            fail("Dice", "gamma", expected, gamma)
        check_choice("Dice", "absent", absent, ("skip", "zero", "keep"))
        if per_image and process_group is not None:
            fail("Dice", "process_group", "None with per_image", describe(process_group))
        self._register_weight(weight)
        self.alpha, self.beta = alpha, beta
        self.smooth, self.smooth_denominator = smooth, smooth_denominator
        self.squared, self.per_image = squared, per_image
        self.classes = chosen_classes("Dice", classes)
        self.absent, self.log, self.gamma = absent, log, gamma
        self.sigmoid = sigmoid
        self.process_group = group_name("Dice", process_group)

    def wanted(self) -> Wanted:
        wanted = super().wanted()
        return wanted._replace(
            probability_sums=True, squares=self.squared, per_image=self.per_image
        )

    @property
    def _is_defined(self) -> bool:
        """Whether every denominator is above 0, also of a class without pixels, whose numerator
        is 0."""
        is_below_0_possible = self.squared and self.alpha > self.beta  # as explained for gamma
        if self.sigmoid or self.absent == "keep" or is_below_0_possible:
            return False
        return self.beta + self.smooth_denominator > 0

    def parts(self, moments: SoftmaxMoments, logits: Tensor) -> dict[str, Tensor]:
        return {"dice": self._dice(moments, class_weight(self, logits))}

    def _dice(self, moments: SoftmaxMoments, weight: Tensor | None) -> Tensor:
        sums = moments.squares if self.squared else moments.probability_sums
        intersections, counts = moments.intersections, moments.counts
        assert sums is not None and intersections is not None
        if self.sigmoid:  # of the two classes of a channel, class 1
            intersections, sums, counts = intersections[..., 1], sums[..., 1], counts[..., 1]
        if self.process_group is not None:
            group = self.process_group
            intersections, sums = all_reduce(torch.stack([intersections, sums]), group).unbind()
            counts = all_reduce(counts, group)
        if self.classes is not None:
            check_chosen_classes("Dice", self.classes, counts.shape[-1])
            intersections, sums, counts = (
                torch.stack([x[..., k] for k in self.classes], -1)
                for x in (intersections, sums, counts)
            )
            if weight is not None:
                weight = torch.stack([weight[k] for k in self.classes])
        # With c at least 1, which changes classes without pixels alone. Not
        # torch.add(…, alpha=…): torch.compile would compile again with each number.
        sizes = counts.clamp(min=1) if self._is_defined else counts
        if self.alpha == self.beta == 0.5:  # the same with fewer operators
            denominator = 0.5 * (sums + sizes)
        else:
            denominator = intersections + self.alpha * (sums - intersections)
            denominator = denominator + self.beta * (sizes - intersections)
        if self.smooth_denominator > 0:
            denominator = denominator + self.smooth_denominator
        present: Any = 1 if self.absent == "keep" else counts.clamp(max=1)
        numerator = intersections
        if self.smooth > 0:
            numerator = numerator + present * as_scalar(self.smooth, numerator)
        # Before the division, because the derivative of a skipped score may be 0 · ∞.
        if not self._is_defined:
            undefined = denominator <= 0  # false for NaN, which must not become a score of 0
            if self.absent != "keep":
                undefined = undefined | (counts == 0)
            numerator = numerator.masked_fill(undefined, 0)
            denominator = denominator.masked_fill(undefined, 1)
        scores = numerator / denominator
        tiny = torch.finfo(scores.dtype).tiny
        losses = present * -scores.clamp(min=tiny).log() if self.log else present - scores
        counted = present if self.absent == "skip" else torch.ones_like(counts)
        if weight is None:  # exact: fewer than 2^24 numbers
            total = counted.sum(dtype=losses.dtype).clamp(min=1), None
        else:
            losses, counted = losses * weight, counted * weight
            total = divisor_or_0(fixed_order_sum(counted))
        mean = divide(fixed_order_sum(losses), total)

        if self.gamma != 1:
            # Below 0 by rounding alone. Kept above 0, where the derivative of a power below 1 is ∞.
            mean = torch.where(mean <= 0, 0, mean.clamp(min=tiny) ** self.gamma)
        return mean


class CrossEntropyDice(MomentsLoss):
    """ce_weight·CrossEntropy + dice_weight·Dice, sharing the passes over the logits.

    Args:
        cross_entropy, dice: the two losses; with their default arguments if not given. Both have
            the same align_corners, and the same kind of logits: CrossEntropy and Dice() are of a
            softmax, BinaryCrossEntropy and Dice(sigmoid=True) of sigmoids.
        ce_weight, dice_weight: the weights of the two losses.
        ignore_index: the label to ignore, for both. A loss that has one of its own must have this;
            otherwise this becomes its own.
        check_labels: as in `CrossEntropy`; also if one of the two requests it.

    Call it with (logits, labels, pixel_weights=None); the pixel weights apply to the cross-entropy.
    `terms`: ce, dice, labels_out_of_range, labels_ignored, and accuracy if one of them requests it.

    Raises ValueError if the two differ in ignore_index, align_corners or the kind of logits.
    """

    def __init__(
        self,
        cross_entropy: CrossEntropy | BinaryCrossEntropy | None = None,
        dice: Dice | None = None,
        *,
        ce_weight: float = 1.0,
        dice_weight: float = 1.0,
        ignore_index: int | None = None,
        check_labels: bool = False,
    ) -> None:
        part = dice if cross_entropy is None else cross_entropy
        sigmoid, align_corners = (
            getattr(part, name, False) for name in ("sigmoid", "align_corners")
        )
        if cross_entropy is None:
            make = BinaryCrossEntropy if sigmoid else CrossEntropy
            cross_entropy = make(align_corners=align_corners)
        if dice is None:
            dice = Dice(sigmoid=sigmoid, align_corners=align_corners)
        ce_weight = check_number("CrossEntropyDice", "ce_weight", ce_weight)
        dice_weight = check_number("CrossEntropyDice", "dice_weight", dice_weight)
        check_flags("CrossEntropyDice", check_labels=check_labels)
        if not isinstance(cross_entropy, CrossEntropy | BinaryCrossEntropy):
            expected = "a CrossEntropy or BinaryCrossEntropy"
            fail("CrossEntropyDice", "cross_entropy", expected, describe(cross_entropy))
        if not isinstance(dice, Dice):
            fail("CrossEntropyDice", "dice", "a Dice", describe(dice))
        if cross_entropy.sigmoid != dice.sigmoid:
            expected = f"sigmoid={cross_entropy.sigmoid}, as {type(cross_entropy).__name__} has it"
            fail("CrossEntropyDice", "dice", expected, f"sigmoid={dice.sigmoid}")
        if cross_entropy.align_corners != dice.align_corners:
            expected = f"the cross-entropy's align_corners, {cross_entropy.align_corners}"
            fail("CrossEntropyDice", "dice", expected, f"align_corners = {dice.align_corners}")
        if ignore_index is not None:
            ignore_index = check_ignore_index("CrossEntropyDice", ignore_index, 1)
        given = ignore_index, cross_entropy.ignore_index, dice.ignore_index
        labels = {label for label in given if label is not None}
        if len(labels) > 1:
            fail("CrossEntropyDice", "ignore_index", "one label for all parts", sorted(labels))
        ignore_index = labels.pop() if labels else None
        cross_entropy.ignore_index = dice.ignore_index = ignore_index
        super().__init__(
            accuracy=cross_entropy.accuracy or dice.accuracy,
            ignore_index=ignore_index,
            align_corners=cross_entropy.align_corners,
            check_labels=check_labels or cross_entropy.check_labels or dice.check_labels,
        )
        self.sigmoid = dice.sigmoid
        self.cross_entropy, self.dice = cross_entropy, dice
        self.ce_weight, self.dice_weight = ce_weight, dice_weight

    def options(self, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None) -> Options:
        return self.cross_entropy.options(logits, labels, pixel_weights)

    def wanted(self) -> Wanted:
        both = Wanted(*map(operator.or_, self.cross_entropy.wanted(), self.dice.wanted()))
        return both._replace(correct=self.accuracy)

    def parts(self, moments: SoftmaxMoments, logits: Tensor) -> dict[str, Tensor]:
        parts = {}
        for loss, factor in ((self.cross_entropy, self.ce_weight), (self.dice, self.dice_weight)):
            for name, part in loss.parts(moments, logits).items():
                if name in parts:
                    expected = "parts of other names than the cross-entropy's"
                    fail("CrossEntropyDice", "dice", expected, name)
                parts[name] = part if factor == 1 else factor * part
        return parts
