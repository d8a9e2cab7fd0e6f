"""Features and anchors, as arguments of the kernels of class moments."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import Pixels


class Features(NamedTuple):
    """[B, D, P] by strides: see launch.Pixels."""

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
