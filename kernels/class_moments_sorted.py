"""Class moments for many keys, and residual sums: the pixels are sorted by key.

    sums[k] = Σ f_p    residuals[k] = Σ (f_p − a_k)    sqdists[k] = Σ ‖f_p − a_k‖²

The pixels are sorted by key once. A program processes a block of channels and a range of the sorted
pixels; there are no partials of all keys. If all pixels of a key lie within a range, its statistics
are written once, to their final place. If a key continues in other ranges, each range stores one
row of it, and a last kernel adds these rows in the order of the ranges.

If channels are contiguous, a program gathers rows of 512 bytes. If pixels are contiguous, it
gathers from the plane of each channel: runs of equal labels remain runs, but with random labels
each pixel fetches a sector of 32 bytes. All ranges of a block of channels run before the next
block. This part of the features (pixels × BLOCK_D) stays in the L2 cache and is fetched from memory
once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fold import fold
from .launch import Pixels, pixels_per_range, sorted_tile_of

COUNTS = ("total", "range_pixels", "ranges")  # as TILE_COUNTS of class_moments.py


@triton.jit(do_not_specialize=["total"])
def _offsets_kernel(
    order_ptr,  # int64 [N]: pixels, counted through all lines
    offsets_ptr,  # int64 [N]: where their features begin
    total,  # N
    pixels,
    lines_per_image,
    stride_b,
    stride_h,
    stride_p,
    BLOCK: tl.constexpr,
):
    """Reads and writes 8 bytes per pixel."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    order = tl.load(order_ptr + i, mask=i < total, other=0)
    line, pixel = order // pixels, order % pixels
    offset = line // lines_per_image * stride_b + line % lines_per_image * stride_h
    tl.store(offsets_ptr + i, offset + pixel * stride_p, mask=i < total)


