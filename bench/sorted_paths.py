"""The path of class_moments_sorted_kernel through its machine code, and the time of the whole pass
over sorted pixels: the sort, the features, and the joins."""

import math

import numpy as np
from label_maps import lines_of_loads
from shapes import RESIDUALS, SQDISTS, SUMS, Estimate, Shape, keys_of
from time_model import (
    CLOCK,
    COPY_BANDWIDTH,
    L2,
    LAUNCH,
    MEMORY,
    MULTIPROCESSORS,
    Block,
    Path,
    simulate,
    steady,
    walk,
)

TILE_BYTES, CHANNELS, GROUP = 4096, 32, 32  # a group of pixels is added at once
# Bytes of a block in shared memory: two tiles with padding, and their keys.
SHARED_BYTES = 2 * (4096 + 512 + 256)
# Assumed of torch.sort, stable, with 16-bit keys: the pixels' indices; histogram, prefix sums and
# two passes of a radix sort; two memsets. Before it keys are converted, after it offsets are
# computed.
SORT_LAUNCHES = 1 + 7 + 1
# Bytes of these launches for a pixel, with keys of 2 bytes and indices of 8: conversion 4 + 2,
# indices 8, histogram 2, passes 2 · 2 · 10, offsets 10 + 12.
SORT_BYTES = 78


