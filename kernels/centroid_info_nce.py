"""InfoNCE between centroids.

    logits[r, j] = q_r·k_j/τ + bias_j,  positive_logits[r] = q_r·p_r/τ instead of the row's own key
    losses[r] = lse[r] − positive_logits[r],  lse[r] = log Σ e^logits over own and present keys

Row r is query g of class k: r = k·G + g. There are only two kernels, because launches take longer
than the small K×K×D products. If there are few logits, they are kept for the gradient. Absent rows
and keys are never loaded: they may contain NaN.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import architecture

BLOCK_R = 16  # rows
BLOCK_K = 32  # keys
BLOCK_D = 32
CHUNKS = 8  # of the keys, at most


class Rows(NamedTuple):
    """[K, G, D] by strides, or [K, D]."""

    ptr: Any
    stride_k: int
    stride_g: int
    stride_d: int


class Present(NamedTuple):
    """Which rows have a loss, and which keys are in their denominators."""

    queries: Any  # bool [K·G] or None: all
    keys: Any  # bool [K] or None: all classes with a present query


class Scaling(NamedTuple):
    """From inner products to logits."""

    inverse_temperature: float
    bias: Any  # float32 [K] or None, added to the logits of the keys


class Sizes(NamedTuple):
    num_classes: int
    dim: int
    width: int  # of the logits of a row: K, rounded up to a multiple of 8


class Problem(NamedTuple):
    """What both directions read."""

    queries: Rows
    keys: Rows
    positives: Rows  # the keys if none were given
    present: Present
    scaling: Scaling
    sizes: Sizes


class Form(NamedTuple):
    """The constants of a problem, for which kernels are compiled."""

    groups: int
    all_keys: bool
    has_positives: bool  # otherwise the positive of a row is the key of its class
    mirrored: bool  # positives are queries: query G−1−g is the positive of query g


class Logits(NamedTuple):
    """float32 [rows from first_row to end_row, width], or None: −∞ where a key is not in the row's
    denominator, and for the own key."""

    ptr: Any
    first_row: int
    end_row: int


class Sums(NamedTuple):
    """What the loss is computed from. All are None if only the logits are computed."""

    maxima: Any  # float32 [chunks, K·G]: largest logit of the chunk's keys, without the own key
    totals: Any  # float32 [chunks, K·G]: Σ e^(logit − maximum)
    positive_logits: Any  # float32 [K·G]


@triton.jit
def is_present(present_ptr, r, count):
    inside = r < count
    if present_ptr is None:
        return inside
    else:
        return tl.load(present_ptr + r, mask=inside, other=0).to(tl.int1)


@triton.jit
def row_is_present(problem, r, FORM: tl.constexpr):
    return is_present(problem.present.queries, r, problem.sizes.num_classes * FORM.groups)


@triton.jit
def any_row_is_present(problem, j, FORM: tl.constexpr):
    """Whether class j has a present query."""
    GROUPS: tl.constexpr = FORM.groups
    found = j < 0
    for g in tl.static_range(GROUPS):
        found = found | row_is_present(problem, j * GROUPS + g, FORM)
    return found


@triton.jit
def key_is_present(problem, j, FORM: tl.constexpr):
    """Whether the key is in the denominator of every row."""
    if FORM.all_keys:
        return j < problem.sizes.num_classes
    elif problem.present.keys is None:
        return any_row_is_present(problem, j, FORM)
    else:
        return is_present(problem.present.keys, j, problem.sizes.num_classes)


@triton.jit
def row_ptrs(rows, r, FORM: tl.constexpr):
    k, g = (r // FORM.groups).to(tl.int64), (r % FORM.groups).to(tl.int64)
    return rows.ptr + k * rows.stride_k + g * rows.stride_g


@triton.jit
def load_channels(ptrs, stride_d, d, mask, dim):
    """Channels d of rows: float32 [rows, channels], 0 where masked."""
    inside = mask[:, None] & (d < dim)[None, :]
    offsets = (d.to(tl.int64) * stride_d)[None, :]
    return tl.load(ptrs[:, None] + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _products(
    problem, queries_ptrs, present, j, used, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows [BLOCK_R] times keys [BLOCK_K]: float32 [BLOCK_R, BLOCK_K]."""
    queries, keys, dim = problem.queries, problem.keys, problem.sizes.dim
    keys_ptrs = keys.ptr + j.to(tl.int64) * keys.stride_k
    total = tl.zeros((present.shape[0], used.shape[0]), tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        q = load_channels(queries_ptrs, queries.stride_d, d, present, dim)
        k = tl.load(
            keys_ptrs[None, :] + (d.to(tl.int64) * keys.stride_d)[:, None],
            mask=used[None, :] & (d < dim)[:, None],
            other=0.0,
        )
        total = tl.dot(q, k.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def _logits_of_keys(
    problem, queries_ptrs, r, present, j, FORM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_K], −∞ for the own key and where the key is not in the denominator."""
    used = key_is_present(problem, j, FORM)
    logits = problem.scaling.inverse_temperature * _products(
        problem, queries_ptrs, present, j, used, PRECISION, BLOCK_D
    )
    if problem.scaling.bias is not None:
        logits += tl.load(problem.scaling.bias + j, mask=used, other=0.0)[None, :]
    others = present[:, None] & used[None, :] & ((r // FORM.groups)[:, None] != j[None, :])
    return tl.where(others, logits, -float("inf"))


@triton.jit
def _positive_logits(problem, queries_ptrs, r, present, FORM: tl.constexpr, BLOCK_D: tl.constexpr):
    own_ptrs = row_ptrs(problem.positives, r, FORM)
    product = tl.zeros(r.shape, tl.float32)
    for start in range(0, problem.sizes.dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        q = load_channels(queries_ptrs, problem.queries.stride_d, d, present, problem.sizes.dim)
        p = load_channels(own_ptrs, problem.positives.stride_d, d, present, problem.sizes.dim)
        product += tl.sum(q * p, 1)
    positive = problem.scaling.inverse_temperature * product
    if problem.scaling.bias is not None and not FORM.has_positives:
        positive += tl.load(problem.scaling.bias + r // FORM.groups, mask=present, other=0.0)
    return positive


@triton.jit
def _centroid_info_nce_fwd_kernel(
    problem,  # Problem
    logits,  # Logits
    sums,  # Sums
    keys_per_chunk,
    FORM: tl.constexpr,
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
    r = logits.first_row + tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < logits.end_row
    present = inside & row_is_present(problem, r, FORM)
    queries_ptrs = row_ptrs(problem.queries, r, FORM)

    maximum = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    first = chunk * keys_per_chunk
    end = tl.minimum(first + keys_per_chunk, problem.sizes.num_classes)
    for start in range(first, end, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        x = _logits_of_keys(problem, queries_ptrs, r, present, j, FORM, PRECISION, BLOCK_D)
        if logits.ptr is not None:
            row = (r - logits.first_row).to(tl.int64)[:, None] * problem.sizes.width
            mask = inside[:, None] & (j < problem.sizes.width)[None, :]
            tl.store(logits.ptr + row + j[None, :], x, mask=mask)
        new_maximum = tl.maximum(maximum, tl.max(x, 1))
        shift = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)
        maximum = new_maximum
    if sums.maxima is not None:
        rows = problem.sizes.num_classes * FORM.groups
        tl.store(sums.maxima + chunk * rows + r, maximum, mask=inside)
        tl.store(sums.totals + chunk * rows + r, total, mask=inside)
        if chunk == 0:
            positive = _positive_logits(problem, queries_ptrs, r, present, FORM, BLOCK_D)
            tl.store(sums.positive_logits + r, positive, mask=inside)


@triton.jit
def _reduce_kernel(
    sums,  # Sums
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
        maxima = tl.load(sums.maxima + chunk * rows + r[None, :], inside, -float("inf"))
        totals = tl.load(sums.totals + chunk * rows + r[None, :], inside, 0.0)
        positive = tl.load(sums.positive_logits + r, mask=r < rows, other=0.0)
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


def rows_of(tensor: Tensor) -> Rows:
    """[K, D] or [K, G, D]."""
    if tensor.dim() == 2:
        return Rows(tensor, tensor.stride(0), 0, tensor.stride(1))
    return Rows(tensor, *tensor.stride())


def mirrored_rows(queries: Tensor) -> Rows:
    """Query G−1−g of each class in place of query g."""
    rows = rows_of(queries)
    return rows._replace(
        ptr=queries if queries.dim() == 2 else queries[:, -1], stride_g=-rows.stride_g
    )


def problem_of(
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    positives: Tensor | None,
    present: Tensor | None,
    present_keys: Tensor | None,
    all_keys: bool,
    mirrored: bool,
    temperature: float,
) -> tuple[Problem, Form]:
    """From the operator's arguments."""
    own = rows_of(keys if positives is None else positives)
    masks = (mask if mask is None else mask.contiguous() for mask in (present, present_keys))
    num_classes, dim = keys.shape
    problem = Problem(
        rows_of(queries),
        rows_of(keys),
        mirrored_rows(queries) if mirrored else own,
        Present(*masks),
        Scaling(1 / temperature, bias),
        Sizes(num_classes, dim, triton.cdiv(num_classes, 8) * 8),
    )
    groups = 1 if queries.dim() == 2 else queries.shape[1]
    return problem, Form(groups, all_keys, mirrored or positives is not None, mirrored)


def options() -> dict[str, object]:
    """Of both kernels."""
    return {
        "PRECISION": precision(),
        "BLOCK_R": BLOCK_R,
        "BLOCK_K": BLOCK_K,
        "BLOCK_D": BLOCK_D,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def keys_per_chunk(num_classes: int) -> int:
    return triton.cdiv(triton.cdiv(num_classes, CHUNKS), BLOCK_K) * BLOCK_K


def compute_logits(problem: Problem, form: Form, logits: Logits, sums: Sums) -> None:
    """Launches the first kernel for the rows of the logits; it writes what is given."""
    each = keys_per_chunk(problem.sizes.num_classes)
    rows = logits.end_row - logits.first_row
    grid = triton.cdiv(rows, BLOCK_R), triton.cdiv(problem.sizes.num_classes, each)
    _centroid_info_nce_fwd_kernel[grid](problem, logits, sums, each, FORM=form, **options())


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
    problem, form = problem_of(*given)
    rows, shape = problem.sizes.num_classes * form.groups, queries.shape[:-1]

    def new(*size: int) -> Tensor:
        return queries.new_empty(size, dtype=torch.float32)

    loss, scale = new(*(shape if reduction == "none" else ())), new()
    lse, positive_logits = new(*shape), new(*shape)
    kept = rows * problem.sizes.width <= logits_at_once
    logits = new(rows, problem.sizes.width) if kept else new(0)
    if rows == 0:
        return loss.zero_(), lse, positive_logits, scale.fill_(loss_weight), logits
    chunks = triton.cdiv(keys.shape[0], keys_per_chunk(keys.shape[0]))
    maxima, totals = new(chunks, rows), new(chunks, rows)
    sums = Sums(maxima, totals, positive_logits)
    compute_logits(problem, form, Logits(logits if kept else None, 0, rows), sums)
    _reduce_kernel[(1,)](
        *(sums, problem.present.queries, loss, lse, scale, rows, chunks, loss_weight),
        REDUCTION=reduction,
        BLOCK_R=256,
        CHUNKS=CHUNKS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return loss, lse, positive_logits, scale, logits
