"""Class moments for many keys: the pixels are sorted by key.

    sums[k] = Σ f_p    sqdists[k] = Σ ‖f_p − a_k‖²

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

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .features import Pixels, anchor_offset, anchors_of, channel_ptrs, fold
from .launch import programs

# BLOCK_D, BLOCK_P and LANES for pixels sorted by key and one warp: 4 KB. Rows of 512 bytes if
# channels are contiguous; otherwise two pixels for each lane: a key often has fewer than 64 pixels.
_SORTED_TILES = {
    (False, 2): (32, 64, 32),
    (False, 4): (16, 64, 32),
    (True, 2): (256, 8, 1),
    (True, 4): (128, 8, 1),
}
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


class Rows(NamedTuple):
    """A statistic, in rows by key; the pointers are None if it is not wanted."""

    ptr: Any  # float32 [num_keys, width], zero on entry
    ends: Any  # float32 [ranges · 2, width], for keys in several ranges: see _store_row


class Range(NamedTuple):
    """A range of the sorted pixels, and the keys of the pixels before and after it."""

    part: Any
    first: Any
    last: Any
    before: Any
    after: Any


@triton.jit
def _range_of_program(keys_ptr, total, range_pixels):
    part = tl.program_id(0).to(tl.int64)
    first = part * range_pixels
    last = tl.minimum(first + range_pixels, total)
    before = tl.load(keys_ptr + first - 1, first > 0, -1, eviction_policy="evict_last")
    after = tl.load(keys_ptr + last, last < total, -1, eviction_policy="evict_last")
    return Range(part, first, last, before, after)


@triton.jit
def _store_row(rows, key, values, column, mask, width, pixels):
    """Store the statistics of a key: in its own row; or, if the key began before this range of
    pixels or continues after it, in the first or second of this range's rows."""
    end = 2 * pixels.part + tl.where(key == pixels.before, 0, 1)
    goes_on = (key == pixels.before) | (key == pixels.after)
    row = tl.where(goes_on, rows.ends + end * width, rows.ptr + key.to(tl.int64) * width)
    tl.store(row + column, values, mask=mask)


