"""InfoNCE between class centroids, on tensor cores with the accuracy of float32 (below compute
capability 8.0, without bfloat16, by multiply-adds).

    x[r, k] = q_r·k_k/τ + b_k,  own[r]: that of row r's own key, which its positive may replace
    loss[r] = lse[r] − own[r],  lse[r] = log Σ e^x[r, k], of the denominator's keys and the own one

1. Each program computes a tile of logits, and the sums of its rows.
2. One program adds the tiles' sums: losses, and their mean. ("none": several programs.)

Sums are added in a fixed order, so equal inputs give equal bits. With `eps`, rows are divided by
max(length, eps): lengths are summed beside the products, and multiply the logits.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq, is_cuda

from .constants import INF
from .launch import architecture, ceil_div, without_spills


class Problem(NamedTuple):
    """Row r is of class first + r // groups."""

    queries: Any  # [R, D], contiguous
    keys: Any  # [K, D], contiguous
    positives: Any  # [R, D], contiguous, or None
    bias: Any  # [K], contiguous, or None; with it all keys are in the denominators
    present: Any  # uint8 [R // groups, groups] by strides, or None: all
    present_c: int
    present_g: int
    present_keys: Any  # uint8 [K], or None: the classes with a present query
    rows: int
    num_keys: int
    dim: int
    groups: int
    first: int
    temperature: Any  # float32 []
    eps: Any  # of lengths, or None: nothing is normalised


class Saved(NamedTuple):
    """float32, for the gradient. A row that nobody needs may be NaN, and its length is ∞."""

    logits: Any  # [R, pitch], −∞ where a key is not in the denominator
    pitch: int  # K, or the next multiple of 16: rows begin at multiples of 16 bytes
    lse: Any  # [R]
    own: Any  # [R], where positives are given: their logits
    query_lengths: Any  # [R], 1 if there is no eps
    positive_lengths: Any  # [R]
    key_lengths: Any  # [K]


def problem_of(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor | None,
    bias: Tensor | None,
    present: Tensor | None,
    present_keys: Tensor | None,
    first: int,
    temperature: Tensor,
    eps: float | None,
) -> Problem:
    """queries, positives [C, D] or [C, G, D]; keys [K, D]; bias [K]; present bool [C] or [C, G];
    present_keys bool [K]."""
    *shape, dim = queries.shape
    classes, groups = (*shape, 1)[:2]
    strides = (0, 0) if present is None else (*present.stride(), 0)[:2]
    return Problem(
        queries.contiguous(),
        keys.contiguous(),
        None if positives is None else positives.contiguous(),
        None if bias is None else bias.contiguous(),
        None if present is None else present.view(torch.uint8),
        *strides,
        None if present_keys is None else present_keys.contiguous().view(torch.uint8),
        classes * groups,
        keys.shape[0],
        dim,
        groups,
        first,
        temperature,
        eps,
    )


def saved_of(logits: Tensor, rows: Tensor, key_lengths: Tensor) -> Saved:
    lse, own, query_lengths, positive_lengths = rows.unbind()
    pitch = logits.shape[1]
    return Saved(logits, pitch, lse, own, query_lengths, positive_lengths, key_lengths)


