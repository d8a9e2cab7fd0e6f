"""Products of matrices that lie in the registers of a warp. Sums are exact to float64 and rounded
once, where tensor cores truncate."""

import numpy as np

from .arithmetic import F4, F8, U2, U4, halves
from .text import Unsupported

LANE = np.arange(32)
ROW, COLUMN = LANE // 4, LANE % 4
QUARTERS = ((0, 0), (8, 0), (0, 8), (8, 8))  # of a matrix of 16 × 16: where its registers begin


def _left(registers, dtype: str):
    """A [warps, 16, 16]."""
    result = np.zeros((len(registers[0]) // 32, 16, 16))
    for register, (row, column) in zip(registers, QUARTERS, strict=True):
        pair = halves(register, dtype).reshape(-1, 32, 2)
        for j in range(2):
            result[:, ROW + row, 2 * COLUMN + column + j] = pair[..., j]
    return result


def _right(registers, dtype: str):
    """B [warps, 16, 8]."""
    result = np.zeros((len(registers[0]) // 32, 16, 8))
    for i, register in enumerate(registers):
        pair = halves(register, dtype).reshape(-1, 32, 2)
        for j in range(2):
            result[:, 2 * COLUMN + 8 * i + j, ROW] = pair[..., j]
    return result


def product(*registers, dtype: str):
    """mma.sync.m16n8k16: A B + C, of 16 × 16, 16 × 8 and 16 × 8."""
    a, b, c = registers[:4], registers[4:6], registers[6:]
    exact = _left(a, dtype) @ _right(b, dtype)
    results = []
    for i, old in enumerate(c):
        part = exact[:, ROW + 8 * (i // 2), 2 * COLUMN + i % 2].reshape(-1)
        results.append((part + old).astype(F4))
    return results


def transposed(words):
    """Matrices of 8 × 8 elements of 16 bits, as words [..., 8, 4]."""
    elements = np.ascontiguousarray(words).view(U2)
    return np.ascontiguousarray(np.swapaxes(elements, -1, -2)).view(U4)


def wgmma(a, b, c, keep, dtype: str):
    """A [64, 16] in the registers of four warps, B [groups, 16, n] float64, added to C where `keep`
    holds."""
    left = _left(a, dtype).reshape(-1, 4, 16, 16)
    exact = (left @ b[:, None]).reshape(-1, 16, b.shape[2])  # of a warp: 16 rows
    results = []
    for i, old in enumerate(c):
        column = 8 * (i // 4) + 2 * COLUMN + i % 2
        part = exact[:, ROW + 8 * (i // 2 % 2), column].reshape(-1)
        results.append((part + np.where(keep, old.astype(F8), 0)).astype(F4))
    return results


def operand_offsets(descriptor: int, n: int, n_major: bool):
    """Bytes from the beginning of shared memory of B's elements [16, n], by a descriptor: its bits
    0 to 13 are the address, 16 to 29 and 32 to 45 the distances of parts, in 16 bytes, and 62 to 63
    the swizzle."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise Unsupported("the PTX machine does not know descriptors of wgmma with a base offset")
    if descriptor >> 62 == 0:
        raise Unsupported("the PTX machine does not know descriptors of wgmma without a swizzle")
    chunks = {3: 2, 2: 4, 1: 8}[descriptor >> 62]  # of 16 bytes, in a row that is swizzled
    k, column = np.meshgrid(np.arange(16), np.arange(n), indexing="ij")
    inner, outer = (column, k) if n_major else (k, column)
    part, chunk = 2 * (inner % 8), inner // 8
    if n_major:
        offset = chunk % chunks * 16 + chunk // chunks * leading
        offset += outer % 8 * 16 * chunks + outer // 8 * stride + part
    else:
        offset = chunk * 16 + outer % 8 * 16 * chunks + outer // 8 * stride + part
    address = start + offset
    return address ^ (address >> 3 & (chunks - 1) << 4)
