"""The gradient of InfoNCE between centroids.

dlogits[r, j] = dloss[r]·(e^(logits[r, j] − lse[r]) − [j is r's own])/τ
dqueries = dlogits·keys,  dkeys = dlogitsᵀ·queries,  dpositives[r] = dlogits[r, own]·q_r
dbias[j] = τ·Σ_r dlogits[r, j]

One launch, if the logits of all rows were kept. Otherwise the logits of a part of the rows are
computed again, and the gradients of its queries; the gradients of the keys are added in the order
of the parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .centroid_info_nce import (
    BLOCK_D,
    BLOCK_R,
    Problem,
    as_rows,
    compute_logits,
    is_present,
    key_is_present,
    row_offsets,
)


@triton.jit
def row_gradients(
    dloss_ptr, scale_ptr, lse_ptr, positive_logits_ptr, present, r, stride_dloss,
    inverse_temperature,
):  # fmt: skip
    """Of each row dloss/τ, lse, and the gradient of its positive's inner product. Absent rows: 0"""
    lse = tl.load(lse_ptr + r, mask=present, other=0.0)
    positive = tl.load(positive_logits_ptr + r, mask=present, other=0.0)
    dloss = tl.load(dloss_ptr + r * stride_dloss, mask=present, other=0.0)
    dloss *= tl.load(scale_ptr) * inverse_temperature
    return dloss, lse, dloss * (tl.exp(positive - lse) - 1)