@triton.jit
def _sums_of_key(
    key, position, keys_ptr, offsets_ptr, features_ptrs, channels, anchor, last,
    HAS_SUMS: tl.constexpr, HAS_SQDISTS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_P: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The statistics of the pixels from `position` on that have this key, [BLOCK_D, LANES]; and the
    position after them."""
    sums = tl.zeros((channels.shape[0], LANES), tl.float32)
    sqdists = tl.zeros((channels.shape[0], LANES), tl.float32)
    matches = BLOCK_P
    while matches == BLOCK_P:
        i = position + tl.arange(0, BLOCK_P)
        inside = i < last
        keys = tl.load(keys_ptr + i, inside, -2, eviction_policy="evict_last")
        mine = keys == key
        offset = tl.load(offsets_ptr + i, inside, 0, eviction_policy="evict_last")
        mask = (mine & (keys >= 0))[None, :]
        if ALIGNED:
            offset = tl.multiple_of(offset, 16)
            mask &= channels[:, None]
        x = tl.load(features_ptrs[:, None] + offset[None, :], mask, 0.0).to(tl.float32)
        if HAS_SUMS:
            sums += fold(x, LANES, False)
        if HAS_SQDISTS:
            residual = tl.where(mask, x - anchor[:, None], 0.0)
            sqdists += fold(residual * residual, LANES, False)
        matches = tl.sum(mine.to(tl.int32), 0)
        position += matches
    return sums, sqdists, position


@triton.jit(do_not_specialize=COUNTS)
def _sorted_pixels_kernel(
    features_ptr,  # [N, D] by offset and stride
    dim,
    stride_features_d,
    keys_ptr,  # int32 [N], ascending, −1 where ignored
    offsets_ptr,  # int64 [N]: see _offsets_kernel
    anchors,  # Anchors
    sums,  # Rows, of D
    sqdists,  # Rows, of the blocks of channels
    total,  # N
    range_pixels,
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LANES: tl.constexpr,
):
    """Reads the features once (except for sectors, see above), 12 bytes a pixel for each block of
    channels, and a row of anchors for each key of a range. Writes a row of statistics for each key
    of a range."""
    block, blocks = tl.program_id(1), tl.num_programs(1)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    channels = d < dim
    pixels = _range_of_program(keys_ptr, total, range_pixels)
    # Beyond the last channel, this channel is read again: faster than a mask for short loads.
    column = d if ALIGNED else tl.minimum(d, dim - 1)
    features_ptrs = features_ptr + column.to(tl.int64) * stride_features_d
    position = pixels.first
    while position < pixels.last:
        key = tl.load(keys_ptr + position, eviction_policy="evict_last")
        anchor = tl.zeros((BLOCK_D,), tl.float32)
        if anchors.ptr is not None:
            taken = d < tl.where(key >= 0, dim, 0)
            ptrs = channel_ptrs(anchors, d) + anchor_offset(anchors, key)
            anchor = tl.load(ptrs, mask=taken, other=0.0, eviction_policy="evict_last")
        total_sums, total_sqdists, position = _sums_of_key(
            key, position, keys_ptr, offsets_ptr, features_ptrs, channels, anchor, pixels.last,
            sums.ptr is not None, sqdists.ptr is not None, ALIGNED, BLOCK_P, LANES,
        )  # fmt: skip
        if key >= 0:
            if sums.ptr is not None:
                _store_row(sums, key, tl.sum(total_sums, 1), d, channels, dim, pixels)
            if sqdists.ptr is not None:
                total_sqdists = tl.where(channels[:, None], total_sqdists, 0.0)
                _store_row(sqdists, key, tl.sum(total_sqdists), block, None, blocks, pixels)


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
        matches = BLOCK_R
        while matches == BLOCK_R:
            r = other + tl.arange(0, BLOCK_R)
            mine = tl.load(keys_ptr + r * range_pixels, mask=r < ranges, other=-2) == key
            rows = ends_ptr + (2 * r * width)[:, None] + column[None, :]
            total += tl.sum(tl.load(rows, mask=mine[:, None] & columns[None, :], other=0.0), 0)
            matches = tl.sum(mine.to(tl.int32), 0)
            other += matches
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


def _tile_of(view: Pixels, itemsize: int) -> tuple[int, int, int]:
    """BLOCK_D, BLOCK_P and LANES of a program of one warp."""
    block_d, block_p, lanes = _SORTED_TILES[view.channels_contiguous, itemsize]
    if view.channels_contiguous and not view.rows_aligned:
        block_d = 64  # elements that are loaded one by one need more registers
    return min(block_d, max(triton.next_power_of_2(view.dim), 16)), block_p, lanes


def _pixels_per_range(pixels: int, blocks: int) -> int:
    """For pixels sorted by key: enough ranges to fill the device a few times with programs of one
    warp. The rows of keys that continue in other ranges are at most 1/16 of the features."""
    wanted = triton.cdiv(pixels * blocks, 8 * programs())
    return min(max(triton.cdiv(wanted, 128), 1), 8) * 128


def class_moments_sorted(
    features: Tensor,
    view: Pixels,
    keys: Tensor,
    anchors: Tensor | None,
    groups: int,
    sums: Tensor,
    sqdists: Tensor,
) -> None:
    """Fills sums [num_keys, D] and sqdists [num_keys], if they are not (0,).

    In addition it needs about 40 bytes a pixel, most of it for the sort, and two rows of each
    result for each range.
    """
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
    block_d, block_p, lanes = _tile_of(view, features.element_size())
    blocks = triton.cdiv(view.dim, block_d)
    range_pixels = _pixels_per_range(total, blocks)
    ranges = triton.cdiv(total, range_pixels)

    def rows(out: Tensor, width: int) -> Rows:
        if out.numel() == 0:
            return Rows(None, None)
        return Rows(out.zero_(), sums.new_empty((2 * ranges, width)))

    sqdists_by_block = sqdists.new_empty((sqdists.numel(), blocks))
    all_rows = rows(sums, view.dim), rows(sqdists_by_block, blocks)
    _sorted_pixels_kernel[(ranges, blocks)](
        *(features, view.dim, view.stride_d, ordered, offsets, anchors_of(anchors, groups)),
        *(*all_rows, total, range_pixels),
        ALIGNED=view.rows_aligned,
        BLOCK_D=block_d,
        BLOCK_P=block_p,
        LANES=lanes,
        num_warps=1,
        enable_fp_fusion=False,  # lanes that hold copies of a sum must agree
    )
    for each in all_rows:
        if each.ptr is not None:
            _join_ranges(ordered, each.ends, each.ptr, range_pixels)
    if sqdists.numel() > 0:
        torch.sum(sqdists_by_block, 1, out=sqdists)
