"""The gradient of prototype_halves. One launch, a program per class."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .prototype_halves import halves, options, sums_of_halves


@triton.jit(do_not_specialize=["seed_offset"])
def _prototype_halves_bwd_kernel(
    dcentroids_ptr,  # float32 [K, D] or None
    ddistances_ptr,  # float32 [K] by stride, or None
    drows_ptr,  # float32 [K, G, D] or None
    prototypes_ptr,  # float32 [G, K, D]
    seed_ptr,  # int64
    centroids_ptr,  # float32 [K, D]
    products_ptr,  # float32 [K, 4]: ‖m‖, ‖a‖, ‖b‖, cos
    dprototypes_ptr,  # float32 [G, K, D]
    seed_offset,
    stride_ddistances,
    num_classes,
    groups,
    dim,
    eps,
    loss_weight,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    half = halves(seed_ptr, seed_offset, groups, BLOCK_G)
    da = tl.zeros((BLOCK_D,), tl.float32)
    db = tl.zeros((BLOCK_D,), tl.float32)
    if ddistances_ptr is not None:
        a, b = sums_of_halves(
            prototypes_ptr, half, k, d, num_classes, groups, dim, BLOCK_G, BLOCK_D
        )
        dcosine = -loss_weight * tl.load(ddistances_ptr + k * stride_ddistances)
        norm_a, norm_b = tl.load(products_ptr + 4 * k + 1), tl.load(products_ptr + 4 * k + 2)
        cosine = tl.load(products_ptr + 4 * k + 3)
        a, b = a / tl.maximum(norm_a, eps), b / tl.maximum(norm_b, eps)
        da = dcosine * (b - tl.where(norm_a < eps, 0.0, cosine) * a) / tl.maximum(norm_a, eps)
        db = dcosine * (a - tl.where(norm_b < eps, 0.0, cosine) * b) / tl.maximum(norm_b, eps)
    if dcentroids_ptr is not None:
        dcentroid = tl.load(dcentroids_ptr + k * dim + d, mask=d < dim, other=0.0)
        centroid = tl.load(centroids_ptr + k * dim + d, mask=d < dim, other=0.0)
        norm = tl.load(products_ptr + 4 * k)
        product = tl.where(norm < eps, 0.0, tl.sum(dcentroid * centroid, 0))
        dmean = (dcentroid - product * centroid) / (tl.maximum(norm, eps) * groups)
        da += dmean
        db += dmean
    for g in range(0, groups):
        in_a = tl.sum(tl.where(tl.arange(0, BLOCK_G) == g, half, 0), 0) > 0
        row = dprototypes_ptr + (g * num_classes + k) * dim
        gradient = tl.where(in_a, da, db)
        if drows_ptr is not None:
            gradient += tl.load(drows_ptr + (k * groups + g) * dim + d, mask=d < dim, other=0.0)
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
    groups, num_classes, dim = prototypes.shape
    dprototypes = torch.empty_like(prototypes)
    _prototype_halves_bwd_kernel[(num_classes,)](
        dcentroids,
        ddistances,
        drows,
        prototypes,
        seed,
        centroids,
        products,
        dprototypes,
        seed_offset,
        0 if ddistances is None else ddistances.stride(0),
        num_classes,
        groups,
        dim,
        eps,
        loss_weight,
        **options(prototypes),
    )
    return dprototypes
