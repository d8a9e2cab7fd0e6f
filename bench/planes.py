"""Reads planes as the CUDA kernels of class moments do: a warp has 32 planes, and reads 128 bytes
of each before it goes on. It shows what the memory gives in this order."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PLANES, PIECE = 32, 64  # 64 numbers of two bytes
WARPS = 12  # resident on a multiprocessor


@triton.jit
def _read_planes_kernel(x, sums, pixels, pieces, PLANES: tl.constexpr, PIECE: tl.constexpr):
    """x: bfloat16 [planes, pixels]; sums: float32 [programs]. pieces: of a program."""
    planes = tl.program_id(0) * PLANES + tl.arange(0, PLANES)
    first = tl.program_id(1) * pieces
    total = tl.zeros((PLANES, PIECE), tl.float32)
    for piece in range(first, first + pieces):
        place = piece * PIECE + tl.arange(0, PIECE)
        wanted = (place < pixels)[None, :]
        ptrs = x + planes[:, None].to(tl.int64) * pixels + place[None, :]
        total += tl.load(ptrs, wanted, 0.0, eviction_policy="evict_first").to(tl.float32)
    index = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + index, tl.sum(tl.sum(total, 1), 0))


def read_planes(x: Tensor, multiprocessors: int = 132) -> Tensor:
    """The sum of x, bfloat16 [planes, pixels]. The number of planes is a multiple of 32."""
    planes, pixels = x.shape
    groups, all_pieces = planes // PLANES, triton.cdiv(pixels, PIECE)
    chunks = max(1, multiprocessors * WARPS // groups)
    pieces = triton.cdiv(all_pieces, chunks)
    sums = torch.empty((groups, chunks), device=x.device)
    launch: Any = _read_planes_kernel[groups, chunks]
    launch(x, sums, pixels, pieces, PLANES, PIECE, num_warps=1)
    return sums.sum()
