"""CeCo's loss of class centers, from the sums of their pixels: one operator instead of some forty
on K×C numbers.

    m_k = sums_k / max(counts_k, 1)    x_k = (m_k − mean)/√(variance + eps)    z_k = γ·x_k + β
    h_k = ReLU(P z_k + b)    u_k = h_k / max(‖h_k‖, 1e−12)    ẑ_k = u_k/(1 − dropout), or 0
    loss = loss_weight · mean_{k present} −log softmax_k(scale·⟨ẑ_k, etf⟩ + log(prior + 1e−12))

A center depends on no other one. Therefore the forward pass also computes dz_k and dh_k of its own
loss, and the backward pass only needs dz:

    dγ = Σ dz_k·x_k    dβ = Σ dz_k    dm_k = γ·dz_k/√(variance + eps)
    dmean = −Σ dm_k    dvariance = −½·γ·dγ/(variance + eps)

On GPUs it is an operator; on CPU the formula of the reference is used.
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._backend import select
from .._checks import in_transform
from ..reference import UpsampledSums
from .registration import ON_GPU, Gradient, define

MOST_NUMBERS = 24_000  # C + 2E + K that fit into the shared memory of a block


def _forward_fake(sums: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    projection: Tensor = inputs[5]
    rows = sums.shape[0]
    return (
        sums.new_empty(()),
        sums.new_empty(()),
        torch.empty_like(sums),
        torch.empty_like(sums),
        sums.new_empty(rows, projection.shape[0]),
    )


def _backward_fake(
    dloss: Tensor, number: Tensor, dcenters: Tensor, sums: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d = (sums.new_empty(sums.shape[1]) for _ in range(4))
    return torch.empty_like(sums), a, b, c, d


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    sums, counts, mean, variance, norm_weight, *_, ctx.eps, _, _, ctx.loss_weight = inputs
    _, number, centers, dcenters, dhidden = output
    ctx.mark_non_differentiable(*output[1:])
    trained = any(inputs[i].requires_grad for i in (6, 7))
    of_projection = (centers, dhidden) if trained else (None, None)
    ctx.save_for_backward(
        number, dcenters, sums, counts, mean, variance, norm_weight, *of_projection
    )


def _backward(operator: Any, ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Any, ...]:
    if dloss is None:
        return (None,) * 15
    *saved, centers, dhidden = ctx.saved_tensors
    dsums, dmean, dvariance, *dnorm = operator(dloss, *saved, ctx.eps, ctx.loss_weight)
    dprojection = None, None
    if dhidden is not None:
        dhidden = dhidden * (dloss * ctx.loss_weight / saved[0].clamp(min=1))
        dprojection = dhidden.T @ centers, dhidden.sum(0)
    return dsums, None, dmean, dvariance, *dnorm, *dprojection, *(None,) * 7


# R centers: K, or B·K, image by image. sums: float32 [R, C]; counts: int64 [R]; number: float32;
# all other tensors float32, contiguous.
define(
    "center_loss",
    "(Tensor sums, Tensor counts, Tensor mean, Tensor variance, Tensor norm_weight, "
    "Tensor norm_bias, Tensor weight, Tensor bias, Tensor etf, Tensor prior, Tensor? noise, "
    "float eps, float scale, float dropout, float loss_weight) "
    "-> (Tensor loss, Tensor number, Tensor centers, Tensor dcenters, Tensor dhidden)",
    _forward_fake,
    backends=ON_GPU,
    gradient=Gradient(
        "(Tensor dloss, Tensor number, Tensor dcenters, Tensor sums, Tensor counts, Tensor mean, "
        "Tensor variance, Tensor norm_weight, float eps, float loss_weight) "
        "-> (Tensor dsums, Tensor dmean, Tensor dvariance, Tensor dnorm_weight, Tensor dnorm_bias)",
        _backward_fake,
        _setup_context,
        _backward,
    ),
)


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
    """The loss and the number of present centers, as `reference.center_loss`. Arguments already
    checked."""
    counts, sums, mean, variance = moments
    tensors = mean, variance, *norm, *projection, etf, prior
    backend = select("center_loss", sums, len(prior))
    fits = sums.shape[-1] + 2 * etf.shape[1] + len(prior) <= MOST_NUMBERS
    if backend not in ON_GPU or in_transform(sums) or not fits:
        mean, variance, gamma, beta, weight, bias, etf, prior = (x.to(sums.dtype) for x in tensors)
        return reference.center_loss(
            UpsampledSums(counts, sums, mean, variance),
            (gamma, beta),
            (weight, bias),
            etf,
            prior,
            noise,
            eps=eps,
            scale=scale,
            dropout=dropout,
            loss_weight=loss_weight,
        )
    operator = getattr(torch.ops.anchorops.center_loss, backend)
    loss, number, *_ = operator(
        sums.flatten(0, -2).contiguous(),
        counts.flatten(),
        *(x.to(torch.float32).contiguous() for x in tensors),
        None if noise is None else noise.flatten(0, -2),
        eps,
        scale,
        dropout,
        loss_weight,
    )
    return loss, number
