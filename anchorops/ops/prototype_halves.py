"""Centroids of learnable prototypes, how well two random halves of their groups agree, and the
prototypes in the order of classes: one launch in each direction.

    m_k = mean_g V_gk    c_k = m_k / ‖m_k‖    a_k, b_k: sums of V over the two halves of the groups
    distances_k = w·(1 − cos_k),  cos_k = a_k·b_k / (‖a_k‖·‖b_k‖)    rows_kg = V_gk
    dV_gk = (dc_k − (c_k·dc_k)·c_k) / (G·‖m_k‖)
            − w·ddistances_k·(b_k/‖b_k‖ − cos_k·a_k/‖a_k‖) / ‖a_k‖ + drows_kg

This is for groups of the half a; for the others a and b change places. Lengths are at least eps;
below eps, the terms (c_k·dc_k)·c_k and cos_k·a_k/‖a_k‖ are 0. On GPUs it is an operator; on CPU the
formula of the reference is used. The rows are a copy on GPUs, so that all gradients of V are added
in one launch.
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._backend import select
from .registration import ON_GPU, Gradient, define
from .split_groups import random_halves


def _forward_fake(prototypes: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups, num_classes, dim = prototypes.shape
    return (
        prototypes.new_empty((num_classes, dim)),
        prototypes.new_empty(num_classes),
        prototypes.new_empty((num_classes, groups, dim)),
        prototypes.new_empty((num_classes, 4)),
    )


def _backward_fake(
    dcentroids: Tensor | None,
    ddistances: Tensor | None,
    drows: Tensor | None,
    prototypes: Tensor,
    *saved: Any,
) -> Tensor:
    return prototypes.new_empty(prototypes.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    prototypes, seed, *ctx.options = inputs
    centroids, _, _, products = output
    ctx.mark_non_differentiable(products)
    ctx.save_for_backward(prototypes, seed, centroids, products)


def _backward(
    operator: Any,
    ctx: Any,
    dcentroids: Tensor | None,
    ddistances: Tensor | None,
    drows: Tensor | None,
    _: None,
) -> tuple[Any, ...]:
    if dcentroids is None and ddistances is None and drows is None:
        return (None,) * 5
    dcentroids, drows = (None if d is None else d.contiguous() for d in (dcentroids, drows))
    gradient = operator(dcentroids, ddistances, drows, *ctx.saved_tensors, *ctx.options)
    return gradient, *(None,) * 4


# prototypes: float32 [G, K, D]; seed: int64, one element; centroids: [K, D]; distances: [K];
# rows: [K, G, D]; products: [K, 4], ‖m‖, ‖a‖, ‖b‖ and cos
define(
    "prototype_halves",
    "(Tensor prototypes, Tensor seed, int seed_offset, float eps, float loss_weight) "
    "-> (Tensor centroids, Tensor distances, Tensor rows, Tensor products)",
    _forward_fake,
    backends=ON_GPU,
    gradient=Gradient(
        "(Tensor? dcentroids, Tensor? ddistances, Tensor? drows, Tensor prototypes, Tensor seed, "
        "Tensor centroids, Tensor products, int seed_offset, float eps, float loss_weight) "
        "-> Tensor",
        _backward_fake,
        _setup_context,
        _backward,
    ),
)


def prototype_halves(
    prototypes: Tensor, seed: Tensor, seed_offset: int, *, eps: float, loss_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows of the means over the groups [K, D]; loss_weight·(1 − cos(a, b)) [K] of the sums a
    and b over two random halves of the groups, a with ⌊G/2⌋ of them; and the prototypes [K, G, D].

    prototypes: [G, K, D]; seed: int64, one element; it is increased by seed_offset. Arguments
    already checked.
    """
    backend = select("prototype_halves", prototypes, 1)
    if backend not in ON_GPU:
        half = random_halves(prototypes.shape[0], seed + seed_offset, prototypes)
        return reference.prototype_halves(prototypes, half, eps, loss_weight)
    operator = getattr(torch.ops.anchorops.prototype_halves, backend)
    given = prototypes.to(torch.float32).contiguous(), seed, seed_offset, eps, loss_weight
    return operator(*given)[:3]
