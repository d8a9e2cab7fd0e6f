"""Class moments: sums and squared distances to an anchor, by key.

    sums[k] = Σ f_p    sqdists[k] = Σ ‖f_p − a_k‖²

If there are few enough keys for partials (chunks_of), there are three kernels. Otherwise the pixels
are sorted by key (class_moments_sorted.py).

The first kernel lists the keys of each tile of pixels; it reads only the labels. The next two
kernels read the features, each tile once. Tiles of one key are summed in registers as long as the
key repeats. Tiles of several keys are multiplied by a one-hot matrix of the tile's own keys; its
size does not depend on the number of classes. A program processes a block of channels and a chunk
of the tiles, and adds to its own partials. torch.sum adds the partials of the chunks.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .class_moments_sorted import class_moments_sorted
from .features import (
    Pixels,
    TileSizes,
    anchor_offset,
    anchors_of,
    as_pixels,
    channel_ptrs,
    check_keys,
    features_of,
    fold,
    pixels_of_tile,
    tile_of,
)
from .launch import PARTIALS_IN_CACHE, programs, without_spills
from .tile_keys import has_ignored, number_of_keys, only_key, tile_keys

BLOCK_K = 16  # keys in one one-hot product
# They change with the images' size. Triton does not compile again if one becomes 1 or a multiple of
# 16.
TILE_COUNTS = ("tiles", "tiles_per_line", "tiles_per_chunk")


class Partials(NamedTuple):
    """Partial results of each chunk of tiles; None if not requested."""

    sums: Any  # float32 [chunks, num_keys, D]
    sqdists: Any  # float32 [chunks · blocks, num_keys]
    num_keys: int


@triton.jit
def _sums_ptrs(partials, d, dim):
    """Pointers to the partial sums of this program's chunk for key 0."""
    return partials.sums + (tl.program_id(1).to(tl.int64) * partials.num_keys * dim + d)


@triton.jit
def _sqdists_ptr(partials):
    """Pointer to the partial sqdist of this program's chunk and block of channels for key 0."""
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    return partials.sqdists + row * partials.num_keys


@triton.jit
def _add_to(pointers, values, mask=None):
    tl.store(pointers, tl.load(pointers, mask=mask) + values, mask=mask)


