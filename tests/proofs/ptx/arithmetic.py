"""What instructions compute: functions of arrays with one number for each lane, as the PTX manual
defines them. bfloat16 is held as its bits."""

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic] | np.generic

U1, U2, U4, U8 = np.uint8, np.uint16, np.uint32, np.uint64
I8, F2, F4, F8 = np.int64, np.float16, np.float32, np.float64
NAN16 = U2(0x7FFF)

COMPARE: dict[str, Callable[..., Array]] = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "ne": lambda x, y: (x < y) | (x > y),  # false for NaN, where NumPy's is true
    "neu": np.not_equal,
    "equ": lambda x, y: ~((x < y) | (x > y)),
    "ltu": lambda x, y: ~(x >= y),
    "leu": lambda x, y: ~(x > y),
    "gtu": lambda x, y: ~(x <= y),
    "geu": lambda x, y: ~(x < y),
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}


def without_subnormals(x):
    """`.ftz`: zeros with their signs."""
    return np.where(np.abs(x) < F4(2.0**-126), np.copysign(F4(0), x), x)


def sums_of_halves(x, y):
    """Of the lower and of the upper 16 bits, without a carry between them."""
    low, high = U4(0xFFFF), U4(0xFFFF0000)
    return (x + y & low) | ((x & high) + (y & high))


def high_product(x, y):
    """The upper half of the product."""
    bits = 8 * x.dtype.itemsize
    wide = np.dtype(f"{x.dtype.kind}{bits // 4}").type
    return (x.astype(wide) * y.astype(wide) >> wide(bits)).astype(x.dtype)


def wide_product(x, y):
    wide = f"{x.dtype.kind}{2 * x.dtype.itemsize}"
    return x.astype(wide) * y.astype(wide)


def quotient(x, y):
    """Towards zero. A division by zero is undefined: all bits, as GPUs give."""
    safe = np.where(y == 0, y.dtype.type(1), y)
    floor = x // safe
    up = (floor * safe != x) & ((x < 0) != (safe < 0))
    return np.where(y == 0, ~(x ^ x), floor + up.astype(x.dtype))


def remainder(x, y):
    return np.where(y == 0, x, x - quotient(x, y) * y)


def extreme(x, y, is_min: bool, keep_nan: bool):
    """−0 is less than 0. With one NaN the other number, or NaN if `keep_nan` is true."""
    if is_min:
        result = (np.minimum if keep_nan else np.fmin)(x, y)
    else:
        result = (np.maximum if keep_nan else np.fmax)(x, y)
    both_zero = np.where(np.signbit(x) == is_min, x, y)
    return np.where((x == 0) & (y == 0), both_zero, result)


def fma(x, y, z):
    """x·y + z. In float32 the product is exact in float64; the sum is rounded there first, which
    differs from one rounding in rare cases. In float64 both are rounded."""
    if x.dtype == F8:
        return x * y + z
    return (x.astype(F8) * y + z).astype(F4)


def shift_left(x, by):
    bits = 8 * x.dtype.itemsize
    shifted = x << np.minimum(by, bits - 1).astype(x.dtype)
    return np.where(by < bits, shifted, x.dtype.type(0))


