"""The keys of each tile of pixels, which class moments need before they read the features."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .features import Pixels


@triton.jit(do_not_specialize=["tiles_per_line"])
def _tile_keys_kernel(
    keys_ptr,  # int32 [B, P], −1 where ignored
    tile_ptr,  # int32 [tiles]: −1 − key if all pixels have this key, else the number of keys,
    # plus 2^16 if there are also ignored pixels
    tile_keys_ptr,  # int32 [tiles, BLOCK_P]: these keys, ascending, without repetition
    local_ptr,  # int16 [tiles, BLOCK_P]: index of the pixel's key among them; −1 where ignored
    pixels,
    tiles_per_line,
    BLOCK_P: tl.constexpr,
):
    """Reads 4 bytes per pixel, writes 2 bytes and the lists: 1/D of a pass over the features."""
    tile = tl.program_id(0)
    line = (tile // tiles_per_line).to(tl.int64)
    i = tl.arange(0, BLOCK_P)
    pixel = (tile % tiles_per_line).to(tl.int64) * BLOCK_P + i
    key = tl.load(keys_ptr + line * pixels + pixel, mask=pixel < pixels, other=-1)

    low, high = tl.min(key, 0), tl.max(key, 0)
    base = tile.to(tl.int64) * BLOCK_P
    if low == high:
        tl.store(tile_ptr + tile, -1 - high)  # 0 where all are ignored
    else:
        # Ignored pixels come last.
        ordered = tl.sort((tl.where(key >= 0, key.to(tl.int64), 1 << 31) << 16) | i)
        ordered_key = ordered >> 16
        valid = ordered_key < (1 << 31)
        before = tl.gather(ordered_key, tl.maximum(i - 1, 0), 0)
        first = valid & ((i == 0) | (ordered_key != before))
        rank = tl.cumsum(first.to(tl.int32), 0) - 1
        count = tl.sum(first.to(tl.int32), 0)
        tl.store(tile_ptr + tile, count + tl.where(low < 0, 1 << 16, 0))
        tl.store(tile_keys_ptr + base + rank, ordered_key.to(tl.int32), mask=first)
        tl.store(local_ptr + base + (ordered & 0xFFFF), tl.where(valid, rank, -1).to(tl.int16))


@triton.jit
def only_key(summary):
    """The key of all pixels of a tile; negative if they have several, or none."""
    return -1 - summary


@triton.jit
def number_of_keys(summary):
    """Of a tile of several keys."""
    return summary & 0xFFFF


@triton.jit
def has_ignored(summary):
    """Whether a tile of several keys also has ignored pixels."""
    return summary > 0xFFFF


def tile_keys(keys: Tensor, view: Pixels, block_p: int) -> tuple[Tensor, Tensor, Tensor]:
    """keys int32 [lines, pixels] -> for each tile: int32 [tiles], −1 − key or the number of keys;
    these keys, int32 [tiles, block_p]; and the index of each pixel's key, int16 [tiles, block_p].
    """
    tiles_per_line = triton.cdiv(view.pixels, block_p)
    tiles = view.lines * tiles_per_line
    summaries, lists = keys.new_empty((tiles,)), keys.new_empty((tiles, block_p))
    local = keys.new_empty((tiles, block_p), dtype=torch.int16)
    _tile_keys_kernel[(tiles,)](
        keys,
        summaries,
        lists,
        local,
        view.pixels,
        tiles_per_line,
        BLOCK_P=block_p,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return summaries, lists, local
