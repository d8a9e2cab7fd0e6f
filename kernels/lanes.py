"""Functions that read labels and maps for the pixels of a lane (upsampling.py). They return tuples
of tensors [lanes]; pixel (i, j) of SLOTS_Y × SLOTS_X is element i · SLOTS_X + j."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
NO_CLASS = tl.constexpr(2**31 - 1)


class PixelMap(NamedTuple):
    """[B, H, W] by strides."""

    ptr: Any
    stride_b: int
    stride_h: int
    stride_w: int


def pixel_map_of(tensor: Tensor | None) -> PixelMap:
    """The pointer is None if there is no map."""
    return PixelMap(None, 0, 0, 0) if tensor is None else PixelMap(tensor, *tensor.stride())


@triton.jit
def repeated(x, PIXELS: tl.constexpr):
    out = ()
    for _ in tl.static_range(PIXELS):
        out = out + (x,)
    return out


@triton.jit
def load_labels(labels, image, lanes, num_classes, ignore_index, CELLS: tl.constexpr):
    """int32, −1 where ignored or no pixel."""
    SLOTS_Y: tl.constexpr = CELLS.y.slots
    SLOTS_X: tl.constexpr = CELLS.x.slots
    ptr = labels.ptr + image.to(tl.int64) * labels.stride_b
    out = ()
    for i in tl.static_range(SLOTS_Y):
        for j in tl.static_range(SLOTS_X):
            y, x = lanes.y.start + i, lanes.x.start + j
            offset = y.to(tl.int64) * labels.stride_h + x.to(tl.int64) * labels.stride_w
            inside = (y < lanes.y.stop) & (x < lanes.x.stop)
            label = tl.load(ptr + offset, mask=inside, other=0).to(tl.int64)
            valid = inside & (label >= 0) & (label < num_classes) & (label != ignore_index)
            out = out + (tl.where(valid, label, -1).to(tl.int32),)
    return out


@triton.jit
def next_label(labels, after):
    """The smallest label of all lanes beyond `after`, NO_CLASS if there is none."""
    smallest = tl.full(labels[0].shape, NO_CLASS, tl.int32)
    for i in tl.static_range(len(labels)):
        smallest = tl.minimum(smallest, tl.where(labels[i] > after, labels[i], NO_CLASS))
    return tl.min(smallest, 0)


@triton.jit
def load_map(pixel_map, image, lanes, labels, CELLS: tl.constexpr):
    """A number for each valid pixel."""
    SLOTS_Y: tl.constexpr = CELLS.y.slots
    SLOTS_X: tl.constexpr = CELLS.x.slots
    ptr = pixel_map.ptr + image.to(tl.int64) * pixel_map.stride_b
    out = ()
    for i in tl.static_range(SLOTS_Y):
        for j in tl.static_range(SLOTS_X):
            y, x = (lanes.y.start + i).to(tl.int64), (lanes.x.start + j).to(tl.int64)
            valid = labels[i * SLOTS_X + j] >= 0
            offset = y * pixel_map.stride_h + x * pixel_map.stride_w
            out = out + (tl.load(ptr + offset, mask=valid, other=0.0),)
    return out


@triton.jit
def store_map(ptr, values, image, lanes, axes, CELLS: tl.constexpr):
    """To a contiguous map [B, H, W]."""
    SLOTS_Y: tl.constexpr = CELLS.y.slots
    SLOTS_X: tl.constexpr = CELLS.x.slots
    ptr += image.to(tl.int64) * axes.y.pixels * axes.x.pixels
    for i in tl.static_range(SLOTS_Y):
        for j in tl.static_range(SLOTS_X):
            y, x = lanes.y.start + i, lanes.x.start + j
            inside = (y < lanes.y.stop) & (x < lanes.x.stop)
            value = values[i * SLOTS_X + j].to(ptr.dtype.element_ty)
            tl.store(ptr + y.to(tl.int64) * axes.x.pixels + x, value, mask=inside)
