"""The gradient of unit_rows. One launch, a program per row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .unit_rows import options


@triton.jit
def _unit_rows_bwd_kernel(
    dunits_ptr,  # float32 [R, D] or None
    dmeans_ptr,  # float32 [R, D] or None
    units_ptr,  # float32 [R, D]
    norms_ptr,  # float32 [R]
    counts_ptr,  # int64 [R] or None
    drows_ptr,  # float32 [R, D]
    dim,
    eps,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    drow = tl.zeros((BLOCK_D,), tl.float32)
    if dunits_ptr is not None:
        dunit = tl.load(dunits_ptr + r * dim + d, mask=d < dim, other=0.0)
        unit = tl.load(units_ptr + r * dim + d, mask=d < dim, other=0.0)
        norm = tl.load(norms_ptr + r)
        product = tl.where(norm < eps, 0.0, tl.sum(dunit * unit, 0))
        drow = (dunit - product * unit) / tl.maximum(norm, eps)
    if dmeans_ptr is not None:
        drow += tl.load(dmeans_ptr + r * dim + d, mask=d < dim, other=0.0)
    if counts_ptr is not None:
        drow = drow / tl.maximum(tl.load(counts_ptr + r), 1).to(tl.float32)
    tl.store(drows_ptr + r * dim + d, drow, mask=d < dim)


def unit_rows_backward(
    dunits: Tensor | None,
    dmeans: Tensor | None,
    units: Tensor,
    norms: Tensor,
    counts: Tensor | None,
    eps: float,
) -> Tensor:
    """Everything contiguous -> drows [..., D]."""
    drows, dim = torch.empty_like(units), units.shape[-1]
    if units.numel():
        given = dunits, dmeans, units, norms, counts, drows, dim, eps
        _unit_rows_bwd_kernel[(norms.numel(),)](*given, **options(dim))
    return drows