@triton.jit
def _upper_half(bits):
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _parts(x):
    """Three bfloat16 whose sum is x. By integers, because conversions of single numbers to bfloat16
    occupy the unit for exponentials, at an eighth of the rate."""
    high = x.to(tl.int32, bitcast=True) & -65536
    rest = x - high.to(tl.float32, bitcast=True)
    middle = (rest.to(tl.int32, bitcast=True) + 32768) & -65536
    low = (rest - middle.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    return _upper_half(high), _upper_half(middle), _upper_half(low)


@triton.jit
def product(x, y):
    """x y of float32, but for products below 2^−23 of it; the smallest first. The caller adds it to
    its sum, because tensor cores truncate sums."""
    if is_cuda() and not cuda_capability_geq(8):  # whose tensor cores have no bfloat16
        return tl.dot(x, y, input_precision="ieee")
    x0, x1, x2 = _parts(x)
    y0, y1, y2 = _parts(y)
    acc = tl.dot(x1, y1)
    acc = tl.dot(x2, y0, acc)
    acc = tl.dot(x0, y2, acc)
    acc = tl.dot(x1, y0, acc)
    acc = tl.dot(x0, y1, acc)
    return tl.dot(x0, y0, acc)


@triton.jit
def read_rows(ptr, rows, d, needed, dim):
    """[rows, d] in float32; 0 where they are not needed."""
    inside = needed[:, None] & (d < dim)[None, :]
    ptrs = ptr + rows.to(tl.int64)[:, None] * dim + d[None, :]
    return tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def scale_of(lengths, eps):
    """What a row is multiplied by, 0 for a row that nobody needs."""
    return 1.0 / lengths if eps is None else 1.0 / tl.maximum(lengths, eps)


@triton.jit
def inverse_temperature(p):
    return tl.div_rn(1.0, tl.load(p.temperature))


@triton.jit
def _length_of(squares, needed, eps):
    return tl.where(needed, 1.0 if eps is None else tl.sqrt_rn(squares), INF)


@triton.jit
def _is_present(p, r):
    """The rows r that exist and are present."""
    exists = r < p.rows
    if p.present is None:
        return exists
    else:
        ptrs = p.present + (r // p.groups).to(tl.int64) * p.present_c + r % p.groups * p.present_g
        return tl.load(ptrs, mask=exists, other=0) != 0


@triton.jit
def _keys_of_tile(p, k):
    """Which keys k are in the denominators of other rows, and which are read."""
    row = tl.where((k >= p.first) & (k < p.num_keys), (k - p.first) * p.groups, p.rows)
    has_query = row < 0
    for g in range(p.groups):
        has_query |= _is_present(p, tl.minimum(row + g, p.rows))
    if p.bias is not None:
        return k < p.num_keys, k < p.num_keys
    elif p.present_keys is None:
        return has_query, has_query
    else:
        counted = tl.load(p.present_keys + k, mask=k < p.num_keys, other=0) != 0
        return counted, counted if p.positives is not None else counted | has_query


@triton.jit
def _logits_of_positives(p, saved, r, needed, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    products = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    x_squares, y_squares = products, products
    for start in range(0, p.dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = read_rows(p.queries, r, d, needed, p.dim)
        y = read_rows(p.positives, r, d, needed, p.dim)
        products += x * y
        x_squares += x * x
        y_squares += y * y
    x_lengths = _length_of(tl.sum(x_squares, 1), needed, p.eps)
    y_lengths = _length_of(tl.sum(y_squares, 1), needed, p.eps)
    scale = scale_of(x_lengths, p.eps) * scale_of(y_lengths, p.eps) * inverse_temperature(p)
    own = tl.sum(products, 1) * scale
    tl.store(saved.positive_lengths + r, y_lengths, mask=r < p.rows)
    tl.store(saved.own + r, own, mask=r < p.rows)


@triton.jit
def _logits_of_keys(
    p, saved, sums_ptr, r, here,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, blocks = tl.program_id(1), tl.num_programs(1)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    counted, needed = _keys_of_tile(p, k)
    x = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    q_squares = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    k_squares = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, p.dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        q_part = read_rows(p.queries, r, d, here, p.dim)
        k_part = read_rows(p.keys, k, d, needed, p.dim)
        x += product(q_part, tl.trans(k_part))
        if p.eps is not None:
            q_squares += q_part * q_part
            k_squares += k_part * k_part
    q_lengths = _length_of(tl.sum(q_squares, 1), here, p.eps)
    k_lengths = _length_of(tl.sum(k_squares, 1), needed, p.eps)
    tl.store(saved.query_lengths + r, q_lengths, mask=(r < p.rows) & (block == 0))
    tl.store(saved.key_lengths + k, k_lengths, mask=(k < p.num_keys) & (tl.program_id(0) == 0))
    own = k[None, :] == (p.first + r // p.groups)[:, None]
    used = counted[None, :] & (own == 0) if p.positives is not None else counted[None, :] | own
    q_scale, k_scale = scale_of(q_lengths, p.eps), scale_of(k_lengths, p.eps)
    x *= (q_scale * inverse_temperature(p))[:, None] * k_scale[None, :]
    if p.bias is not None:
        x += tl.load(p.bias + k, mask=needed, other=0.0).to(tl.float32)[None, :]
    x = tl.where(here[:, None] & used, x, -INF)
    ptrs = saved.logits + r.to(tl.int64)[:, None] * saved.pitch + k[None, :]
    tl.store(ptrs, x, mask=(r < p.rows)[:, None] & (k < saved.pitch)[None, :])
    maxima = tl.max(x, 1)
    sums = tl.sum(tl.exp(x - tl.where(maxima == -INF, 0.0, maxima)[:, None]), 1)
    tl.store(sums_ptr + block * p.rows + r, sums, mask=r < p.rows)
    tl.store(sums_ptr + (blocks + block) * p.rows + r, maxima, mask=r < p.rows)


@triton.jit
def _logits_kernel(
    p, saved, sums_ptr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes logits and lengths; and sums, float32 [2, blocks, R]: of each row and block of keys
    the sum of e^(x − maximum), and the maximum. With positives there is one block more, whose
    programs compute their logits."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    here = _is_present(p, r)
    if tl.program_id(1) * BLOCK_K < p.num_keys:
        _logits_of_keys(p, saved, sums_ptr, r, here, BLOCK_R, BLOCK_K, BLOCK_D)
    elif p.positives is not None:
        _logits_of_positives(p, saved, r, here, BLOCK_R, BLOCK_D)


@triton.jit
def _losses_kernel(
    p, saved, sums_ptr, losses_ptr, factor_ptr, blocks, pitch,
    REDUCTION: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Reads sums [2, pitch, R] of `blocks` blocks of keys, and the own logits. Writes lse; losses
    [R], or their sum or mean; and the factor of the gradient of each loss."""
    block = tl.arange(0, BLOCKS)[:, None]
    loss_sum, number = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R,), tl.int32)
    for start in range(tl.program_id(0) * BLOCK_R, p.rows, tl.num_programs(0) * BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        here = _is_present(p, r)
        ptrs, inside = sums_ptr + block * p.rows + r[None, :], here[None, :] & (block < blocks)
        sums = tl.load(ptrs, mask=inside, other=0.0)
        maxima = tl.load(ptrs + pitch * p.rows, mask=inside, other=-INF)
        own_ptrs = saved.own + r
        if p.positives is None:
            own_ptrs = saved.logits + r.to(tl.int64) * saved.pitch + p.first + r // p.groups
        own = tl.load(own_ptrs, mask=here, other=0.0)
        maximum = tl.maximum(tl.max(maxima, 0), own)
        total = tl.sum(sums * tl.exp(maxima - maximum[None, :]), 0)
        if p.positives is not None:
            total += tl.exp(own - maximum)
        tl.store(saved.lse + r, tl.where(here, tl.log(total) + maximum, 0.0), mask=r < p.rows)
        losses = tl.where(here, tl.log(total) + (maximum - own), 0.0)
        if REDUCTION == "none":
            tl.store(losses_ptr + r, losses, mask=r < p.rows)
        loss_sum += losses
        number += here.to(tl.int32)
    count = 1.0
    if REDUCTION == "mean":
        count = tl.maximum(tl.sum(number, 0), 1).to(tl.float32)
    if REDUCTION != "none":
        tl.store(losses_ptr, tl.sum(loss_sum, 0) / count)
    tl.store(factor_ptr, 1.0 / count, mask=tl.program_id(0) == 0)


# Triton lays the warps of products that depend on each other along the longer side of a tile, so
# none is square. Large tiles reuse what they read more often, but are too few for small problems.
SMALL = {"BLOCK_R": 16, "BLOCK_K": 32, "BLOCK_D": 32, "num_warps": 4, "num_stages": 3}
LARGE = {"BLOCK_R": 128, "BLOCK_K": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3}
ENOUGH = 96  # large tiles, to keep a GPU busy


def centroid_info_nce(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor | None,
    bias: Tensor | None,
    present: Tensor | None,
    present_keys: Tensor | None,
    first: int,
    temperature: Tensor,
    reduction: str,
    normalize: float | None,
) -> tuple[Tensor, ...]:
    """losses; logits [R, pitch], rows [4, R], key_lengths [K] as in `Saved`; factor."""
    masks = present, present_keys
    p = problem_of(queries, keys, positives, bias, *masks, first, temperature, normalize)
    pitch, shape = ceil_div(p.num_keys, 16) * 16, queries.shape[:-1]

    def new(*size: int) -> Tensor:
        return queries.new_empty(size, dtype=torch.float32)

    losses, factor = new(*shape) if reduction == "none" else new(), new()
    kept = new(p.rows, pitch), new(4, p.rows), new(p.num_keys)
    results, saved = (losses, *kept, factor), saved_of(*kept)
    if p.rows == 0:
        losses.zero_()
        return results
    few = ceil_div(p.rows, LARGE["BLOCK_R"]) * ceil_div(p.num_keys, LARGE["BLOCK_K"]) < ENOUGH
    # there products need more registers: a large tile would spill some
    tile = SMALL if few or architecture() in ("sm_75", "sm_120") else LARGE
    blocks = ceil_div(p.num_keys, tile["BLOCK_K"])
    columns = blocks + (positives is not None)
    sums = new(2, columns, p.rows)
    grid = ceil_div(p.rows, tile["BLOCK_R"]), columns
    _logits_kernel[grid](p, saved, sums, **tile, **without_spills(), enable_fp_fusion=True)
    padded = triton.next_power_of_2(blocks)
    block_r = max(min(8192 // padded, 512, triton.next_power_of_2(p.rows)), 32)
    _losses_kernel[(ceil_div(p.rows, block_r) if reduction == "none" else 1,)](
        *(p, saved, sums, losses, factor, blocks, columns),
        REDUCTION=reduction,
        BLOCKS=padded,
        BLOCK_R=block_r,
        num_warps=min(max(padded * block_r // 512, 1), 16),
        enable_fp_fusion=True,
    )
    return results
