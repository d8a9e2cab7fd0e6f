"""The gradient of upsampled_sums. A program writes a tile of it. It computes the features' weights
again, for each key of the labels around the tile."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import without_spills
from .splat import NO_KEY, columns_around, first_key, splat_key, tile_at
from .upsampled_sums import SIZES_BUT_WIDTH, axes_without_lanes, launch_of


class Gradients(NamedTuple):
    """float32; dmean and dvariance are None if they have no gradient."""

    dsums: Any  # [num_keys, C]
    mean: Any  # [C]
    dmean: Any  # [C]
    dvariance: Any  # [C]


@triton.jit
def _gradient_of_moments(gradients, x, d, some, pixels):
    """The gradient of mean and variance over all pixels, [BLOCK_D, BLOCK_P] like the features x."""
    mean, dmean = tl.load(gradients.mean + d, mask=some), tl.load(gradients.dmean + d, mask=some)
    dvariance = tl.load(gradients.dvariance + d, mask=some)
    gradient = 2 * dvariance[:, None] * (x - mean[:, None]) + dmean[:, None]
    return gradient / pixels


@triton.jit(do_not_specialize=[*SIZES_BUT_WIDTH, "pixels", "label_rows"])
def _upsampled_sums_bwd_kernel(
    features,  # Features
    keys_ptr,  # [B, rows, columns] of labels, −1, or 255 in uint8, where ignored
    gradients,  # Gradients
    dfeatures_ptr,  # with the strides of the features
    image_keys,  # the sums of image i begin at row i·image_keys
    pixels,  # of all images
    height,
    width,
    label_height,
    label_width,
    ratios,  # Ratios
    label_rows,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Reads the features once, if the mean and variance have gradients; writes dfeatures once."""
    dim, axes = features.dim, axes_without_lanes(height, width, label_height, label_width, ratios)
    tiles = axes.y.source * tl.cdiv(width, BLOCK_P)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    some = d < dim
    keys_ptr += image * axes.y.pixels * axes.x.pixels
    dsums_ptrs = gradients.dsums + image * image_keys * dim + d
    tile = tile_at(tl.program_id(0) % tiles, axes, BLOCK_P)
    offset = (tile.y * width + tile.x).to(tl.int64)[None, :] * features.stride_p
    offset += d.to(tl.int64)[:, None] * features.stride_d + image * features.stride_b
    mask = some[:, None] & tile.inside[None, :]
    if gradients.dmean is not None:
        x = tl.load(features.ptr + offset, mask=mask, other=0.0).to(tl.float32)
        gradient = _gradient_of_moments(gradients, x, d, some, pixels)
    else:
        gradient = tl.zeros((BLOCK_D, BLOCK_P), tl.float32)
    columns = columns_around(tile, axes.x, BLOCK_L)
    first = first_key(keys_ptr, tile, axes)
    key = first
    while key < NO_KEY:
        weight, following = splat_key(keys_ptr, key, first, tile, columns, axes, label_rows)
        if key >= 0:
            dsums = tl.load(dsums_ptrs + key.to(tl.int64) * dim, mask=some, other=0.0)
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
    launch, keys = launch_of(features, keys), keys.contiguous()
    blocks = triton.cdiv(channels, launch.blocks["BLOCK_D"])
    image_keys = num_classes if len(dsums) > num_classes else 0
    _upsampled_sums_bwd_kernel[(len(features) * launch.tiles, blocks)](
        *(launch.features, keys, Gradients(dsums, mean, dmean, dvariance), dfeatures),
        *(image_keys, features.numel() // channels),
        *(*launch.sizes, launch.ratios, launch.label_rows),
        **launch.blocks,
        num_warps=8,
        enable_fp_fusion=False,  # positions as in the reference
        **without_spills(),
    )
    return dfeatures
