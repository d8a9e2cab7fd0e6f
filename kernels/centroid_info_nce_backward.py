"""The gradient of InfoNCE between centroids.

dlogits[r, j] = dloss[r]·(e^(logits[r, j] − lse[r]) − [j is r's own])/τ
dqueries = dlogits·keys,  dkeys = dlogitsᵀ·queries,  dpositives[r] = dlogits[r, own]·q_r
dbias[j] = τ·Σ_r dlogits[r, j]

One launch, if the logits of all rows were kept. Otherwise the logits of a part of the rows are
computed again, and the gradients of its queries; the gradients of the keys are added in the order
of the parts.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .centroid_info_nce import (
    BLOCK_D,
    BLOCK_R,
    Logits,
    Sums,
    any_row_is_present,
    compute_logits,
    key_is_present,
    load_channels,
    options,
    problem_of,
    row_is_present,
    row_ptrs,
)
from .launch import without_spills


class DlossOfRows(NamedTuple):
    """The gradient of each row's loss."""

    dloss: Any  # float32 [K·G] by stride, 0 for a scalar
    stride: int
    scale: Any  # float32, one
    lse: Any  # float32 [K·G]
    positive_logits: Any  # float32 [K·G]


class Outputs(NamedTuple):
    dqueries: Any  # [K, G, D]
    dkeys: Any  # [K, D]; float32 if it is added to
    dbias: Any  # float32 [K] or None
    dpositives: Any  # [K, G, D], if positives were given


class RowGradients(NamedTuple):
    """Of each row dloss/τ, lse, and the gradient of its positive's inner product. Absent rows: 0"""

    dloss: Any
    lse: Any
    dpositive: Any


@triton.jit
def load_row_gradients(losses, problem, present, r):
    lse = tl.load(losses.lse + r, mask=present, other=0.0)
    positive = tl.load(losses.positive_logits + r, mask=present, other=0.0)
    dloss = tl.load(losses.dloss + r * losses.stride, mask=present, other=0.0)
    dloss *= tl.load(losses.scale) * problem.scaling.inverse_temperature
    return RowGradients(dloss, lse, dloss * (tl.exp(positive - lse) - 1))


