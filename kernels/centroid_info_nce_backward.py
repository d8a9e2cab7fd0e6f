"""The gradient of InfoNCE of rows of inner products.

    dx[r, k] = dlosses[r]·(e^(x[r, k] − lse[r]) − [k = own])/τ

That of the own key is dpositives[r], if positives are given; otherwise it is in dproducts.
"""

import triton
import triton.language as tl
from torch import Tensor

from .centroid_info_nce import OPTIONS, are_present, problem_of, programs_of, tile_of


@triton.jit
def _centroid_info_nce_bwd_kernel(
    problem,  # Problem
    dlosses_ptr,  # float32 [R]
    lse_ptr,  # float32 [R]
    dproducts_ptr,  # float32 [R, K]
    dpositives_ptr,  # float32 [R], or None
    rows,
    num_keys,
    groups,
    scale,  # 1/τ
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program reads its BLOCK_R rows once, and writes their gradients."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    present = are_present(problem.present, r, rows)
    dloss = tl.load(dlosses_ptr + r, mask=present, other=0.0)[:, None] * scale
    lse = tl.load(lse_ptr + r, mask=present, other=0.0)[:, None]
    dpositive = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, num_keys, BLOCK_K):
        x, own, places = tile_of(problem, r, start, rows, num_keys, groups, scale, BLOCK_K)
        p = tl.exp(x - lse)
        dx = dloss * tl.where(own, p - 1, p)
        if dpositives_ptr is not None:
            dpositive += tl.sum(tl.where(own, dx, 0.0), 1)
            dx = tl.where(own, 0.0, dx)
        inside = (r < rows)[:, None] & (start + tl.arange(0, BLOCK_K) < num_keys)[None, :]
        tl.store(dproducts_ptr + places, dx, mask=inside)
    if dpositives_ptr is not None:
        tl.store(dpositives_ptr + r, dpositive, mask=r < rows)


def centroid_info_nce_backward(
    dlosses: Tensor,
    products: Tensor,
    positives: Tensor | None,
    present: Tensor | None,
    present_keys: Tensor | None,
    lse: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """dlosses [R], contiguous -> dproducts [R, K]; and dpositives [R], (0,) if there were none."""
    problem, sizes = problem_of(products, positives, present, present_keys)
    dproducts = products.new_empty(products.shape)
    dpositives = products.new_empty(0 if positives is None else len(products))
    if products.numel() > 0:
        _centroid_info_nce_bwd_kernel[programs_of(products)](
            problem,
            *(dlosses, lse, dproducts, None if positives is None else dpositives),
            *sizes,
            1 / temperature,
            **OPTIONS,
        )
    return dproducts, dpositives
