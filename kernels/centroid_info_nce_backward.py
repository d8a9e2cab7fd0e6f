"""The gradient of InfoNCE between centroids.

dlogits[r, j] = dloss[r]·(e^(logits[r, j] − lse[r]) − [j is r's own])/τ
dqueries = dlogits·keys,  dkeys = dlogitsᵀ·queries,  dpositives[r] = dlogits[r, own]·q_r
"""

import triton
import triton.language as tl
from torch import Tensor

from .centroid_info_nce import (
    BLOCK_D,
    BLOCK_K,
    BLOCK_R,
    as_rows,
    dense,
    inner_products,
    is_present,
    key_is_present,
    precision,
    row_offsets,
)


@triton.jit
def _dlogits_kernel(
    dloss_ptr,  # float32 [K·G] by stride, 0 for a scalar
    queries_ptr,
    keys_ptr,
    present_ptr,
    present_keys_ptr,
    lse_ptr,  # float32 [K·G]
    positive_logits_ptr,  # float32 [K·G]
    scale_ptr,
    dlogits_ptr,  # float32 [K·G, K]; if positives were given, the own key's is stored separately
    dpositive_logits_ptr,  # float32 [K·G]
    num_classes,
    dim,
    inverse_temperature,
    stride_dloss,
    stride_queries_k,
    stride_queries_g,
    stride_queries_d,
    stride_keys_k,
    stride_keys_d,
    HAS_POSITIVES: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program computes BLOCK_R rows and BLOCK_K keys. It reads queries and keys from memory once,
    from the caches for each block of the others, and 12 bytes per row. It writes dlogits, 4 bytes
    per row and key, and with positives 4 bytes per row."""
    rows = num_classes * GROUPS
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    present = is_present(present_ptr, r, rows)
    used = key_is_present(present_ptr, present_keys_ptr, j, num_classes, GROUPS)
    queries_ptrs = queries_ptr + row_offsets(r, stride_queries_k, stride_queries_g, GROUPS)
    keys_ptrs = keys_ptr + j.to(tl.int64) * stride_keys_k
    logits = inverse_temperature * inner_products(
        queries_ptrs, keys_ptrs, present, used, dim, stride_queries_d, stride_keys_d, PRECISION,
        BLOCK_D,
    )  # fmt: skip
    lse = tl.load(lse_ptr + r, mask=present, other=0.0)
    positive = tl.load(positive_logits_ptr + r, mask=present, other=0.0)
    dloss = tl.load(dloss_ptr + r * stride_dloss, mask=present, other=0.0)
    dloss *= tl.load(scale_ptr) * inverse_temperature
    dpositive = dloss * (tl.exp(positive - lse) - 1)
    own = (r // GROUPS)[:, None] == j[None, :]
    dlogits = dloss[:, None] * tl.exp(logits - lse[:, None])
    dlogits = tl.where(used[None, :] & present[:, None], dlogits, 0.0)
    dlogits = tl.where(own, 0.0 if HAS_POSITIVES else dpositive[:, None], dlogits)
    tl.store(
        dlogits_ptr + r.to(tl.int64)[:, None] * num_classes + j[None, :],
        dlogits,
        mask=(r < rows)[:, None] & (j < num_classes)[None, :],
    )
    if HAS_POSITIVES and tl.program_id(1) == 0:
        tl.store(dpositive_logits_ptr + r, dpositive, mask=r < rows)


@triton.jit
def _centroid_info_nce_bwd_kernel(
    dlogits_ptr,  # these two: see _dlogits_kernel
    dpositive_logits_ptr,
    queries_ptr,
    keys_ptr,
    positives_ptr,
    present_ptr,
    present_keys_ptr,
    dqueries_ptr,  # [K, G, D]
    dkeys_ptr,  # [K, D]
    dpositives_ptr,  # [K, G, D]
    num_classes,
    dim,
    stride_queries_k,
    stride_queries_g,
    stride_queries_d,
    stride_keys_k,
    stride_keys_d,
    stride_positives_k,
    stride_positives_g,
    stride_positives_d,
    HAS_POSITIVES: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program computes BLOCK_D channels of BLOCK_R rows, or of as many keys. A block of dqueries
    (with dpositives) reads its rows of dlogits and all keys; a block of dkeys reads its columns and
    all queries. If the caches hold dlogits, dlogits and the inputs are read from memory once. From
    the caches, dlogits is read twice for each block of channels, keys and queries for each block of
    rows and of keys. Each gradient is written once."""
    rows = num_classes * GROUPS
    row_blocks = tl.cdiv(rows, BLOCK_R)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    channels = (d < dim)[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    if tl.program_id(0) < row_blocks:
        r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        for start in range(0, num_classes, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            used = key_is_present(present_ptr, present_keys_ptr, j, num_classes, GROUPS)
            if not HAS_POSITIVES:  # a present row uses its own key even if that key is absent
                used = used | key_is_present(present_ptr, None, j, num_classes, GROUPS)
            weights = tl.load(
                dlogits_ptr + r.to(tl.int64)[:, None] * num_classes + j[None, :],
                mask=(r < rows)[:, None] & (j < num_classes)[None, :],
                other=0.0,
            )
            k = tl.load(
                keys_ptr + (j.to(tl.int64) * stride_keys_k)[:, None] + d[None, :] * stride_keys_d,
                mask=used[:, None] & channels,
                other=0.0,
            )
            total = tl.dot(weights, k.to(tl.float32), total, input_precision=PRECISION)
        present = is_present(present_ptr, r, rows)
        out = r.to(tl.int64)[:, None] * dim + d[None, :]
        if HAS_POSITIVES:
            mask = present[:, None] & channels
            weight = tl.load(dpositive_logits_ptr + r, mask=present, other=0.0)[:, None]
            offsets = row_offsets(r, stride_positives_k, stride_positives_g, GROUPS)[:, None]
            p = tl.load(
                positives_ptr + offsets + d[None, :] * stride_positives_d, mask=mask, other=0.0
            )
            total += weight * p.to(tl.float32)
            offsets = row_offsets(r, stride_queries_k, stride_queries_g, GROUPS)[:, None]
            q = tl.load(queries_ptr + offsets + d[None, :] * stride_queries_d, mask=mask, other=0.0)
            dpositives = weight * q.to(tl.float32)
            dpositives = dpositives.to(dpositives_ptr.dtype.element_ty)
            tl.store(dpositives_ptr + out, dpositives, mask=(r < rows)[:, None] & channels)
        dqueries = total.to(dqueries_ptr.dtype.element_ty)
        tl.store(dqueries_ptr + out, dqueries, mask=(r < rows)[:, None] & channels)
    else:
        i = (tl.program_id(0) - row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        for start in range(0, rows, BLOCK_K):
            row = start + tl.arange(0, BLOCK_K)
            column = tl.load(
                dlogits_ptr + row.to(tl.int64)[None, :] * num_classes + i[:, None],
                mask=(row < rows)[None, :] & (i < num_classes)[:, None],
                other=0.0,
            )
            offsets = row_offsets(row, stride_queries_k, stride_queries_g, GROUPS)[:, None]
            x = tl.load(
                queries_ptr + offsets + d[None, :] * stride_queries_d,
                mask=is_present(present_ptr, row, rows)[:, None] & channels,
                other=0.0,
            )
            total = tl.dot(column, x.to(tl.float32), total, input_precision=PRECISION)
        dkeys = total.to(dkeys_ptr.dtype.element_ty)
        dkeys_ptrs = dkeys_ptr + i.to(tl.int64)[:, None] * dim + d[None, :]
        tl.store(dkeys_ptrs, dkeys, mask=(i < num_classes)[:, None] & channels)


def centroid_info_nce_backward(
    dloss: Tensor,
    queries: Tensor,
    keys: Tensor,
    positives: Tensor | None,
    present: Tensor | None,
    present_keys: Tensor | None,
    lse: Tensor,
    positive_logits: Tensor,
    scale: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dloss float32 [], [K] or [K, G] -> dqueries, dkeys, dpositives ((0,) if there were none).

    In addition it needs 4·K·G·K bytes for dlogits: 90 KB for K = 150, 1 GB for K = 16,384.
    """
    num_classes, dim = keys.shape
    groups = 1 if queries.dim() == 2 else queries.shape[1]
    rows = num_classes * groups
    dqueries, dkeys = queries.new_empty(queries.shape), keys.new_empty(keys.shape)
    dpositives = queries.new_empty(0) if positives is None else positives.new_empty(queries.shape)
    if rows == 0 or dim == 0:
        return dqueries.zero_(), dkeys.zero_(), dpositives.zero_()
    dlogits = lse.new_empty((rows, num_classes))
    dpositive_logits = lse.new_empty(rows)
    present, present_keys = dense(present), dense(present_keys)
    dloss = dloss.contiguous()
    own = keys if positives is None else positives
    flags = {
        "HAS_POSITIVES": positives is not None,
        "GROUPS": groups,
        "PRECISION": precision(),
        "BLOCK_R": BLOCK_R,
        "BLOCK_K": BLOCK_K,
        "BLOCK_D": BLOCK_D,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
    row_blocks, key_blocks = triton.cdiv(rows, BLOCK_R), triton.cdiv(num_classes, BLOCK_R)
    _dlogits_kernel[(row_blocks, triton.cdiv(num_classes, BLOCK_K))](
        dloss,
        queries,
        keys,
        present,
        present_keys,
        lse,
        positive_logits,
        scale,
        dlogits,
        dpositive_logits,
        num_classes,
        dim,
        1 / temperature,
        0 if dloss.dim() == 0 else 1,
        *as_rows(queries),
        *keys.stride(),
        **flags,
    )
    _centroid_info_nce_bwd_kernel[(row_blocks + key_blocks, triton.cdiv(dim, BLOCK_D))](
        dlogits,
        dpositive_logits,
        queries,
        keys,
        own,
        present,
        present_keys,
        dqueries,
        dkeys,
        dpositives,
        num_classes,
        dim,
        *as_rows(queries),
        *keys.stride(),
        *as_rows(own),
        **flags,
    )
    return dqueries, dkeys, dpositives
