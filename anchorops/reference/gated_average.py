"""The moving average of the anchors, in which each class has a gate (Eq. 8 of SAR)."""

import torch
from torch import Tensor


def gated_average(
    average: Tensor, anchors: Tensor, recognised: Tensor, *, momentum: float, per_class: bool
) -> tuple[Tensor, Tensor]:
    """momentum·average + (1−momentum)·anchors where the gate is open, or the anchors alone if the
    average of the class has not started (its row is zero); the old average where it is closed.

    average, anchors: [K, D]; recognised: bool [K]. The gate of a class is open if its anchor is
    recognised, or, without per_class, if all anchors are. Returns the updated average and the
    gates, bool [K].
    """
    gate = recognised if per_class else recognised.all().expand_as(recognised)
    updated = momentum * average + (1 - momentum) * anchors
    updated = torch.where(average.any(1, keepdim=True), updated, anchors)
    return torch.where(gate[:, None], updated, average), gate
