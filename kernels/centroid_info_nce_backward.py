"""The gradients of centroid InfoNCE, from the kept logits x.

    dx[r, k] = dloss[r]·(e^(x[r, k] − lse[r]) − [k is own])/τ,  dq = dx k,  dk = dxᵀ q,
    db[k] = τ·Σ_r dx[r, k]

Each program computes a tile of a gradient, and dx as it goes. If rows were normalised, the gradient
of a normalised row q̂ = q/length is projected: dq = (dq̂ − (q̂·dq̂)·q̂)/length, and q̂·dq̂ is
τ·Σ_k dx[r, k]·x[r, k]. A row that is not longer than eps was divided by a constant.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .centroid_info_nce import (
    Problem,
    inverse_temperature,
    problem_of,
    product,
    read_rows,
    saved_of,
    scale_of,
)
from .constants import INF
from .launch import architecture, ceil_div, without_spills


class Upstream(NamedTuple):
    ptr: Any  # float32 [R]
    stride: int
    factor: Any  # float32, of each loss


@triton.jit
def _numbers(ptr, i, count, stride=1):
    return tl.load(ptr + i * stride, mask=i < count, other=0.0)


@triton.jit
def _lengths(ptr, i, count):
    return tl.load(ptr + i, mask=i < count, other=INF)


@triton.jit
def _through_scale(p, dx_hat, row, length, along):
    """The gradient of rows [m, d] from that of the normalised ones, whose product with these is
    `along`·τ."""
    if p.eps is None:
        return dx_hat
    else:
        scale = scale_of(length, p.eps)
        along = tl.where(length > p.eps, along * scale * tl.load(p.temperature), 0.0)
        return scale[:, None] * (dx_hat - along[:, None] * row)


@triton.jit
def _dlosses(p, dlosses, r, length):
    """dloss[r]/τ; 0 where the row is absent, even if its upstream gradient is NaN."""
    dloss = _numbers(dlosses.ptr, r, p.rows, dlosses.stride)
    factor = tl.load(dlosses.factor) * inverse_temperature(p)
    return tl.where(length != INF, dloss * factor, 0.0)


@triton.jit
def _gradient(
    p, saved, dlosses, out_ptr, dpositives_ptr, dbias_ptr, pid, OF_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile [m, d] of dq, or of dk: a sum over n, the keys, or the queries."""
    blocks_d = tl.maximum(tl.cdiv(p.dim, BLOCK_D), 1)
    m = pid // blocks_d * BLOCK_M + tl.arange(0, BLOCK_M)
    d = pid % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_count, n_count = (p.num_keys, p.rows) if OF_KEYS else (p.rows, p.num_keys)
    m_ptr, n_ptr = (p.keys, p.queries) if OF_KEYS else (p.queries, p.keys)
    m_lengths, n_lengths = saved.query_lengths, saved.key_lengths
    if OF_KEYS:
        m_lengths, n_lengths = n_lengths, m_lengths
    m_length = _lengths(m_lengths, m, m_count)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    along = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if not OF_KEYS:
        lse = _numbers(saved.lse, m, p.rows)[:, None]
        dloss = _dlosses(p, dlosses, m, m_length)[:, None]
    for start in range(0, n_count, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_length = _lengths(n_lengths, n, n_count)
        r, k = m[:, None], n[None, :]
        if OF_KEYS:
            r, k = n[None, :], m[:, None]
            lse = _numbers(saved.lse, n, p.rows)[None, :]
            dloss = _dlosses(p, dlosses, n, n_length)[None, :]
        inside = (r < p.rows) & (k < saved.pitch)
        x = tl.load(saved.logits + r.to(tl.int64) * saved.pitch + k, mask=inside, other=-INF)
        dx = tl.exp(x - lse)
        if p.positives is None:
            dx = tl.where(k == p.first + r // p.groups, dx - 1, dx)
        dx *= dloss
        if p.eps is not None:
            along += dx * tl.where(x == -INF, 0.0, x)
        elif dbias_ptr is not None:
            along += dx
        # read whether needed or not: a mask that depends on a load prevents prefetching
        y = read_rows(n_ptr, n, d, n < n_count, p.dim)
        y = tl.where((n_length != INF)[:, None], y, 0.0)
        acc += product(dx * scale_of(n_length, p.eps)[None, :], y)
    along_m = tl.sum(along, 1)
    ptrs = m.to(tl.int64)[:, None] * p.dim + d[None, :]
    inside = (m < m_count)[:, None] & (d < p.dim)[None, :]
    row = read_rows(m_ptr, m, d, m_length != INF, p.dim)
    if p.positives is not None and not OF_KEYS:
        y_length = _lengths(saved.positive_lengths, m, p.rows)
        y = read_rows(p.positives, m, d, m_length != INF, p.dim)
        own = _numbers(saved.own, m, p.rows)
        dx = tl.sum(dloss * (tl.exp(own[:, None] - lse) - 1), 1)
        along_y = dx * own
        along_m += along_y
        acc += (dx * scale_of(y_length, p.eps))[:, None] * y
        if dpositives_ptr is not None:
            dy = _through_scale(
                p, (dx * scale_of(m_length, p.eps))[:, None] * row, y, y_length, along_y
            )
            tl.store(dpositives_ptr + ptrs, dy.to(dpositives_ptr.dtype.element_ty), mask=inside)
    if dbias_ptr is not None:
        dbias = (along_m * tl.load(p.temperature)).to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + m, dbias, mask=(m < m_count) & (pid % blocks_d == 0))
    if out_ptr is not None:
        acc = _through_scale(p, acc, row, m_length, along_m)
        tl.store(out_ptr + ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradients_kernel(
    p, saved, dlosses, dqueries_ptr, dkeys_ptr, dpositives_ptr, dbias_ptr, of_keys,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The first `of_keys` programs are the keys': with several groups they take longer."""
    pid = tl.program_id(0)
    if pid >= of_keys:
        _gradient(
            p, saved, dlosses, dqueries_ptr, dpositives_ptr, None, pid - of_keys, False,
            BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    elif (dkeys_ptr is not None) | (dbias_ptr is not None):
        _gradient(
            p, saved, dlosses, dkeys_ptr, None, dbias_ptr, pid, True,
            BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip


SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_D": 64, "num_warps": 4, "num_stages": 3}
LARGE = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_D": 128, "num_warps": 8, "num_stages": 3}
ENOUGH = 192  # large tiles, to keep a GPU busy


def _tiles(count: int, p: Problem, tile: dict[str, int]) -> int:
    return ceil_div(count, tile["BLOCK_M"]) * max(ceil_div(p.dim, tile["BLOCK_D"]), 1)


def centroid_info_nce_backward(
    dlosses: Tensor,
    queries: Tensor,
    keys: Tensor,
    positives: Tensor | None,
    bias: Tensor | None,
    present: Tensor | None,
    present_keys: Tensor | None,
    logits: Tensor,
    rows: Tensor,
    key_lengths: Tensor,
    factor: Tensor,
    first: int,
    temperature: Tensor,
    reduction: str,
    normalize: float | None,
    of_queries: bool,
    of_keys: bool,
    of_positives: bool,
    of_bias: bool,
) -> tuple[Tensor, ...]:
    """dqueries, dkeys, dpositives, dbias, dense, in the inputs' dtypes; empty if not wanted."""
    p = problem_of(queries, keys, positives, bias, None, None, first, temperature, normalize)
    inputs, needed = (queries, keys, positives, bias), (of_queries, of_keys, of_positives, of_bias)
    wanted = zip(inputs, needed, strict=True)
    gradients = [x.new_empty(x.shape) if x is not None and y else None for x, y in wanted]
    results = tuple(queries.new_empty(0) if x is None else x for x in gradients)
    if p.rows == 0:
        return tuple(x.zero_() for x in results)
    dq, dk, dp, db = gradients
    of_rows = 0 if dq is None and dp is None else p.rows
    of_classes = 0 if dk is None and db is None else p.num_keys
    few = _tiles(of_rows, p, LARGE) + _tiles(of_classes, p, LARGE) < ENOUGH
    is_amd = not architecture().startswith("sm_")  # whose compiler spills registers of large tiles
    tile = SMALL if few or is_amd else LARGE
    flat = dlosses.expand(queries.shape[:-1]).reshape(-1)
    upstream = Upstream(flat, flat.stride(0), factor)
    programs = _tiles(of_rows, p, tile) + _tiles(of_classes, p, tile)
    _gradients_kernel[(programs,)](
        *(p, saved_of(logits, rows, key_lengths), upstream, *gradients),
        _tiles(of_classes, p, tile),
        **tile,
        **without_spills(),
        enable_fp_fusion=True,
    )
    return results
