"""Bilinear upsampling of logits (B, K, h, w) to (B, H, W) inside a kernel, as in F.interpolate.

Coordinates are float32: (i + ½)·ratio − ½, with align_corners i·ratio. Each operation is rounded,
so kernels are compiled without fusing products and sums. A *cell* lies between four neighbouring
logits, c and c + 1 along each axis; without align_corners there is one more cell before the first
logit. Its label pixels are i = first_pixel(c) … first_pixel(c + 1) − 1. They are divided into
*parts* of at most MOST_ROWS or MOST_COLUMNS pixels; a *lane* is one part along both axes. Before
the first and beyond the last logit both neighbours are the same logit.

What lanes have in common is a tensor [1, lanes]. Something of their pixels is a list: for each
column of a lane's pixels a tensor [rows, lanes]. So Triton compiles one access to memory for four
pixels; its time grows with the number of accesses, and with the code around them.

If labels have the logits' size (`same`), a pixel is a cell and reads one logit. If the pixels of an
image then follow each other in memory, they are one row, of which a lane has ADJACENT cells, which
it loads and stores at once. What lanes have in common is then [cells, lanes].
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion

from .constants import Constant

# Pixels of a lane, 16 together. With aligned corners, cells have five pixels if labels have four
# times as many as logits; along the columns they are one part.
MOST_ROWS, MOST_COLUMNS = 4, 5
# Lanes of a program of the forward direction: one warp, because it sums without barriers.
FORWARD_LANES = 32
# Cells of a lane, if the sizes are the same. Four float32 are the widest store.
ADJACENT = 4
# Of [rows, lanes]; with Triton 3.6 they are [lanes, rows], because a lane's rows should be in one
# thread: of a tensor of pointers that is contiguous along no axis, Triton 3.6 puts neighbours along
# the first axis into different threads, later versions those along the last one.
ROW_AXIS = Constant(0 if TorchVersion(triton.__version__) >= "3.7" else 1)
# Arguments that change with the images' size are in do_not_specialize: then Triton does not compile
# again if one becomes 1 or a multiple of 16. It would, if they were elements of a tuple.
SIZES = ("height", "width", "label_height", "label_width")


def strides_of(name: str, axes: str) -> tuple[str, ...]:
    """The names of a tensor's strides."""
    return tuple(f"{name}_{axis}" for axis in axes)


LOGITS = ("num_classes", *strides_of("logits", "bkhw"))


class YX(NamedTuple):
    """Something along the rows and along the columns."""

    y: Any
    x: Any


class Axis(NamedTuple):
    """One axis of the upsampling."""

    source: int  # logits
    pixels: int  # labels
    ratio: float
    inverse: float
    lanes: int


class Cells(NamedTuple):
    """The cells along an axis, for which kernels are compiled. The first cell is `first`, −1 or 0.
    A cell has `parts` (a power of two) of at most `pixels` pixels. `select`: a pixel may have
    weight 0 for a neighbour that it must not read. `even`: each part has `pixels` pixels, 2 or 4,
    and the pixels of a cell have the weights (t + ½)/(parts·pixels). `same`: labels have the
    logits' size; then `pixels` are those of a lane, each of them a cell. These three are the same
    along both axes, because each combination would be compiled."""

    first: int
    parts: int
    pixels: int
    select: bool
    even: bool
    align_corners: bool
    same: bool


class Grid(NamedTuple):
    """The cells along both axes; and the numbers 0, 1, … of the columns of a lane's pixels. Kernels
    write `for i in () + CELLS.columns`: a comprehension needs a tuple, and CELLS.columns is a
    constant."""

    y: Cells
    x: Cells
    columns: tuple[int, ...]


class Ratios(NamedTuple):
    y: float
    x: float
    inverse_y: float
    inverse_x: float


def _check_lanes(lanes: int) -> None:
    if lanes >= 2**31:
        raise ValueError(f"upsampling: expected images of fewer than 2^31 positions, got {lanes}")


