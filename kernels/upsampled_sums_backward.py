"""The gradient of upsampled_sums. A program writes a tile of it. It computes the features' weights
again, for each key of the labels around the tile."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import without_spills
from .splat import NO_KEY, as_int32, labels_around, splat_key
from .upsampled_sums import grid_of, tiles_of


@triton.jit(do_not_specialize=["label_rows"])
def _upsampled_sums_bwd_kernel(
    features_ptr,
    keys_ptr,  # [B, label_height, label_width], −1, or 255 in uint8, where ignored
    dsums_ptr,  # float32 [num_keys, C]
    mean_ptr,  # float32 [C]
    dmean_ptr,  # float32 [C]
    dvariance_ptr,  # float32 [C]
    dfeatures_ptr,
    channels,
    image_keys,  # the sums of image i begin at row i·image_keys
    pixels,  # of all images
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
    HAS_MOMENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Reads the features once, if the mean and variance have gradients; writes dfeatures once."""
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    some = d < channels
    keys_ptr += image * label_height * label_width
    dsums_ptr += image * image_keys * channels
    row_tiles = tl.cdiv(width, BLOCK_P)
    y, start = tile // row_tiles, tile % row_tiles * BLOCK_P
    x = start + tl.arange(0, BLOCK_P)
    inside = x < width
    offset = d.to(tl.int64)[:, None] * stride_d + (y * width + x)[None, :] * stride_p
    offset += image * stride_b
    mask = some[:, None] & inside[None, :]
    if HAS_MOMENTS:
        features = tl.load(features_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        mean, dmean = tl.load(mean_ptr + d, mask=some), tl.load(dmean_ptr + d, mask=some)
        dvariance = tl.load(dvariance_ptr + d, mask=some)
        gradient = 2 * dvariance[:, None] * (features - mean[:, None]) + dmean[:, None]
        gradient = gradient / pixels
    else:
        gradient = tl.zeros((BLOCK_D, BLOCK_P), tl.float32)
    columns, around, weights = labels_around(x, label_width, width, step_x, labels_each_x, BLOCK_L)
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
            dsums = tl.load(dsums_ptr + key.to(tl.int64) * channels + d, mask=some, other=0.0)
            gradient += dsums[:, None] * weight[None, :]
        key = following
    tl.store(dfeatures_ptr + offset, gradient.to(dfeatures_ptr.dtype.element_ty), mask=mask)


def upsampled_sums_backward(
    features: Tensor,
    keys: Tensor,
    dsums: Tensor,
    mean: Tensor,
    dmean: Tensor | None,
    dvariance: Tensor | None,
    num_classes: int,
) -> Tensor:
    """Everything except the features contiguous -> dfeatures, with the features' strides."""
    dfeatures, channels = torch.empty_like(features), features.shape[1]
    if features.numel() == 0:
        return dfeatures
    grid, keys = grid_of(features, keys), keys.contiguous()
    blocks = triton.cdiv(channels, grid.blocks["BLOCK_D"])
    image_keys = num_classes if len(dsums) > num_classes else 0
    _upsampled_sums_bwd_kernel[(tiles_of(grid), len(features), blocks)](
        *(features, keys, dsums, mean, dmean, dvariance, dfeatures, channels),
        *(image_keys, features.numel() // channels, *grid.strides, *grid.sizes, *grid.axes),
        HAS_MOMENTS=dmean is not None,
        **grid.blocks,
        num_warps=8,
        enable_fp_fusion=False,  # positions as in the reference
        **without_spills(),
    )
    return dfeatures
