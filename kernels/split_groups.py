"""Random groups: keys of pixels -> keys of random groups of equal size (±1).

The n pixels of a key are divided among n buckets by their hashes, in ascending order. A bucket is a
linked list. The order of a list does not matter, because ranks depend only on the hashes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .class_keys import BLOCK_P


@triton.jit
def _mix32(x):
    """As in anchorops/reference/split_groups.py; x: uint32."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def hash_of(seed, pixel):
    """seed: int64, pixel: int32 -> uint32."""
    low, high = _mix32(seed.to(tl.uint32)), _mix32((seed >> 32).to(tl.uint32))
    return _mix32(_mix32(pixel.to(tl.uint32) ^ low) ^ high)


@triton.jit(do_not_specialize=["pixels", "groups", "all_groups"])
def _link_pixels_kernel(
    keys_ptr,  # int32 [pixels], −1 where ignored
    counts_ptr,  # int64 [num_keys]
    ends_ptr,  # int64 [num_keys], their cumulative sum
    seed_ptr,  # int64, one number
    first_ptr,  # int32 [pixels], for each bucket: its first pixel + 1, or 0; zero on entry
    totals_ptr,  # int32 [programs]: number of pixels in BLOCK_P buckets each; zero on entry
    next_ptr,  # int32 [pixels], for each pixel: the next pixel in its bucket + 1, or 0
    split_ptr,  # int32 [pixels], written where keys are ignored
    group_counts_ptr,  # int64 [all_groups]
    pixels,
    groups,
    all_groups,
):
    """Reads 4 bytes per pixel, writes 8."""
    for block in range(tl.program_id(0) * BLOCK_P, all_groups, tl.num_programs(0) * BLOCK_P):
        group = block + tl.arange(0, BLOCK_P)
        size = tl.load(counts_ptr + group // groups, mask=group < all_groups, other=0)
        size = (size + (groups - 1 - group % groups)) // groups
        tl.store(group_counts_ptr + group, size, mask=group < all_groups)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    key = tl.load(keys_ptr + pixel, mask=pixel < pixels, other=-1)
    valid = key >= 0
    tl.store(split_ptr + pixel, key, mask=(pixel < pixels) & (key < 0))
    count = tl.load(counts_ptr + key, mask=valid, other=0)
    start = tl.load(ends_ptr + key, mask=valid, other=0) - count
    scaled_hash = hash_of(tl.load(seed_ptr), pixel).to(tl.uint64) * count.to(tl.uint64)
    bucket = start + (scaled_hash >> 32).to(tl.int64)
    # scope="sys": Triton 3.8 compiles no exchange of scope "gpu" for AMD (mended by triton#11019)
    head = tl.atomic_xchg(first_ptr + bucket, pixel + 1, mask=valid, sem="relaxed", scope="sys")
    tl.store(next_ptr + pixel, head, mask=valid)
    tl.atomic_add(totals_ptr + bucket // BLOCK_P, 1, mask=valid, sem="relaxed")


@triton.jit(do_not_specialize=["pixels", "groups"])
def _rank_pixels_kernel(
    keys_ptr,  # for the pointers see _link_pixels_kernel
    counts_ptr,
    ends_ptr,
    seed_ptr,
    first_ptr,
    totals_ptr,
    next_ptr,
    split_ptr,
    pixels,
    groups,
):
    """Processes BLOCK_P buckets. Reads a list m + 2 times if there are m pixels in it."""
    program, seed = tl.program_id(0), tl.load(seed_ptr)
    before = tl.zeros((BLOCK_P,), tl.int64)  # pixels in buckets of earlier programs
    for block in range(0, program, BLOCK_P):
        other = block + tl.arange(0, BLOCK_P)
        before += tl.load(totals_ptr + other, mask=other < program, other=0)
    bucket = program * BLOCK_P + tl.arange(0, BLOCK_P)
    head = tl.load(first_ptr + bucket, mask=bucket < pixels, other=0)
    size = tl.zeros((BLOCK_P,), tl.int64)
    a = head
    while tl.max(a, 0) > 0:
        size += (a > 0).to(tl.int64)
        a = tl.load(next_ptr + a - 1, mask=a > 0, other=0)
    start = tl.sum(before, 0) + tl.cumsum(size, 0) - size
    a = head
    while tl.max(a, 0) > 0:
        key = tl.load(keys_ptr + a - 1, mask=a > 0, other=0)
        first_rank = tl.load(ends_ptr + key, mask=a > 0, other=0)
        first_rank -= tl.load(counts_ptr + key, mask=a > 0, other=0)
        rank = start - first_rank
        pixel_hash = hash_of(seed, a - 1)
        b = head
        while tl.max(b, 0) > 0:
            rank += ((b > 0) & (hash_of(seed, b - 1) < pixel_hash)).to(tl.int64)
            b = tl.load(next_ptr + b - 1, mask=b > 0, other=0)
        group = (rank % groups).to(tl.int32)
        tl.store(split_ptr + a - 1, key * groups + group, mask=a > 0)
        a = tl.load(next_ptr + a - 1, mask=a > 0, other=0)


def split_groups(keys: Tensor, counts: Tensor, seed: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """keys int32 [B, P], counts int64 of any shape -> keys·groups + group, counts [..., groups]."""
    pixels = keys.numel()
    if pixels >= 2**31 or not keys.is_contiguous():
        raise ValueError(
            "split_groups: keys: expected fewer than 2^31 contiguous keys, "
            f"got shape {tuple(keys.shape)} and strides {keys.stride()}"
        )
    split = torch.empty_like(keys)
    group_counts = counts.new_empty((*counts.shape, groups))
    options = {"num_warps": 4, "enable_fp_fusion": True}
    if pixels == 0:
        return split, group_counts.zero_()
    ends = counts.flatten().cumsum(0)
    programs = triton.cdiv(pixels, BLOCK_P.value)
    first, totals = keys.new_zeros(pixels + programs).split([pixels, programs])
    lists = first, totals, keys.new_empty((pixels,))
    _link_pixels_kernel[(programs,)](
        *(keys, counts, ends, seed, *lists, split, group_counts),
        *(pixels, groups, group_counts.numel()),
        **options,
    )
    _rank_pixels_kernel[(programs,)](
        *(keys, counts, ends, seed, *lists, split, pixels, groups), **options
    )
    return split, group_counts
