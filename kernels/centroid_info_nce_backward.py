"""The gradient of InfoNCE between centroids.

    dlogits[r, k] = dlosses[r]·e^(logits[r, k] − lse[r])/τ
    dpositive[r] = dlosses[r]·(e^−losses[r] − 1)/τ, which is dlogits[r, own] if p_r is the own key
    dqueries[r] = Σ_k dlogits[r, k]·key_k + dpositive[r]·p_r    dpositives[r] = dpositive[r]·q_r
    dkeys[k] = Σ_r dlogits[r, k]·q_r

The logits are computed again, for each block of channels of a gradient.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .centroid_info_nce import (
    BLOCK_R,
    are_present,
    load_rows,
    problem_of,
    products,
)
from .launch import without_spills

MOST_CHANNELS = 128  # of a program


class Losses(NamedTuple):
    """float32 [R]."""

    dlosses: Any
    losses: Any
    lse: Any


class Outputs(NamedTuple):
    """float32."""

    dqueries: Any  # [R, D]
    dkeys: Any  # [K, D]
    dpositives: Any  # [R, D], if positives were given


@triton.jit
def _dpositive(problem, row_losses, r):
    """The gradient of the positive's inner product; 0 of an absent row."""
    present = are_present(problem.queries, r)
    dloss = tl.load(row_losses.dlosses + r, mask=present, other=0.0)
    loss = tl.load(row_losses.losses + r, mask=present, other=0.0)
    return dloss * problem.sizes.inverse_temperature * (tl.exp(-loss) - 1)


@triton.jit
def _dlogits(product, problem, row_losses, r, k):
    """The gradients of the inner products of rows r and keys k; 0 for the own key. All broadcast
    to one shape."""
    present = are_present(problem.queries, r)
    dloss = tl.load(row_losses.dlosses + r, mask=present, other=0.0)
    lse = tl.load(row_losses.lse + r, mask=present, other=0.0)
    used = present & are_present(problem.keys, k) & (r // problem.sizes.groups != k)
    scale = problem.sizes.inverse_temperature
    return tl.where(used, dloss * scale * tl.exp(scale * product - lse), 0.0)


@triton.jit
def _store(ptr, values, i, d, count, dim):
    offsets = i.to(tl.int64)[:, None] * dim + d.to(tl.int64)[None, :]
    tl.store(ptr + offsets, values, mask=(i < count)[:, None] & (d < dim)[None, :])


@triton.jit
def _write_gradients(
    problem, row_losses, outputs, i, d, OF_QUERIES: tl.constexpr, OWN_KEY_IS_POSITIVE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Channels d of the gradients of queries i and their positives, or of keys i."""
    queries, keys, sizes = problem.queries, problem.keys, problem.sizes
    ours, others = (queries, keys) if OF_QUERIES else (keys, queries)
    total = tl.zeros((i.shape[0], d.shape[0]), tl.float32)
    for start in range(0, others.count, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        product = products(ours, i, others, j, sizes.dim, PRECISION, BLOCK_D)
        r, k = (i[:, None], j[None, :]) if OF_QUERIES else (j[None, :], i[:, None])
        dlogits = _dlogits(product, problem, row_losses, r, k)
        if OWN_KEY_IS_POSITIVE and not OF_QUERIES:
            dlogits += tl.where(r // sizes.groups == k, _dpositive(problem, row_losses, r), 0.0)
        x = load_rows(others, j, d, are_present(others, j), sizes.dim)
        total = tl.dot(dlogits, x, total, input_precision=PRECISION)
    if OF_QUERIES:
        present, weight = are_present(queries, i), _dpositive(problem, row_losses, i)[:, None]
        own_key = i // sizes.groups
        p = load_rows(
            problem.positives, own_key if OWN_KEY_IS_POSITIVE else i, d, present, sizes.dim
        )
        dqueries = tl.where(present[:, None], total + weight * p, 0.0)
        _store(outputs.dqueries, dqueries, i, d, queries.count, sizes.dim)
        if not OWN_KEY_IS_POSITIVE:
            dpositives = weight * load_rows(queries, i, d, present, sizes.dim)
            _store(outputs.dpositives, dpositives, i, d, queries.count, sizes.dim)
    else:
        _store(outputs.dkeys, total, i, d, keys.count, sizes.dim)


@triton.jit
def _centroid_info_nce_bwd_kernel(
    problem,  # Problem
    row_losses,  # Losses
    outputs,  # Outputs
    CHANNELS: tl.constexpr,
    OWN_KEY_IS_POSITIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program writes some channels of the gradients of BLOCK_R queries, or of as many keys. It
    reads all rows of the other tensor from the caches."""
    row_blocks = tl.cdiv(problem.queries.count, BLOCK_R)
    block, i = tl.program_id(0), tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    if block < row_blocks:
        _write_gradients(
            problem, row_losses, outputs, block * BLOCK_R + i, d, True,
            OWN_KEY_IS_POSITIVE, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    else:
        _write_gradients(
            problem, row_losses, outputs, (block - row_blocks) * BLOCK_R + i, d, False,
            OWN_KEY_IS_POSITIVE, PRECISION, BLOCK_K, BLOCK_D,
        )  # fmt: skip


def centroid_info_nce_backward(
    dlosses: Tensor,
    queries: Tensor,
    keys: Tensor,
    positives: Tensor | None,
    present: Tensor | None,
    present_keys: Tensor | None,
    losses: Tensor,
    lse: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dlosses [R], contiguous -> dqueries, dkeys, dpositives, float32 and contiguous (the last one
    (0,) if there were none)."""
    inputs = queries, keys, positives, present, present_keys, temperature
    (problem, options), dim = problem_of(*inputs), keys.shape[1]
    dqueries, dkeys, dpositives = (
        queries.new_empty(0 if x is None else x.shape) for x in (queries, keys, positives)
    )
    if keys.numel() > 0:
        channels = min(max(triton.next_power_of_2(dim), 16), MOST_CHANNELS)
        blocks = triton.cdiv(len(queries), BLOCK_R) + triton.cdiv(len(keys), BLOCK_R)
        _centroid_info_nce_bwd_kernel[(blocks, triton.cdiv(dim, channels))](
            *(problem, Losses(dlosses, losses, lse)),
            Outputs(dqueries, dkeys, dpositives),
            CHANNELS=channels,
            **options,
            **without_spills(),
        )
    return dqueries, dkeys, dpositives