@lru_cache(maxsize=1024)
def axis_of(
    source: int, pixels: int, align_corners: bool, most_pixels: int, rows: bool
) -> tuple[Axis, Cells]:
    """`rows`: along the rows of pixels, whose number in a tensor is a power of two."""
    ratio = (source - 1) / max(pixels - 1, 1) if align_corners else source / max(pixels, 1)
    inverse = 1 / ratio if ratio else 0.0
    if source == pixels:
        _check_lanes(source)
        cells = Cells(0, 1, 1, True, False, align_corners, True)
        return Axis(source, pixels, ratio, inverse, source), cells
    if max(source, pixels) > 2**23:  # pixel + 1/2 must be exact
        raise ValueError(
            "upsampling in float32: expected axes of at most 2^23 logits and labels, got "
            f"{source} and {pixels}"
        )
    at = torch.arange(pixels, dtype=torch.float32, device="cpu")
    step = torch.tensor(ratio, dtype=torch.float32, device="cpu")
    at = at * step if align_corners else (at + 0.5) * step - 0.5
    cell = at.floor().clamp(max=source - 1)
    first = 0 if align_corners else -1
    most = int((cell.long() + 1).bincount().max())
    parts = triton.next_power_of_2(triton.cdiv(most, most_pixels))
    part = triton.cdiv(most, parts)
    part = triton.next_power_of_2(part) if rows else part
    select = bool(((at == cell) & (cell < source - 1)).any())
    even = part in (2, 4) and pixels == parts * part * source and not align_corners
    axis = Axis(source, pixels, ratio, inverse, (source - first) * parts)
    return axis, Cells(first, parts, part, select, even, align_corners, False)