def shift_right(x, by):
    """x shifted to the right; the sign of a signed number fills."""
    bits = 8 * x.dtype.itemsize
    shifted = x >> np.minimum(by, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(by < bits, shifted, x.dtype.type(0))


def extracted_bits(x, position, length):
    """bfe; x is signed or not."""
    bits = 8 * x.dtype.itemsize
    position, length = position.astype(I8) & 255, length.astype(I8) & 255
    unsigned = x.view(f"u{x.dtype.itemsize}").astype(U8)
    field = np.where(length < 64, (U8(1) << np.minimum(length, 63).astype(U8)) - U8(1), ~U8(0))
    value = (
        np.where(position < bits, unsigned >> np.minimum(position, 63).astype(U8), U8(0)) & field
    )
    if x.dtype.kind == "i":
        at = np.minimum(position + length - 1, bits - 1)
        negative = (unsigned >> np.maximum(at, 0).astype(U8)) & U8(1) == 1
        missing = ~field | ~np.where(
            position < bits,
            ~U8(0) >> (U8(64) - U8(bits) + np.minimum(position, bits - 1).astype(U8)),
            U8(0),
        )
        value = np.where(negative & (length > 0), value | missing, value)
    return value.astype(f"u{x.dtype.itemsize}").view(x.dtype)


def permuted_bytes(x, y, selector):
    """prmt: four bits select a byte of y and x; the highest copies the byte's sign."""
    both, result = x.astype(U8) | (y.astype(U8) << U8(32)), U8(0)
    for i in range(4):
        chosen = (selector >> U4(4 * i)) & U4(15)
        byte = (both >> ((chosen & U4(7)).astype(U8) * U8(8))) & U8(255)
        sign = np.where(byte >= 128, U8(255), U8(0))
        result = result | (np.where(chosen >= 8, sign, byte) << U8(8 * i))
    return result.astype(U4)


def leading_zeros(x):
    bits = 8 * x.dtype.itemsize
    below, filled = x | (x >> x.dtype.type(1)), 2
    while filled < bits:
        below, filled = below | (below >> x.dtype.type(filled)), 2 * filled
    return (bits - np.bitwise_count(below)).astype(U4)


def highest_bit(x, shift: bool):
    """bfind of an unsigned number: its position, or with `shift` how far it lies from the left."""
    zeros = leading_zeros(x)
    return np.where(x == 0, ~U4(0), zeros if shift else U4(8 * x.dtype.itemsize - 1) - zeros)


def reversed_bits(x):
    itemsize = x.dtype.itemsize
    octets = np.ascontiguousarray(x).reshape(-1).view(U1).reshape(-1, itemsize)
    bits = np.unpackbits(octets, axis=1, bitorder="little")[:, ::-1]
    return np.packbits(bits, axis=1, bitorder="little").reshape(-1).view(x.dtype).reshape(x.shape)


def rounded_to_integer(x, mode: str, dtype: str):
    """Within the integers of dtype. NaN is 0, or the highest bit alone where float64 or an integer
    of 64 bits takes part."""
    to_integer = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[mode]
    rounded, info = to_integer(x.astype(F8)), np.iinfo(dtype)
    low, above = float(info.min), float(info.max) + (info.bits < 64)  # 2^k
    inside = (rounded >= low) & (rounded < above)
    number = np.where(inside, rounded, 0).astype(dtype)
    number = np.where(rounded >= above, info.max, number)
    number = np.where(rounded < low, info.min, number).astype(dtype)
    if x.dtype == F8 or info.bits == 64:
        highest = np.array(1 << (info.bits - 1), f"u{info.bits // 8}").view(dtype)
        return np.where(np.isnan(x), highest, number)
    return number


def to_bfloat16(x):
    bits = x.view(U4)
    rounded = bits + U4(0x7FFF) + ((bits >> U4(16)) & U4(1))
    return np.where(np.isnan(x), NAN16, (rounded >> U4(16)).astype(U2))


def to_float16(x):
    return np.where(np.isnan(x), NAN16, x.astype(F2).view(U2))


def from_bfloat16(bits):
    return (bits.astype(U4) << U4(16)).view(F4)


def halves(x, dtype: str):
    """Both 16-bit floats of a register: [..., 2] float32."""
    bits = np.stack([(x & U4(0xFFFF)).astype(U2), (x >> U4(16)).astype(U2)], -1)
    return bits.view(F2).astype(F4) if dtype.startswith("f16") else from_bfloat16(bits)


def packed(low, high):
    return low.astype(U4) | (high.astype(U4) << U4(16))


def _sources(by, clamp, mode: str):
    """For each lane of a warp, or of all warps, the lane whose value shfl takes, and whether it is
    one of its segment; otherwise it takes its own."""
    lane, segment, limit = np.arange(32), (clamp >> 8) & 31, clamp & 31
    last, by = (lane & segment) | (limit & ~segment), by & 31
    if mode == "up":
        source = lane - by
        inside = source >= last
    else:
        source = lane ^ by if mode == "bfly" else (lane & segment) | (by & ~segment)
        inside = source <= last
    return np.where(inside, source, lane), inside


_same_sources = cache(_sources)  # of numbers


def shuffled(x, by, clamp, mode: str):
    """shfl: the value of another lane of the warp, and whether there is one."""
    warps = x.reshape(-1, 32)
    if (by == by[0]).all() and (clamp == clamp[0]).all():
        source, inside = _same_sources(int(by[0]), int(clamp[0]), mode)
        return warps[:, source].reshape(-1), np.broadcast_to(inside, warps.shape).reshape(-1)
    by, clamp = (v.reshape(-1, 32).astype(I8) for v in (by, clamp))
    source, inside = _sources(by, clamp, mode)
    return np.take_along_axis(warps, source, 1).reshape(-1), inside.reshape(-1)


def reduced(x, kind: str):
    """redux: of a warp."""
    rows = x.reshape(-1, 32)
    ufunc = {"add": np.add, "min": np.minimum, "max": np.maximum, "or": np.bitwise_or}[kind]
    return np.repeat(ufunc.reduce(rows, axis=1, dtype=x.dtype), 32)


def ballot(predicate):
    """Bit i: of lane i of the warp."""
    bits = predicate.reshape(-1, 32).astype(U4) << np.arange(32, dtype=U4)
    return np.repeat(np.bitwise_or.reduce(bits, axis=1), 32)
