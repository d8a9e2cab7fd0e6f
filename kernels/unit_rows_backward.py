"""The gradient of unit_rows. One launch, a program per row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .unit_rows import options


@triton.jit
def _unit_rows_bwd_kernel(
    dunits_ptr,  # float32 [R, D]
    units_ptr,  # float32 [R, D]
    norms_ptr,  # float32 [R]
    counts_ptr,  # int64 [R]
    drows_ptr,  # float32 [R, D]
    dim,
    eps,
    HAS_COUNTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    dunit = tl.load(dunits_ptr + r * dim + d, mask=d < dim, other=0.0)
    unit = tl.load(units_ptr + r * dim + d, mask=d < dim, other=0.0)
    norm = tl.load(norms_ptr + r)
    product = tl.where(norm < eps, 0.0, tl.sum(dunit * unit, 0))
    length = tl.maximum(norm, eps)
    if HAS_COUNTS:
        length *= tl.maximum(tl.load(counts_ptr + r), 1).to(tl.float32)
    tl.store(drows_ptr + r * dim + d, (dunit - product * unit) / length, mask=d < dim)


def unit_rows_backward(
    dunits: Tensor, units: Tensor, norms: Tensor, counts: Tensor | None, eps: float
) -> Tensor:
    """Everything contiguous -> drows [..., D]."""
    drows = torch.empty_like(units)
    if units.numel():
        given = dunits, units, norms, counts, drows, units.shape[-1], eps
        _unit_rows_bwd_kernel[(norms.numel(),)](*given, **options(units, counts))
    return drows
