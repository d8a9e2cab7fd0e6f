"""Labels and maps of the pixels of lanes (upsampling.py): lists of tensors [rows, lanes], one for
each column of a lane's pixels."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .constants import INF, Constant
from .upsampling import ROW_AXIS, at_pixels, both, rows_of_lane, strides_of

LABELS = strides_of("labels", "bhw")
NO_CLASS = Constant(2**31 - 1)


class PixelMap(NamedTuple):
    """[B, H, W] by strides."""

    ptr: Any
    stride_b: int
    stride_h: int
    stride_w: int


def pixel_map_of(tensor: Tensor | None) -> PixelMap:
    """All are None if there is no map."""
    return PixelMap(*(None,) * 4) if tensor is None else PixelMap(tensor, *tensor.stride())


@triton.jit
def contiguous_map(ptr, axes):
    """A contiguous map with the labels' size."""
    return PixelMap(ptr, axes.y.pixels.to(tl.int64) * axes.x.pixels, axes.x.pixels, 1)


@triton.jit
def inside_of(lanes, CELLS: tl.constexpr):
    """Whether there is such a pixel: a cell may have fewer than the others."""
    inside = lanes.y.start + rows_of_lane(CELLS) < lanes.y.stop
    return [both(inside, lanes.x.start + i < lanes.x.stop, CELLS) for i in () + CELLS.columns]


@triton.jit
def pointers(pixel_map, image, lanes, CELLS: tl.constexpr):
    """Pointers to the numbers of a map."""
    ptr = pixel_map.ptr + image.to(tl.int64) * pixel_map.stride_b
    ptr += (lanes.y.start + rows_of_lane(CELLS)).to(tl.int64) * pixel_map.stride_h
    offsets = [(lanes.x.start + i).to(tl.int64) * pixel_map.stride_w for i in () + CELLS.columns]
    return [at_pixels(ptr, offset, CELLS) for offset in offsets]


@triton.jit
def sum_of(x):
    """The sum of x [rows, lanes], a scalar."""
    return tl.sum(tl.sum(x, ROW_AXIS), 0)


@triton.jit
def any_of(mask):
    """Whether it is true in any lane."""
    return sum_of(mask.to(tl.int32)) > 0


@triton.jit
def number_of(mask):
    """How many pixels it has: int64."""
    total = tl.zeros(mask[0].shape, tl.int32)
    for i in tl.static_range(len(mask)):
        total += mask[i].to(tl.int32)
    return sum_of(total).to(tl.int64)


@triton.jit
def load_labels(
    label_map, image, lanes, num_classes, ignore_index, CELLS: tl.constexpr, outside_ptr=None,
    program=0,
):  # fmt: skip
    """int32, −1 where ignored or no pixel. The number of labels that are neither a class nor
    ignored is added to that of the program, if there is an `outside_ptr`."""
    inside, ptrs = inside_of(lanes, CELLS), pointers(label_map, image, lanes, CELLS)
    label = [tl.load(ptrs[i], mask=inside[i], other=0).to(tl.int64) for i in () + CELLS.columns]
    if outside_ptr is not None:
        outside = [
            inside[i] & ((label[i] < 0) | (label[i] >= num_classes)) & (label[i] != ignore_index)
            for i in () + CELLS.columns
        ]
        ptr = outside_ptr + program
        tl.store(ptr, tl.load(ptr) + number_of(outside))
    valid = [
        (label[i] >= 0) & (label[i] < num_classes) & (label[i] != ignore_index)
        for i in () + CELLS.columns
    ]
    return [tl.where(inside[i] & valid[i], label[i], -1).to(tl.int32) for i in () + CELLS.columns]


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def classes_of(labels):
    """Bit k % 32 is set if a pixel of these lanes has class k; bit 31 also if one is ignored."""
    bits = tl.zeros(labels[0].shape, tl.uint32)
    for i in tl.static_range(len(labels)):
        bits |= tl.full(labels[0].shape, 1, tl.uint32) << (labels[i] & 31).to(tl.uint32)
    return tl.reduce(tl.reduce(bits, ROW_AXIS, _either), 0, _either)


@triton.jit
def may_have(classes, k):
    """Whether a pixel has class k, or one that has its bit of classes_of."""
    return (classes >> (k & 31).to(tl.uint32)) & 1 != 0


@triton.jit
def next_label(labels, after):
    """The smallest label of all lanes beyond `after`, NO_CLASS if there is none."""
    smallest = tl.full(labels[0].shape, NO_CLASS, tl.int32)
    for i in tl.static_range(len(labels)):
        smallest = tl.minimum(smallest, tl.where(labels[i] > after, labels[i], NO_CLASS))
    return tl.min(tl.min(smallest, ROW_AXIS), 0)


@triton.jit
def largest_label(labels):
    largest = labels[0]
    for i in tl.static_range(1, len(labels)):
        largest = tl.maximum(largest, labels[i])
    return largest


@triton.jit
def load_map(pixel_map, image, lanes, labels, CELLS: tl.constexpr):
    """The numbers of valid pixels; 0 where ignored."""
    ptrs = pointers(pixel_map, image, lanes, CELLS)
    if CELLS.y.same:  # pixels that are loaded at once have one mask
        loaded = tl.load(ptrs[0], mask=inside_of(lanes, CELLS)[0], other=0.0)
        return (tl.where(labels[0] >= 0, loaded, 0.0),)
    else:
        return [tl.load(ptrs[i], mask=labels[i] >= 0, other=0.0) for i in () + CELLS.columns]


@triton.jit
def load_again(ptr, image, axes, lanes, labels, CELLS: tl.constexpr):
    """The numbers of a contiguous map, ∞ where ignored. Their addresses are computed in another way
    than in load_map: otherwise these would be kept in registers, and the numbers too."""
    row = (image * axes.y.pixels + lanes.y.start + rows_of_lane(CELLS)) * axes.x.pixels
    ptr += row + lanes.x.start
    return [tl.load(ptr + i, mask=labels[i] >= 0, other=INF) for i in () + CELLS.columns]


@triton.jit
def store_map(pixel_map, values, image, lanes, CELLS: tl.constexpr):
    inside, ptrs = inside_of(lanes, CELLS), pointers(pixel_map, image, lanes, CELLS)
    for i in tl.static_range(len(values)):
        tl.store(ptrs[i], values[i].to(pixel_map.ptr.dtype.element_ty), mask=inside[i])


@triton.jit
def values_of_labels(ptr, stride, labels):
    """A number of the class of each pixel; 0 where ignored."""
    return [
        tl.load(ptr + label.to(tl.int64) * stride, mask=label >= 0, other=0.0) for label in labels
    ]
