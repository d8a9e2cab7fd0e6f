"""The paths of our CUDA kernels through their machine code, and the times that follow from them.

NOTES.md says how to add a kernel. A path is described by the instructions in its blocks, not by
addresses, so it remains valid with another compiler. If a kernel is rewritten, its path must be
rewritten too.
"""

import math
import re
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np
from label_maps import changes_of_tiles, label_maps, rows_of_loads
from time_model import (
    BYTES_PER_CYCLE,
    CLOCK,
    COPY_BANDWIDTH,
    L1,
    L2,
    LAUNCH,
    MULTIPROCESSORS,
    Block,
    Choice,
    Path,
    blocks_of,
    cached,
    simulate,
    steady,
    walk,
)

SUMS, SQDISTS, RESIDUALS = 1, 2, 4
CHANNELS = 32
MAX_SHARED_BYTES, SHARED_PER_SM, CACHE_PER_SM = 99 << 10, 227 << 10, 256 << 10


class Shape(NamedTuple):
    batch: int
    dim: int
    height: int
    width: int
    num_keys: int

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width


HRNET, SEGFORMER = Shape(8, 720, 128, 256, 19), Shape(16, 768, 128, 128, 150)


class Estimate(NamedTuple):
    warps: int  # resident on a multiprocessor
    one: float  # cycles of a tile (a step of the backward pass), one warp alone
    all: float  # the same when all resident warps work on their own tiles
    waves: float
    share: float  # of the copy bandwidth, including launches and partials


# --- forward: a warp, 32 channels, tile after tile ------------------------------------------------


class ForwardPlan(NamedTuple):
    """The plan of class_moments.cu."""

    warps: int
    columns: int  # of squared distances
    blocks: int  # of channels
    chunks: int
    tiles_per_chunk: int
    partial_bytes: int
    anchor_bytes: int  # of a warp's channels


