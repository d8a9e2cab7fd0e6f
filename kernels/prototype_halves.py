"""Centroids of learnable prototypes, the cosine of two halves of their groups, and the prototypes
in the order of classes. One launch, a program per class."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .split_groups import hash_of


class Prototypes(NamedTuple):
    """float32 [G, K, D] contiguous, and what both directions compute from them."""

    ptr: Any
    seed: Any  # int64, one
    groups: int
    num_classes: int
    dim: int
    eps: float
    loss_weight: float


@triton.jit
def halves(prototypes, seed_offset, BLOCK_G: tl.constexpr):
    """int32 [BLOCK_G]: 1 for ⌊G/2⌋ random groups, as random_halves of anchorops/ops/split_groups.py
    draws them; the rank of a group's hash is odd."""
    g = tl.arange(0, BLOCK_G)
    hashes = hash_of(tl.load(prototypes.seed) + seed_offset, g)
    smaller = (hashes[None, :] < hashes[:, None]) & (g < prototypes.groups)[None, :]
    return tl.sum(smaller.to(tl.int32), 1) % 2


@triton.jit
def is_in_a(half, g):
    return tl.sum(tl.where(tl.arange(0, half.shape[0]) == g, half, 0), 0) > 0


@triton.jit
def sums_of_halves(prototypes, half, k, d):
    """float32 [BLOCK_D]: the sums over the groups with half 1, and with half 0."""
    a, b = tl.zeros(d.shape, tl.float32), tl.zeros(d.shape, tl.float32)
    for g in range(0, prototypes.groups):
        row = prototypes.ptr + (g * prototypes.num_classes + k) * prototypes.dim
        value = tl.load(row + d, mask=d < prototypes.dim, other=0.0)
        in_a = is_in_a(half, g)
        a += tl.where(in_a, value, 0.0)
        b += tl.where(in_a, 0.0, value)
    return a, b


@triton.jit(do_not_specialize=["seed_offset"])
def _prototype_halves_kernel(
    prototypes,  # Prototypes
    seed_offset,
    centroids_ptr,  # float32 [K, D]
    distances_ptr,  # float32 [K]
    rows_ptr,  # float32 [K, G, D]
    products_ptr,  # float32 [K, 4]: ‖m‖, ‖a‖, ‖b‖, cos
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    groups, dim, eps = prototypes.groups, prototypes.dim, prototypes.eps
    k = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    half = halves(prototypes, seed_offset, BLOCK_G)
    a, b = sums_of_halves(prototypes, half, k, d)
    mean = (a + b) / groups
    norm = tl.sqrt(tl.sum(mean * mean, 0))
    norm_a, norm_b = tl.sqrt(tl.sum(a * a, 0)), tl.sqrt(tl.sum(b * b, 0))
    cosine = tl.sum(a * b, 0) / (tl.maximum(norm_a, eps) * tl.maximum(norm_b, eps))
    tl.store(centroids_ptr + k * dim + d, mean / tl.maximum(norm, eps), mask=d < dim)
    for g in range(0, groups):
        ptrs = prototypes.ptr + (g * prototypes.num_classes + k) * dim + d
        tl.store(rows_ptr + (k * groups + g) * dim + d, tl.load(ptrs, mask=d < dim), mask=d < dim)
    tl.store(distances_ptr + k, prototypes.loss_weight * (1 - cosine))
    tl.store(products_ptr + 4 * k, norm)
    tl.store(products_ptr + 4 * k + 1, norm_a)
    tl.store(products_ptr + 4 * k + 2, norm_b)
    tl.store(products_ptr + 4 * k + 3, cosine)


def prototypes_of(prototypes: Tensor, seed: Tensor, eps: float, loss_weight: float) -> Prototypes:
    return Prototypes(prototypes, seed, *prototypes.shape, eps, loss_weight)


def options(prototypes: Tensor) -> dict[str, object]:
    groups, _, dim = prototypes.shape
    return {
        "BLOCK_G": max(triton.next_power_of_2(groups), 2),
        "BLOCK_D": max(triton.next_power_of_2(dim), 16),
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def prototype_halves(
    prototypes: Tensor, seed: Tensor, seed_offset: int, eps: float, loss_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """prototypes float32 [G, K, D], seed int64 -> centroids [K, D], distances [K], rows [K, G, D],
    products [K, 4]."""
    groups, num_classes, dim = prototypes.shape
    centroids = prototypes.new_empty((num_classes, dim))
    distances, products = prototypes.new_empty(num_classes), prototypes.new_empty((num_classes, 4))
    rows = prototypes.new_empty((num_classes, groups, dim))
    _prototype_halves_kernel[(num_classes,)](
        prototypes_of(prototypes, seed, eps, loss_weight),
        *(seed_offset, centroids, distances, rows, products),
        **options(prototypes),
    )
    return centroids, distances, rows, products
