"""The gradient of class moments.

dfeatures[p] = 2·dsqdists[k]·(f_p − a_k) + dsums[k],  k = key_p;  0 where ignored
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .features import (
    anchor_offset,
    anchors_of,
    as_pixels,
    channel_ptrs,
    check_keys,
    features_of,
    pixels_of_tile,
    tile_of,
)


class Gradients(NamedTuple):
    """By strides; a pointer is None if there is no gradient."""

    dsums: Any  # float32 [num_keys, D]
    stride_dsums_k: int
    stride_dsums_d: int
    dsqdists: Any  # float32 [num_keys]
    stride_dsqdists_k: int


@triton.jit
def _gradient_of_one_key(features, anchors, gradients, offset, inside, d, k):
    """The gradient of a tile whose pixels all have key k; 0 if k is −1."""
    taken = d < tl.where(k >= 0, features.dim, 0)
    out = tl.zeros(inside.shape, tl.float32)
    if gradients.dsqdists is not None:
        ptrs = channel_ptrs(features, d)[:, None] + offset[None, :]
        mask = inside & taken[:, None]
        x = tl.load(ptrs, mask, 0.0, eviction_policy="evict_first").to(tl.float32)
        anchor_ptrs = channel_ptrs(anchors, d) + anchor_offset(anchors, k)
        anchor = tl.load(anchor_ptrs, mask=taken, other=0.0)
        dsqdists_ptr = gradients.dsqdists + k * gradients.stride_dsqdists_k
        dsqdist = tl.load(dsqdists_ptr, mask=k >= 0, other=0.0)
        out = 2 * dsqdist * (x - anchor[:, None])
    if gradients.dsums is not None:
        dsums_ptrs = gradients.dsums + d * gradients.stride_dsums_d
        dsums = tl.load(dsums_ptrs + k * gradients.stride_dsums_k, mask=taken, other=0.0)
        out += dsums[:, None]
    return out


@triton.jit
def _gradient_of_several_keys(features, anchors, gradients, offset, inside, d, key):
    """The gradient of a tile whose pixels have these keys, −1 where ignored."""
    valid = key >= 0
    taken = (d < features.dim)[:, None] & valid[None, :]
    out = tl.zeros(inside.shape, tl.float32)
    if gradients.dsqdists is not None:
        ptrs = channel_ptrs(features, d)[:, None] + offset[None, :]
        x = tl.load(ptrs, taken, 0.0, eviction_policy="evict_first").to(tl.float32)
        anchor_ptrs = channel_ptrs(anchors, d)[:, None] + anchor_offset(anchors, key)[None, :]
        a = tl.load(anchor_ptrs, mask=taken, other=0.0)
        dsqdists_ptrs = gradients.dsqdists + key.to(tl.int64) * gradients.stride_dsqdists_k
        dsqdists = tl.load(dsqdists_ptrs, mask=valid, other=0.0)
        out = 2 * dsqdists[None, :] * (x - a)
    if gradients.dsums is not None:
        dsums_ptrs = gradients.dsums + d * gradients.stride_dsums_d
        rows = (key.to(tl.int64) * gradients.stride_dsums_k)[None, :]
        out += tl.load(dsums_ptrs[:, None] + rows, mask=taken, other=0.0)
    return out


@triton.jit(do_not_specialize=["tiles_per_line"])
def _class_moments_bwd_kernel(
    features,  # Features
    keys_ptr,  # int32 [B, P], −1 where ignored
    anchors,  # Anchors
    gradients,  # Gradients
    dfeatures,  # Features
    tiles_per_line,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Writes dfeatures once. Reads the features once if sqdists has a gradient, otherwise not at
    all. A tile of one key reads a column of the tables; other tiles gather from the caches."""
    blocks = tl.cdiv(dfeatures.dim, BLOCK_D)
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    d = (block * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    line, pixel, out_offset = pixels_of_tile(dfeatures, tile, tiles_per_line, BLOCK_P)
    _, _, offset = pixels_of_tile(features, tile, tiles_per_line, BLOCK_P)
    keys_ptrs = keys_ptr + line.to(tl.int64) * dfeatures.pixels + pixel
    key = tl.load(keys_ptrs, mask=pixel < dfeatures.pixels, other=-1)

    inside = (d < dfeatures.dim)[:, None] & (pixel < dfeatures.pixels)[None, :]
    out_ptrs = channel_ptrs(dfeatures, d)[:, None] + out_offset[None, :]
    low, high = tl.min(key, 0), tl.max(key, 0)
    if low == high:
        out = _gradient_of_one_key(
            features, anchors, gradients, offset, inside, d, low.to(tl.int64)
        )
        tl.store(out_ptrs, out.to(dfeatures.ptr.dtype.element_ty), mask=inside)
    else:
        out = _gradient_of_several_keys(features, anchors, gradients, offset, inside, d, key)
        tl.store(out_ptrs, out.to(dfeatures.ptr.dtype.element_ty), mask=inside)


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
    """dsums float32 [num_keys, D], dsqdists float32 [num_keys] -> dfeatures of this size and dtype.
    features and anchors (float32 [K, D]) are needed only for dsqdists. An empty stride is that of
    torch.empty_like(features)."""
    if stride:
        dfeatures = keys.new_empty_strided(size, stride, dtype=dtype)
    else:
        dfeatures = torch.empty_like(features)
    if dfeatures.numel() == 0:
        return dfeatures
    check_keys("class_moments_backward.triton", keys, dfeatures.numel() // dfeatures.shape[1])
    out, view = as_pixels(
        size, dfeatures.stride(), (dfeatures if features is None else features).stride()
    )
    tile = tile_of(out, dfeatures.element_size())
    tiles_per_line = triton.cdiv(out.pixels, tile.block_p)
    gradients = Gradients(
        dsums,
        *((0, 0) if dsums is None else dsums.stride()),
        dsqdists,
        0 if dsqdists is None else dsqdists.stride(0),
    )
    _class_moments_bwd_kernel[(out.lines * tiles_per_line * triton.cdiv(out.dim, tile.block_d),)](
        features_of(features, view),
        keys,
        anchors_of(anchors, groups),
        gradients,
        features_of(dfeatures, out),
        tiles_per_line,
        BLOCK_D=tile.block_d,
        BLOCK_P=tile.block_p,
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
    )
    return dfeatures
