"""Features and anchors as arguments of kernels, and tiles of features: a fixed table."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import architecture


class Pixels(NamedTuple):
    """Features as lines × channels × pixels: element (line, d, p) lies at (line // lines_per_image)
    ·stride_b + (line % lines_per_image)·stride_h + d·stride_d + p·stride_p.

    A line is an image; or a row of an image, if its rows are not adjacent (in a cropped view).
    """

    lines: int
    dim: int
    pixels: int
    lines_per_image: int
    stride_b: int
    stride_h: int
    stride_d: int
    stride_p: int

    @property
    def strides(self) -> tuple[int, int, int, int]:
        return self.stride_b, self.stride_h, self.stride_d, self.stride_p

    @property
    def channels_contiguous(self) -> bool:
        return self.stride_d == 1 and self.stride_p != 1

    @property
    def rows_aligned(self) -> bool:
        """Whether channels are contiguous, and those of every pixel begin at a multiple of 16
        elements."""
        strides = self.stride_b, self.stride_h, self.stride_p
        return self.channels_contiguous and all(stride % 16 == 0 for stride in strides)


def _rows_follow_each_other(size: Sequence[int], stride: Sequence[int]) -> bool:
    height, width = size[2:]
    return height == 1 or width == 1 or stride[2] == width * stride[3]


def check_keys(operation: str, keys: Tensor, pixels: int) -> None:
    """The keys of all pixels are contiguous, because kernels read them consecutively."""
    if not keys.is_contiguous() or keys.numel() != pixels:
        raise ValueError(
            f"{operation}: keys: expected a contiguous key for each of {pixels} pixels, "
            f"got shape {tuple(keys.shape)} and strides {keys.stride()}"
        )


def as_pixels(size: Sequence[int], *strides: Sequence[int]) -> list[Pixels]:
    """(B, D, H, W), (B, D, N) or (N, D) as lines of pixels: the same lines for all the strides."""
    if len(size) == 2:
        return [Pixels(1, size[1], size[0], 1, 0, 0, s[1], s[0]) for s in strides]
    if len(size) == 3:
        return [Pixels(size[0], size[1], size[2], 1, s[0], 0, s[1], s[2]) for s in strides]
    batch, dim, height, width = size
    if all(_rows_follow_each_other(size, s) for s in strides):
        pixels = height * width
        return [
            Pixels(batch, dim, pixels, 1, s[0], 0, s[1], s[2] if width == 1 else s[3])
            for s in strides
        ]
    return [Pixels(batch * height, dim, width, height, s[0], s[2], s[1], s[3]) for s in strides]


class TileSizes(NamedTuple):
    """A program's tile of BLOCK_D channels × BLOCK_P pixels; LANES sums of a channel, one for each
    thread that sums a part of its pixels; warps for tiles of one key, and of several keys."""

    block_d: int
    block_p: int
    lanes: int
    num_warps: int
    several_keys_warps: int


# By (channels contiguous, itemsize): 16 KB, in lines of 128 bytes or more.
_TILES = {
    (False, 2): TileSizes(64, 128, 16, 8, 4),
    (False, 4): TileSizes(32, 128, 32, 8, 4),
    (True, 2): TileSizes(64, 128, 16, 4, 4),
    (True, 4): TileSizes(32, 128, 16, 4, 4),
}
# If a thread has too few registers: for elements that are loaded one by one, and for GPUs that are
# not listed below.
_SMALL_TILES = {
    (False, 2): TileSizes(32, 128, 16, 8, 8),
    (False, 4): TileSizes(16, 128, 32, 8, 8),
    (True, 2): TileSizes(32, 128, 64, 8, 8),
    (True, 4): TileSizes(16, 128, 64, 8, 8),
}
_TILES_BY_ARCH = {"sm_80": _TILES, "sm_90": _TILES, "sm_100": _TILES}


def tile_of(view: Pixels, itemsize: int) -> TileSizes:
    small = any(stride > 1 and stride * itemsize % 16 > 0 for stride in view.strides)
    table = _SMALL_TILES if small else _TILES_BY_ARCH.get(architecture(), _SMALL_TILES)
    tile = table[view.channels_contiguous, itemsize]
    return tile._replace(block_d=min(tile.block_d, max(triton.next_power_of_2(view.dim), 16)))


class Features(NamedTuple):
    """[B, D, P] by strides: see Pixels."""

    ptr: Any
    dim: int
    pixels: int
    lines_per_image: int
    stride_b: int
    stride_h: int
    stride_d: int
    stride_p: int


def features_of(features: Tensor | None, view: Pixels) -> Features:
    return Features(features, view.dim, view.pixels, view.lines_per_image, *view.strides)


class Anchors(NamedTuple):
    """float32 [K, D] by strides; the pointer is None if there are none. The anchor of a key is
    key // groups % K."""

    ptr: Any
    num_classes: int
    groups: int
    stride_k: int
    stride_d: int


def anchors_of(anchors: Tensor | None, groups: int) -> Anchors:
    if anchors is None:
        return Anchors(None, 1, groups, 0, 0)
    return Anchors(anchors, anchors.shape[0], groups, *anchors.stride())


@triton.jit
def pixels_of_tile(features, tile, tiles_per_line, BLOCK_P: tl.constexpr):
    """The tile's line, its pixels there, and their offsets in the features."""
    line = tile // tiles_per_line
    pixel = tl.cast(tile % tiles_per_line, tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    offset = tl.cast(line // features.lines_per_image, tl.int64) * features.stride_b
    offset += tl.cast(line % features.lines_per_image, tl.int64) * features.stride_h
    return line, pixel, offset + pixel * features.stride_p


@triton.jit
def channel_ptrs(features, d):
    """Pointers to channels d of features or anchors."""
    return features.ptr + d.to(tl.int64) * features.stride_d


@triton.jit
def anchor_offset(anchors, key):
    return (key // anchors.groups % anchors.num_classes).to(tl.int64) * anchors.stride_k


@triton.jit
def fold(x, LANES: tl.constexpr, PIXELS_CONTIGUOUS: tl.constexpr):
    """The part of a sum over pixels within each thread: [BLOCK_D, BLOCK_P] to […, LANES]."""
    BLOCK_D: tl.constexpr = x.shape[0]
    PER_LANE: tl.constexpr = x.shape[1] // LANES
    if PIXELS_CONTIGUOUS:
        return tl.sum(tl.reshape(x, (BLOCK_D, LANES, PER_LANE)), 2)
    else:
        return tl.sum(tl.reshape(x, (BLOCK_D, PER_LANE, LANES)), 1)
