"""Rows of length 1, or the means of classes scaled to length 1. One launch, a program per row."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _unit_rows_kernel(
    rows_ptr,  # float32 [R, D]
    counts_ptr,  # int64 [R]
    units_ptr,  # float32 [R, D]
    norms_ptr,  # float32 [R]
    dim,
    eps,
    HAS_COUNTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    row = tl.load(rows_ptr + r * dim + d, mask=d < dim, other=0.0)
    if HAS_COUNTS:
        row = row / tl.maximum(tl.load(counts_ptr + r), 1).to(tl.float32)
    norm = tl.sqrt(tl.sum(row * row, 0))
    tl.store(units_ptr + r * dim + d, row / tl.maximum(norm, eps), mask=d < dim)
    tl.store(norms_ptr + r, norm)


def options(rows: Tensor, counts: Tensor | None) -> dict[str, object]:
    return {
        "HAS_COUNTS": counts is not None,
        "BLOCK_D": max(triton.next_power_of_2(rows.shape[-1]), 16),
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def unit_rows(rows: Tensor, counts: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """rows float32 [..., D], counts int64 [...] or None -> units [..., D], norms [...]."""
    units, norms = torch.empty_like(rows), rows.new_empty(rows.shape[:-1])
    if rows.numel():
        given = rows, counts, units, norms, rows.shape[-1], eps
        _unit_rows_kernel[(norms.numel(),)](*given, **options(rows, counts))
    return units, norms
