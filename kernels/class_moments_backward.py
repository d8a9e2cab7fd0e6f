"""The gradient of class moments.

dfeatures[p] = 2·dsqdists[k]·(f_p − a_k) + dsums[k],  k = key_p;  0 where ignored
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import as_pixels, check_keys, tile_of


@triton.jit(do_not_specialize=["tiles_per_line"])
def _class_moments_bwd_kernel(
    features_ptr,  # [B, D, P] by strides
    keys_ptr,  # int32 [B, P], −1 where ignored
    anchors_ptr,  # float32 [K, D] by strides
    dsums_ptr,  # float32 [num_keys, D] by strides
    dsqdists_ptr,  # float32 [num_keys] by stride
    dfeatures_ptr,  # [B, D, P] by strides
    dim,
    pixels,
    lines_per_image,
    tiles_per_line,
    num_classes,
    groups,
    stride_features_b,
    stride_features_h,
    stride_features_d,
    stride_features_p,
    stride_anchors_k,
    stride_anchors_d,
    stride_dsums_k,
    stride_dsums_d,
    stride_dsqdists_k,
    stride_dfeatures_b,
    stride_dfeatures_h,
    stride_dfeatures_d,
    stride_dfeatures_p,
    HAS_DSUMS: tl.constexpr,
    HAS_DSQDISTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Writes dfeatures once. Reads the features once if sqdists has a gradient, otherwise not at
    all. A tile of one key reads a column of the tables; other tiles gather from the caches."""
    blocks = tl.cdiv(dim, BLOCK_D)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    line = tile // tiles_per_line
    image, row = (line // lines_per_image).to(tl.int64), (line % lines_per_image).to(tl.int64)
    d = (block * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    channels = d < dim
    pixel = (tile % tiles_per_line).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    key = tl.load(keys_ptr + line.to(tl.int64) * pixels + pixel, mask=pixel < pixels, other=-1)

    dfeatures_ptr += image * stride_dfeatures_b + row * stride_dfeatures_h
    dfeatures_ptrs = (
        dfeatures_ptr + (d * stride_dfeatures_d)[:, None] + (pixel * stride_dfeatures_p)[None, :]
    )
    if HAS_DSQDISTS:
        features_ptr += image * stride_features_b + row * stride_features_h
        features_ptrs = (
            features_ptr + (d * stride_features_d)[:, None] + (pixel * stride_features_p)[None, :]
        )
        anchors_ptr += d * stride_anchors_d
    if HAS_DSUMS:
        dsums_ptr += d * stride_dsums_d
    out = tl.zeros((BLOCK_D, BLOCK_P), tl.float32)
    inside = channels[:, None] & (pixel < pixels)[None, :]
    low, high = tl.min(key, 0), tl.max(key, 0)
    if low == high:
        k = low.to(tl.int64)
        taken_d = d < tl.where(k >= 0, dim, 0)
        if HAS_DSQDISTS:
            x = tl.load(
                features_ptrs, inside & taken_d[:, None], 0.0, eviction_policy="evict_first"
            )
            nearest = k // groups % num_classes * stride_anchors_k
            anchor = tl.load(anchors_ptr + nearest, taken_d, 0.0)
            dsqdist = tl.load(dsqdists_ptr + k * stride_dsqdists_k, mask=k >= 0, other=0.0)
            out = 2 * dsqdist * (x.to(tl.float32) - anchor[:, None])
        if HAS_DSUMS:
            out += tl.load(dsums_ptr + k * stride_dsums_k, taken_d, 0.0)[:, None]
        tl.store(dfeatures_ptrs, out.to(dfeatures_ptr.dtype.element_ty), mask=inside)
    else:
        valid = key >= 0
        taken = channels[:, None] & valid[None, :]
        if HAS_DSQDISTS:
            x = tl.load(features_ptrs, taken, 0.0, eviction_policy="evict_first")
            pixel_nearest = (key // groups % num_classes).to(tl.int64) * stride_anchors_k
            a = tl.load(anchors_ptr[:, None] + pixel_nearest[None, :], mask=taken, other=0.0)
            dsqdists = tl.load(
                dsqdists_ptr + key.to(tl.int64) * stride_dsqdists_k, mask=valid, other=0.0
            )
            out = 2 * dsqdists[None, :] * (x.to(tl.float32) - a)
        if HAS_DSUMS:
            dsums_rows = (key.to(tl.int64) * stride_dsums_k)[None, :]
            out += tl.load(dsums_ptr[:, None] + dsums_rows, mask=taken, other=0.0)
        tl.store(dfeatures_ptrs, out.to(dfeatures_ptr.dtype.element_ty), mask=inside)


def class_moments_backward(
    features: Tensor | None,
    keys: Tensor,
    anchors: Tensor | None,
    dsums: Tensor | None,
    dsqdists: Tensor | None,
    groups: int,
    size: list[int],
    stride: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """dsums float32 [num_keys, D], dsqdists float32 [num_keys] -> dfeatures of this size, stride
    and dtype. features and anchors (float32 [K, D]) are needed only for dsqdists."""
    dfeatures = keys.new_empty_strided(size, stride, dtype=dtype)
    if dfeatures.numel() == 0:
        return dfeatures
    check_keys("class_moments_backward.triton", keys, dfeatures.numel() // dfeatures.shape[1])
    out, view = as_pixels(
        size, dfeatures.stride(), (dfeatures if features is None else features).stride()
    )
    tile = tile_of(out, dfeatures.element_size())
    tiles_per_line = triton.cdiv(out.pixels, tile.block_p)
    _class_moments_bwd_kernel[(out.lines * tiles_per_line * triton.cdiv(out.dim, tile.block_d),)](
        features,
        keys,
        anchors,
        dsums,
        dsqdists,
        dfeatures,
        out.dim,
        out.pixels,
        out.lines_per_image,
        tiles_per_line,
        1 if anchors is None else anchors.shape[0],
        groups,
        *view.strides,
        *((0, 0) if anchors is None else anchors.stride()),
        *((0, 0) if dsums is None else dsums.stride()),
        0 if dsqdists is None else dsqdists.stride(0),
        *out.strides,
        HAS_DSUMS=dsums is not None,
        HAS_DSQDISTS=dsqdists is not None,
        BLOCK_D=tile.block_d,
        BLOCK_P=tile.block_p,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
    )
    return dfeatures
