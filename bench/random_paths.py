"""The path of class_moments_random_kernel through its machine code, and the time of the pass."""

import math
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from label_maps import SLOTS
from shapes import RESIDUALS, SQDISTS, SUMS, Estimate, Shape, keys_of
from time_model import (
    CLOCK,
    COPY_BANDWIDTH,
    EARLY_LAUNCH,
    L2,
    MEMORY,
    MULTIPROCESSORS,
    Block,
    Choice,
    Path,
    simulate,
    steady,
    walk,
)

TILE_BYTES, CHANNELS = 4096, 32
WINDOWS, WINDOW_KEYS = 12, 16  # warps that add, and their keys at most
MOVERS = 4  # warps that move pixels to rows
CHUNK_PIXELS, CHANNEL_BLOCKS = WINDOWS * 1024, 4
ROUNDS_SORTED = 4  # at a time
STEP = {2: 4, 4: 2}  # pairs of rows that are loaded at once, by bytes of an element
# Cycles that labels of images lose, because both kernels look at keys. All warps of a
# multiprocessor look at keys in memory. They return, and blocks of class_moments_kernel take their
# place, after an assumed time. These look at the same keys.
LOOK, NEXT_BLOCK, SECOND_LOOK = MEMORY + 340, 500, L2 + 250
SECONDS_TO_CHOOSE = (LOOK + NEXT_BLOCK + SECOND_LOOK) / CLOCK


class RandomPlan(NamedTuple):
    """The plan of class_moments_plan.cuh."""

    groups: int  # of blocks of channels
    chunks: int
    rounds: int


def is_used(num_keys: int, groups: int, itemsize: int, statistics: int) -> bool:
    """Whether the kernel is launched, on a GPU with 227 KB of shared memory."""
    several = statistics not in (SUMS, SQDISTS)
    slow = several if itemsize == 4 else statistics == SUMS | SQDISTS | RESIDUALS
    fewest = WINDOWS if slow else SLOTS + 1
    return groups == 1 and fewest <= num_keys <= WINDOWS * WINDOW_KEYS


