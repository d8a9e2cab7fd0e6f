"""Sums of upsampled features over the pixels of each key; mean and variance of each channel.

The features are read once. A program sums a chunk, some tiles of one image; a tile is a part of a
row. For each key of the labels around a tile, it computes the features' weights from the labels,
and adds the weighted sum to its own partial. A second kernel adds the partials in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import as_pixels, programs, without_spills
from .splat import NO_KEY, as_int32, axis, labels_around, splat_key

_MOST_CHUNKS, _MOST_BYTES = 512, 10 * 2**20  # of partials
_ROWS, _BLOCK_E = tl.constexpr(64), 64  # partials, and elements of each, that are added at once


@triton.jit(do_not_specialize=["chunks", "chunk_tiles", "label_rows"])
def _upsampled_sums_kernel(
    features_ptr,
    keys_ptr,  # [B, label_height, label_width], −1, or 255 in uint8, where ignored
    partials_ptr,  # float32 [B·chunks, K, C]
    moments_ptr,  # float32 [B·chunks, 3, C]: pixels, means, sums of squared deviations
    channels,
    num_classes,
    chunks,
    chunk_tiles,
    stride_b,
    stride_d,
    stride_p,
    height,
    width,
    label_height,
    label_width,
    step_y,
    labels_each_y,
    label_rows,
    step_x,
    labels_each_x,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Reads the features of a chunk once. One thread makes all additions to an element of the
    chunk's partial. They are atomic, because a load could otherwise happen before an earlier
    store."""
    chunk, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    some = d < channels
    features_ptr += image * stride_b
    keys_ptr += image * label_height * label_width
    partials_ptr += (image * chunks + chunk) * num_classes * channels + d
    for k in range(0, num_classes):
        tl.store(partials_ptr + k * channels, tl.zeros((BLOCK_D,), tl.float32), mask=some)
    tl.debug_barrier()  # other threads may store an element than add to it
    pixels = tl.full((), 0.0, tl.float32)
    mean, squares = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    row_tiles = tl.cdiv(width, BLOCK_P)
    end = tl.minimum((chunk + 1) * chunk_tiles, height * row_tiles)
    for tile in range(chunk * chunk_tiles, end):
        y, start = tile // row_tiles, tile % row_tiles * BLOCK_P
        x = start + tl.arange(0, BLOCK_P)
        inside = x < width
        offset = d.to(tl.int64)[:, None] * stride_d + (y * width + x)[None, :] * stride_p
        mask = some[:, None] & inside[None, :]
        features = tl.load(features_ptr + offset, mask=mask, other=0.0).to(tl.float32)

        here = tl.minimum(width - start, BLOCK_P).to(tl.float32)
        mean_here = tl.sum(features, 1) / here
        deviations = tl.where(mask, features - mean_here[:, None], 0.0)
        shift = mean_here - mean
        mean += shift * (here / (pixels + here))
        squares += tl.sum(deviations * deviations, 1)
        squares += shift * shift * (pixels * here / (pixels + here))
        pixels += here

        columns, around, weights = labels_around(
            x, label_width, width, step_x, labels_each_x, BLOCK_L
        )
        around &= inside[:, None]
        nearest = (y * labels_each_y).to(tl.int64) * label_width
        first = as_int32(tl.load(keys_ptr + nearest + (start * labels_each_x).to(tl.int32)))
        key = first
        while key < NO_KEY:
            weight, following = splat_key(
                *(keys_ptr, key, first, y, columns, around, weights, label_height, label_width),
                *(height, step_y, labels_each_y, label_rows),
            )
            if key >= 0:
                total = tl.sum(features * weight[None, :], 1)
                tl.atomic_add(partials_ptr + key * channels, total, mask=some, sem="relaxed")
            key = following
    moments_ptr += (image * chunks + chunk) * 3 * channels + d
    tl.store(moments_ptr, tl.zeros((BLOCK_D,), tl.float32) + pixels, mask=some)
    tl.store(moments_ptr + channels, mean, mask=some)
    tl.store(moments_ptr + 2 * channels, squares, mask=some)


@triton.jit
def _rows(ptr, stride, start, parts, e, inside):
    """Elements e of the next 64 partials, 0 after the last one: [64, BLOCK_E]."""
    part = start + tl.arange(0, _ROWS)
    offset = part.to(tl.int64)[:, None] * stride + e[None, :]
    return tl.load(ptr + offset, mask=(part < parts)[:, None] & inside[None, :], other=0.0)


