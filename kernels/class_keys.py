"""Class keys: labels at any size -> one integer key per pixel, and the number of pixels per key."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .constants import Constant

BLOCK_P = Constant(256)  # pixels of a program that needs their keys alone


@triton.jit
def add_counts(counts_ptr, key):
    """counts[key] += 1 for each non-negative key of a tile. The keys are sorted, so equal keys form
    runs: a run from i to j adds (j + 1) − i."""
    run = tl.sort(key)
    i = tl.arange(0, key.shape[0])
    starts = (i == 0) | (run != tl.gather(run, tl.maximum(i - 1, 0), 0))
    ends = (i == key.shape[0] - 1) | (run != tl.gather(run, tl.minimum(i + 1, key.shape[0] - 1), 0))
    counts_ptrs = counts_ptr + run
    tl.atomic_add(counts_ptrs, -i.to(tl.int64), mask=starts & (run >= 0), sem="relaxed")
    tl.atomic_add(counts_ptrs, i.to(tl.int64) + 1, mask=ends & (run >= 0), sem="relaxed")


@triton.jit(
    do_not_specialize=[
        *("labels_b", "labels_h", "label_height", "label_width"),
        *("pixels", "width", "tiles_per_image"),
    ]
)
def _class_keys_kernel(
    labels_ptr,  # integers [B, H', W']
    labels_b,
    labels_h,
    labels_w,
    label_height,
    label_width,
    keys_ptr,  # int32, or a smaller dtype for classes alone [B, P]
    counts_ptr,  # int64 [K] or [B, K], zero on entry
    pixels,
    width,
    tiles_per_image,
    scales,  # of rows and columns: the labels' size / the keys' size
    num_classes,
    ignore_index,
    PER_IMAGE: tl.constexpr,
    IMAGE_IN_KEY: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    RESIZE: tl.constexpr,
):
    """Reads each used label once, writes one key per pixel. The label of pixel i along an axis is
    floor(i · scale) in float32, as F.interpolate selects it. The counts use integer atomics, two
    for each key of a tile; their order does not matter."""
    tile = tl.program_id(0)
    image = tile // tiles_per_image
    pixel = (tile % tiles_per_image).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < pixels

    x = pixel
    offset = image.to(tl.int64) * labels_b
    if HAS_ROWS:  # an image: fewer than 2^31 pixels
        y = pixel.to(tl.int32) // width
        x = pixel.to(tl.int32) % width
        if RESIZE:
            y = tl.minimum((y.to(tl.float32) * scales[0]).to(tl.int32), label_height - 1)
            x = tl.minimum((x.to(tl.float32) * scales[1]).to(tl.int32), label_width - 1)
        offset += y.to(tl.int64) * labels_h
    offset += x.to(tl.int64) * labels_w
    label = tl.load(labels_ptr + offset, mask=inside, other=0)
    label = label.to(tl.int64)
    valid = inside & (label >= 0) & (label < num_classes) & (label != ignore_index)
    key = label.to(tl.int32)
    counted = key + image * num_classes if PER_IMAGE else key
    key = tl.where(valid, counted if IMAGE_IN_KEY else key, -1).to(keys_ptr.dtype.element_ty)
    tl.store(keys_ptr + image.to(tl.int64) * pixels + pixel, key, mask=inside)

    add_counts(counts_ptr, tl.where(valid, counted, -1))


@triton.jit
def as_int32(keys):
    """Keys that the kernel stored: −1 where ignored, also if uint8 has 255 there."""
    wide = keys.to(tl.int32)
    return tl.where(wide == 255, -1, wide) if keys.dtype == tl.uint8 else wide


def class_keys(
    labels: Tensor,
    height: int,
    width: int,
    num_classes: int,
    per_image: bool,
    ignore_index: int,
    class_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """labels [B, H', W'] -> keys int32 [B, height·width], counts int64 [K] or [B, K]. With
    class_dtype, keys are the classes alone, in this dtype."""
    batch, label_height, label_width = labels.shape
    pixels = height * width
    keys = labels.new_empty((batch, pixels), dtype=class_dtype or torch.int32)
    shape = (batch, num_classes) if per_image else (num_classes,)
    counts = labels.new_zeros(shape, dtype=torch.int64)
    if keys.numel() == 0:
        return keys, counts
    resize = (height, width) != (label_height, label_width)
    _, stride_y, stride_x = labels.stride()
    has_rows = resize or not (height == 1 or stride_y == width * stride_x)
    if has_rows and pixels >= 2**31:
        raise ValueError(f"class_keys: expected images of fewer than 2^31 pixels, got {pixels}")
    tiles_per_image = triton.cdiv(pixels, BLOCK_P.value)
    _class_keys_kernel[(batch * tiles_per_image,)](
        labels,
        *labels.stride(),
        label_height,
        label_width,
        keys,
        counts,
        pixels,
        width,
        tiles_per_image,
        (label_height / height, label_width / width),
        num_classes,
        ignore_index,
        PER_IMAGE=per_image,
        IMAGE_IN_KEY=per_image and class_dtype is None,
        HAS_ROWS=has_rows,
        RESIZE=resize,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return keys, counts
