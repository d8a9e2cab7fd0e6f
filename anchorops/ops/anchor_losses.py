"""SAR's losses of pixels and of anchors, from numbers of each class: one launch in each direction.

    p2a = loss_weight·Σ q_k / max(D·Σ n_k, 1)    over the classes with an open gate
    aux = aux_weight·Σ w_k c_k                   over the unsure anchors, exp(−c_k) ≤ τ
    w_k = c_k / (Σ c_j + 1e-9), or 1 / max(their number, 1)

    dq_k = dp2a·slopes[0, k],  dc_k = daux·slopes[1, k]; the forward pass computes the slopes:
    slopes[0] = [gate]·loss_weight / max(D·Σ n_k, 1)
    slopes[1] = [unsure]·aux_weight·s_k,  s_k = (2·c_k − Σ w_j c_j) / (Σ c_j + 1e-9), or w_k if the
                                                weights are constants

On GPUs it is an operator; on CPU the formula of the reference is used.
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._backend import select
from ..reference import AnchorLosses
from .registration import ON_GPU, Gradient, define


def _forward_fake(
    sqdists: Tensor,
    counts: Tensor,
    gate: Tensor | None,
    cross_entropies: Tensor | None,
    dim: int,
    loss_weight: float,
    aux_weight: float,
    tau: float,
    reweight: bool,
    detach_weights: bool,
) -> tuple[Tensor, ...]:
    both = cross_entropies is not None
    return (
        sqdists.new_empty(()),
        sqdists.new_empty(() if both else (0,)),
        sqdists.new_empty(2 if both else 0),
        sqdists.new_empty((2 if both else 1, *sqdists.shape)),
    )


def _backward_fake(dp2a: Tensor | None, daux: Tensor | None, slopes: Tensor) -> Tensor:
    return torch.empty_like(slopes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.both = inputs[3] is not None
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[3])  # it depends on the inputs, so second derivatives raise


def _backward(
    operator: Any, ctx: Any, dp2a: Tensor | None, daux: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    daux = daux if ctx.both else None  # the gradient of an empty output is not None
    if dp2a is None and daux is None:
        return (None,) * 10
    gradients = operator(dp2a, daux, *ctx.saved_tensors)
    return gradients[0], None, None, gradients[1] if ctx.both else None, *(None,) * 6


# sqdists, cross_entropies: float32 [K]; counts: int64 [K]; gate: bool [K]; logs: the share of open
# gates and the number of unsure anchors; slopes: [2, K], without cross_entropies [1, K]
define(
    "anchor_losses",
    "(Tensor sqdists, Tensor counts, Tensor? gate, Tensor? cross_entropies, SymInt dim, "
    "float loss_weight, float aux_weight, float tau, bool reweight, bool detach_weights) -> "
    "(Tensor p2a, Tensor aux, Tensor logs, Tensor slopes)",
    _forward_fake,
    backends=ON_GPU,
    gradient=Gradient(
        "(Tensor? dp2a, Tensor? daux, Tensor slopes) -> Tensor",
        _backward_fake,
        _setup_context,
        _backward,
    ),
)


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
    """The losses of the reference, from arguments already checked."""
    backend = select("anchor_losses", sqdists, sqdists.shape[0])
    if backend not in ON_GPU:
        return reference.anchor_losses(
            counts,
            sqdists,
            gate,
            cross_entropies,
            dim=dim,
            loss_weight=loss_weight,
            aux_weight=aux_weight,
            tau=tau,
            reweight=reweight,
            detach_weights=detach_weights,
        )
    if cross_entropies is not None:
        cross_entropies = cross_entropies.to(torch.float32).contiguous()
    operator = getattr(torch.ops.anchorops.anchor_losses, backend)
    p2a, aux, logs, _ = operator(
        sqdists.contiguous(),
        counts.contiguous(),
        gate,
        cross_entropies,
        dim,
        loss_weight,
        aux_weight,
        tau,
        reweight,
        detach_weights,
    )
    return AnchorLosses(p2a) if cross_entropies is None else AnchorLosses(p2a, aux, *logs.unbind())