@triton.jit
def _dlogits(problem, logits, r, j, dloss, lse, dpositive, FORM: tl.constexpr):
    """The gradients of the inner products: all arguments [R, 1], but keys j [1, K]; or [1, R] and
    [K, 1]."""
    x = tl.load(
        logits.ptr + (r - logits.first_row).to(tl.int64) * problem.sizes.width + j,
        mask=(r < logits.end_row) & (j < problem.sizes.num_classes),
        other=-float("inf"),
    )
    dlogits = dloss * tl.exp(x - lse)
    if not FORM.has_positives:
        dlogits = tl.where(r // FORM.groups == j, dpositive, dlogits)
    return dlogits


@triton.jit
def _add_positives(
    total, weight, present, problem, losses, outputs, r, inside, d, FORM: tl.constexpr
):
    """dqueries with the part of the positives, whose inner products have the gradient `weight`.
    Writes dpositives."""
    used = present
    if FORM.mirrored:  # the positive is a query, and this row is the positive of that query
        mirror = r // FORM.groups * FORM.groups + (FORM.groups - 1 - r % FORM.groups)
        there = inside & row_is_present(problem, mirror, FORM)
        weight += load_row_gradients(losses, problem, there, mirror).dpositive
        used = used | there
    positives, queries, dim = problem.positives, problem.queries, problem.sizes.dim
    p = load_channels(row_ptrs(positives, r, FORM), positives.stride_d, d, used, dim)
    if not FORM.mirrored:
        q = load_channels(row_ptrs(queries, r, FORM), queries.stride_d, d, used, dim)
        _store(outputs.dpositives, weight[:, None] * q, r, d, inside, dim)
    return total + weight[:, None] * p


@triton.jit
def _store(ptr, values, r, d, inside, dim):
    """Rows r and channels d of a contiguous output."""
    offsets = r.to(tl.int64)[:, None] * dim + d.to(tl.int64)[None, :]
    mask = inside[:, None] & (d < dim)[None, :]
    tl.store(ptr + offsets, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _write_queries(
    problem, logits, losses, outputs, r, d, FORM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dqueries of rows r and channels d, from all keys; and dpositives."""
    inside = r < logits.end_row
    present = inside & row_is_present(problem, r, FORM)
    row = load_row_gradients(losses, problem, present, r)
    dloss, lse, dpositive = row.dloss[:, None], row.lse[:, None], row.dpositive[:, None]
    keys = problem.keys
    total = tl.zeros((r.shape[0], d.shape[0]), tl.float32)
    for start in range(0, problem.sizes.num_classes, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        used = key_is_present(problem, j, FORM)
        if not FORM.has_positives:  # a present row uses its own key even if that key is absent
            used = used | any_row_is_present(problem, j, FORM)
        dlogits = _dlogits(problem, logits, r[:, None], j[None, :], dloss, lse, dpositive, FORM)
        keys_ptrs = keys.ptr + j.to(tl.int64) * keys.stride_k
        k = load_channels(keys_ptrs, keys.stride_d, d, used, problem.sizes.dim)
        total = tl.dot(dlogits, k, total, input_precision=PRECISION)
    if FORM.has_positives:
        total = _add_positives(
            total, row.dpositive, present, problem, losses, outputs, r, inside, d, FORM
        )
    _store(outputs.dqueries, total, r, d, inside, problem.sizes.dim)


@triton.jit
def _write_keys(
    problem, logits, losses, outputs, j, d, ADD: tl.constexpr, FORM: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dkeys of keys j and channels d, and dbias, from all rows of the logits."""
    inside = j < problem.sizes.num_classes
    queries, dim = problem.queries, problem.sizes.dim
    total = tl.zeros((j.shape[0], d.shape[0]), tl.float32)
    sums = tl.zeros(j.shape, tl.float32)
    if ADD:
        dkeys_ptrs = outputs.dkeys + j.to(tl.int64) * dim
        total = load_channels(dkeys_ptrs, 1, d, inside, dim)
    for start in range(logits.first_row, logits.end_row, BLOCK_K):
        r = start + tl.arange(0, BLOCK_K)
        present = (r < logits.end_row) & row_is_present(problem, r, FORM)
        row = load_row_gradients(losses, problem, present, r)
        dloss, lse, dpositive = row.dloss[None, :], row.lse[None, :], row.dpositive[None, :]
        dlogits = _dlogits(problem, logits, r[None, :], j[:, None], dloss, lse, dpositive, FORM)
        q = load_channels(row_ptrs(queries, r, FORM), queries.stride_d, d, present, dim)
        sums += tl.sum(dlogits, 1)
        total = tl.dot(dlogits, q, total, input_precision=PRECISION)
    _store(outputs.dkeys, total, j, d, inside, dim)
    if outputs.dbias is not None and tl.program_id(1) == 0:
        dbias = sums / problem.scaling.inverse_temperature
        if ADD:
            dbias += tl.load(outputs.dbias + j, mask=inside, other=0.0)
        tl.store(outputs.dbias + j, dbias, mask=inside)


@triton.jit
def _centroid_info_nce_bwd_kernel(
    problem,  # Problem
    logits,  # Logits
    losses,  # DlossOfRows
    outputs,  # Outputs
    ADD: tl.constexpr,  # to dkeys and dbias
    FORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program computes BLOCK_D channels of BLOCK_R rows, or of as many keys. A block of dqueries
    (with dpositives) reads its rows of logits and all keys; a block of dkeys reads its columns and
    all queries. If the caches hold the logits, these and the inputs are read from memory once. From
    the caches, logits are read twice for each block of channels, keys and queries for each block of
    rows and of keys. Each gradient is written once."""
    row_blocks = tl.cdiv(logits.end_row - logits.first_row, BLOCK_R)
    block = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if block < row_blocks:
        r = logits.first_row + block * BLOCK_R + tl.arange(0, BLOCK_R)
        _write_queries(problem, logits, losses, outputs, r, d, FORM, PRECISION, BLOCK_K)
    else:
        j = (block - row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        _write_keys(problem, logits, losses, outputs, j, d, ADD, FORM, PRECISION, BLOCK_K)


def centroid_info_nce_backward(
    dloss: Tensor,
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    positives: Tensor | None,
    present: Tensor | None,
    present_keys: Tensor | None,
    lse: Tensor,
    positive_logits: Tensor,
    scale: Tensor,
    logits: Tensor,
    all_keys: bool,
    mirrored: bool,
    temperature: float,
    logits_at_once: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dloss float32 [], [K] or [K, G] -> dqueries, dkeys, dbias, dpositives (these two (0,) if
    there were none).

    If the logits were not kept, it needs in addition 4·logits_at_once bytes (or 16 rows), and
    4·K·D if the keys are not float32.
    """
    given = queries, keys, bias, positives, present, present_keys, all_keys, mirrored, temperature
    problem, form = problem_of(*given)
    num_classes, dim, width = problem.sizes.num_classes, problem.sizes.dim, problem.sizes.width
    rows, kept = num_classes * form.groups, logits.dim() == 2
    part = rows if kept else max(logits_at_once // width // BLOCK_R, 1) * BLOCK_R
    dqueries = queries.new_empty(queries.shape)
    dkeys = keys.new_empty(keys.shape, dtype=keys.dtype if part >= rows else torch.float32)
    dbias = lse.new_empty(0 if bias is None else num_classes)
    dpositives = queries.new_empty(0) if positives is None else positives.new_empty(queries.shape)
    if rows == 0:
        return dqueries.zero_(), dkeys.zero_(), dbias.zero_(), dpositives.zero_()
    if not kept:
        logits = lse.new_empty((min(part, rows), width))
    dloss = dloss.contiguous()
    losses = DlossOfRows(dloss, 0 if dloss.dim() == 0 else 1, scale, lse, positive_logits)
    outputs = Outputs(dqueries, dkeys, None if bias is None else dbias, dpositives)
    key_blocks = triton.cdiv(num_classes, BLOCK_R)
    for first_row in range(0, rows, part):
        these = Logits(logits, first_row, min(first_row + part, rows))
        if not kept:
            compute_logits(problem, form, these, Sums(None, None, None))
        row_blocks = triton.cdiv(these.end_row - first_row, BLOCK_R)
        _centroid_info_nce_bwd_kernel[(row_blocks + key_blocks, max(triton.cdiv(dim, BLOCK_D), 1))](
            *(problem, these, losses, outputs),
            ADD=first_row > 0,
            FORM=form,
            **options(),
            **without_spills(),
        )
    return dqueries, dkeys.to(keys.dtype), dbias, dpositives
