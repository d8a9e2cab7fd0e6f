"""CeCo's loss of class centers, from the sums of their pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .upsampled_sums import UpsampledSums


def normalized_means(moments: UpsampledSums, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Batch norm of the mean m_k of each class [..., C], without a meaning where a class is absent:
    z_k = (m_k − mean)·weight/√(variance + eps) + bias."""
    counts, sums, mean, variance = moments
    means = sums / counts.clamp(min=1)[..., None]
    return (means - mean) * (weight * (variance + eps).rsqrt()) + bias


def center_loss(
    moments: UpsampledSums,
    norm: tuple[Tensor, Tensor],
    projection: tuple[Tensor, Tensor],
    etf: Tensor,
    prior: Tensor,
    noise: Tensor | None,
    *,
    eps: float,
    scale: float,
    dropout: float,
    loss_weight: float,
) -> tuple[Tensor, Tensor]:
    """loss_weight · mean_{k present} −log softmax_k(scale·⟨ẑ_k, etf⟩ + log(prior + 1e−12)) and the
    number of present centers, with ẑ_k = dropout(normalize(ReLU(projection z_k))).

    norm: weight and bias [C] of the batch norm; projection: weight [E, C] and bias [E]; etf [K, E];
    prior [K]; noise: uniform in [0, 1), [..., E], of which those below `dropout` set ẑ to 0; None
    without dropout. The loss is 0 without present centers.
    """
    centers = normalized_means(moments, *norm, eps)
    hidden = F.normalize(F.linear(centers, *projection).relu(), dim=-1, eps=1e-12)
    if noise is not None:
        hidden = torch.where(noise < dropout, 0, hidden / (1 - dropout))
    logits = scale * F.linear(hidden, etf) + (prior + 1e-12).log()
    own = logits.log_softmax(-1).diagonal(dim1=-2, dim2=-1)
    present = moments.counts > 0
    number = present.sum().to(own.dtype)
    total = torch.where(present, own, 0).sum()
    return -loss_weight * total / number.clamp(min=1), number
