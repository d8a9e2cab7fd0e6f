"""Rows of length 1, or the means of classes scaled to length 1, and the centroids of views. One
launch, a program per class."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _unit_rows_kernel(
    rows_ptr,  # float32 [K, G, D]
    counts_ptr,  # int64 [K, G] or None
    units_ptr,  # float32 [K, G, D]
    means_ptr,  # float32 [K, G, D] or None
    centroids_ptr,  # float32 [K, D] or None
    norms_ptr,  # float32 [K, G]
    present_ptr,  # bool [K, G], if there are counts
    groups,
    dim,
    eps,
    BLOCK_D: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    least = 1 << 62  # of the counts
    if counts_ptr is not None:
        for g in range(0, groups):
            least = tl.minimum(least, tl.load(counts_ptr + k * groups + g))
    for g in range(0, groups):
        r = k * groups + g
        row = tl.load(rows_ptr + r * dim + d, mask=d < dim, other=0.0)
        if counts_ptr is not None:
            tl.store(present_ptr + r, least > 0)
            row = row / tl.maximum(tl.load(counts_ptr + r), 1).to(tl.float32)
        norm = tl.sqrt(tl.sum(row * row, 0))
        tl.store(units_ptr + r * dim + d, row / tl.maximum(norm, eps), mask=d < dim)
        tl.store(norms_ptr + r, norm)
        if means_ptr is not None:
            tl.store(means_ptr + r * dim + d, row, mask=d < dim)
        total += row
    if centroids_ptr is not None:
        mean = total / groups
        norm = tl.sqrt(tl.sum(mean * mean, 0))
        tl.store(centroids_ptr + k * dim + d, mean / tl.maximum(norm, eps), mask=d < dim)


def options(dim: int) -> dict[str, object]:
    block_d = max(triton.next_power_of_2(dim), 16)
    return {"BLOCK_D": block_d, "num_warps": 4, "enable_fp_fusion": True}


def unit_rows(
    rows: Tensor, counts: Tensor | None, eps: float, with_means: bool, with_centroids: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """rows float32 [..., D], or [K, G, D] for centroids; counts int64 [...] or None -> units and
    means [..., D], centroids [K, D], norms [...], present bool [...]. What is not wanted is
    (0,)."""
    dim, norms = rows.shape[-1], rows.new_empty(rows.shape[:-1])
    groups = rows.shape[1] if with_centroids else 1
    units = torch.empty_like(rows)
    means = torch.empty_like(rows) if with_means else rows.new_empty(0)
    centroids = rows.new_empty((rows.shape[0], dim) if with_centroids else 0)
    present = rows.new_empty(0 if counts is None else norms.shape, dtype=torch.bool)
    if rows.numel():
        _unit_rows_kernel[(norms.numel() // groups,)](
            rows,
            counts,
            units,
            means if with_means else None,
            centroids if with_centroids else None,
            norms,
            present,
            groups,
            dim,
            eps,
            **options(dim),
        )
    return units, means, centroids, norms, present
