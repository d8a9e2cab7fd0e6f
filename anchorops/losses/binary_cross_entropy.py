"""Binary cross-entropy of sigmoid logits, for one channel or several independent ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._checks import check_pos_weight
from .cross_entropy import BaseCrossEntropy
from .pixel_binary_cross_entropy import binary_smoothed, class_weights


class BinaryCrossEntropy(BaseCrossEntropy):
    """Binary cross-entropy of low-resolution logits, compared with labels at their own size.

        L = Σ_q ω_q·(1 − p_y)^γ·L_q / Σ_q ω_q
        L_q = (1 − ε)·w_y·(−log p_y) + ε/2·(w_1·(−log p_1) + w_0·(−log p_0))

    over the valid labels q of all channels that are used (all, unless ohem_threshold or
    ohem_min_kept is given), with p_1 = sigmoid(z) of the upsampled logits, p_0 = 1 − p_1,
    w_1 = pos_weight, w_0 = 1. It is 0 if the denominator is 0. Without options it equals
    F.binary_cross_entropy_with_logits of F.interpolate(logits.float(), …) and labels.float(), over
    the valid labels.

    Args:
        pos_weight: a number of at least 0, or one for each channel: a tensor [C], (C, 1, 1) or
            (1, C, 1, 1), an array or a sequence, of which the module keeps a copy; 1 if not given.
            It weights the positive labels, as in torch.nn.BCEWithLogitsLoss: the denominator
            remains the number of labels.
        label_smoothing: ε in [0, 1]: the target is 1 − ε/2 for positive labels, else ε/2.
        focal_gamma: γ at least 0 (Lin et al., Focal Loss, arXiv 1708.02002, Eq. 4). torchvision's
            sigmoid_focal_loss, with α, is (1 − α) times this loss with pos_weight α/(1 − α). The
            factor's 1 − p is at least 2⁻²⁴, p of the true class.
        ohem_threshold, ohem_min_kept, accuracy, ignore_index, align_corners, check_labels: as in
            `CrossEntropy`; each label of each channel is an example.

    Shapes: logits (B, C, h, w), labels (B, C, H, W) of any size, or (B, H, W) if C = 1, of 0, 1 and
    ignore_index; integer or bool. (N, C), (B, C, N) and (B, C, d, h, w) are possible, too.

    Call it with (logits, labels, pixel_weights=None); pixel_weights is ω, of the labels' shape.
    `terms`: ce, labels_out_of_range, labels_ignored, and accuracy if requested.
    """

    sigmoid = True
    divides_by_weight = False
    if TYPE_CHECKING:  # torch.jit.script reads annotations
        pos_weight: Tensor | None

    def __init__(
        self,
        pos_weight: Tensor | Sequence[float] | float | None = None,
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
        self._register_weight(pos_weight, "pos_weight")

    def class_weight(self, logits: Tensor) -> Tensor | None:
        pos_weight: Any = self.pos_weight
        if pos_weight is None:
            return None
        self.check_initialized()
        return class_weights(check_pos_weight(type(self).__name__, pos_weight, logits), logits)

    def smoothed(
        self, weight: Tensor | None, logits: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        return binary_smoothed(weight, self.label_smoothing, logits)
