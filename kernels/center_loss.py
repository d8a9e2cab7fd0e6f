"""CeCo's loss of class centers, and its gradient in the centers. A program processes one center; a
second kernel adds the losses."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import without_spills

_BLOCK = 16  # channels, or classes, that are multiplied at once


class Centers(NamedTuple):
    """What the normalized centers are computed from: float32, except the counts."""

    sums: Any  # [R, C]
    counts: Any  # int64 [R]
    mean: Any  # [C]
    variance: Any  # [C]
    norm_weight: Any  # [C]
    norm_bias: Any  # [C], None for the gradient
    channels: int
    eps: float


class Layers(NamedTuple):
    """What follows the centers, float32."""

    weight: Any  # [E, C]
    bias: Any  # [E]
    etf: Any  # [K, E]
    prior: Any  # [K]
    noise: Any  # [R, E] or None
    dim: int
    classes: int
    scale: float
    dropout: float


class Results(NamedTuple):
    """float32"""

    losses: Any  # [R]
    centers: Any  # [R, C]
    dcenters: Any  # [R, C]
    dhidden: Any  # [R, E]


@triton.jit
def _center_of(centers, r, count, c, inside):
    """Channels c of the normalized center."""
    center = tl.load(centers.sums + r * centers.channels + c, mask=inside, other=0.0)
    center = center / tl.maximum(count, 1).to(tl.float32)
    center -= tl.load(centers.mean + c, mask=inside, other=0.0)
    center /= tl.sqrt(tl.load(centers.variance + c, mask=inside, other=1.0) + centers.eps)
    center *= tl.load(centers.norm_weight + c, mask=inside, other=0.0)
    return center + tl.load(centers.norm_bias + c, mask=inside, other=0.0)


@triton.jit
def _weights_of(layers, channels, e, c, inside):
    """The projection of channels c, [BLOCK_E, BLOCK]."""
    mask = (e < layers.dim)[:, None] & inside[None, :]
    ptrs = layers.weight + e[:, None] * channels + c[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _logits_of(layers, query, e, k):
    """Of classes k, −∞ after the last one; and their rows of the simplex, [BLOCK, BLOCK_E]."""
    inside = k < layers.classes
    mask = inside[:, None] & (e < layers.dim)[None, :]
    ptrs = layers.etf + k[:, None] * layers.dim + e[None, :]
    etf = tl.load(ptrs, mask=mask, other=0.0)
    prior = tl.load(layers.prior + k, mask=inside, other=1.0)
    logits = layers.scale * tl.sum(etf * query[None, :], 1) + tl.log(prior + 1e-12)
    return tl.where(inside, logits, -float("inf")), etf


@triton.jit
def _lse_and_own(layers, query, e, own_class, BLOCK: tl.constexpr):
    """log Σ e^logits, and the logit of the center's own class."""
    top, total, own = -float("inf"), 0.0, 0.0
    for start in range(0, layers.classes, BLOCK):
        k = start + tl.arange(0, BLOCK)
        logits, _ = _logits_of(layers, query, e, k)
        higher = tl.maximum(top, tl.max(logits, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher), 0)
        own += tl.sum(tl.where(k == own_class, logits, 0.0), 0)
        top = higher
    return top + tl.log(total), own


@triton.jit
def _query_gradient(layers, query, lse, e, own_class, BLOCK: tl.constexpr):
    dquery = tl.zeros(e.shape, tl.float32)
    for start in range(0, layers.classes, BLOCK):
        k = start + tl.arange(0, BLOCK)
        logits, etf = _logits_of(layers, query, e, k)
        dlogits = tl.exp(logits - lse) - tl.where(k == own_class, 1.0, 0.0)
        dquery += tl.sum(dlogits[:, None] * etf, 0)
    return layers.scale * dquery


@triton.jit
def _center_loss_kernel(
    centers,  # Centers
    layers,  # Layers
    results,  # Results
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Reads the projection and the simplex twice. Everything is 0 if the class is absent."""
    r = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    some, channels = e < layers.dim, centers.channels
    count = tl.load(centers.counts + r)
    present = (count > 0).to(tl.float32)
    hidden = tl.load(layers.bias + e, mask=some, other=0.0)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = c < channels
        center = _center_of(centers, r, count, c, inside)
        tl.store(results.centers + r * channels + c, center * present, mask=inside)
        hidden += tl.sum(_weights_of(layers, channels, e, c, inside) * center[None, :], 1)

    positive = tl.where(hidden < 0, 0.0, hidden)  # tl.maximum would hide NaN
    norm = tl.sqrt(tl.sum(positive * positive, 0))
    length = tl.maximum(norm, 1e-12)
    unit = positive / length
    kept = tl.full((BLOCK_E,), 1.0, tl.float32)
    if layers.noise is not None:
        noise = tl.load(layers.noise + r * layers.dim + e, mask=some, other=0.0)
        kept = tl.where(noise < layers.dropout, 0.0, 1 / (1 - layers.dropout))
    query = unit * kept

    own_class = (r % layers.classes).to(tl.int32)
    lse, own = _lse_and_own(layers, query, e, own_class, BLOCK)
    tl.store(results.losses + r, (lse - own) * present)

    dunit = _query_gradient(layers, query, lse, e, own_class, BLOCK) * kept
    product = tl.where(norm < 1e-12, 0.0, tl.sum(dunit * unit, 0))
    dhidden = tl.where(hidden <= 0, 0.0, (dunit - product * unit) / length) * present
    tl.store(results.dhidden + r * layers.dim + e, dhidden, mask=some)
    for start in range(0, channels, BLOCK):
        c = start + tl.arange(0, BLOCK)
        inside = c < channels
        dcenter = tl.sum(_weights_of(layers, channels, e, c, inside) * dhidden[:, None], 0)
        tl.store(results.dcenters + r * channels + c, dcenter, mask=inside)


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
    if rows:
        _center_loss_kernel[(rows,)](
            Centers(sums, counts, mean, variance, norm_weight, norm_bias, channels, eps),
            Layers(weight, bias, etf, prior, noise, dim, len(prior), scale, dropout),
            Results(losses, centers, dcenters, dhidden),
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
