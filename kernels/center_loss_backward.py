"""The gradient of center_loss in the sums and in the batch norm. A program processes some channels
of all centers."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .center_loss import Centers


class Gradients(NamedTuple):
    """float32; the first three are given."""

    dloss: Any  # []
    number: Any  # []
    dcenters: Any  # [R, C], of each center's own loss
    dsums: Any  # [R, C]
    dmean: Any  # [C]
    dvariance: Any  # [C]
    dnorm_weight: Any  # [C]
    dnorm_bias: Any  # [C]


@triton.jit
def _center_loss_bwd_kernel(
    centers,  # Centers
    gradients,  # Gradients
    rows,
    loss_weight,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < centers.channels
    factor = tl.load(gradients.dloss) * loss_weight / tl.maximum(tl.load(gradients.number), 1.0)
    mean = tl.load(centers.mean + c, mask=inside, other=0.0)
    deviation = tl.sqrt(tl.load(centers.variance + c, mask=inside, other=1.0) + centers.eps)
    slope = tl.load(centers.norm_weight + c, mask=inside, other=0.0) / deviation
    dweight, dbias = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        offset = r.to(tl.int64)[:, None] * centers.channels + c[None, :]
        mask = (r < rows)[:, None] & inside[None, :]
        count = tl.load(centers.counts + r, mask=r < rows, other=1)
        count = tl.maximum(count, 1).to(tl.float32)[:, None]
        dcenter = factor * tl.load(gradients.dcenters + offset, mask=mask, other=0.0)
        center = tl.load(centers.sums + offset, mask=mask, other=0.0) / count
        dbias += tl.sum(dcenter, 0)
        dweight += tl.sum(dcenter * (center - mean[None, :]) / deviation[None, :], 0)
        tl.store(gradients.dsums + offset, dcenter * slope[None, :] / count, mask=mask)
    tl.store(gradients.dmean + c, -slope * dbias, mask=inside)
    tl.store(gradients.dvariance + c, -0.5 * slope * dweight / deviation, mask=inside)
    tl.store(gradients.dnorm_weight + c, dweight, mask=inside)
    tl.store(gradients.dnorm_bias + c, dbias, mask=inside)


def center_loss_backward(
    dloss: Tensor,
    number: Tensor,
    dcenters: Tensor,
    sums: Tensor,
    counts: Tensor,
    mean: Tensor,
    variance: Tensor,
    norm_weight: Tensor,
    eps: float,
    loss_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> dsums [R, C], dmean [C], dvariance [C], dnorm_weight [C], dnorm_bias [C]."""
    dsums, (rows, channels) = torch.empty_like(sums), sums.shape
    dmean, dvariance, dnorm_weight, dnorm_bias = (torch.empty_like(mean) for _ in range(4))
    _center_loss_bwd_kernel[(triton.cdiv(channels, 16),)](
        Centers(sums, counts, mean, variance, norm_weight, None, channels, eps),
        Gradients(dloss, number, dcenters, dsums, dmean, dvariance, dnorm_weight, dnorm_bias),
        rows,
        loss_weight,
        BLOCK_R=64,
        BLOCK_C=16,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return dsums, dmean, dvariance, dnorm_weight, dnorm_bias
