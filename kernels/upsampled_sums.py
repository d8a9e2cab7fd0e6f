"""Sums of upsampled features over the pixels of each key; mean and variance of each channel.

The features are read once. A program sums a chunk, some tiles of one image; a tile is a part of a
row. For each key of the labels around a tile, it computes the features' weights from the labels,
and adds the weighted sum to its own partial. torch.sum adds the partials.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .features import Features, as_pixels, channel_ptrs, features_of
from .launch import programs, without_spills
from .splat import NO_KEY, columns_around, first_key, most_labels, splat_key, tile_at
from .upsampling import SIZES, YX, Axis, Ratios, upsampling_of

_MOST_CHUNKS, _MOST_BYTES = 512, 10 * 2**20  # of partials


class Moments(NamedTuple):
    """Number, mean and sum of squared deviations of numbers that come in parts (Chan et al.)."""

    count: Any
    mean: Any
    squares: Any


@triton.jit
def _add_moments(moments, x, mask, count):
    """The moments with `count` more numbers of each channel, x [BLOCK_D, BLOCK_P]."""
    mean = tl.sum(x, 1) / count
    deviations = tl.where(mask, x - mean[:, None], 0.0)
    shift, total = mean - moments.mean, moments.count + count
    squares = moments.squares + tl.sum(deviations * deviations, 1)
    return Moments(
        total,
        moments.mean + shift * (count / total),
        squares + shift * shift * (moments.count * count / total),
    )


@triton.jit
def _set_to_zero(partials_ptrs, num_classes, dim, some):
    for k in range(0, num_classes):
        tl.store(partials_ptrs + k * dim, tl.zeros(some.shape, tl.float32), mask=some)
    tl.debug_barrier()  # other threads may store an element than add to it


@triton.jit
def _add_keys(partials_ptrs, x, some, keys_ptr, tile, axes, label_rows, dim, BLOCK_L: tl.constexpr):
    """Adds the weighted sums of a tile's features x, for each key around it."""
    columns = columns_around(tile, axes.x, BLOCK_L)
    first = first_key(keys_ptr, tile, axes)
    key = first
    while key < NO_KEY:
        weight, following = splat_key(keys_ptr, key, first, tile, columns, axes, label_rows)
        if key >= 0:
            used = tl.where(weight[None, :] != 0, x, 0.0)  # x may be NaN where the weight is 0
            total = tl.sum(used * weight[None, :], 1)
            tl.atomic_add(partials_ptrs + key * dim, total, mask=some, sem="relaxed")
        key = following


@triton.jit
def axes_without_lanes(height, width, label_height, label_width, ratios):
    """Those that splat.py needs."""
    return YX(
        Axis(height, label_height, ratios.y, ratios.inverse_y, 0),
        Axis(width, label_width, ratios.x, ratios.inverse_x, 0),
    )


# Triton compiles again if the features' width becomes a multiple of 16: then their rows are
# aligned, and a thread needs half of the registers.
SIZES_BUT_WIDTH = [name for name in SIZES if name != "width"]


