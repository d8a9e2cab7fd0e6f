"""InfoNCE of rows of inner products, which are the logits after division by the temperature τ.

    x[r, k] = products[r, k]/τ, of the own key positives[r]/τ, if positives are given
    lse[r] = log Σ_k e^x[r, k], k: the keys that are present, and the own one
    losses[r] = lse[r] − x[r, own], 0 of an absent row

Row r is a query of class r // groups. Absent rows and keys are never loaded: they may contain NaN.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {
    "BLOCK_R": 4,  # rows of a tile
    "BLOCK_K": 256,  # keys of a tile
    "enable_fp_fusion": False,  # x must be the same number in lse and beside it
}


class Problem(NamedTuple):
    """What both directions read."""

    products: Any  # float32 [R, K], contiguous
    positives: Any  # float32 [R], or None: the products with the own keys
    present: Any  # bool [R], or None: all
    present_keys: Any  # bool [K], or None: all


@triton.jit
def are_present(mask, i, count):
    if mask is None:
        return i < count
    else:
        return tl.load(mask + i, mask=i < count, other=0).to(tl.int1)


@triton.jit
def tile_of(problem, r, start, rows, num_keys, groups, scale, BLOCK_K: tl.constexpr):
    """x of the rows r and the keys from `start` on, −inf where not used; whether a key is the own
    one; and where the products are."""
    k = (start + tl.arange(0, BLOCK_K))[None, :]
    own = k == (r // groups)[:, None]
    row = are_present(problem.present, r, rows)[:, None]
    used = row & (are_present(problem.present_keys, k, num_keys) | own)
    places = r.to(tl.int64)[:, None] * num_keys + k
    x = tl.load(problem.products + places, mask=used, other=-float("inf"))
    if problem.positives is not None:
        positive = tl.load(problem.positives + r[:, None], mask=row, other=0.0)
        x = tl.where(own & used, positive, x)
    return x * scale, own & used, places


@triton.jit
def _centroid_info_nce_fwd_kernel(
    problem,  # Problem
    losses_ptr,  # float32 [R]
    lse_ptr,  # float32 [R]
    rows,
    num_keys,
    groups,
    scale,  # 1/τ
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program reads its BLOCK_R rows once."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    maximum = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    positive = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, num_keys, BLOCK_K):
        x, own, _ = tile_of(problem, r, start, rows, num_keys, groups, scale, BLOCK_K)
        largest = tl.maximum(maximum, tl.max(x, 1))
        shift = tl.where(largest == -float("inf"), 0.0, largest)
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)
        positive += tl.sum(tl.where(own, x, 0.0), 1)
        maximum = largest
    lse = maximum + tl.log(total)
    present = are_present(problem.present, r, rows)
    tl.store(lse_ptr + r, tl.where(present, lse, 0.0), mask=r < rows)
    tl.store(losses_ptr + r, tl.where(present, lse - positive, 0.0), mask=r < rows)


def problem_of(*tensors: Tensor | None) -> tuple[Problem, tuple[int, int, int]]:
    rows, num_keys = tensors[0].shape  # pyright: ignore[reportOptionalMemberAccess]
    return Problem(*tensors), (rows, num_keys, max(rows // max(num_keys, 1), 1))


def programs_of(products: Tensor) -> tuple[int]:
    return (triton.cdiv(len(products), OPTIONS["BLOCK_R"]),)


def centroid_info_nce(
    products: Tensor,
    positives: Tensor | None,
    present: Tensor | None,
    present_keys: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """products [R, K], contiguous -> losses, lse [R]; all float32."""
    problem, sizes = problem_of(products, positives, present, present_keys)
    losses, lse = products.new_empty(len(products)), products.new_empty(len(products))
    if products.numel() > 0:
        _centroid_info_nce_fwd_kernel[programs_of(products)](
            problem, losses, lse, *sizes, 1 / temperature, **OPTIONS
        )
    return losses, lse