class Upsampling(NamedTuple):
    """The upsampling along both axes, and the arguments of a kernel that describe it."""

    y: Axis
    x: Axis
    cells: Grid

    @property
    def lanes(self) -> int:
        """The number of lanes of an image."""
        return self.y.lanes * self.x.lanes

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The arguments SIZES."""
        return self.y.source, self.x.source, self.y.pixels, self.x.pixels

    @property
    def ratios(self) -> Ratios:
        return Ratios(self.y.ratio, self.x.ratio, self.y.inverse, self.x.inverse)


def _follow_each_other(tensor: Tensor) -> bool:
    """Whether the pixels of an image are one row, of which ADJACENT ones can be loaded at once."""
    *strides, stride_h, stride_w = tensor.stride()
    height, width = tensor.shape[-2:]
    one_row = stride_w == 1 and (stride_h == width or height == 1)
    steps = height * width, *strides
    return one_row and tensor.data_ptr() % 16 == 0 and all(step % ADJACENT == 0 for step in steps)


def _of_one_row(pixels: int, align_corners: bool) -> Upsampling:
    """Logits and labels of the same size, with ADJACENT pixels for a lane."""
    y, cells = axis_of(1, 1, align_corners, 1, True)
    x, _ = axis_of(pixels, pixels, align_corners, 1, False)
    cells_x = cells._replace(pixels=ADJACENT)
    return Upsampling(y, x._replace(lanes=pixels // ADJACENT), Grid(cells, cells_x, (0,)))


def upsampling_of(
    logits: Tensor,
    height: int,
    width: int,
    align_corners: bool,
    most_rows: int | None = None,
    most_columns: int | None = None,
    maps: Sequence[Tensor | None] | None = None,
) -> Upsampling:
    """From logits (B, K, h, w) to labels (B, height, width). A part has at most so many rows and
    columns of pixels; None: MOST_ROWS, MOST_COLUMNS. `maps`: everything else (…, height, width)
    that a kernel accesses by the same lanes, except for new tensors; None: its lanes must not have
    several cells."""
    one_row = maps is not None and logits.shape[2:] == (height, width)
    if one_row and all(_follow_each_other(x) for x in (logits, *(maps or ())) if x is not None):
        return _of_one_row(height * width, align_corners)
    most = most_rows or MOST_ROWS, most_columns or MOST_COLUMNS
    return _of_sizes(*logits.shape[2:], height, width, align_corners, *most)


@lru_cache(maxsize=1024)
def _of_sizes(
    source_height: int,
    source_width: int,
    height: int,
    width: int,
    align_corners: bool,
    most_rows: int,
    most_columns: int,
) -> Upsampling:
    x, cells_x = axis_of(source_width, width, align_corners, most_columns, False)
    rows = min(most_rows, 16 // triton.next_power_of_2(cells_x.pixels))
    y, cells_y = axis_of(source_height, height, align_corners, rows, True)
    joined = {
        "select": cells_y.select or cells_x.select,
        "even": cells_y.even and cells_x.even,
        "same": cells_y.same and cells_x.same,
    }
    cells_y, cells_x = cells_y._replace(**joined), cells_x._replace(**joined)
    _check_lanes(y.lanes * x.lanes)
    return Upsampling(y, x, Grid(cells_y, cells_x, tuple(range(cells_x.pixels))))


class Logits(NamedTuple):
    """[B, K, h, w] by strides."""

    ptr: Any
    num_classes: int
    stride_b: int
    stride_k: int
    stride_h: int
    stride_w: int


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
def axes_of(height, width, label_height, label_width, ratios, CELLS: tl.constexpr):
    lanes_y = (height - CELLS.y.first) * CELLS.y.parts
    lanes_x = (width - CELLS.x.first) * CELLS.x.parts
    if CELLS.x.same:
        lanes_x = width // CELLS.x.pixels
    return YX(
        Axis(height, label_height, ratios.y, ratios.inverse_y, lanes_y),
        Axis(width, label_width, ratios.x, ratios.inverse_x, lanes_x),
    )


@triton.jit
def logits_of_image(logits, image):
    """The logits of one image."""
    ptr = logits.ptr + image.to(tl.int64) * logits.stride_b
    return Logits(
        ptr,
        logits.num_classes,
        logits.stride_b,
        logits.stride_k,
        logits.stride_h,
        logits.stride_w,
    )


@triton.jit
def coordinate(i, axis, ALIGN_CORNERS: tl.constexpr):
    if ALIGN_CORNERS:
        return i.to(tl.float32) * axis.ratio
    else:
        return (i.to(tl.float32) + 0.5) * axis.ratio - 0.5


@triton.jit
def first_pixel(cell, axis, CELLS: tl.constexpr):
    """The first label row (or column) whose coordinate is at least the cell. It is at most one away
    from where it would be without rounding."""
    if CELLS.align_corners:
        exact = cell.to(tl.float32) * axis.inverse
    else:
        exact = (cell.to(tl.float32) + 0.5) * axis.inverse - 0.5
    i = tl.ceil(exact).to(tl.int32) - 1
    i += (coordinate(i, axis, CELLS.align_corners) < cell).to(tl.int32)
    i += (coordinate(i, axis, CELLS.align_corners) < cell).to(tl.int32)
    return i


@triton.jit
def pixels_of_part(cell, part, axis, CELLS: tl.constexpr):
    """The first pixel of a part along an axis, and the end of its cell's pixels. A cell that does
    not exist has no pixels."""
    if CELLS.same:
        start, stop = cell, tl.minimum(cell + 1, axis.pixels)
    else:
        start = tl.maximum(first_pixel(cell, axis, CELLS), 0) + part * CELLS.pixels
        stop = first_pixel(cell + 1, axis, CELLS)
        stop = tl.where(cell + 1 < axis.source, tl.minimum(stop, axis.pixels), axis.pixels)
    return start, tl.where((cell >= CELLS.first) & (cell < axis.source), stop, start)


@triton.jit
def rows_of_lane(CELLS: tl.constexpr):
    """0, 1, … for the rows of a lane's pixels: [rows, 1]."""
    ROWS: tl.constexpr = CELLS.y.pixels
    return tl.expand_dims(tl.arange(0, ROWS), 1 - ROW_AXIS)


@triton.jit
def zeros_of_pixels(lanes, CELLS: tl.constexpr):
    """float32 [rows, lanes]"""
    return tl.zeros((rows_of_lane(CELLS) + lanes.x.cell).shape, tl.float32)