@triton.jit(do_not_specialize=["parts", "all_parts"])
def _add_upsampled_partials_kernel(
    partials_ptr,  # float32 [tables, parts, K·C]
    moments_ptr,  # float32 [tables·parts, 3, C]
    sums_ptr,  # float32 [tables, K·C]
    mean_ptr,  # float32 [C]
    variance_ptr,  # float32 [C]
    entries,  # K·C
    channels,
    parts,
    all_parts,
    tables,
    BLOCK_E: tl.constexpr,
):
    """A table has the sums of all classes: one for each image, or one for all images. The programs
    of the last row of the grid add the moments."""
    e, table = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E), tl.program_id(1).to(tl.int64)
    if table < tables:
        inside = e < entries
        total = tl.zeros((BLOCK_E,), tl.float32)
        for start in range(0, parts, _ROWS):
            ptr = partials_ptr + table * parts * entries
            total += tl.sum(_rows(ptr, entries, start, parts, e, inside), 0)
        tl.store(sums_ptr + table * entries + e, total, mask=inside)
    else:
        inside = e < channels
        stride, squares_ptr = 3 * channels, moments_ptr + 2 * channels
        pixels, total = tl.zeros((BLOCK_E,), tl.float32), tl.zeros((BLOCK_E,), tl.float32)
        for start in range(0, all_parts, _ROWS):
            here = _rows(moments_ptr, stride, start, all_parts, e, inside)
            means = _rows(moments_ptr + channels, stride, start, all_parts, e, inside)
            pixels += tl.sum(here, 0)
            total += tl.sum(here * means, 0)
        pixels = tl.maximum(pixels, 1.0)
        mean, squares = total / pixels, tl.zeros((BLOCK_E,), tl.float32)
        for start in range(0, all_parts, _ROWS):
            here = _rows(moments_ptr, stride, start, all_parts, e, inside)
            means = _rows(moments_ptr + channels, stride, start, all_parts, e, inside)
            shift = means - mean[None, :]
            own = _rows(squares_ptr, stride, start, all_parts, e, inside)
            squares += tl.sum(own + here * shift * shift, 0)
        tl.store(mean_ptr + e, mean, mask=inside)
        tl.store(variance_ptr + e, squares / pixels, mask=inside)


class Grid(NamedTuple):
    """Strides of the features; arguments that describe both grids; sizes of a tile."""

    strides: tuple[int, int, int]
    sizes: tuple[int, int, int, int]
    axes: tuple[float, float, int, float, float]
    blocks: dict[str, int]


def grid_of(features: Tensor, keys: Tensor) -> Grid:
    (_, channels, height, width), (label_height, label_width) = features.shape, keys.shape[1:]
    step_x, labels_each_x, label_columns = axis(label_width, width)
    (view,) = as_pixels(features.shape, features.stride())
    assert view.lines_per_image == 1  # the features are the output of a layer
    return Grid(
        (view.stride_b, view.stride_d, view.stride_p),
        (height, width, label_height, label_width),
        (*axis(label_height, height), step_x, labels_each_x),
        {
            "BLOCK_D": min(max(triton.next_power_of_2(channels), 16), 128),
            "BLOCK_P": min(max(triton.next_power_of_2(width), 16), 64),
            "BLOCK_L": max(triton.next_power_of_2(label_columns), 2),
        },
    )


def tiles_of(grid: Grid) -> int:
    """Tiles of an image."""
    height, width = grid.sizes[:2]
    return height * triton.cdiv(width, grid.blocks["BLOCK_P"])


def upsampled_sums(
    features: Tensor, keys: Tensor, num_keys: int, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """features (B, C, H, W), keys [B, H', W'] -> sums float32 [num_keys, C], mean [C],
    variance [C]."""
    channels, images, keys = features.shape[1], len(features), keys.contiguous()
    sums, mean, variance = (
        features.new_empty(size, dtype=torch.float32)
        for size in ((num_keys, channels), (channels,), (channels,))
    )
    if features.numel() == 0:
        return sums.zero_(), mean.zero_(), variance.zero_()
    grid, entries = grid_of(features, keys), num_classes * channels
    most = min(_MOST_CHUNKS, programs(), _MOST_BYTES // (4 * entries))
    tiles = tiles_of(grid)
    chunk_tiles = triton.cdiv(tiles, max(most // images, 1))
    chunks = triton.cdiv(tiles, chunk_tiles)
    partials = sums.new_empty(images * chunks, num_classes, channels)
    moments = sums.new_empty(images * chunks, 3, channels)
    tables = images if num_keys > num_classes else 1
    blocks = triton.cdiv(channels, grid.blocks["BLOCK_D"])
    _upsampled_sums_kernel[(chunks, images, blocks)](
        *(features, keys, partials, moments, channels, num_classes),
        *(chunks, chunk_tiles, *grid.strides, *grid.sizes, *grid.axes),
        **grid.blocks,
        num_warps=8,
        enable_fp_fusion=False,  # positions as in the reference
        **without_spills(),
    )
    parts = images * chunks // tables
    _add_upsampled_partials_kernel[(triton.cdiv(max(entries, channels), _BLOCK_E), tables + 1)](
        *(partials, moments, sums, mean, variance, entries, channels, parts, images * chunks),
        tables,
        BLOCK_E=_BLOCK_E,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return sums, mean, variance
