"""CeCo's loss of class centers, and its gradient in the centers. A program processes one center; a
second kernel adds the losses."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import without_spills

_BLOCK = 16  # channels, or classes, that are multiplied at once


@triton.jit
def _center_loss_kernel(
    sums_ptr,  # float32 [R, C]
    counts_ptr,  # int64 [R]
    mean_ptr,  # float32 [C]
    variance_ptr,  # float32 [C]
    norm_weight_ptr,  # float32 [C]
    norm_bias_ptr,  # float32 [C]
    weight_ptr,  # float32 [E, C]
    bias_ptr,  # float32 [E]
    etf_ptr,  # float32 [K, E]
    prior_ptr,  # float32 [K]
    noise_ptr,  # float32 [R, E]
    losses_ptr,  # float32 [R]
    centers_ptr,  # float32 [R, C]
    dcenters_ptr,  # float32 [R, C]
    dhidden_ptr,  # float32 [R, E]
    channels,
    dim,
    classes,
    eps,
    scale,
    dropout,
    HAS_NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Reads the projection and the simplex twice. Everything is 0 if the class is absent."""
    r = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    some = e < dim
    count = tl.load(counts_ptr + r)
    present = (count > 0).to(tl.float32)
    hidden = tl.load(bias_ptr + e, mask=some, other=0.0)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = c < channels
        center = tl.load(sums_ptr + r * channels + c, mask=inside, other=0.0)
        center = center / tl.maximum(count, 1).to(tl.float32)
        center -= tl.load(mean_ptr + c, mask=inside, other=0.0)
        center /= tl.sqrt(tl.load(variance_ptr + c, mask=inside, other=1.0) + eps)
        center *= tl.load(norm_weight_ptr + c, mask=inside, other=0.0)
        center += tl.load(norm_bias_ptr + c, mask=inside, other=0.0)
        tl.store(centers_ptr + r * channels + c, center * present, mask=inside)
        mask = some[:, None] & inside[None, :]
        weight = tl.load(weight_ptr + e[:, None] * channels + c[None, :], mask=mask, other=0.0)
        hidden += tl.sum(weight * center[None, :], 1)

    positive = tl.where(hidden < 0, 0.0, hidden)  # tl.maximum would hide NaN
    norm = tl.sqrt(tl.sum(positive * positive, 0))
    length = tl.maximum(norm, 1e-12)
    unit = positive / length
    kept = tl.full((BLOCK_E,), 1.0, tl.float32)
    if HAS_NOISE:
        noise = tl.load(noise_ptr + r * dim + e, mask=some, other=0.0)
        kept = tl.where(noise < dropout, 0.0, 1 / (1 - dropout))
    query = unit * kept

    own_class = (r % classes).to(tl.int32)
    top, total, own = -float("inf"), 0.0, 0.0
    for start in range(0, classes, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask = (k < classes)[:, None] & some[None, :]
        etf = tl.load(etf_ptr + k[:, None] * dim + e[None, :], mask=mask, other=0.0)
        prior = tl.load(prior_ptr + k, mask=k < classes, other=1.0)
        logits = scale * tl.sum(etf * query[None, :], 1) + tl.log(prior + 1e-12)
        logits = tl.where(k < classes, logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher), 0)
        own += tl.sum(tl.where(k == own_class, logits, 0.0), 0)
        top = higher
    lse = top + tl.log(total)
    tl.store(losses_ptr + r, (lse - own) * present)

    dquery = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(0, classes, BLOCK):
        k = start + tl.arange(0, BLOCK)
        mask = (k < classes)[:, None] & some[None, :]
        etf = tl.load(etf_ptr + k[:, None] * dim + e[None, :], mask=mask, other=0.0)
        prior = tl.load(prior_ptr + k, mask=k < classes, other=1.0)
        logits = scale * tl.sum(etf * query[None, :], 1) + tl.log(prior + 1e-12)
        dlogits = tl.exp(logits - lse) - tl.where(k == own_class, 1.0, 0.0)
        dquery += tl.sum(dlogits[:, None] * etf, 0)
    dunit = scale * dquery * kept
    product = tl.where(norm < 1e-12, 0.0, tl.sum(dunit * unit, 0))
    dhidden = tl.where(hidden <= 0, 0.0, (dunit - product * unit) / length) * present
    tl.store(dhidden_ptr + r * dim + e, dhidden, mask=some)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        mask = some[:, None] & (c < channels)[None, :]
        weight = tl.load(weight_ptr + e[:, None] * channels + c[None, :], mask=mask, other=0.0)
        dcenter = tl.sum(weight * dhidden[:, None], 0)
        tl.store(dcenters_ptr + r * channels + c, dcenter, mask=c < channels)


@triton.jit
def _mean_kernel(
    losses_ptr,  # float32 [R]
    counts_ptr,  # int64 [R]
    loss_ptr,  # float32 []
    number_ptr,  # float32 []
    rows,
    loss_weight,
    BLOCK_R: tl.constexpr,
):
    total, number = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        total += tl.load(losses_ptr + r, mask=r < rows, other=0.0)
        number += (tl.load(counts_ptr + r, mask=r < rows, other=0) > 0).to(tl.float32)
    centers = tl.sum(number, 0)
    tl.store(loss_ptr, loss_weight * tl.sum(total, 0) / tl.maximum(centers, 1.0))
    tl.store(number_ptr, centers)


def center_loss(
    sums: Tensor,
    counts: Tensor,
    mean: Tensor,
    variance: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    etf: Tensor,
    prior: Tensor,
    noise: Tensor | None,
    eps: float,
    scale: float,
    dropout: float,
    loss_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """sums float32 [R, C], counts int64 [R] -> loss, number, centers [R, C], dcenters [R, C],
    dhidden [R, E]."""
    (rows, channels), dim = sums.shape, weight.shape[0]
    loss, number, losses = sums.new_empty(()), sums.new_empty(()), sums.new_empty(rows)
    centers, dcenters = torch.empty_like(sums), torch.empty_like(sums)
    dhidden = sums.new_empty(rows, dim)
    given = sums, counts, mean, variance, norm_weight, norm_bias, weight, bias, etf, prior, noise
    if rows:
        _center_loss_kernel[(rows,)](
            *(*given, losses, centers, dcenters, dhidden),
            *(channels, dim, len(prior), eps, scale, dropout),
            HAS_NOISE=noise is not None,
            BLOCK=_BLOCK,
            BLOCK_E=max(triton.next_power_of_2(dim), 16),
            num_warps=8,
            enable_fp_fusion=True,
            **without_spills(),
        )
    _mean_kernel[(1,)](
        *(losses, counts, loss, number, rows, loss_weight),
        BLOCK_R=256,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return loss, number, centers, dcenters, dhidden