def forward_plan(shape: Shape, itemsize: int, statistics: int, rows: bool) -> ForwardPlan | None:
    """None if tables do not fit; then pixels are sorted."""
    tile, matrices = 256 // itemsize, (statistics & SUMS > 0) + (statistics & RESIDUALS > 0)

    def ring(channels_last: bool) -> int:
        return 2 * (8192 + (0 if channels_last else 512)) + 3 * tile * 4

    def tables(columns: int) -> int:
        return (
            (1 + shape.num_keys) * 4 * (CHANNELS * matrices + columns * bool(statistics & SQDISTS))
        )

    def resident(shared: int) -> int:
        warps = min(12, SHARED_PER_SM // (shared + 1024))
        return warps // 4 * 4 if warps > 8 else warps

    def planned(columns: int) -> int:
        return resident(ring(False) + tables(columns))

    columns = next((c for c in (32, 8) if planned(c) == planned(1) or planned(c) >= 6), 1)
    if tables(columns) + ring(False) > MAX_SHARED_BYTES:
        return None
    blocks = math.ceil(shape.dim / CHANNELS)
    chunk_bytes = 4 * shape.num_keys * (matrices * shape.dim + blocks * bool(statistics & SQDISTS))
    feature_bytes = shape.pixels * shape.dim * itemsize
    once = max(MULTIPROCESSORS * planned(columns) // blocks, 1)
    times = min(max(feature_bytes // 64 // (once * chunk_bytes), 1), 4)
    wanted = min(once * times, max(feature_bytes // 8, 16 << 20) // chunk_bytes)
    tiles = shape.pixels // tile
    tiles_per_chunk = math.ceil(tiles / min(max(wanted, 1), tiles))
    chunks = math.ceil(tiles / tiles_per_chunk)
    warps = resident(ring(rows) + tables(columns))
    return ForwardPlan(
        warps,
        columns,
        blocks,
        chunks,
        tiles_per_chunk,
        chunks * chunk_bytes,
        shape.num_keys * CHANNELS * 4,
    )


def staged_bytes(block: Block) -> int:
    """Bytes that a lane reads from a tile in shared memory; 0 if it also writes there."""
    if block.count(r"STS"):
        return 0
    widths = {r"LDS$": 4, r"LDS\.U16": 2, r"LDS\.64": 8, r"LDS\.128": 16}
    return sum(block.count(pattern) * width for pattern, width in widths.items())


class Forward:
    """Paths of class_moments_kernel in raster order.

    A group of 32 pixels of one key is summed in one block. Other groups are processed in segments
    of 16 bytes of pixels. In a segment with one or two changes of key, each change ends a run; with
    more changes, the pixels are added one by one.
    """

    def __init__(self, blocks: list[Block], statistics: int, itemsize: int, plan: ForwardPlan):
        self.blocks, self.segment = blocks, 16 // itemsize
        self.squares = bool(statistics & SQDISTS)
        in_cache = plan.warps * plan.anchor_bytes <= CACHE_PER_SM - SHARED_PER_SM
        self.latency = L1 if in_cache else L2
        self.ways: dict[object, Path] = {}

        most = max(block.count("LDGSTS") for block in blocks)
        self.copy = self.those(lambda b: b.count("LDGSTS") == most)
        self.keys = self.those(lambda b: b.count("LDGSTS") == 1, 0, self.copy[0])
        self.vote = self.those(lambda b: b.count("VOTE") > 0 and b.count("DEPBAR") > 0)
        self.whole = self.those(lambda b: staged_bytes(b) == 32 * itemsize, self.vote[0])[-1:]
        inside = self.vote[0] + 1, self.whole[0]
        self.group = self.those(lambda b: b.count("SHFL") == 1 and not b.count("FADD"), *inside)[:1]
        self.head = self.those(lambda b: staged_bytes(b) == 16, *inside)[:1]
        self.run = self.those(  # the block that ends a run
            lambda b: 1 <= b.count("STS") <= 2 and (b.count("FADD") <= 2) == self.squares, *inside
        )
        self.many = self.those(  # the first of a segment of many changes, and those of its squares
            lambda b: b.count("LDS") >= 4 and b.count("LDG|STS") >= 4, self.head[0] + 1, inside[1]
        )[:1]
        self.rows = self.those(lambda b: b.count("STS") == 4 == b.count("LDS"), *inside)
        self.folds = [self.those(lambda b: b.count("SHFL") == 2, *inside)] * (
            self.squares and plan.columns < CHANNELS
        )

    def those(self, choice: Choice, first: int = 0, last: int | None = None) -> list[int]:
        return [i for i in range(len(self.blocks))[first:last] if choice(self.blocks[i])]

    def walk(self, *stops: list[int]) -> Path:
        key = tuple(map(tuple, stops))
        if key not in self.ways:
            self.ways[key] = cached(walk(self.blocks, *stops), self.latency)
        return self.ways[key]

    def tile(self, groups: tuple[tuple[int, ...], ...]) -> Path:
        """groups: for each group, the changes of key in its segments."""
        if groups not in self.ways:
            path = self.walk(self.copy, self.vote, self.group)
            for segments in groups[:-1]:
                path = path + self.summed(segments, self.group)
            self.ways[groups] = path + self.summed(groups[-1], self.keys, self.copy)
        return self.ways[groups]

    def summed(self, segments: tuple[int, ...], *end: list[int]) -> Path:
        """From a group to the next, or to the next tile."""
        if not any(segments):
            return self.walk(self.group, self.whole, *end)
        path = self.walk(self.group, self.head)
        for changes in segments[:-1]:
            path = path + self.walk(self.head, *self.stops(changes), self.head)
        return path + self.walk(self.head, *self.stops(segments[-1]), *end)

    def stops(self, changes: int) -> list[list[int]]:
        if changes <= 2:
            return [*self.folds, self.run] * changes
        rows = [self.rows] * (self.segment // 4 if self.squares else 0)
        return [self.many, *self.folds * self.segment, *rows]


def forward(
    blocks: list[Block], itemsize: int, statistics: int, rows: bool, shape: Shape, kind: str
) -> Estimate | None:
    plan = forward_plan(shape, itemsize, statistics, rows)
    if plan is None:
        return None
    code = Forward(blocks, statistics, itemsize, plan)
    keys = label_maps(kind, shape.batch, shape.height, shape.width, shape.num_keys)
    tiles = changes_of_tiles(keys, 256 // itemsize, 16 // itemsize)
    order = np.random.default_rng(1).permutation(len(tiles)).tolist()

    def tile(warp: int, r: int) -> Path:
        return code.tile(tiles[order[(warp * 31 + r) % len(order)]])

    one = simulate([[x for r in range(100) for x in tile(0, r)]]) / 100
    every = steady(tile, plan.warps, 2 if kind == "random" else 24)
    waves = plan.chunks * plan.blocks / (MULTIPROCESSORS * plan.warps)
    last = waves - math.floor(waves)
    full = every * plan.tiles_per_chunk
    # the last wave has fewer warps: it takes as long as one warp, or as its share of the memory
    rest = max(one, every * last) * plan.tiles_per_chunk if last else 0
    bytes_moved = shape.pixels * shape.dim * itemsize
    seconds = (math.floor(waves) * full + rest) / CLOCK + LAUNCH
    seconds += 2 * plan.partial_bytes / COPY_BANDWIDTH
    return Estimate(plan.warps, one, every, waves, bytes_moved / COPY_BANDWIDTH / seconds)


# --- backward: a thread, 16 bytes of pixels or of channels at a time ------------------------------

GRADIENT = r"STG\.E\.EF\.128"


class BackwardPlan(NamedTuple):
    """The plan of class_moments_backward.cu."""

    threads: int  # of all blocks
    stores: int  # of 16 bytes, of each thread


def backward_plan(
    shape: Shape, itemsize: int, rows: bool, sums: bool, sqdists: bool
) -> BackwardPlan:
    vector, table_bytes = 16 // itemsize, 4 * shape.num_keys * (sums + sqdists)
    if rows:
        vectors = shape.pixels * shape.dim // vector
        stores = 4 * min(max(vectors // (256 * 4 * 2048), 1), 8)
        return BackwardPlan(vectors // stores, stores)
    pixel_blocks = math.ceil(shape.pixels / vector / 128)
    cached_channels = max(min((128 << 10) // table_bytes, 64), 16)
    ranges = math.ceil(shape.dim / min(cached_channels, max(shape.dim * pixel_blocks // 2048, 16)))
    channels = 4 * math.ceil(math.ceil(shape.dim / ranges) / 4)
    return BackwardPlan(pixel_blocks * 128 * ranges, channels)


def backward(
    blocks: list[Block],
    itemsize: int,
    warps: int,
    rows: bool,
    sums: bool,
    sqdists: bool,
    shape: Shape,
    kind: str,
) -> Estimate:
    """A loop stores in one block, or in several blocks with separate conditions."""
    plan = backward_plan(shape, itemsize, rows, sums, sqdists)
    most = max(block.count(GRADIENT) for block in blocks)
    loop = [[i] for i, block in enumerate(blocks) if block.count(GRADIENT) == most]
    exits = [
        i for i, b in enumerate(blocks) if b.instructions and b.instructions[-1].text == "EXIT ;"
    ]
    rounds = max(plan.stores // (most * len(loop)), 1)
    lines = 16 // itemsize  # of channels in a row of a table
    if not rows:
        keys = label_maps(kind, shape.batch, shape.height, shape.width, shape.num_keys)
        lines = round(rows_of_loads(keys, 16 // itemsize))
    enter = cached(walk(blocks, [0], loop[0]), L2)
    again = cached(walk(blocks, *loop, loop[0]), L1, lines) if rounds > 1 else []
    leave = cached(walk(blocks, *loop, exits), L1, lines)
    thread = enter + again * (rounds - 1) + leave
    every = steady(lambda warp, r: thread, warps, 2)
    ideal = shape.pixels * shape.dim * itemsize * (1 + sqdists) / COPY_BANDWIDTH
    moved = 512 * most * len(loop) * rounds * (1 + sqdists)  # by a warp
    seconds = ideal / (moved * warps / every / BYTES_PER_CYCLE) + LAUNCH
    waves = plan.threads / 32 / (MULTIPROCESSORS * warps)
    return Estimate(warps, simulate([thread]) / rounds, every / rounds, waves, ideal / seconds)


# --- what cuda_report.py prints -------------------------------------------------------------------

SHAPES = {"HRNet": HRNET, "SegFormer": SEGFORMER}
GOALS = {("forward", "images"): 0.9, ("backward", "images"): 0.85}
GOAL_OF_RANDOM = 0.6
HEAD = (
    "kernel",
    "shape, labels",
    "warps",
    "cycles of a tile: one warp",
    "all warps",
    "waves",
    "share",
    "goal",
)
FORWARD = re.compile(r"class_moments_kernel<(BFloat16|float), (\d), (true|false), false>")
BACKWARD = re.compile(
    r"class_moments_backward_(planes|rows)_kernel<(BFloat16|float), (?:[48], 1, )?(\w+), (\w+)>"
)


def estimates(name: str, sass: str, resident: Callable[[int], int]) -> list[tuple[object, ...]]:
    """Rows of the table for a kernel of sm_90; none for a kernel whose paths are not known here.
    resident: blocks on a multiprocessor, for a number of threads."""
    forwards, backwards = FORWARD.match(name), BACKWARD.match(name)
    if not (forwards or backwards):
        return []
    blocks, found = blocks_of(sass), []
    for (title, shape), kind in product(SHAPES.items(), ("images", "random")):
        if forwards:
            itemsize = 2 if forwards[1] == "BFloat16" else 4
            estimate = forward(
                blocks, itemsize, int(forwards[2]), forwards[3] == "true", shape, kind
            )
            goal = GOALS["forward", "images"]
        else:
            assert backwards is not None
            rows, itemsize = backwards[1] == "rows", 2 if backwards[2] == "BFloat16" else 4
            threads = 256 if rows else 128
            warps = resident(threads) * threads // 32
            given = backwards[3] == "true", backwards[4] == "true"
            estimate = backward(blocks, itemsize, warps, rows, *given, shape, kind)
            goal = GOALS["backward", "images"]
        if estimate:
            goal = GOAL_OF_RANDOM if kind == "random" else goal
            found.append((name, f"{title}, {kind}", *estimate, goal))
    return found


def resident_forward(num_keys: int) -> str:
    """Warps on a multiprocessor for sums / both / all three, in bf16 NCHW; "sorted" if tables do
    not fit."""
    shape = HRNET._replace(num_keys=num_keys)
    plans = [forward_plan(shape, 2, statistics, False) for statistics in (1, 3, 7)]
    return " / ".join(str(plan.warps) if plan else "sorted" for plan in plans)
