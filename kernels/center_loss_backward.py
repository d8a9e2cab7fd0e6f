"""The gradient of center_loss in the sums and in the batch norm. A program processes some channels
of all centers."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _center_loss_bwd_kernel(
    dloss_ptr,  # float32 []
    number_ptr,  # float32 []
    dcenters_ptr,  # float32 [R, C], of each center's own loss
    sums_ptr,  # float32 [R, C]
    counts_ptr,  # int64 [R]
    mean_ptr,  # float32 [C]
    variance_ptr,  # float32 [C]
    norm_weight_ptr,  # float32 [C]
    dsums_ptr,  # float32 [R, C]
    dmean_ptr,  # float32 [C]
    dvariance_ptr,  # float32 [C]
    dnorm_weight_ptr,  # float32 [C]
    dnorm_bias_ptr,  # float32 [C]
    rows,
    channels,
    eps,
    loss_weight,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    factor = tl.load(dloss_ptr) * loss_weight / tl.maximum(tl.load(number_ptr), 1.0)
    mean = tl.load(mean_ptr + c, mask=inside, other=0.0)
    deviation = tl.sqrt(tl.load(variance_ptr + c, mask=inside, other=1.0) + eps)
    slope = tl.load(norm_weight_ptr + c, mask=inside, other=0.0) / deviation
    dweight, dbias = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        offset = r.to(tl.int64)[:, None] * channels + c[None, :]
        mask = (r < rows)[:, None] & inside[None, :]
        count = tl.maximum(tl.load(counts_ptr + r, mask=r < rows, other=1), 1).to(tl.float32)
        dcenter = factor * tl.load(dcenters_ptr + offset, mask=mask, other=0.0)
        center = tl.load(sums_ptr + offset, mask=mask, other=0.0) / count[:, None]
        dbias += tl.sum(dcenter, 0)
        dweight += tl.sum(dcenter * (center - mean[None, :]) / deviation[None, :], 0)
        tl.store(dsums_ptr + offset, dcenter * slope[None, :] / count[:, None], mask=mask)
    tl.store(dmean_ptr + c, -slope * dbias, mask=inside)
    tl.store(dvariance_ptr + c, -0.5 * slope * dweight / deviation, mask=inside)
    tl.store(dnorm_weight_ptr + c, dweight, mask=inside)
    tl.store(dnorm_bias_ptr + c, dbias, mask=inside)


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
    given = dloss, number, dcenters, sums, counts, mean, variance, norm_weight
    _center_loss_bwd_kernel[(triton.cdiv(channels, 16),)](
        *(*given, dsums, dmean, dvariance, dnorm_weight, dnorm_bias),
        *(rows, channels, eps, loss_weight),
        BLOCK_R=64,
        BLOCK_C=16,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return dsums, dmean, dvariance, dnorm_weight, dnorm_bias