@triton.jit
def _set_to_zero(partials, d, dim, BLOCK_K: tl.constexpr):
    for start in range(0, partials.num_keys, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        some = k < partials.num_keys
        if partials.sums is not None:
            ptrs = _sums_ptrs(partials, d, dim)[None, :] + k.to(tl.int64)[:, None] * dim
            zeros = tl.zeros((BLOCK_K, d.shape[0]), tl.float32)
            tl.store(ptrs, zeros, mask=some[:, None] & (d < dim)[None, :])
        if partials.sqdists is not None:
            tl.store(_sqdists_ptr(partials) + k, tl.zeros((BLOCK_K,), tl.float32), mask=some)


@triton.jit(do_not_specialize=TILE_COUNTS)
def _one_key_kernel(
    features,  # Features
    tile_ptr,  # see tile_keys.py
    anchors,  # Anchors
    partials,  # Partials
    tiles,
    tiles_per_line,
    tiles_per_chunk,
    PIXELS_CONTIGUOUS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sets the partials to zero. Reads the features of tiles of one key once. Whenever the key
    changes, it reads and writes a partial row of BLOCK_D."""
    dim = features.dim
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    channels = d < dim
    _set_to_zero(partials, d, dim, BLOCK_K)
    tl.debug_barrier()

    features_ptrs = channel_ptrs(features, d[:, None])
    if partials.sums is not None:
        sums_ptrs = _sums_ptrs(partials, d, dim)
    if partials.sqdists is not None:
        sqdists_ptr, anchors_ptrs = _sqdists_ptr(partials), channel_ptrs(anchors, d)
    sums = tl.zeros((BLOCK_D, LANES), tl.float32)
    sqdists = tl.zeros((BLOCK_D, LANES), tl.float32)
    anchor = tl.zeros((BLOCK_D,), tl.float32)
    current = -1  # the key of the sum in registers
    first_tile = tl.program_id(1) * tiles_per_chunk
    last_tile = tl.minimum(first_tile + tiles_per_chunk, tiles)
    for tile in range(
        first_tile, last_tile + 1
    ):  # one iteration more than there are tiles, to store the last key
        key = only_key(tl.load(tile_ptr + tl.minimum(tile, tiles - 1)))
        key = tl.where(tile < last_tile, key, -1)
        if (key >= 0) | (tile == last_tile):
            _, _, offset = pixels_of_tile(features, tile, tiles_per_line, BLOCK_P)
            taken = d < tl.where(key >= 0, dim, 0)
            x = tl.load(
                features_ptrs + offset[None, :],
                mask=taken[:, None],
                other=0.0,
                eviction_policy="evict_first",
            ).to(tl.float32)
            if key != current:
                if current >= 0:
                    if partials.sums is not None:
                        row_ptrs = sums_ptrs + current.to(tl.int64) * dim
                        _add_to(row_ptrs, tl.sum(sums, 1), channels)
                    if partials.sqdists is not None:
                        _add_to(sqdists_ptr + current, tl.sum(sqdists))
                    tl.debug_barrier()  # next time other threads may add to these addresses
                current = key
                sums = tl.zeros((BLOCK_D, LANES), tl.float32)
                sqdists = tl.zeros((BLOCK_D, LANES), tl.float32)
                if partials.sqdists is not None:
                    anchor = tl.load(anchors_ptrs + anchor_offset(anchors, key), taken, 0.0)
            if partials.sums is not None:
                sums += fold(x, LANES, PIXELS_CONTIGUOUS)
            if partials.sqdists is not None:
                residual = x - anchor[:, None]
                sqdists += fold(residual * residual, LANES, PIXELS_CONTIGUOUS)


@triton.jit
def _sums_by_rank(x, local, rank):
    """Σ over pixels of x [BLOCK_D, BLOCK_P] where local [BLOCK_P] is rank [BLOCK_K].

    This is a product with a one-hot matrix. It is exact except for the rounding of the sums, which
    have at most BLOCK_P terms, because tensor cores truncate. A float32 is the exact sum of three
    bfloat16. If the result is not finite, a pixel that is not finite may have been multiplied by
    the zeros of other keys (0·NaN = NaN). Then the sums are computed again, by selection.
    """
    member = local[:, None] == rank[None, :]
    if x.dtype == tl.float32:
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        one_hot = member.to(tl.bfloat16)
        sums = tl.dot(low, one_hot) + tl.dot(middle, one_hot) + tl.dot(high, one_hot)
    else:
        sums = tl.dot(x, member.to(x.dtype))
    if tl.sum(sums - sums) != 0:  # Inf − Inf and NaN − NaN are NaN
        for j in range(rank.shape[0]):
            column = rank == tl.min(rank, 0) + j
            mine = local == tl.min(rank, 0) + j
            by_selection = tl.sum(tl.where(mine[None, :], x.to(tl.float32), 0.0), 1)
            sums = tl.where(column[None, :], by_selection[:, None], sums)
    return sums


@triton.jit
def _sqdists_of_pixels(x, anchors, anchors_ptrs, key, channels):
    """‖x − anchor‖² over the channels of each pixel; its key is −1 where ignored."""
    mask = channels[:, None] & (key >= 0)[None, :]
    a = tl.load(anchors_ptrs[:, None] + anchor_offset(anchors, key)[None, :], mask=mask, other=0.0)
    residual = x.to(tl.float32) - a
    return tl.sum(residual * residual, 0)


@triton.jit(do_not_specialize=TILE_COUNTS)
def _several_keys_kernel(
    features,  # Features
    keys_ptr,  # int32 [B, P], −1 where ignored
    tile_ptr,  # these three: see tile_keys.py
    tile_keys_ptr,
    local_ptr,
    anchors,  # Anchors
    partials,  # Partials
    tiles,
    tiles_per_line,
    tiles_per_chunk,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Reads the features of tiles of several keys once. From the caches it reads 2 bytes and a row
    of BLOCK_D anchors for each pixel; for each key of a tile it reads and writes a partial row of
    BLOCK_D."""
    dim = features.dim
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    channels = d < dim
    features_ptrs = channel_ptrs(features, d[:, None])
    if partials.sums is not None:
        sums_ptrs = _sums_ptrs(partials, d, dim)
    if partials.sqdists is not None:
        sqdists_ptr, anchors_ptrs = _sqdists_ptr(partials), channel_ptrs(anchors, d)
    first_tile = tl.program_id(1) * tiles_per_chunk
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_chunk, tiles)):
        summary = tl.load(tile_ptr + tile)
        count = number_of_keys(summary)
        if summary > 0:
            line, pixel, offset = pixels_of_tile(features, tile, tiles_per_line, BLOCK_P)
            inside = pixel < features.pixels
            x = tl.load(
                features_ptrs + offset[None, :],
                mask=channels[:, None] & inside[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            base = tl.cast(tile, tl.int64) * BLOCK_P
            local = tl.load(local_ptr + base + tl.arange(0, BLOCK_P))
            if has_ignored(summary):
                x = tl.where((local >= 0)[None, :], x, 0.0)
            if partials.sqdists is not None:
                keys_ptrs = keys_ptr + tl.cast(line, tl.int64) * features.pixels + pixel
                pixel_key = tl.load(keys_ptrs, mask=inside, other=-1)
                sqdist = _sqdists_of_pixels(x, anchors, anchors_ptrs, pixel_key, channels)
            for start in range(0, count, BLOCK_K):
                rank = start + tl.arange(0, BLOCK_K)
                listed = rank < count
                key = tl.load(tile_keys_ptr + base + rank, mask=listed, other=0).to(tl.int64)
                if partials.sums is not None:
                    rows = (key * dim)[None, :]
                    mask = channels[:, None] & listed[None, :]
                    sums = _sums_by_rank(x, local, rank)
                    _add_to(sums_ptrs[:, None] + rows, sums, mask)
                if partials.sqdists is not None:
                    member = local[:, None] == rank[None, :]
                    sqdists = tl.sum(tl.where(member, sqdist[:, None], 0.0), 0)
                    _add_to(sqdists_ptr + key, sqdists, listed)
            tl.debug_barrier()  # the next tile may add to these rows from other threads


def chunks_of(view: Pixels, itemsize: int, tile: TileSizes, chunk_bytes: int) -> int:
    """The number of chunks of tiles; 0 if the pixels should be sorted instead.

    The partials of a chunk, for all keys, have chunk_bytes. There are as many chunks as fill the
    device a few times, if the partials are at most 1/32 of the features. There are at least as many
    as fill half of it (or one for each tile), if the partials are then at most 1/8 of the features,
    or fit into the L2 cache.
    """
    blocks = triton.cdiv(view.dim, tile.block_d)
    tiles = view.lines * triton.cdiv(view.pixels, tile.block_p)
    feature_bytes = view.lines * view.dim * view.pixels * itemsize
    full = min(triton.cdiv(programs(), blocks), tiles)
    half = min(triton.cdiv(programs(), 8 * blocks), tiles)
    if half * chunk_bytes > max(feature_bytes // 8, PARTIALS_IN_CACHE):
        return 0
    return max(half, min(full, feature_bytes // 32 // max(chunk_bytes, 1)))


def class_moments(
    features: Tensor,
    keys: Tensor,
    anchors: Tensor | None,
    num_keys: int,
    groups: int,
    with_sums: bool,
) -> tuple[Tensor, Tensor]:
    """features by strides, keys int32 [B, P], anchors float32 [K, D] -> float32
    sums [num_keys, D], sqdists [num_keys]; (0,) if not requested."""
    check_keys("class_moments.triton", keys, features.numel() // max(features.shape[1], 1))
    (view,) = as_pixels(features.shape, features.stride())
    has_anchors = anchors is not None

    def new(*shape: int) -> Tensor:
        return features.new_empty(shape, dtype=torch.float32)

    sums = new(num_keys, view.dim) if with_sums else new(0)
    sqdists = new(num_keys) if has_anchors else new(0)
    if features.numel() == 0 or num_keys == 0:
        return sums.zero_(), sqdists.zero_()

    tile = tile_of(view, features.element_size())
    blocks = triton.cdiv(view.dim, tile.block_d)
    tiles_per_line = triton.cdiv(view.pixels, tile.block_p)
    tiles = view.lines * tiles_per_line
    chunk_bytes = 4 * num_keys * (view.dim * with_sums + blocks * has_anchors)
    chunks = chunks_of(view, features.element_size(), tile, chunk_bytes)
    if chunks == 0:
        class_moments_sorted(features, view, keys, anchors, groups, sums, sqdists)
        return sums, sqdists
    tiles_per_chunk = triton.cdiv(tiles, chunks)
    chunks = triton.cdiv(tiles, tiles_per_chunk)
    partial_sums = new(chunks, num_keys, view.dim) if with_sums else None
    partial_sqdists = new(chunks * blocks, num_keys) if has_anchors else None

    partials = Partials(partial_sums, partial_sqdists, num_keys)
    common = anchors_of(anchors, groups), partials, tiles, tiles_per_line, tiles_per_chunk
    sizes = {
        "BLOCK_D": tile.block_d,
        "BLOCK_P": tile.block_p,
        "BLOCK_K": BLOCK_K,
        "enable_fp_fusion": False,  # lanes that hold copies of a sum must agree
    }
    tile_summaries, lists, local = tile_keys(keys, view, tile.block_p)
    _one_key_kernel[(blocks, chunks)](
        *(features_of(features, view), tile_summaries, *common),
        PIXELS_CONTIGUOUS=view.stride_p == 1,
        LANES=tile.lanes,
        num_warps=tile.num_warps,
        **sizes,
    )
    _several_keys_kernel[(blocks, chunks)](
        *(features_of(features, view), keys, tile_summaries, lists, local, *common),
        num_warps=tile.several_keys_warps,
        **sizes,
        **without_spills(),
    )
    if partial_sums is not None:
        torch.sum(partial_sums, 0, out=sums)
    if partial_sqdists is not None:
        torch.sum(partial_sqdists, 0, out=sqdists)
    return sums, sqdists
