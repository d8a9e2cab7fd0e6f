"""Views of tensors for the kernels, and sizes of programs: fixed tables, no autotuning."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.runtime import driver


class Pixels(NamedTuple):
    """Features as lines × channels × pixels: element (line, d, p) lies at (line // lines_per_image)
    ·stride_b + (line % lines_per_image)·stride_h + d·stride_d + p·stride_p.

    A line is an image; or a row of an image, if its rows are not adjacent (in a cropped view).
    """

    lines: int
    dim: int
    pixels: int
    lines_per_image: int
    stride_b: int
    stride_h: int
    stride_d: int
    stride_p: int

    @property
    def strides(self) -> tuple[int, int, int, int]:
        return self.stride_b, self.stride_h, self.stride_d, self.stride_p

    @property
    def channels_contiguous(self) -> bool:
        return self.stride_d == 1 and self.stride_p != 1

    @property
    def rows_aligned(self) -> bool:
        """Whether channels are contiguous, and those of every pixel begin at a multiple of 16
        elements."""
        strides = self.stride_b, self.stride_h, self.stride_p
        return self.channels_contiguous and all(stride % 16 == 0 for stride in strides)


def _rows_follow_each_other(size: Sequence[int], stride: Sequence[int]) -> bool:
    height, width = size[2:]
    return height == 1 or width == 1 or stride[2] == width * stride[3]


def check_keys(operation: str, keys: Tensor, pixels: int) -> None:
    """The keys of all pixels are contiguous, because kernels read them consecutively."""
    if not keys.is_contiguous() or keys.numel() != pixels:
        raise ValueError(
            f"{operation}: keys: expected a contiguous key for each of {pixels} pixels, "
            f"got shape {tuple(keys.shape)} and strides {keys.stride()}"
        )


def as_pixels(size: Sequence[int], *strides: Sequence[int]) -> list[Pixels]:
    """(B, D, H, W), (B, D, N) or (N, D) as lines of pixels: the same lines for all the strides."""
    if len(size) == 2:
        return [Pixels(1, size[1], size[0], 1, 0, 0, s[1], s[0]) for s in strides]
    if len(size) == 3:
        return [Pixels(size[0], size[1], size[2], 1, s[0], 0, s[1], s[2]) for s in strides]
    batch, dim, height, width = size
    if all(_rows_follow_each_other(size, s) for s in strides):
        pixels = height * width
        return [
            Pixels(batch, dim, pixels, 1, s[0], 0, s[1], s[2] if width == 1 else s[3])
            for s in strides
        ]
    return [Pixels(batch * height, dim, width, height, s[0], s[2], s[1], s[3]) for s in strides]


class Tile(NamedTuple):
    """A program's tile of BLOCK_D channels × BLOCK_P pixels; LANES sums of a channel, one for each
    thread that sums a part of its pixels; warps for tiles of one key, and of several keys."""

    block_d: int
    block_p: int
    lanes: int
    num_warps: int
    several_keys_warps: int


# By (channels contiguous, itemsize): 16 KB, in lines of 128 bytes or more.
_TILES = {
    (False, 2): Tile(64, 128, 16, 8, 4),
    (False, 4): Tile(32, 128, 32, 8, 4),
    (True, 2): Tile(64, 128, 16, 4, 4),
    (True, 4): Tile(32, 128, 16, 4, 4),
}
# If a thread has too few registers: for elements that are loaded one by one, and for GPUs that are
# not listed below.
_SMALL_TILES = {
    (False, 2): Tile(32, 128, 16, 8, 8),
    (False, 4): Tile(16, 128, 32, 8, 8),
    (True, 2): Tile(32, 128, 64, 8, 8),
    (True, 4): Tile(16, 128, 64, 8, 8),
}
# BLOCK_D, BLOCK_P and LANES for pixels sorted by key and one warp: 4 KB. Rows of 512 bytes if
# channels are contiguous; otherwise two pixels for each lane: a key often has fewer than 64 pixels.
_SORTED_TILES = {
    (False, 2): (32, 64, 32),
    (False, 4): (16, 64, 32),
    (True, 2): (256, 8, 1),
    (True, 4): (128, 8, 1),
}
_TILES_BY_ARCH = {"sm_80": _TILES, "sm_90": _TILES, "sm_100": _TILES}

# Enough programs to fill the device a few times, which balances tiles of unequal work.
_PROGRAMS = {"sm_80": 1536, "sm_90": 2048, "sm_100": 2304}
_PROGRAMS_ELSEWHERE = 2048
PARTIALS_IN_CACHE = 16 * 2**20  # bytes
# Of a program of softmax moments: one warp, because it sums without barriers.
FORWARD_LANES = 32


def ceil_div(a: int, b: int) -> int:
    """As triton.cdiv, which is for kernels too, and therefore slow on the host."""
    return -(-a // b)


def architecture() -> str:
    target: Any = driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def tile_of(view: Pixels, itemsize: int) -> Tile:
    small = any(stride > 1 and stride * itemsize % 16 > 0 for stride in view.strides)
    table = _SMALL_TILES if small else _TILES_BY_ARCH.get(architecture(), _SMALL_TILES)
    tile = table[view.channels_contiguous, itemsize]
    return tile._replace(block_d=min(tile.block_d, max(triton.next_power_of_2(view.dim), 16)))


def programs() -> int:
    return _PROGRAMS.get(architecture(), _PROGRAMS_ELSEWHERE)


def chunks_of(view: Pixels, itemsize: int, tile: Tile, chunk_bytes: int) -> int:
    """The number of chunks of tiles; 0 if the pixels should be sorted instead.

    The partials of a chunk, for all keys, have chunk_bytes. There are as many chunks as fill the
    device a few times, if the partials are at most 1/32 of the features. There are at least as many
    as fill half of it (or one for each tile), if the partials are then at most 1/8 of the features,
    or fit into the L2 cache.
    """
    blocks = triton.cdiv(view.dim, tile.block_d)
    tiles = view.lines * triton.cdiv(view.pixels, tile.block_p)
    feature_bytes = view.lines * view.dim * view.pixels * itemsize
    full = min(triton.cdiv(programs(), blocks), tiles)
    half = min(triton.cdiv(programs(), 8 * blocks), tiles)
    if half * chunk_bytes > max(feature_bytes // 8, PARTIALS_IN_CACHE):
        return 0
    return max(half, min(full, feature_bytes // 32 // max(chunk_bytes, 1)))


def sorted_tile_of(view: Pixels, itemsize: int) -> tuple[int, int, int]:
    """BLOCK_D, BLOCK_P and LANES of a program of one warp."""
    block_d, block_p, lanes = _SORTED_TILES[view.channels_contiguous, itemsize]
    if view.channels_contiguous and not view.rows_aligned:
        block_d = 64  # elements that are loaded one by one need more registers
    return min(block_d, max(triton.next_power_of_2(view.dim), 16)), block_p, lanes


def pixels_per_range(pixels: int, blocks: int) -> int:
    """For pixels sorted by key: enough ranges to fill the device a few times with programs of one
    warp. The rows of keys that continue in other ranges are at most 1/16 of the features."""
    wanted = triton.cdiv(pixels * blocks, 8 * programs())
    return min(max(triton.cdiv(wanted, 128), 1), 8) * 128


def most_rows(options: bool, class_statistics: bool) -> int | None:
    """The largest number of rows of pixels of a lane, for softmax moments; None: no limit. With
    options of the loss and class statistics, 16 pixels would need more registers than there are."""
    return 2 if options and class_statistics else None


MOST_PARTS = 8  # along an axis, in a program of the gradient: of 256 lanes, as it has two cells


def backward_lanes(parts_y: int, parts_x: int, row: int, more_registers: bool) -> tuple[int, int]:
    """The shape of a program's lanes for the gradient. If a lane needs more registers, for
    gradients of class statistics, maps of pixels or options of the loss, there are fewer lanes. If
    the labels have the logits' size, `row` logits wide, no cell needs its neighbours. Otherwise the
    shape does not depend on the images' size, because each one would be compiled."""
    if row > 0:
        return 1, min(max(triton.next_power_of_2(row), 32), 256)
    if parts_y == 4 and parts_x < 4:
        return 32, 8  # eight cells along the rows, of which one has no gradient of its own
    if max(parts_y, parts_x) > 2:
        return max(16, 2 * parts_y), max(16, 2 * parts_x)
    return (8, 16) if more_registers and parts_y == 1 else (16, 16)


def registers(most: int) -> dict[str, int]:
    """An option that limits the registers of a thread, if the compiler has one."""
    return {"maxnreg": most} if architecture().startswith("sm_") else {}


def without_spills() -> dict[str, int]:
    """An option that lets ptxas use all registers. By default it would spill a few of them to run
    more programs at once than the memory needs."""
    return registers(255)