def random_plan(shape: Shape, itemsize: int) -> RandomPlan:
    tile = TILE_BYTES // CHANNELS // itemsize
    tiles = shape.pixels // tile
    groups = math.ceil(math.ceil(shape.dim / CHANNELS) / CHANNEL_BLOCKS)
    chunks = math.ceil(tiles / (CHUNK_PIXELS // tile))
    waves = math.ceil(chunks * groups / MULTIPROCESSORS)
    chunks = max(chunks, min(waves * MULTIPROCESSORS // groups, tiles // (3 * WINDOWS)))
    return RandomPlan(groups, chunks, math.ceil(math.ceil(tiles / chunks) / WINDOWS))


class Random:
    """Paths of the warps of a block in a round."""

    def __init__(self, blocks: list[Block], itemsize: int, moved: int):
        self.blocks, self.moved = blocks, moved
        self.ways: dict[tuple[int, int], Path] = {}
        most = max(block.count("LDGSTS") for block in blocks)
        self.copy = self.those(lambda b: b.count("LDGSTS") == most)[:1]
        self.sort = self.those(lambda b: b.count("MATCH") > 0 and b.count("BAR") > 0)[:1]
        self.move = self.those(lambda b: b.count("STS.128") == 8 and b.count("LDS|LDSM") >= 8)[:1]
        waits = self.those(lambda b: b.count("DEPBAR") > 0)
        self.wait = [i for i in waits if i < self.move[0]][-1:]
        # for each key of a window: its first pairs of rows, the others of the first step, and the
        # loop of other steps
        steps = self.those(lambda b: b.count(r"LDS(\.64)?$") >= STEP[itemsize])
        self.loops = [i for i in steps if i in blocks[i].next and blocks[i].count("FADD|FFMA")]
        self.seconds = [self.branch_before(i) for i in self.loops]
        self.heads = [self.branch_before(i) for i in self.seconds]
        barriers = self.those(lambda b: b.count("BAR") > 0)
        self.barrier = [i for i in barriers if i < self.heads[0]][-1:]

    def branch_before(self, block: int) -> int:
        return max(i for i in range(block) if len(self.blocks[i].next) == 2)

    def those(self, choice: Choice) -> list[int]:
        return [i for i, block in enumerate(self.blocks) if choice(block)]

    def legs(self, *stops: list[int]) -> Path:
        path: Path = []
        for first, last in pairwise(stops):
            key = first[0], last[0]
            if key not in self.ways:
                leg = walk(self.blocks, first, last)
                self.ways[key] = leg
            path = path + self.ways[key]
        return path

    def add(self, halves: tuple[int, ...]) -> Path:
        """halves: how many halves of a step have rows, for each run of the window."""
        stops = [self.barrier]
        for i, count in enumerate(halves):
            stops.append([self.heads[i]])
            if count > 1:
                stops += [[self.seconds[i]], *[[self.loops[i]]] * (math.ceil(count / 2) - 1)]
        return self.legs(*stops, self.barrier)

    def moves(self) -> Path:
        tile = self.legs(self.wait, self.move, self.copy, self.wait)
        without = [x for x in tile if not x.opcode.startswith("BAR.SYNC")]
        return without * (self.moved - 1) + tile


def random_forward(
    blocks: list[Block], itemsize: int, statistics: int, shape: Shape, kind: str
) -> Estimate:
    keys = keys_of(shape, kind)
    tile = TILE_BYTES // CHANNELS // itemsize
    groups, chunks, rounds = random_plan(shape, itemsize)
    moved, warps = WINDOWS // MOVERS, WINDOWS + MOVERS
    code = Random(blocks, itemsize, moved)
    keys_of_window = math.ceil(shape.num_keys / WINDOWS)

    @cache
    def steps(warp: int, round_: int) -> tuple[int, ...]:
        first = [
            ((w // moved * rounds + round_ % rounds) * moved + w % moved) * tile
            for w in range(WINDOWS)
        ]
        pixels = np.concatenate([keys[i : i + tile] for i in first])
        own = range(warp * keys_of_window, min((warp + 1) * keys_of_window, shape.num_keys))
        counts = [int((pixels == key).sum()) for key in own]
        return tuple(math.ceil(n / STEP[itemsize]) for n in counts)

    moves = code.moves()

    def round_of(warp: int, r: int) -> Path:
        return code.add(steps(warp, r)) if warp < WINDOWS else moves

    every = steady(round_of, warps, 10, warps)
    one = simulate([[x for r in range(10) for x in code.add(steps(0, r))]]) / 10
    sort = simulate([code.legs(code.sort, code.sort) * 2 for _ in range(warps)], warps) / 2
    sort = (sort + MEMORY) / ROUNDS_SORTED  # with its keys
    waves = chunks * groups / MULTIPROCESSORS
    edges = 2 * MEMORY + 600  # first copies of a block of channels, anchors, totals
    cycles = rounds * sort + CHANNEL_BLOCKS * (rounds * every + edges)
    cycles = math.ceil(waves) * (MEMORY + cycles)  # MEMORY: the keys that are looked at
    matrices = (statistics & SUMS > 0) + (statistics & RESIDUALS > 0)
    width = matrices * shape.dim + math.ceil(shape.dim / CHANNELS) * (statistics & SQDISTS > 0)
    partial_bytes = 4 * chunks * shape.num_keys * width
    seconds = cycles / CLOCK + 2 * EARLY_LAUNCH + 2 * partial_bytes / COPY_BANDWIDTH
    bytes_moved = shape.pixels * shape.dim * itemsize
    return Estimate(warps, one, every, waves, bytes_moved / COPY_BANDWIDTH / seconds)
