"""InfoNCE between centroids.

    logits[r, k] = q_r·key_k/τ        positive[r] = q_r·p_r/τ
    lse[r] = log(e^positive[r] + Σ_k e^logits[r, k]), k: the keys that are present, but the own
    losses[r] = lse[r] − positive[r], 0 of an absent row

Row r is a query of class r // G. The logits are never in memory: a program computes a tile of them
in registers. Absent rows and keys are never loaded: they may contain NaN.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import architecture, without_spills

BLOCK_R = 16  # rows of a program
BLOCK_K = 32  # rows of the other tensor in a tile
BLOCK_D = 32  # channels of a product


class Rows(NamedTuple):
    """float32 [count, D] by strides."""

    ptr: Any
    present: Any  # bool [count], or None: all
    count: int
    stride: int
    stride_d: int


class Sizes(NamedTuple):
    groups: int  # rows of a class
    dim: int
    inverse_temperature: float


class Problem(NamedTuple):
    """What both directions read."""

    queries: Rows
    keys: Rows
    positives: Rows  # the keys if none were given
    sizes: Sizes


@triton.jit
def are_present(rows, i):
    inside = i < rows.count
    if rows.present is None:
        return inside
    else:
        return tl.load(rows.present + i, mask=inside, other=0).to(tl.int1)


@triton.jit
def load_rows(rows, i, d, present, dim):
    """Channels d of rows i: float32 [rows, channels], 0 where not present."""
    offsets = i.to(tl.int64)[:, None] * rows.stride + d.to(tl.int64)[None, :] * rows.stride_d
    return tl.load(rows.ptr + offsets, mask=present[:, None] & (d < dim)[None, :], other=0.0)


@triton.jit
def products(ours, i, others, j, dim, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr):
    """Inner products of rows i of one tensor and rows j of the other, 0 where not present."""
    our_present, other_present = are_present(ours, i), are_present(others, j)
    total = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = load_rows(ours, i, d, our_present, dim)
        y = load_rows(others, j, d, other_present, dim)
        total = tl.dot(x, tl.trans(y), total, input_precision=PRECISION)
    return total


@triton.jit
def _centroid_info_nce_fwd_kernel(
    problem,  # Problem
    losses_ptr,  # float32 [R]
    lse_ptr,  # float32 [R]
    OWN_KEY_IS_POSITIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program reads its BLOCK_R rows for each BLOCK_K keys, and all keys, from the caches."""
    queries, keys, positives, sizes = problem
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    present, own_key = are_present(queries, r), r // sizes.groups
    maximum = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, keys.count, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = sizes.inverse_temperature * products(queries, r, keys, k, sizes.dim, PRECISION, BLOCK_D)
        used = are_present(keys, k)[None, :] & (k[None, :] != own_key[:, None])
        x = tl.where(used, x, -float("inf"))
        largest = tl.maximum(maximum, tl.max(x, 1))
        shift = tl.where(largest == -float("inf"), 0.0, largest)
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)
        maximum = largest

    product = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, sizes.dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        p = load_rows(positives, own_key if OWN_KEY_IS_POSITIVE else r, d, present, sizes.dim)
        product += tl.sum(load_rows(queries, r, d, present, sizes.dim) * p, 1)
    positive = sizes.inverse_temperature * product
    largest = tl.maximum(maximum, positive)
    lse = largest + tl.log(total * tl.exp(maximum - largest) + tl.exp(positive - largest))
    tl.store(lse_ptr + r, lse, mask=r < queries.count)
    tl.store(losses_ptr + r, tl.where(present, lse - positive, 0.0), mask=r < queries.count)


def precision() -> str:
    """The precision of float32 products: three TF32 terms on tensor cores, otherwise IEEE; never
    plain TF32."""
    return "tf32x3" if architecture().startswith("sm_") else "ieee"


def _rows_of(tensor: Tensor, present: Tensor | None) -> Rows:
    return Rows(tensor, present, tensor.shape[0], tensor.stride(0), tensor.stride(1))


def problem_of(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor | None,
    present: Tensor | None,
    present_keys: Tensor | None,
    temperature: float,
) -> tuple[Problem, dict[str, object]]:
    """From the operator's arguments; and the options of both kernels."""
    groups = max(queries.shape[0] // max(keys.shape[0], 1), 1)
    problem = Problem(
        _rows_of(queries, present),
        _rows_of(keys, present_keys),
        _rows_of(keys if positives is None else positives, None),
        Sizes(groups, keys.shape[1], 1 / temperature),
    )
    options = {
        "OWN_KEY_IS_POSITIVE": positives is None,
        "PRECISION": precision(),
        "BLOCK_R": BLOCK_R,
        "BLOCK_K": BLOCK_K,
        "BLOCK_D": BLOCK_D,
        "num_warps": 4,
        "enable_fp_fusion": False,  # lanes that hold copies of a sum must agree
    }
    return problem, options


def centroid_info_nce(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor | None,
    present: Tensor | None,
    present_keys: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """queries, positives [R, D], keys [K, D] -> losses, lse [R]; all float32."""
    inputs = queries, keys, positives, present, present_keys, temperature
    problem, options = problem_of(*inputs)
    losses, lse = queries.new_empty(len(queries)), queries.new_empty(len(queries))
    if len(queries) > 0:
        grid = (triton.cdiv(len(queries), BLOCK_R),)
        _centroid_info_nce_fwd_kernel[grid](problem, losses, lse, **options, **without_spills())
    return losses, lse