@triton.jit
def weight_of(t, cell, part, start, axis, CELLS: tl.constexpr):
    """The weight of the upper neighbour, for pixel t of a part; any number if both neighbours are
    the same logit."""
    if CELLS.even:
        return (part * CELLS.pixels + (t + 0.5)) / (CELLS.pixels * CELLS.parts)
    else:
        one = (cell < 0) | (cell >= axis.source - 1)
        weight = coordinate(start + t, axis, CELLS.align_corners) - cell.to(tl.float32)
        return tl.where(one, 0.5, weight)


@triton.jit
def cells_of_lane(CELLS: tl.constexpr):
    """0, 1, … for the cells of a lane along an axis, if the sizes are the same: [cells, 1]."""
    return tl.expand_dims(tl.arange(0, CELLS.pixels), 1 - ROW_AXIS)


@triton.jit
def at_pixels(ptrs, offsets, CELLS: tl.constexpr):
    """ptrs + offsets, one for each pixel. Tells the compiler which of them a lane accesses at once.
    (It is told of the results of an operation, not of arguments.)"""
    ptrs += offsets
    if CELLS.y.same and CELLS.x.pixels > 1:
        PIXELS: tl.constexpr = CELLS.x.pixels
        SIZE: tl.constexpr = ptrs.dtype.element_ty.primitive_bitwidth // 8
        BYTES: tl.constexpr = tl.constexpr(min(PIXELS * SIZE, 16))
        if ROW_AXIS == 0:
            ptrs = tl.max_contiguous(tl.multiple_of(ptrs, (BYTES, 1)), (PIXELS, 1))
        else:
            ptrs = tl.max_contiguous(tl.multiple_of(ptrs, (1, BYTES)), (1, PIXELS))
    return ptrs


@triton.jit
def both(mask_y, mask_x, CELLS: tl.constexpr):
    """A mask of pixels, by rows and columns. It is the same for what a lane accesses at once."""
    mask = mask_y & mask_x
    if CELLS.y.same and CELLS.x.pixels > 1:
        PIXELS: tl.constexpr = CELLS.x.pixels
        if ROW_AXIS == 0:
            mask = tl.max_constancy(mask, (PIXELS, 1))
        else:
            mask = tl.max_constancy(mask, (1, PIXELS))
    return mask


@triton.jit
def neighbours(cell, axis, stride):
    """Offsets of a cell's lower and upper neighbour along an axis."""
    lower = tl.minimum(tl.maximum(cell, 0), axis.source - 1)
    upper = tl.minimum(tl.maximum(cell + 1, 0), axis.source - 1)
    return lower.to(tl.int64) * stride, upper.to(tl.int64) * stride


@triton.jit
def neighbours_of_lane(cell, axis, stride, CELLS: tl.constexpr):
    """The same of the cells of a lane."""
    if CELLS.same:
        last = axis.source - CELLS.pixels + cells_of_lane(CELLS)
        offset = tl.minimum(cell, last).to(tl.int64) * stride
        return offset, offset
    else:
        return neighbours(cell, axis, stride)


class Span(NamedTuple):
    """Lanes along an axis: their cells, and what the functions above return."""

    cell: Any
    start: Any
    stop: Any
    weights: Any  # of the rows a tensor [rows, lanes], of the columns a list
    lower: Any
    upper: Any


@triton.jit
def lanes_at(cell, part, axes, logits, CELLS: tl.constexpr):
    """The lanes of these cells and parts, along both axes."""
    Y: tl.constexpr = CELLS.y
    X: tl.constexpr = CELLS.x
    top, bottom = pixels_of_part(cell.y, part.y, axes.y, Y)
    left, right = pixels_of_part(cell.x, part.x, axes.x, X)
    weights_y = weight_of(rows_of_lane(CELLS), cell.y, part.y, top, axes.y, Y)
    weights_x = [weight_of(i, cell.x, part.x, left, axes.x, X) for i in () + CELLS.columns]
    lower_y, upper_y = neighbours_of_lane(cell.y, axes.y, logits.stride_h, Y)
    lower_x, upper_x = neighbours_of_lane(cell.x, axes.x, logits.stride_w, X)
    return YX(
        Span(cell.y, top, bottom, weights_y, lower_y, upper_y),
        Span(cell.x, left, right, weights_x, lower_x, upper_x),
    )


