"""Functions that read labels and maps for the pixels of a lane (upsampling.py). They return tuples
of tensors [lanes]; pixel (i, j) of SLOTS_Y × SLOTS_X is element i · SLOTS_X + j."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
NO_CLASS = tl.constexpr(2**31 - 1)


@triton.jit
def filled(value, LANES: tl.constexpr, PIXELS: tl.constexpr, DTYPE: tl.constexpr):
    out = ()
    for _ in tl.static_range(PIXELS):
        out = out + (tl.full((LANES,), value, DTYPE),)
    return out


@triton.jit
def load_labels(
    labels_ptr, start_y, stop_y, start_x, stop_x, stride_y, stride_x, num_classes, ignore_index,
    SLOTS_Y: tl.constexpr, SLOTS_X: tl.constexpr,
):  # fmt: skip
    """int32, −1 where ignored or no pixel."""
    labels = ()
    for i in tl.static_range(SLOTS_Y):
        for j in tl.static_range(SLOTS_X):
            y, x = start_y + i, start_x + j
            offset = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
            inside = (y < stop_y) & (x < stop_x)
            label = tl.load(labels_ptr + offset, mask=inside, other=0).to(tl.int64)
            valid = inside & (label >= 0) & (label < num_classes) & (label != ignore_index)
            labels = labels + (tl.where(valid, label, -1).to(tl.int32),)
    return labels


@triton.jit
def next_label(labels, after, PIXELS: tl.constexpr):
    """The smallest label of all lanes beyond `after`, NO_CLASS if there is none."""
    smallest = tl.full(labels[0].shape, NO_CLASS, tl.int32)
    for i in tl.static_range(PIXELS):
        smallest = tl.minimum(smallest, tl.where(labels[i] > after, labels[i], NO_CLASS))
    return tl.min(smallest, 0)


@triton.jit
def load_map(
    ptr, labels, start_y, start_x, stride_y, stride_x, SLOTS_Y: tl.constexpr, SLOTS_X: tl.constexpr
):  # fmt: skip
    """A number for each valid pixel."""
    out = ()
    for i in tl.static_range(SLOTS_Y):
        for j in tl.static_range(SLOTS_X):
            y, x = (start_y + i).to(tl.int64), (start_x + j).to(tl.int64)
            valid = labels[i * SLOTS_X + j] >= 0
            out = out + (tl.load(ptr + y * stride_y + x * stride_x, mask=valid, other=0.0),)
    return out
