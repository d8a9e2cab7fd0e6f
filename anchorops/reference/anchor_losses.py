"""SAR's losses of pixels and of anchors, from numbers of each class."""

from typing import NamedTuple

import torch
from torch import Tensor


class AnchorLosses(NamedTuple):
    """p2a: mean squared distance of the pixels to their anchors, weighted. Without cross-entropies
    the others are None. aux: the auxiliary loss of the anchors, weighted; gate: the share of open
    gates; unsure: the number of anchors in the auxiliary loss, as p2a floating-point."""

    p2a: Tensor
    aux: Tensor | None = None
    gate: Tensor | None = None
    unsure: Tensor | None = None


def anchor_losses(
    counts: Tensor,
    sqdists: Tensor,
    gate: Tensor | None = None,
    cross_entropies: Tensor | None = None,
    *,
    dim: int,
    loss_weight: float = 1.0,
    aux_weight: float = 1.0,
    tau: float = 1.0,
    reweight: bool = True,
    detach_weights: bool = False,
) -> AnchorLosses:
    """p2a = loss_weight·Σ q_k / max(D·Σ n_k, 1), over the classes k with an open gate;
    aux = aux_weight·Σ w_k c_k, over the unsure anchors: those with p_k = exp(−c_k) ≤ tau.

    counts n: int64 [K]; sqdists q: [K]; gate: bool [K]; cross_entropies c: [K]; gate and
    cross_entropies are given together. w_k = c_k / (Σ c_j + 1e-9) over the unsure anchors j, or 1
    divided by their number without reweight. With detach_weights the w_k are constants.
    """
    if gate is not None:
        counts, sqdists = torch.where(gate, counts, 0), torch.where(gate, sqdists, 0)
    p2a = loss_weight * (sqdists.sum() / (dim * counts.sum()).clamp(min=1))
    if gate is None or cross_entropies is None:
        return AnchorLosses(p2a)
    unsure = (-cross_entropies.detach()).exp() <= tau
    losses, number = torch.where(unsure, cross_entropies, 0), unsure.sum()
    if reweight:
        weights = losses.detach() if detach_weights else losses
        aux = (weights * losses).sum() / (weights.sum() + 1e-9)
    else:
        aux = losses.sum() / number.clamp(min=1)
    share = gate.to(losses.dtype).mean()
    return AnchorLosses(p2a, aux_weight * aux, share, number.to(losses.dtype))