@triton.jit
def lanes_of_tile(tile, axes, logits, CELLS: tl.constexpr, LANES: tl.constexpr):
    """A tile is LANES lanes of an image that follow each other."""
    X: tl.constexpr = CELLS.x
    lane = tile * LANES + tl.expand_dims(tl.arange(0, LANES), ROW_AXIS)
    y, x = lane // axes.x.lanes, lane % axes.x.lanes
    if X.same:
        x = x * X.pixels + cells_of_lane(X)
    cell = YX(y // CELLS.y.parts + CELLS.y.first, x // CELLS.x.parts + CELLS.x.first)
    return lanes_at(cell, YX(y % CELLS.y.parts, x % CELLS.x.parts), axes, logits, CELLS)


@triton.jit
def corner_ptrs(ptr, lanes, CELLS: tl.constexpr):
    """Pointers to the four logits of a cell; to one if the sizes are the same. Long loops over the
    classes carry them: Triton takes longer to compile a load whose pointer is computed inside the
    loop."""
    y, x = lanes.y, lanes.x
    if CELLS.y.same:
        return (at_pixels(ptr, y.lower + x.lower, CELLS),)
    else:
        top, bottom = ptr + y.lower, ptr + y.upper
        return (top + x.lower, top + x.upper, bottom + x.lower, bottom + x.upper)


@triton.jit
def next_class(ptrs, stride_k, CELLS: tl.constexpr):
    """The pointers of corner_ptrs, moved to the next class."""
    return [at_pixels(ptr, stride_k, CELLS) for ptr in ptrs]


@triton.jit
def _step_after(k, logits):
    return tl.where(k + 1 < logits.num_classes, logits.stride_k, 0)


@triton.jit
def class_after(ptr, k, logits):
    """A pointer to class k, moved to the next one, if there is one."""
    return ptr + _step_after(k, logits)


@triton.jit
def following(ptrs, k, logits, CELLS: tl.constexpr):
    """The pointers of corner_ptrs, moved from class k to the next one, if there is one."""
    return next_class(ptrs, _step_after(k, logits), CELLS)


@triton.jit
def at_first_class(ptrs, logits, CELLS: tl.constexpr):
    """The pointers of corner_ptrs, moved from the last class to class 0, for the next loop: kept
    beside those that move, they would need registers."""
    return next_class(ptrs, -(logits.num_classes - 1).to(tl.int64) * logits.stride_k, CELLS)


@triton.jit
def loaded(ptrs):
    """Loops request the logits of the next class before they use those of one: otherwise they would
    wait for memory in every iteration."""
    return [tl.load(ptr) for ptr in ptrs]


@triton.jit
def corners_of(stored, CELLS: tl.constexpr):
    """The four logits of a cell, float32, from what was loaded; four times the same logit if the
    sizes are the same."""
    four = [x.to(tl.float32) for x in stored]
    if CELLS.y.same:
        return four[0], four[0], four[0], four[0]
    else:
        return four


@triton.jit
def corners_of_class(ptrs, k, logits, CELLS: tl.constexpr):
    """The four logits of a cell, of class k. ptrs: corner_ptrs of class 0."""
    return corners_of(loaded(next_class(ptrs, k.to(tl.int64) * logits.stride_k, CELLS)), CELLS)


@triton.jit
def between(low, high, weight, SELECT: tl.constexpr):
    z = tl.fma(weight, high, (1 - weight) * low)
    if SELECT:  # 0 · NaN would be NaN
        z = tl.where(weight == 0, low, z)
    return z


@triton.jit
def upsampled(four, lanes, CELLS: tl.constexpr):
    """z of a lane's pixels, from the four logits of its cell."""
    x00, x01, x10, x11 = four
    if CELLS.y.same:
        return (x00,)
    else:
        left = between(x00, x10, lanes.y.weights, CELLS.y.select)
        right = between(x01, x11, lanes.y.weights, CELLS.y.select)
        return [between(left, right, weight, CELLS.x.select) for weight in lanes.x.weights]
