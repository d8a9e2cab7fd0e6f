"""InfoNCE between centroids.

    logits[r, j] = q_r·k_j/τ + bias_j,  positive_logits[r] = q_r·p_r/τ instead of the row's own key
    losses[r] = lse[r] − positive_logits[r],  lse[r] = log Σ e^logits over own and present keys

Row r is query g of class k: r = k·G + g. There are only two kernels, because launches take longer
than the small K×K×D products. If there are few logits, they are kept for the gradient. Absent rows
and keys are never loaded: they may contain NaN.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import architecture

BLOCK_R = 16  # rows
BLOCK_K = 32  # keys
BLOCK_D = 32
CHUNKS = 8  # of the keys, at most


@triton.jit
def is_present(present_ptr, r, rows):
    inside = r < rows
    if present_ptr is None:
        return inside
    else:
        return tl.load(present_ptr + r, mask=inside, other=0).to(tl.int1)


@triton.jit
def key_is_present(
    present_ptr, present_keys_ptr, j, num_classes, GROUPS: tl.constexpr, ALL_KEYS: tl.constexpr
):
    """Whether the key is in the denominator of every row."""
    if ALL_KEYS:
        return j < num_classes
    elif present_keys_ptr is None:
        found = j < 0
        for g in tl.static_range(GROUPS):
            found = found | is_present(present_ptr, j * GROUPS + g, num_classes * GROUPS)
        return found
    else:
        return is_present(present_keys_ptr, j, num_classes)


@triton.jit
def row_offsets(r, stride_k, stride_g, GROUPS: tl.constexpr):
    return (r // GROUPS).to(tl.int64) * stride_k + (r % GROUPS).to(tl.int64) * stride_g


@triton.jit
def inner_products(
    queries_ptrs, keys_ptrs, row_mask, key_mask, dim, stride_qd, stride_kd, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows [BLOCK_R] times keys [BLOCK_K]: float32 [BLOCK_R, BLOCK_K]."""
    total = tl.zeros((queries_ptrs.shape[0], keys_ptrs.shape[0]), tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        q = tl.load(
            queries_ptrs[:, None] + (d.to(tl.int64) * stride_qd)[None, :],
            mask=row_mask[:, None] & (d < dim)[None, :],
            other=0.0,
        )
        k = tl.load(
            keys_ptrs[None, :] + (d.to(tl.int64) * stride_kd)[:, None],
            mask=key_mask[None, :] & (d < dim)[:, None],
            other=0.0,
        )
        total = tl.dot(q.to(tl.float32), k.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def _centroid_info_nce_fwd_kernel(
    queries_ptr,  # [K, G, D] by strides
    keys_ptr,  # [K, D] by strides
    bias_ptr,  # float32 [K] or None
    positives_ptr,  # [K, G, D] by strides: the keys if none were given
    present_ptr,  # bool [K·G] or None
    present_keys_ptr,  # bool [K] or None
    maxima_ptr,  # float32 [chunks, K·G]: largest logit of the chunk's keys, without the own key
    totals_ptr,  # float32 [chunks, K·G]: Σ e^(logit − maximum)
    positive_logits_ptr,  # float32 [K·G]
    logits_ptr,  # float32 [rows from first_row to end_row, width] or None: −∞ where a key is not in
    # the row's denominator, and for the own key
    num_classes,
    dim,
    first_row,
    end_row,
    width,
    keys_per_chunk,
    inverse_temperature,
    stride_queries_k,
    stride_queries_g,
    stride_queries_d,
    stride_keys_k,
    stride_keys_d,
    stride_positives_k,
    stride_positives_g,
    stride_positives_d,
    HAS_POSITIVES: tl.constexpr,
    ALL_KEYS: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program computes BLOCK_R rows and a chunk of the keys. It reads queries, keys and positives
    from memory once; from the caches it reads the keys for each block of rows, and the rows for
    each BLOCK_K keys. It writes 8 bytes per row and chunk, and 4 per row; or, for the gradient,
    only the logits. With few logits it writes both."""
    chunk = tl.program_id(1)
    rows = num_classes * GROUPS
    r = first_row + tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < end_row
    present = inside & is_present(present_ptr, r, rows)
    queries_ptr += row_offsets(r, stride_queries_k, stride_queries_g, GROUPS)

    maximum = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    first = chunk * keys_per_chunk
    for start in range(first, tl.minimum(first + keys_per_chunk, num_classes), BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        used = key_is_present(present_ptr, present_keys_ptr, j, num_classes, GROUPS, ALL_KEYS)
        keys_ptrs = keys_ptr + j.to(tl.int64) * stride_keys_k
        logits = inverse_temperature * inner_products(
            queries_ptr, keys_ptrs, present, used, dim, stride_queries_d, stride_keys_d, PRECISION,
            BLOCK_D,
        )  # fmt: skip
        if bias_ptr is not None:
            logits += tl.load(bias_ptr + j, mask=used, other=0.0)[None, :]
        others = present[:, None] & used[None, :] & ((r // GROUPS)[:, None] != j[None, :])
        logits = tl.where(others, logits, -float("inf"))
        if logits_ptr is not None:
            tl.store(
                logits_ptr + (r - first_row).to(tl.int64)[:, None] * width + j[None, :],
                logits,
                mask=inside[:, None] & (j < width)[None, :],
            )
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        shift = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        maximum = new_maximum
    if maxima_ptr is not None:
        tl.store(maxima_ptr + chunk * rows + r, maximum, mask=inside)
        tl.store(totals_ptr + chunk * rows + r, total, mask=inside)

    if positive_logits_ptr is not None and chunk == 0:
        own = positives_ptr + row_offsets(r, stride_positives_k, stride_positives_g, GROUPS)
        product = tl.zeros((BLOCK_R,), tl.float32)
        for start in range(0, dim, BLOCK_D):
            d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
            mask = present[:, None] & (d < dim)
            q = tl.load(queries_ptr[:, None] + d * stride_queries_d, mask=mask, other=0.0)
            p = tl.load(own[:, None] + d * stride_positives_d, mask=mask, other=0.0)
            product += tl.sum(q.to(tl.float32) * p.to(tl.float32), 1)
        positive = inverse_temperature * product
        if bias_ptr is not None and not HAS_POSITIVES:
            positive += tl.load(bias_ptr + r // GROUPS, mask=present, other=0.0)
        tl.store(positive_logits_ptr + r, positive, mask=inside)


@triton.jit
def _reduce_kernel(
    maxima_ptr,  # these three: see _centroid_info_nce_fwd_kernel
    totals_ptr,
    positive_logits_ptr,
    present_ptr,  # bool [K·G] or None
    loss_ptr,  # float32: one, or [K·G] for "none"
    lse_ptr,  # float32 [K·G]
    scale_ptr,  # float32: the factor of the sum of the losses
    rows,
    chunks,
    loss_weight,
    REDUCTION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """One program. Reads 8 bytes per row and chunk, and 4 bytes and the mask per row. Writes 4
    bytes per row (8 for "none"), the loss and the scale."""
    chunk = tl.arange(0, CHUNKS)[:, None]
    loss = tl.zeros((BLOCK_R,), tl.float32)
    count = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        present = is_present(present_ptr, r, rows)
        inside = (chunk < chunks) & (r < rows)[None, :]
        maxima = tl.load(maxima_ptr + chunk * rows + r[None, :], inside, -float("inf"))
        totals = tl.load(totals_ptr + chunk * rows + r[None, :], inside, 0.0)
        positive = tl.load(positive_logits_ptr + r, mask=r < rows, other=0.0)
        maximum = tl.maximum(tl.max(maxima, 0), positive)
        total = tl.exp(positive - maximum) + tl.sum(totals * tl.exp(maxima - maximum[None, :]), 0)
        lse = maximum + tl.log(total)
        tl.store(lse_ptr + r, lse, mask=r < rows)
        losses = tl.where(present, lse - positive, 0.0)
        if REDUCTION == "none":
            tl.store(loss_ptr + r, loss_weight * losses, mask=r < rows)
        loss += losses
        count += tl.where(present, 1.0, 0.0)
    scale = loss_weight
    if REDUCTION == "mean":
        scale = loss_weight / tl.maximum(tl.sum(count, 0), 1.0)
    tl.store(scale_ptr, scale)
    if REDUCTION != "none":
        tl.store(loss_ptr, tl.sum(loss, 0) * scale)


def precision() -> str:
    """The precision of float32 products: three TF32 terms on tensor cores, otherwise IEEE; never
    plain TF32."""
    return "tf32x3" if architecture().startswith("sm_") else "ieee"


def as_rows(tensor: Tensor) -> tuple[int, int, int]:
    """Strides (k, g, d) of [K, D] or [K, G, D]."""
    if tensor.dim() == 2:
        return tensor.stride(0), 0, tensor.stride(1)
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def mirrored_rows(queries: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Query G−1−g of each class in place of query g: the first element, and the strides."""
    stride_k, stride_g, stride_d = as_rows(queries)
    return (queries if queries.dim() == 2 else queries[:, -1]), (stride_k, -stride_g, stride_d)


class Problem(NamedTuple):
    """The arguments of the operator that both directions need."""

    queries: Tensor
    keys: Tensor
    bias: Tensor | None
    positives: Tensor | None
    present: Tensor | None
    present_keys: Tensor | None
    all_keys: bool
    mirrored: bool
    temperature: float

    @property
    def groups(self) -> int:
        return 1 if self.queries.dim() == 2 else self.queries.shape[1]

    @property
    def rows(self) -> int:
        return self.keys.shape[0] * self.groups

    @property
    def width(self) -> int:
        """Of the logits of a row: K, rounded up to a multiple of 8."""
        return triton.cdiv(self.keys.shape[0], 8) * 8

    def masks(self) -> tuple[Tensor | None, Tensor | None]:
        present, keys = self.present, self.present_keys
        return (
            None if present is None else present.contiguous(),
            None if keys is None else keys.contiguous(),
        )

    def positive_rows(self) -> tuple[Tensor, tuple[int, int, int]]:
        """The positives, and their strides (k, g, d)."""
        if self.mirrored:
            return mirrored_rows(self.queries)
        own = self.keys if self.positives is None else self.positives
        return own, as_rows(own)

    def flags(self) -> dict[str, object]:
        return {
            "HAS_POSITIVES": self.mirrored or self.positives is not None,
            "ALL_KEYS": self.all_keys,
            "GROUPS": self.groups,
            "PRECISION": precision(),
            "BLOCK_R": BLOCK_R,
            "BLOCK_K": BLOCK_K,
            "BLOCK_D": BLOCK_D,
            "num_warps": 4,
            "enable_fp_fusion": True,
        }


def keys_per_chunk(num_classes: int) -> int:
    return triton.cdiv(triton.cdiv(num_classes, CHUNKS), BLOCK_K) * BLOCK_K


def compute_logits(
    problem: Problem,
    first_row: int,
    end_row: int,
    *,
    maxima: Tensor | None = None,
    totals: Tensor | None = None,
    positive_logits: Tensor | None = None,
    logits: Tensor | None = None,
) -> None:
    """Launches the first kernel for these rows; it writes what is given."""
    num_classes, dim = problem.keys.shape
    own, own_strides = problem.positive_rows()
    each = keys_per_chunk(num_classes)
    grid = triton.cdiv(end_row - first_row, BLOCK_R), triton.cdiv(num_classes, each)
    _centroid_info_nce_fwd_kernel[grid](
        problem.queries,
        problem.keys,
        problem.bias,
        own,
        *problem.masks(),
        maxima,
        totals,
        positive_logits,
        logits,
        num_classes,
        dim,
        first_row,
        end_row,
        problem.width,
        each,
        1 / problem.temperature,
        *as_rows(problem.queries),
        *problem.keys.stride(),
        *own_strides,
        **problem.flags(),
    )


def centroid_info_nce(
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    positives: Tensor | None,
    present: Tensor | None,
    present_keys: Tensor | None,
    all_keys: bool,
    mirrored: bool,
    temperature: float,
    loss_weight: float,
    reduction: str,
    logits_at_once: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """queries, positives [K, D] or [K, G, D], keys [K, D], bias float32 [K] -> float32 loss, and
    for the gradient lse and positive logits [K] or [K, G], the scale of the sum [], and the logits
    [K·G, width], or (0,) if there are more than logits_at_once."""
    given = queries, keys, bias, positives, present, present_keys, all_keys, mirrored, temperature
    problem = Problem(*given)
    rows, shape = problem.rows, queries.shape[:-1]

    def new(*size: int) -> Tensor:
        return queries.new_empty(size, dtype=torch.float32)

    loss, scale = new(*(shape if reduction == "none" else ())), new()
    lse, positive_logits = new(*shape), new(*shape)
    kept = rows * problem.width <= logits_at_once
    logits = new(rows, problem.width) if kept else new(0)
    if rows == 0:
        return loss.zero_(), lse, positive_logits, scale.fill_(loss_weight), logits
    chunks = triton.cdiv(keys.shape[0], keys_per_chunk(keys.shape[0]))
    maxima, totals = new(chunks, rows), new(chunks, rows)
    compute_logits(
        problem,
        0,
        rows,
        maxima=maxima,
        totals=totals,
        positive_logits=positive_logits,
        logits=logits if kept else None,
    )
    _reduce_kernel[(1,)](
        maxima,
        totals,
        positive_logits,
        problem.masks()[0],
        loss,
        lse,
        scale,
        rows,
        chunks,
        loss_weight,
        REDUCTION=reduction,
        BLOCK_R=256,
        CHUNKS=CHUNKS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return loss, lse, positive_logits, scale, logits