class Sorted:
    """Paths of a warp for groups of pixels with one key, two, or more."""

    def __init__(self, blocks: list[Block], rows: bool):
        self.blocks, self.rows = blocks, rows
        count = [block.count for block in blocks]
        if rows:
            most = max(of("LDGSTS") for of in count)
            self.copy = [i for i, of in enumerate(count) if of("LDGSTS") == most]
        else:
            self.copy = [i for i, of in enumerate(count) if of("LDG") == of("STS") >= 16]
        last = self.copy[-1]
        reads = [of(r"LDS\.U16") == 32 or of(r"LDS\.128") >= 4 or of("LDS$") >= 32 for of in count]
        after = [i for i in range(last + 1, len(blocks)) if reads[i]]
        self.wait = [i for i in range(last, len(blocks)) if count[i]("DEPBAR")][:1]
        # in the order of the source: one key, two, several
        self.one, self.two, self.few = ([i] for i in after[:3])
        self.votes = [i for i in range(last, after[0]) if count[i]("FLO")]
        self.store = [i for i in range(self.two[0], self.few[0]) if count[i]("STG")][:1]
        self.again = [i for i in range(self.few[0] + 1, len(blocks)) if count[i]("SHFL.IDX")][:1]

    def walk(self, *stops: list[int]) -> Path:
        return walk(self.blocks, *stops)

    def tile(self, groups: list[int], columns: int) -> Path:
        """groups: the keys of each group of the tile; 0 if all pixels have the key before.
        columns: how often a lane iterates over the channels, if pixels are copied by element."""
        path: Path = []
        if self.rows:
            path = self.walk(self.copy, self.wait)
        else:
            again = self.walk(self.copy, self.copy) * (columns * CHANNELS // 16 - 1)
            path = again + self.walk(self.copy, self.wait)
        at = self.wait
        if any(groups):
            path, at = path + self.walk(at, self.votes), self.votes
        for keys in groups:
            stop = (self.one, self.two, self.few)[min(keys, 2)]
            path = path + self.walk(at, stop)
            at = stop
            if keys == 1:
                path, at = path + self.walk(at, self.store), self.store
            for _ in range(keys - 1):
                path, at = path + self.walk(at, self.again), self.again
        return path + self.walk(at, self.copy)


def groups_of(keys: np.ndarray, pixels_per_chunk: int, tile: int) -> list[list[int]]:
    """For each tile of sorted pixels: how many other keys than that of the pixel before each of its
    groups has."""
    padded = np.append(keys, np.full(-len(keys) % tile, keys[-1]))
    changes = np.diff(padded, prepend=padded[0]) != 0
    changes[::pixels_per_chunk] = False
    return changes.reshape(-1, tile // GROUP, GROUP).sum(-1).tolist()


def sorted_forward(
    blocks: list[Block],
    itemsize: int,
    statistics: int,
    rows: bool,
    warps: int,
    shape: Shape,
    kind: str,
) -> Estimate:
    keys = keys_of(shape, kind)
    order = np.argsort(keys, kind="stable")
    tile = TILE_BYTES // CHANNELS // itemsize
    tiles, channel_blocks = math.ceil(shape.pixels / tile), math.ceil(shape.dim / CHANNELS)
    # as in class_moments_plan.cuh
    occupied = 4 * 12 * MULTIPROCESSORS
    tiles_per_chunk = min(max(tiles * channel_blocks // occupied, 2), 16)
    chunks = math.ceil(tiles / tiles_per_chunk)
    groups = groups_of(keys[order], tiles_per_chunk * tile, tile)
    code = Sorted(blocks, rows)
    lines = 1 if rows else round(lines_of_loads(order, itemsize))

    ways: dict[tuple[int, ...], Path] = {}

    def of_tile(number: int) -> Path:
        found = tuple(groups[number])
        if found not in ways:
            ways[found] = [
                x._replace(bytes=0, latency=L2)  # keys; features are the copies of 16 bytes
                if x.opcode.startswith("LDGSTS") and not x.opcode.endswith("128")
                else x._replace(latency=L2)
                if x.opcode.startswith("LDG.E.64") or "CONSTANT" in x.opcode
                # elements: each line of 128 bytes takes a cycle; its other pixels hit the L2 cache
                else x._replace(latency=MEMORY, busy=lines)
                if x.opcode.startswith("LDG.E")
                else x
                for x in code.tile(groups[number], tile // GROUP)
            ]
        return ways[found]

    shuffled = np.random.default_rng(1).permutation(len(groups)).tolist()

    def round_of(warp: int, r: int) -> Path:
        return of_tile(shuffled[(warp * 31 + r) % len(shuffled)])

    one = simulate([[x for r in range(100) for x in round_of(0, r)]]) / 100
    every = steady(round_of, warps, 24)
    feature_bytes = shape.pixels * shape.dim * itemsize
    if not rows:  # the bytes of elements are in no instruction
        ideal = TILE_BYTES * warps * MULTIPROCESSORS * CLOCK / COPY_BANDWIDTH
        every = max(every, ideal)
    waves = chunks * channel_blocks / (MULTIPROCESSORS * warps)
    # the last wave has fewer warps: it takes the time of one warp, or its part of a full wave
    last = waves - math.floor(waves)
    cycles = tiles_per_chunk * (math.floor(waves) * every + (max(one, every * last) if last else 0))
    return Estimate(
        warps,
        one,
        every,
        waves,
        feature_bytes
        / COPY_BANDWIDTH
        / (cycles / CLOCK + other_seconds(shape, statistics, chunks, channel_blocks)),
    )


def other_seconds(shape: Shape, statistics: int, chunks: int, channel_blocks: int) -> float:
    """The launches besides that of the features, and the bytes that they move: the sort, zeros, the
    joins of the chunks, and the sum of sqdists over blocks of channels."""
    matrices = (statistics & SUMS > 0) + (statistics & RESIDUALS > 0)
    launches = 1 + SORT_LAUNCHES + matrices + 2 * (statistics & SQDISTS > 0) + 1
    width = 4 * (matrices * shape.dim + channel_blocks * (statistics & SQDISTS > 0))
    moved = SORT_BYTES * shape.pixels + width * (4 * chunks + 2 * shape.num_keys)
    # a join searches for the end of its key; then it adds the chunks, eight at a time
    chain = math.ceil(math.log2(chunks)) + math.ceil(chunks / shape.num_keys / 8) + 2
    return launches * LAUNCH + moved / COPY_BANDWIDTH + chain * L2 / CLOCK
