"""Bilinear upsampling of logits (B, K, h, w) to (B, H, W) inside a kernel, as in F.interpolate.

Coordinates are float32: (i + ½)·ratio − ½, with align_corners i·ratio. Each operation is rounded,
so kernels are compiled without fusing products and sums. A *cell* lies between four neighbouring
logits, c and c + 1 along each axis; without align_corners there is one more cell before the first
logit. Its label pixels are i = first_pixel(c) … first_pixel(c + 1) − 1. They are divided into
*parts* of at most SLOTS pixels along an axis; a *lane* of a kernel is one part along both axes.
Before the first and beyond the last logit both neighbours are the same logit.

If labels have the logits' size (SAME), a pixel is a cell and reads one logit.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED

MAX_SLOTS = 1 if INTERPRETED else 4  # along an axis: 16 pixels for each lane
# Arguments that change with the images' size. Triton does not compile again if one becomes 1 or a
# multiple of 16.
SIZES = ("height", "width", "label_height", "label_width")


class Axis(NamedTuple):
    """One axis of the upsampling. The first cell is `first`, −1 or 0. A cell has `parts` (a power
    of two) of `slots` pixels. `select`: a pixel may have weight 0 for a neighbour that it must not
    read. `even`: each cell has `slots` pixels, with weights (t + ½)/slots."""

    source: int  # logits
    size: int  # labels
    first: int
    parts: int
    slots: int
    select: bool
    even: bool
    ratio: float
    inverse: float

    @property
    def lanes(self) -> int:
        return (self.source - self.first) * self.parts


@lru_cache(maxsize=1024)
def axis_of(source: int, size: int, align_corners: bool) -> Axis:
    ratio = (source - 1) / max(size - 1, 1) if align_corners else source / max(size, 1)
    inverse = 1 / ratio if ratio else 0.0
    if source == size:
        return Axis(source, size, 0, 1, 1, True, False, ratio, inverse)
    at = torch.arange(size, dtype=torch.float32, device="cpu")
    at = at * torch.tensor(ratio) if align_corners else (at + 0.5) * torch.tensor(ratio) - 0.5
    cell = at.floor().clamp(max=source - 1)
    first = 0 if align_corners else -1
    most = int((cell.long() + 1).bincount().max())
    parts = triton.next_power_of_2(triton.cdiv(most, MAX_SLOTS))
    slots = triton.cdiv(most, parts)
    select = bool(((at == cell) & (cell < source - 1)).any())
    even = slots in (2, 4) and size == slots * source and not align_corners
    return Axis(source, size, first, parts, slots, select, even, ratio, inverse)


class Upsampling(NamedTuple):
    """The upsampling along both axes, and the arguments of a kernel that describe it."""

    y: Axis
    x: Axis
    align_corners: bool

    @property
    def same(self) -> bool:
        return self.y.source == self.y.size and self.x.source == self.x.size

    @property
    def lanes(self) -> int:
        """Of an image."""
        return self.y.lanes * self.x.lanes

    @property
    def arguments(self) -> tuple[int | float, ...]:
        """height, width, label_height, label_width, ratio_y, ratio_x, inverse_y, inverse_x"""
        y, x = self.y, self.x
        return y.source, x.source, y.size, x.size, y.ratio, x.ratio, y.inverse, x.inverse

    @property
    def constants(self) -> dict[str, int | bool]:
        """The constants of a compiled kernel. Fusing products and sums is switched off, because
        coordinates are rounded as in F.interpolate."""
        y, x = self.y, self.x
        return {
            "ALIGN_CORNERS": self.align_corners,
            "SAME": self.same,
            "FIRST_Y": y.first,
            "FIRST_X": x.first,
            "PARTS_Y": y.parts,
            "PARTS_X": x.parts,
            "SLOTS_Y": y.slots,
            "SLOTS_X": x.slots,
            "SELECT_Y": y.select,
            "SELECT_X": x.select,
            "EVEN_Y": y.even,
            "EVEN_X": x.even,
            "enable_fp_fusion": False,
        }


def upsampling_of(logits: Tensor, height: int, width: int, align_corners: bool) -> Upsampling:
    """From logits (B, K, h, w) to labels (B, height, width)."""
    y = axis_of(logits.shape[2], height, align_corners)
    x = axis_of(logits.shape[3], width, align_corners)
    return Upsampling(y, x, align_corners)


def classes_contiguous(logits: Tensor) -> bool:
    """Whether the classes of (B, K, h, w) are contiguous: channels last, and points (N, K)."""
    return logits.stride(1) < logits.stride(3)


def class_planes(logits: Tensor) -> Tensor:
    """Logits whose classes are not contiguous: a copy, if necessary. A lane reads the classes of
    its position one after the other. If classes are contiguous, each load of a warp would read 2 or
    4 bytes from each of 32 cache lines. This takes longer than the copy, which reads and writes the
    logits once."""
    return logits.contiguous() if classes_contiguous(logits) else logits


@triton.jit
def coordinate(i, ratio, ALIGN_CORNERS: tl.constexpr):
    if ALIGN_CORNERS:
        return i.to(tl.float32) * ratio
    else:
        return (i.to(tl.float32) + 0.5) * ratio - 0.5


@triton.jit
def first_pixel(cell, ratio, inverse, ALIGN_CORNERS: tl.constexpr):
    """The first label row (or column) whose coordinate is at least the cell. It is at most one away
    from where it would be without rounding."""
    if ALIGN_CORNERS:
        exact = cell.to(tl.float32) * inverse
    else:
        exact = (cell.to(tl.float32) + 0.5) * inverse - 0.5
    i = tl.ceil(exact).to(tl.int32) - 1
    i += (coordinate(i, ratio, ALIGN_CORNERS) < cell).to(tl.int32)
    i += (coordinate(i, ratio, ALIGN_CORNERS) < cell).to(tl.int32)
    return i


@triton.jit
def pixels_of_part(
    cell, part, source, size, ratio, inverse, FIRST: tl.constexpr, SLOTS: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """The first pixel of a part along an axis, and the end of its cell's pixels. A cell that does
    not exist has no pixels."""
    if SAME:
        start, stop = cell, tl.minimum(cell + 1, size)
    else:
        start = tl.maximum(first_pixel(cell, ratio, inverse, ALIGN_CORNERS), 0)
        stop = first_pixel(cell + 1, ratio, inverse, ALIGN_CORNERS)
        stop = tl.where(cell + 1 < source, tl.minimum(stop, size), size)
        start += part * SLOTS
    return start, tl.where((cell >= FIRST) & (cell < source), stop, start)


@triton.jit
def weights_of_axis(
    cell, start, source, ratio, SLOTS: tl.constexpr, EVEN: tl.constexpr, ALIGN_CORNERS: tl.constexpr
):  # fmt: skip
    """The weight of the upper neighbour, for each slot; any number if both neighbours are the same
    logit."""
    weights = ()
    one = (cell < 0) | (cell >= source - 1)
    for t in tl.static_range(SLOTS):
        if EVEN:
            weights = weights + ((t + 0.5) / SLOTS,)
        else:
            weight = coordinate(start + t, ratio, ALIGN_CORNERS) - cell.to(tl.float32)
            weights = weights + (tl.where(one, 0.5, weight),)
    return weights


@triton.jit
def neighbours(cell, source, stride):
    """Offsets of a cell's lower and upper neighbour along an axis."""
    lower = tl.minimum(tl.maximum(cell, 0), source - 1)
    upper = tl.minimum(tl.maximum(cell + 1, 0), source - 1)
    return lower.to(tl.int64) * stride, upper.to(tl.int64) * stride