@triton.jit
def _store_row(values, column, mask, out_ptr, ends_ptr, key, before, after, part, width):
    """Store the statistics of a key: in its own row; or, if the key began before this range or
    continues after it, in the first or second of this range's rows."""
    end = 2 * part + tl.where(key == before, 0, 1)
    goes_on = (key == before) | (key == after)
    row = tl.where(goes_on, ends_ptr + end * width, out_ptr + key.to(tl.int64) * width)
    tl.store(row + column, values, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _sorted_pixels_kernel(
    features_ptr,  # [N, D] by offset and stride
    keys_ptr,  # int32 [N], ascending, −1 where ignored
    offsets_ptr,  # int64 [N]: see _offsets_kernel
    anchors_ptr,  # float32 [K, D] by strides
    sums_ptr,  # float32 [num_keys, D]; these three are zero on entry
    residuals_ptr,  # the same
    sqdists_ptr,  # float32 [num_keys, blocks]
    sums_ends_ptr,  # float32 [ranges · 2, D]; these three for keys in several ranges: _store_row
    residuals_ends_ptr,  # the same
    sqdists_ends_ptr,  # float32 [ranges · 2, blocks]
    dim,
    total,  # N
    range_pixels,
    num_classes,
    groups,
    stride_features_d,
    stride_anchors_k,
    stride_anchors_d,
    HAS_SUMS: tl.constexpr,
    HAS_ANCHORS: tl.constexpr,
    HAS_RESIDUALS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LANES: tl.constexpr,
):
    """Reads the features once (except for sectors, see above), 12 bytes a pixel for each block of
    channels, and a row of anchors for each key of a range. Writes a row of statistics for each key
    of a range."""
    part, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    channels = d < dim
    first = part * range_pixels
    last = tl.minimum(first + range_pixels, total)
    before = tl.load(keys_ptr + first - 1, first > 0, -1, eviction_policy="evict_last")
    after = tl.load(keys_ptr + last, last < total, -1, eviction_policy="evict_last")
    # Beyond the last channel, this channel is read again: faster than a mask for short loads.
    column = d if ALIGNED else tl.minimum(d, dim - 1)
    features_ptr += column.to(tl.int64) * stride_features_d
    if HAS_ANCHORS:
        anchors_ptr += d.to(tl.int64) * stride_anchors_d

    position = first
    while position < last:
        key = tl.load(keys_ptr + position, eviction_policy="evict_last")
        sums = tl.zeros((BLOCK_D, LANES), tl.float32)
        residuals = tl.zeros((BLOCK_D, LANES), tl.float32)
        sqdists = tl.zeros((BLOCK_D, LANES), tl.float32)
        if HAS_ANCHORS:
            nearest = (key // groups % num_classes).to(tl.int64) * stride_anchors_k
            anchor = tl.load(
                anchors_ptr + nearest,
                mask=d < tl.where(key >= 0, dim, 0),
                other=0.0,
                eviction_policy="evict_last",
            )
        found = BLOCK_P
        while found == BLOCK_P:
            i = position + tl.arange(0, BLOCK_P)
            inside = i < last
            keys = tl.load(keys_ptr + i, inside, -2, eviction_policy="evict_last")
            mine = keys == key
            offset = tl.load(offsets_ptr + i, inside, 0, eviction_policy="evict_last")
            mask = (mine & (keys >= 0))[None, :]
            if ALIGNED:
                offset = tl.multiple_of(offset, 16)
                mask &= channels[:, None]
            x = tl.load(features_ptr[:, None] + offset[None, :], mask, 0.0).to(tl.float32)
            if HAS_SUMS:
                sums += fold(x, LANES, False)
            if HAS_ANCHORS:
                residual = tl.where(mask, x - anchor[:, None], 0.0)
                sqdists += fold(residual * residual, LANES, False)
                if HAS_RESIDUALS:
                    residuals += fold(residual, LANES, False)
            found = tl.sum(mine.to(tl.int32), 0)
            position += found
        if key >= 0:
            if HAS_SUMS:
                _store_row(
                    tl.sum(sums, 1), d, channels, sums_ptr, sums_ends_ptr, key, before, after, part,
                    dim,
                )  # fmt: skip
            if HAS_RESIDUALS:
                _store_row(
                    tl.sum(residuals, 1), d, channels, residuals_ptr, residuals_ends_ptr, key,
                    before, after, part, dim,
                )  # fmt: skip
            if HAS_ANCHORS:
                sqdists = tl.where(channels[:, None], sqdists, 0.0)
                _store_row(
                    tl.sum(sqdists), block, None, sqdists_ptr, sqdists_ends_ptr, key, before, after,
                    part, blocks,
                )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _join_ranges_kernel(
    keys_ptr,  # int32 [N], ascending
    ends_ptr,  # float32 [ranges · 2, width]
    out_ptr,  # float32 [num_keys, width]
    range_pixels,
    ranges,
    width,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One program for each boundary of two ranges. If a key crosses its first boundary there, the
    program reads the rows of this key in all ranges once, and writes their sum."""
    part = tl.program_id(0).to(tl.int64)
    first, boundary = part * range_pixels, (part + 1) * range_pixels
    column = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    columns = column < width
    key = tl.load(keys_ptr + boundary)
    goes_on = (key >= 0) & (tl.load(keys_ptr + boundary - 1) == key)
    before = tl.load(keys_ptr + first - 1, mask=first > 0, other=-1)
    if goes_on & (before != key):
        total = tl.load(ends_ptr + (2 * part + 1) * width + column, mask=columns, other=0.0)
        other = part + 1
        found = BLOCK_R
        while found == BLOCK_R:
            r = other + tl.arange(0, BLOCK_R)
            mine = tl.load(keys_ptr + r * range_pixels, mask=r < ranges, other=-2) == key
            rows = ends_ptr + (2 * r * width)[:, None] + column[None, :]
            total += tl.sum(tl.load(rows, mask=mine[:, None] & columns[None, :], other=0.0), 0)
            found = tl.sum(mine.to(tl.int32), 0)
            other += found
        tl.store(out_ptr + key.to(tl.int64) * width + column, total, mask=columns)


def _join_ranges(keys: Tensor, ends: Tensor, out: Tensor, range_pixels: int) -> None:
    ranges, width = ends.shape[0] // 2, ends.shape[1]
    if ranges < 2:
        return
    block_w = min(triton.next_power_of_2(width), 128)
    _join_ranges_kernel[(ranges - 1, triton.cdiv(width, block_w))](
        keys,
        ends,
        out,
        range_pixels,
        ranges,
        width,
        BLOCK_R=32,
        BLOCK_W=block_w,
        num_warps=4,
        enable_fp_fusion=True,
    )


def class_moments_sorted(
    features: Tensor,
    view: Pixels,
    keys: Tensor,
    anchors: Tensor | None,
    groups: int,
    sums: Tensor,
    sqdists: Tensor,
    residuals: Tensor,
) -> None:
    """Fills sums and residuals [num_keys, D] and sqdists [num_keys], if they are not (0,).

    In addition it needs about 40 bytes a pixel, most of it for the sort, and two rows of each
    result for each range.
    """
    with_sums, with_residuals, has_anchors = (t.numel() > 0 for t in (sums, residuals, sqdists))
    ordered, order = torch.sort(keys.flatten(), stable=True)
    total = ordered.numel()
    offsets = torch.empty_like(order)
    _offsets_kernel[(triton.cdiv(total, 1024),)](
        order,
        offsets,
        total,
        view.pixels,
        view.lines_per_image,
        view.stride_b,
        view.stride_h,
        view.stride_p,
        BLOCK=1024,
        num_warps=4,
        enable_fp_fusion=True,
    )
    block_d, block_p, lanes = sorted_tile_of(view, features.element_size())
    blocks = triton.cdiv(view.dim, block_d)
    range_pixels = pixels_per_range(total, blocks)
    ranges = triton.cdiv(total, range_pixels)

    def ends(wanted: bool, width: int) -> Tensor:
        return sums.new_empty((2 * ranges if wanted else 0, width))

    sums_ends, residuals_ends = ends(with_sums, view.dim), ends(with_residuals, view.dim)
    sqdists_ends = ends(has_anchors, blocks)
    sqdists_by_block = sqdists.new_zeros((sqdists.numel(), blocks))
    sums.zero_()
    residuals.zero_()
    _sorted_pixels_kernel[(ranges, blocks)](
        features,
        ordered,
        offsets,
        anchors,
        sums,
        residuals,
        sqdists_by_block,
        sums_ends,
        residuals_ends,
        sqdists_ends,
        view.dim,
        total,
        range_pixels,
        1 if anchors is None else anchors.shape[0],
        groups,
        view.stride_d,
        *((0, 0) if anchors is None else anchors.stride()),
        HAS_SUMS=with_sums,
        HAS_ANCHORS=has_anchors,
        HAS_RESIDUALS=with_residuals,
        ALIGNED=view.rows_aligned,
        BLOCK_D=block_d,
        BLOCK_P=block_p,
        LANES=lanes,
        num_warps=1,
        enable_fp_fusion=True,
    )
    if with_sums:
        _join_ranges(ordered, sums_ends, sums, range_pixels)
    if with_residuals:
        _join_ranges(ordered, residuals_ends, residuals, range_pixels)
    if has_anchors:
        _join_ranges(ordered, sqdists_ends, sqdists_by_block, range_pixels)
        torch.sum(sqdists_by_block, 1, out=sqdists)
