"""Class moments: sums, squared distances to an anchor and residual sums, by key.

    sums[k] = Σ f_p    residuals[k] = Σ (f_p − a_k)    sqdists[k] = Σ ‖f_p − a_k‖²

If there are few enough keys for partials (launch.chunks_of) and no residuals are requested, there
are four kernels. Otherwise the pixels are sorted by key (class_moments_sorted.py).

The first kernel lists the keys of each tile of pixels; it reads only the labels. The next two
kernels read the features, each tile once. Tiles of one key are summed in registers as long as the
key repeats. Tiles of several keys are multiplied by a one-hot matrix of the tile's own keys; its
size does not depend on the number of classes. A program processes a block of channels and a chunk
of the tiles, and adds to its own partials. The last kernel adds the partials of the chunks in a
fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .class_moments_sorted import class_moments_sorted
from .fold import fold
from .launch import INTERPRETED, as_pixels, check_keys, chunks_of, tile_of, without_spills
from .tile_keys import tile_keys

BLOCK_K = 16  # keys in one one-hot product
# They change with the images' size. Triton does not compile again if one becomes 1 or a multiple of
# 16.
TILE_COUNTS = ("tiles", "tiles_per_line", "tiles_per_chunk")

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _add_to(pointers, values, mask=None):
    tl.store(pointers, tl.load(pointers, mask=mask) + values, mask=mask)


@triton.jit(do_not_specialize=TILE_COUNTS)
def _one_key_kernel(
    features_ptr,  # [B, D, P] by strides
    tile_ptr,  # see tile_keys.py
    anchors_ptr,  # float32 [K, D] by strides
    sums_ptr,  # partials: float32 [chunks, num_keys, D]
    sqdists_ptr,  # partials: float32 [chunks · blocks, num_keys]
    dim,
    pixels,
    lines_per_image,
    tiles,
    tiles_per_line,
    tiles_per_chunk,
    num_keys,
    num_classes,
    groups,
    stride_features_b,
    stride_features_h,
    stride_features_d,
    stride_features_p,
    stride_anchors_k,
    stride_anchors_d,
    HAS_SUMS: tl.constexpr,
    HAS_ANCHORS: tl.constexpr,
    PIXELS_CONTIGUOUS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sets the partials to zero. Reads the features of tiles of one key once. Whenever the key
    changes, it reads and writes a partial row of BLOCK_D."""
    block, chunk = tl.program_id(0), tl.program_id(1)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    channels = d < dim
    i = tl.arange(0, BLOCK_P)

    sums_ptr += chunk.to(tl.int64) * num_keys * dim + d
    sqdists_ptr += (chunk.to(tl.int64) * tl.num_programs(0) + block) * num_keys
    for start in range(0, num_keys, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        rows = k.to(tl.int64)[:, None] * dim
        inside = (k < num_keys)[:, None] & channels[None, :]
        if HAS_SUMS:
            tl.store(sums_ptr[None, :] + rows, tl.zeros((BLOCK_K, BLOCK_D), tl.float32), inside)
        if HAS_ANCHORS:
            tl.store(sqdists_ptr + k, tl.zeros((BLOCK_K,), tl.float32), k < num_keys)
    tl.debug_barrier()

    features_ptr += d.to(tl.int64)[:, None] * stride_features_d
    if HAS_ANCHORS:
        anchors_ptr += d.to(tl.int64) * stride_anchors_d
    sums = tl.zeros((BLOCK_D, LANES), tl.float32)
    sqdists = tl.zeros((BLOCK_D, LANES), tl.float32)
    anchor = tl.zeros((BLOCK_D,), tl.float32)
    current = -1  # the key of the sum in registers
    first_tile = chunk * tiles_per_chunk
    last_tile = tl.minimum(first_tile + tiles_per_chunk, tiles)
    for tile in range(
        first_tile, last_tile + 1
    ):  # one iteration more than there are tiles, to store the last key
        key = -1 - tl.load(tile_ptr + tl.minimum(tile, tiles - 1))
        key = tl.where(tile < last_tile, key, -1)
        if (key >= 0) | (tile == last_tile):
            line = tile // tiles_per_line
            pixel = tl.cast(tile % tiles_per_line, tl.int64) * BLOCK_P + i
            offset = tl.cast(line // lines_per_image, tl.int64) * stride_features_b
            offset += tl.cast(line % lines_per_image, tl.int64) * stride_features_h
            offset += pixel * stride_features_p
            x = tl.load(
                features_ptr + offset[None, :],
                mask=(d < tl.where(key >= 0, dim, 0))[:, None],
                other=0.0,
                eviction_policy="evict_first",
            ).to(tl.float32)
            if key != current:
                if current >= 0:
                    row = current.to(tl.int64) * dim
                    if HAS_SUMS:
                        _add_to(sums_ptr + row, tl.sum(sums, 1), channels)
                    if HAS_ANCHORS:
                        _add_to(sqdists_ptr + current, tl.sum(sqdists))
                    tl.debug_barrier()  # next time other threads may add to these addresses
                current = key
                sums = tl.zeros((BLOCK_D, LANES), tl.float32)
                sqdists = tl.zeros((BLOCK_D, LANES), tl.float32)
                if HAS_ANCHORS:
                    nearest = (key // groups % num_classes).to(tl.int64) * stride_anchors_k
                    anchor = tl.load(anchors_ptr + nearest, d < tl.where(key >= 0, dim, 0), 0.0)
            if HAS_SUMS:
                sums += fold(x, LANES, PIXELS_CONTIGUOUS)
            if HAS_ANCHORS:
                residual = x - anchor[:, None]
                sqdists += fold(residual * residual, LANES, PIXELS_CONTIGUOUS)


@triton.jit
def _product(x, member):
    if _INTERPRETED:  # the interpreter has no bfloat16 product
        return tl.dot(x.to(tl.float32), tl.where(member, 1.0, 0.0), input_precision="ieee")
    else:
        return tl.dot(x, member.to(x.dtype))


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
        sums = _product(low, member) + _product(middle, member) + _product(high, member)
    else:
        sums = _product(x, member)
    if tl.sum(sums - sums) != 0:  # Inf − Inf and NaN − NaN are NaN
        for j in range(rank.shape[0]):
            column = rank == tl.min(rank, 0) + j
            mine = local == tl.min(rank, 0) + j
            by_selection = tl.sum(tl.where(mine[None, :], x.to(tl.float32), 0.0), 1)
            sums = tl.where(column[None, :], by_selection[:, None], sums)
    return sums


@triton.jit(do_not_specialize=TILE_COUNTS)
def _several_keys_kernel(
    features_ptr,  # [B, D, P] by strides
    keys_ptr,  # int32 [B, P], −1 where ignored
    tile_ptr,  # these three: see tile_keys.py
    tile_keys_ptr,
    local_ptr,
    anchors_ptr,  # float32 [K, D] by strides
    sums_ptr,  # partials: float32 [chunks, num_keys, D]
    sqdists_ptr,  # partials: float32 [chunks · blocks, num_keys]
    dim,
    pixels,
    lines_per_image,
    tiles,
    tiles_per_line,
    tiles_per_chunk,
    num_keys,
    num_classes,
    groups,
    stride_features_b,
    stride_features_h,
    stride_features_d,
    stride_features_p,
    stride_anchors_k,
    stride_anchors_d,
    HAS_SUMS: tl.constexpr,
    HAS_ANCHORS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Reads the features of tiles of several keys once. From the caches it reads 2 bytes and a row
    of BLOCK_D anchors for each pixel; for each key of a tile it reads and writes a partial row of
    BLOCK_D."""
    block, chunk = tl.program_id(0), tl.program_id(1)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    channels = d < dim
    i = tl.arange(0, BLOCK_P)
    sums_ptr += chunk.to(tl.int64) * num_keys * dim + d
    sqdists_ptr += (chunk.to(tl.int64) * tl.num_programs(0) + block) * num_keys
    features_ptr += d.to(tl.int64)[:, None] * stride_features_d
    if HAS_ANCHORS:
        anchors_ptr += d.to(tl.int64) * stride_anchors_d
    first_tile = chunk * tiles_per_chunk
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_chunk, tiles)):
        summary = tl.load(tile_ptr + tile)
        count = summary & 0xFFFF
        if summary > 0:
            line = tile // tiles_per_line
            pixel = tl.cast(tile % tiles_per_line, tl.int64) * BLOCK_P + i
            inside = pixel < pixels
            offset = tl.cast(line // lines_per_image, tl.int64) * stride_features_b
            offset += tl.cast(line % lines_per_image, tl.int64) * stride_features_h
            offset += pixel * stride_features_p
            x = tl.load(
                features_ptr + offset[None, :],
                mask=channels[:, None] & inside[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            base = tl.cast(tile, tl.int64) * BLOCK_P
            local = tl.load(local_ptr + base + i)
            if summary > 0xFFFF:  # there are ignored pixels
                x = tl.where((local >= 0)[None, :], x, 0.0)
            if HAS_ANCHORS:
                pixel_key = tl.load(keys_ptr + tl.cast(line, tl.int64) * pixels + pixel, inside, -1)
                nearest = (pixel_key // groups % num_classes).to(tl.int64) * stride_anchors_k
                a = tl.load(
                    anchors_ptr[:, None] + nearest[None, :],
                    mask=channels[:, None] & (pixel_key >= 0)[None, :],
                    other=0.0,
                )
                residual = x.to(tl.float32) - a
                sqdist = tl.sum(residual * residual, 0)
            for start in range(0, count, BLOCK_K):
                rank = start + tl.arange(0, BLOCK_K)
                listed = rank < count
                key = tl.load(tile_keys_ptr + base + rank, mask=listed, other=0).to(tl.int64)
                rows = (key * dim)[None, :]
                mask = channels[:, None] & listed[None, :]
                if HAS_SUMS:
                    sums = _sums_by_rank(x, local, rank)
                    _add_to(sums_ptr[:, None] + rows, sums, mask)
                if HAS_ANCHORS:
                    member = local[:, None] == rank[None, :]
                    sqdists = tl.sum(tl.where(member, sqdist[:, None], 0.0), 0)
                    _add_to(sqdists_ptr + key, sqdists, listed)
            tl.debug_barrier()  # the next tile may add to these rows from other threads


@triton.jit
def _add_chunks_kernel(
    partials_ptr,  # float32 [chunks, size]
    out_ptr,  # float32 [size]
    chunks,
    size,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Reads each partial and writes each result once."""
    index = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    total = tl.zeros((BLOCK_SIZE,), tl.float32)
    for first in range(0, chunks, BLOCK_CHUNKS):
        chunk = (first + tl.arange(0, BLOCK_CHUNKS)).to(tl.int64)[:, None]
        inside = (chunk < chunks) & (index < size)[None, :]
        total += tl.sum(tl.load(partials_ptr + chunk * size + index[None, :], inside, 0.0), 0)
    tl.store(out_ptr + index, total, mask=index < size)


def _add_chunks(partials: Tensor, out: Tensor) -> None:
    """partials [chunks, …] -> out […]."""
    block_chunks = 32 if partials.shape[0] <= 32 else 128
    block_size = 4096 // block_chunks
    _add_chunks_kernel[(triton.cdiv(out.numel(), block_size),)](
        partials,
        out,
        partials.shape[0],
        out.numel(),
        BLOCK_CHUNKS=block_chunks,
        BLOCK_SIZE=block_size,
        num_warps=4,
        enable_fp_fusion=True,
    )


def class_moments(
    features: Tensor,
    keys: Tensor,
    anchors: Tensor | None,
    num_keys: int,
    groups: int,
    with_sums: bool,
    with_residuals: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """features by strides, keys int32 [B, P], anchors float32 [K, D] -> float32
    sums [num_keys, D], sqdists [num_keys], residuals [num_keys, D]; (0,) if not requested."""
    check_keys("class_moments.triton", keys, features.numel() // max(features.shape[1], 1))
    (view,) = as_pixels(features.shape, features.stride())
    has_anchors = anchors is not None

    def new(*shape: int) -> Tensor:
        return features.new_empty(shape, dtype=torch.float32)

    sums = new(num_keys, view.dim) if with_sums else new(0)
    sqdists = new(num_keys) if has_anchors else new(0)
    residuals = new(num_keys, view.dim) if with_residuals else new(0)
    if features.numel() == 0 or num_keys == 0:
        return sums.zero_(), sqdists.zero_(), residuals.zero_()

    tile = tile_of(view, features.element_size())
    blocks = triton.cdiv(view.dim, tile.block_d)
    tiles_per_line = triton.cdiv(view.pixels, tile.block_p)
    tiles = view.lines * tiles_per_line
    chunk_bytes = 4 * num_keys * (view.dim * with_sums + blocks * has_anchors)
    chunks = chunks_of(view, features.element_size(), tile, chunk_bytes)
    if with_residuals or chunks == 0:
        class_moments_sorted(features, view, keys, anchors, groups, sums, sqdists, residuals)
        return sums, sqdists, residuals
    tiles_per_chunk = triton.cdiv(tiles, chunks)
    chunks = triton.cdiv(tiles, tiles_per_chunk)
    partial_sums = new(chunks, num_keys, view.dim) if with_sums else sums
    partial_sqdists = new(chunks * blocks, num_keys) if has_anchors else sqdists

    sizes = (
        view.dim,
        view.pixels,
        view.lines_per_image,
        tiles,
        tiles_per_line,
        tiles_per_chunk,
        num_keys,
        1 if anchors is None else anchors.shape[0],
        groups,
        *view.strides,
        *((0, 0) if anchors is None else anchors.stride()),
    )
    flags = {
        "HAS_SUMS": with_sums,
        "HAS_ANCHORS": has_anchors,
        "BLOCK_D": tile.block_d,
        "BLOCK_P": tile.block_p,
        "BLOCK_K": BLOCK_K,
        "num_warps": tile.num_warps,
        "enable_fp_fusion": True,
    }
    tile_summaries, lists, local = tile_keys(keys, view, tile.block_p)
    _one_key_kernel[(blocks, chunks)](
        features,
        tile_summaries,
        anchors,
        partial_sums,
        partial_sqdists,
        *sizes,
        PIXELS_CONTIGUOUS=view.stride_p == 1,
        LANES=tile.lanes,
        **flags,
    )
    _several_keys_kernel[(blocks, chunks)](
        features,
        keys,
        tile_summaries,
        lists,
        local,
        anchors,
        partial_sums,
        partial_sqdists,
        *sizes,
        **(flags | without_spills() | {"num_warps": tile.several_keys_warps}),
    )
    if with_sums:
        _add_chunks(partial_sums, sums)
    if has_anchors:
        _add_chunks(partial_sqdists, sqdists)
    return sums, sqdists, residuals