@triton.jit(do_not_specialize=[*SIZES_BUT_WIDTH, "chunks", "chunk_tiles", "label_rows"])
def _upsampled_sums_kernel(
    features,  # Features
    keys_ptr,  # [B, rows, columns] of labels, −1, or 255 in uint8, where ignored
    partials_ptr,  # float32 [B·chunks, K, C]
    moments_ptr,  # float32 [B·chunks, 3, C]: Moments
    num_classes,
    height,
    width,
    label_height,
    label_width,
    ratios,  # Ratios
    label_rows,
    chunks,
    chunk_tiles,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Reads the features of a chunk once. One thread makes all additions to an element of the
    chunk's partial. They are atomic, because a load could otherwise happen before an earlier
    store."""
    image, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    dim, axes = features.dim, axes_without_lanes(height, width, label_height, label_width, ratios)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    some = d < dim
    features_ptrs = channel_ptrs(features, d) + image * features.stride_b
    keys_ptr += image * axes.y.pixels * axes.x.pixels
    partials_ptrs = partials_ptr + (image * chunks + chunk) * num_classes * dim + d
    _set_to_zero(partials_ptrs, num_classes, dim, some)
    zeros = tl.zeros((BLOCK_D,), tl.float32)
    moments = Moments(tl.full((), 0.0, tl.float32), zeros, zeros)
    tiles = axes.y.source * tl.cdiv(width, BLOCK_P)
    for i in range(chunk * chunk_tiles, tl.minimum((chunk + 1) * chunk_tiles, tiles)):
        tile = tile_at(i, axes, BLOCK_P)
        mask = some[:, None] & tile.inside[None, :]
        offset = (tile.y * width + tile.x).to(tl.int64)[None, :] * features.stride_p
        x = tl.load(features_ptrs[:, None] + offset, mask=mask, other=0.0).to(tl.float32)
        moments = _add_moments(
            moments, x, mask, tl.minimum(width - tile.first, BLOCK_P).to(tl.float32)
        )
        _add_keys(partials_ptrs, x, some, keys_ptr, tile, axes, label_rows, dim, BLOCK_L)
    moments_ptrs = moments_ptr + (image * chunks + chunk) * 3 * dim + d
    tl.store(moments_ptrs, zeros + moments.count, mask=some)
    tl.store(moments_ptrs + dim, moments.mean, mask=some)
    tl.store(moments_ptrs + 2 * dim, moments.squares, mask=some)


class Launch(NamedTuple):
    """What the kernels of both directions need: arguments, and sizes of a tile."""

    features: Features
    sizes: tuple[int, int, int, int]  # the arguments SIZES
    ratios: Ratios
    label_rows: int
    blocks: dict[str, int]

    @property
    def tiles(self) -> int:
        """The number of tiles of an image."""
        height, width, *_ = self.sizes
        return height * triton.cdiv(width, self.blocks["BLOCK_P"])


def launch_of(features: Tensor, keys: Tensor) -> Launch:
    _, channels, _, width = features.shape
    upsampling = upsampling_of(features, keys.shape[1], keys.shape[2], align_corners=True)
    (view,) = as_pixels(features.shape, features.stride())
    assert view.lines_per_image == 1  # the features are the output of a layer
    block_l = max(triton.next_power_of_2(most_labels(upsampling.x)), 2)
    # loads of rows that are not aligned need more registers, and so do many labels
    most_pixels = 64 if view.channels_contiguous or width % 16 == 0 else 32
    most_pixels = most_pixels if block_l <= 64 else most_pixels // 2
    blocks = {
        "BLOCK_D": min(max(triton.next_power_of_2(channels), 16), 128),
        "BLOCK_P": min(max(triton.next_power_of_2(width), 16), most_pixels),
        "BLOCK_L": block_l,
    }
    label_rows = most_labels(upsampling.y)
    features_there = features_of(features, view)
    return Launch(features_there, upsampling.sizes, upsampling.ratios, label_rows, blocks)


def upsampled_sums(
    features: Tensor, keys: Tensor, num_keys: int, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """features (B, C, H, W), keys [B, H', W'] -> sums float32 [num_keys, C], mean [C],
    variance [C]."""
    channels, images, keys = features.shape[1], len(features), keys.contiguous()
    sums = features.new_empty((num_keys, channels), dtype=torch.float32)
    if features.numel() == 0:
        return sums.zero_(), sums.new_zeros(channels), sums.new_zeros(channels)
    launch, entries = launch_of(features, keys), num_classes * channels
    most = min(_MOST_CHUNKS, programs(), _MOST_BYTES // (4 * entries))
    chunk_tiles = triton.cdiv(launch.tiles, max(most // images, 1))
    chunks = triton.cdiv(launch.tiles, chunk_tiles)
    partials = sums.new_empty((images * chunks, num_classes, channels))
    moments = sums.new_empty((images * chunks, 3, channels))
    tables = images if num_keys > num_classes else 1
    blocks = triton.cdiv(channels, launch.blocks["BLOCK_D"])
    _upsampled_sums_kernel[(images * chunks, blocks)](
        *(launch.features, keys, partials, moments, num_classes),
        *(*launch.sizes, launch.ratios, launch.label_rows, chunks, chunk_tiles),
        **launch.blocks,
        num_warps=8,
        enable_fp_fusion=False,  # positions as in the reference
        **without_spills(),
    )
    torch.sum(partials.view(tables, -1, entries), 1, out=sums.view(tables, entries))
    counts, means, squares = moments.unbind(1)
    pixels = features.numel() // channels
    mean = (counts * means).sum(0) / pixels
    shifts = means - mean
    variance = torch.addcmul(squares, counts * shifts, shifts).sum(0) / pixels
    return sums, mean, variance
