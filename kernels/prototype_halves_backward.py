"""The gradient of prototype_halves. One launch, a program per class."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .prototype_halves import halves, is_in_a, options, prototypes_of, sums_of_halves


class Gradients(NamedTuple):
    """float32, or None."""

    dcentroids: Any  # [K, D]
    drows: Any  # [K, G, D]
    ddistances: Any  # [K] by stride
    stride_ddistances: int


@triton.jit(do_not_specialize=["seed_offset"])
def _prototype_halves_bwd_kernel(
    prototypes,  # Prototypes
    seed_offset,
    gradients,  # Gradients
    centroids_ptr,  # float32 [K, D]
    products_ptr,  # float32 [K, 4]: ‖m‖, ‖a‖, ‖b‖, cos
    dprototypes_ptr,  # float32 [G, K, D]
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    groups, dim, eps = prototypes.groups, prototypes.dim, prototypes.eps
    k = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    half = halves(prototypes, seed_offset, BLOCK_G)
    da = tl.zeros((BLOCK_D,), tl.float32)
    db = tl.zeros((BLOCK_D,), tl.float32)
    if gradients.ddistances is not None:
        a, b = sums_of_halves(prototypes, half, k, d)
        ddistance = tl.load(gradients.ddistances + k * gradients.stride_ddistances)
        dcosine = -prototypes.loss_weight * ddistance
        norm_a, norm_b = tl.load(products_ptr + 4 * k + 1), tl.load(products_ptr + 4 * k + 2)
        cosine = tl.load(products_ptr + 4 * k + 3)
        a, b = a / tl.maximum(norm_a, eps), b / tl.maximum(norm_b, eps)
        da = dcosine * (b - tl.where(norm_a < eps, 0.0, cosine) * a) / tl.maximum(norm_a, eps)
        db = dcosine * (a - tl.where(norm_b < eps, 0.0, cosine) * b) / tl.maximum(norm_b, eps)
    if gradients.dcentroids is not None:
        dcentroid = tl.load(gradients.dcentroids + k * dim + d, mask=d < dim, other=0.0)
        centroid = tl.load(centroids_ptr + k * dim + d, mask=d < dim, other=0.0)
        norm = tl.load(products_ptr + 4 * k)
        product = tl.where(norm < eps, 0.0, tl.sum(dcentroid * centroid, 0))
        dmean = (dcentroid - product * centroid) / (tl.maximum(norm, eps) * groups)
        da += dmean
        db += dmean
    for g in range(0, groups):
        gradient = tl.where(is_in_a(half, g), da, db)
        if gradients.drows is not None:
            ptrs = gradients.drows + (k * groups + g) * dim + d
            gradient += tl.load(ptrs, mask=d < dim, other=0.0)
        row = dprototypes_ptr + (g * prototypes.num_classes + k) * dim
        tl.store(row + d, gradient, mask=d < dim)


def prototype_halves_backward(
    dcentroids: Tensor | None,
    ddistances: Tensor | None,
    drows: Tensor | None,
    prototypes: Tensor,
    seed: Tensor,
    centroids: Tensor,
    products: Tensor,
    seed_offset: int,
    eps: float,
    loss_weight: float,
) -> Tensor:
    """dcentroids [K, D] and drows [K, G, D] contiguous, ddistances [K] of any stride -> dprototypes
    [G, K, D]."""
    dprototypes, num_classes = torch.empty_like(prototypes), prototypes.shape[1]
    stride = 0 if ddistances is None else ddistances.stride(0)
    _prototype_halves_bwd_kernel[(num_classes,)](
        prototypes_of(prototypes, seed, eps, loss_weight),
        seed_offset,
        Gradients(dcentroids, drows, ddistances, stride),
        *(centroids, products, dprototypes),
        **options(prototypes),
    )
    return dprototypes