@triton.jit
def _centroid_info_nce_bwd_kernel(
    logits_ptr,  # float32 [rows from first_row to end_row, width]
    dloss_ptr,  # float32 [K·G] by stride, 0 for a scalar
    scale_ptr,
    lse_ptr,  # float32 [K·G]
    positive_logits_ptr,  # float32 [K·G]
    queries_ptr,
    keys_ptr,
    positives_ptr,
    present_ptr,
    present_keys_ptr,
    dqueries_ptr,  # [K, G, D]
    dkeys_ptr,  # [K, D]; with ADD float32
    dbias_ptr,  # float32 [K] or None
    dpositives_ptr,  # [K, G, D]
    num_classes,
    dim,
    first_row,
    end_row,
    width,
    temperature,
    stride_dloss,
    stride_queries_k,
    stride_queries_g,
    stride_queries_d,
    stride_keys_k,
    stride_keys_d,
    stride_positives_k,
    stride_positives_g,
    stride_positives_d,
    MIRRORED: tl.constexpr,
    ADD: tl.constexpr,  # to dkeys and dbias
    HAS_POSITIVES: tl.constexpr,
    ALL_KEYS: tl.constexpr,
    GROUPS: tl.constexpr,
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
    rows = num_classes * GROUPS
    row_blocks = tl.cdiv(end_row - first_row, BLOCK_R)
    inverse_temperature = 1 / temperature
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    channels = (d < dim)[None, :]
    if tl.program_id(0) < row_blocks:
        r = first_row + tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = r < end_row
        present = inside & is_present(present_ptr, r, rows)
        dloss, lse, dpositive = row_gradients(
            dloss_ptr, scale_ptr, lse_ptr, positive_logits_ptr, present, r, stride_dloss,
            inverse_temperature,
        )  # fmt: skip
        total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for start in range(0, num_classes, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            used = key_is_present(present_ptr, present_keys_ptr, j, num_classes, GROUPS, ALL_KEYS)
            if not HAS_POSITIVES:  # a present row uses its own key even if that key is absent
                used = used | key_is_present(present_ptr, None, j, num_classes, GROUPS, False)
            logits = tl.load(
                logits_ptr + (r - first_row).to(tl.int64)[:, None] * width + j[None, :],
                mask=inside[:, None] & (j < num_classes)[None, :],
                other=-float("inf"),
            )
            dlogits = dloss[:, None] * tl.exp(logits - lse[:, None])
            if not HAS_POSITIVES:
                own = (r // GROUPS)[:, None] == j[None, :]
                dlogits = tl.where(own, dpositive[:, None], dlogits)
            k = tl.load(
                keys_ptr + (j.to(tl.int64) * stride_keys_k)[:, None] + d[None, :] * stride_keys_d,
                mask=used[:, None] & channels,
                other=0.0,
            )
            total = tl.dot(dlogits, k.to(tl.float32), total, input_precision=PRECISION)
        out = r.to(tl.int64)[:, None] * dim + d[None, :]
        if HAS_POSITIVES:
            weight, used = dpositive, present
            if MIRRORED:  # the positive is a query, and this row is the positive of that query
                mirror = r // GROUPS * GROUPS + (GROUPS - 1 - r % GROUPS)
                there = inside & is_present(present_ptr, mirror, rows)
                _, _, of_mirror = row_gradients(
                    dloss_ptr, scale_ptr, lse_ptr, positive_logits_ptr, there, mirror, stride_dloss,
                    inverse_temperature,
                )  # fmt: skip
                weight, used = weight + of_mirror, used | there
            mask = used[:, None] & channels
            offsets = row_offsets(r, stride_positives_k, stride_positives_g, GROUPS)[:, None]
            p = tl.load(
                positives_ptr + offsets + d[None, :] * stride_positives_d, mask=mask, other=0.0
            )
            total += weight[:, None] * p.to(tl.float32)
            if not MIRRORED:
                offsets = row_offsets(r, stride_queries_k, stride_queries_g, GROUPS)[:, None]
                q = tl.load(
                    queries_ptr + offsets + d[None, :] * stride_queries_d, mask=mask, other=0.0
                )
                dpositives = weight[:, None] * q.to(tl.float32)
                dpositives = dpositives.to(dpositives_ptr.dtype.element_ty)
                tl.store(dpositives_ptr + out, dpositives, mask=inside[:, None] & channels)
        dqueries = total.to(dqueries_ptr.dtype.element_ty)
        tl.store(dqueries_ptr + out, dqueries, mask=inside[:, None] & channels)
    else:
        i = (tl.program_id(0) - row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        dkeys_ptrs = dkeys_ptr + i.to(tl.int64)[:, None] * dim + d[None, :]
        total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        sums = tl.zeros((BLOCK_R,), tl.float32)
        if ADD:
            total = tl.load(dkeys_ptrs, mask=(i < num_classes)[:, None] & channels, other=0.0)
        for start in range(first_row, end_row, BLOCK_K):
            row = start + tl.arange(0, BLOCK_K)
            present = (row < end_row) & is_present(present_ptr, row, rows)
            dloss, lse, dpositive = row_gradients(
                dloss_ptr, scale_ptr, lse_ptr, positive_logits_ptr, present, row, stride_dloss,
                inverse_temperature,
            )  # fmt: skip
            logits = tl.load(
                logits_ptr + (row - first_row).to(tl.int64)[None, :] * width + i[:, None],
                mask=(row < end_row)[None, :] & (i < num_classes)[:, None],
                other=-float("inf"),
            )
            dlogits = dloss[None, :] * tl.exp(logits - lse[None, :])
            if not HAS_POSITIVES:
                own = (row // GROUPS)[None, :] == i[:, None]
                dlogits = tl.where(own, dpositive[None, :], dlogits)
            offsets = row_offsets(row, stride_queries_k, stride_queries_g, GROUPS)[:, None]
            x = tl.load(
                queries_ptr + offsets + d[None, :] * stride_queries_d,
                mask=present[:, None] & channels,
                other=0.0,
            )
            sums += tl.sum(dlogits, 1)
            total = tl.dot(dlogits, x.to(tl.float32), total, input_precision=PRECISION)
        dkeys = total.to(dkeys_ptr.dtype.element_ty)
        tl.store(dkeys_ptrs, dkeys, mask=(i < num_classes)[:, None] & channels)
        if dbias_ptr is not None and tl.program_id(1) == 0:
            dbias = temperature * sums
            if ADD:
                dbias += tl.load(dbias_ptr + i, mask=i < num_classes, other=0.0)
            tl.store(dbias_ptr + i, dbias, mask=i < num_classes)


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
    problem = Problem(*given)
    rows, (num_classes, dim) = problem.rows, keys.shape
    kept = logits.dim() == 2
    part = rows if kept else max(logits_at_once // problem.width // BLOCK_R, 1) * BLOCK_R
    dqueries = queries.new_empty(queries.shape)
    dkeys = keys.new_empty(keys.shape, dtype=keys.dtype if part >= rows else torch.float32)
    dbias = lse.new_empty(0 if bias is None else num_classes)
    dpositives = queries.new_empty(0) if positives is None else positives.new_empty(queries.shape)
    if rows == 0 or dim == 0:
        return dqueries.zero_(), dkeys.zero_(), dbias.zero_(), dpositives.zero_()
    if not kept:
        logits = lse.new_empty((min(part, rows), problem.width))
    dloss = dloss.contiguous()
    own, own_strides = problem.positive_rows()
    key_blocks = triton.cdiv(num_classes, BLOCK_R)
    for first_row in range(0, rows, part):
        end_row = min(first_row + part, rows)
        if not kept:
            compute_logits(problem, first_row, end_row, logits=logits)
        row_blocks = triton.cdiv(end_row - first_row, BLOCK_R)
        _centroid_info_nce_bwd_kernel[(row_blocks + key_blocks, triton.cdiv(dim, BLOCK_D))](
            logits,
            dloss,
            scale,
            lse,
            positive_logits,
            queries,
            keys,
            own,
            *problem.masks(),
            dqueries,
            dkeys,
            None if bias is None else dbias,
            dpositives,
            num_classes,
            dim,
            first_row,
            end_row,
            problem.width,
            temperature,
            0 if dloss.dim() == 0 else 1,
            *as_rows(queries),
            *keys.stride(),
            *own_strides,
            MIRRORED=mirrored,
            ADD=first_row > 0,
            **problem.flags(),
        )
    return dqueries, dkeys.to(keys.dtype), dbias, dpositives