@triton.jit
def along_axis(
    cell, part, source, size, ratio, inverse, stride, FIRST: tl.constexpr, SLOTS: tl.constexpr,
    EVEN: tl.constexpr, ALIGN_CORNERS: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """The three above."""
    start, stop = pixels_of_part(
        cell, part, source, size, ratio, inverse, FIRST, SLOTS, ALIGN_CORNERS, SAME
    )
    weights = weights_of_axis(cell, start, source, ratio, SLOTS, EVEN, ALIGN_CORNERS)
    lower, upper = neighbours(cell, source, stride)
    return start, stop, weights, lower, upper


@triton.jit
def corners(
    ptrs, lower_y, upper_y, lower_x, upper_x, SAME: tl.constexpr
):  # fmt: skip
    """The four logits of a cell, float32; one logit if the sizes are the same."""
    x00 = tl.load(ptrs + lower_y + lower_x).to(tl.float32)
    if SAME:
        return x00, x00, x00, x00
    else:
        x01 = tl.load(ptrs + lower_y + upper_x).to(tl.float32)
        x10 = tl.load(ptrs + upper_y + lower_x).to(tl.float32)
        x11 = tl.load(ptrs + upper_y + upper_x).to(tl.float32)
        return x00, x01, x10, x11


@triton.jit
def between(low, high, weight, SELECT: tl.constexpr):
    z = tl.fma(weight, high, (1 - weight) * low)
    if SELECT:  # 0 · NaN would be NaN
        z = tl.where(weight == 0, low, z)
    return z


@triton.jit
def upsampled(
    x00, x01, x10, x11, weights_y, weights_x, SLOTS_Y: tl.constexpr, SLOTS_X: tl.constexpr,
    SELECT_Y: tl.constexpr, SELECT_X: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """The logits z of a lane's SLOTS_Y × SLOTS_X pixels."""
    if SAME:
        return (x00,)
    else:
        z = ()
        for y in tl.static_range(SLOTS_Y):
            left = between(x00, x10, weights_y[y], SELECT_Y)
            right = between(x01, x11, weights_y[y], SELECT_Y)
            for x in tl.static_range(SLOTS_X):
                z = z + (between(left, right, weights_x[x], SELECT_X),)
        return z


@triton.jit
def logits_of_pixels(
    ptrs, lower_y, upper_y, lower_x, upper_x, weights_y, weights_x, SLOTS_Y: tl.constexpr,
    SLOTS_X: tl.constexpr, SELECT_Y: tl.constexpr, SELECT_X: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """The same, from the class's logits in memory."""
    x00, x01, x10, x11 = corners(ptrs, lower_y, upper_y, lower_x, upper_x, SAME)
    return upsampled(
        x00, x01, x10, x11, weights_y, weights_x, SLOTS_Y, SLOTS_X, SELECT_Y, SELECT_X, SAME
    )


@triton.jit
def first_larger(z, best):
    """Whether z replaces the best logit before it. NaN is larger than all numbers."""
    return (z > best) | ((z != z) & (best == best))
