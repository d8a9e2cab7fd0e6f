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
from label_maps import Group, groups_of_chunk, label_maps, rows_of_loads
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
TILE_BYTES = 8192
WARPS = 8  # of the forward, resident on a multiprocessor
MAX_UNSORTED_KEYS = 1024
SHARED_PER_SM, CACHE_PER_SM = 227 << 10, 256 << 10


class Shape(NamedTuple):
    batch: int
    dim: int
    height: int
    width: int
    classes: int
    groups: int = 1  # of each class, drawn for each pixel

    @property
    def num_keys(self) -> int:
        return self.classes * self.groups

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

    rows: int  # of a block's tables
    blocks: int  # of channels
    chunks: int
    tiles_per_chunk: int


def forward_plan(shape: Shape, itemsize: int, statistics: int) -> ForwardPlan | None:
    """None where pixels are sorted."""
    if shape.num_keys > MAX_UNSORTED_KEYS:
        return None
    tile, matrices = (
        TILE_BYTES // CHANNELS // itemsize,
        (statistics & SUMS > 0) + (statistics & RESIDUALS > 0),
    )
    tables = matrices + (statistics & SQDISTS > 0)
    ring = 2 * (TILE_BYTES + 512 + tile * 4)
    room = SHARED_PER_SM // WARPS - 1024 - ring - 256 - 1 - shape.num_keys
    rows = min(1 + shape.num_keys, room // (tables * CHANNELS * 4), 254)
    blocks = math.ceil(shape.dim / CHANNELS)
    chunk_bytes = 4 * shape.num_keys * (matrices * shape.dim + blocks * bool(statistics & SQDISTS))
    feature_bytes = shape.pixels * shape.dim * itemsize
    once = max(MULTIPROCESSORS * WARPS // blocks, 1)
    times = min(max(feature_bytes // 64 // (once * chunk_bytes), 1), 4)
    wanted = min(once * times, max(feature_bytes // 4, 16 << 20) // chunk_bytes)
    tiles = shape.pixels // tile
    tiles_per_chunk = math.ceil(tiles / min(max(wanted, 1), tiles))
    return ForwardPlan(rows, blocks, math.ceil(tiles / tiles_per_chunk), tiles_per_chunk)


class Forward:
    """Paths of class_moments_kernel in raster order.

    A group of 32 pixels in which no run begins is summed in one block, one of two keys in turn in
    another. Of a few runs, 8 pixels are summed at a time, those where one begins run after run;
    between two runs totals go to a table, or to global memory. Of many, each pixel goes there.
    """

    def __init__(self, blocks: list[Block], statistics: int, latency: int):
        self.blocks, self.latency = blocks, latency
        self.ways: dict[object, Path] = {}
        adds = tables = bin(statistics).count("1")

        most = max(block.count("LDGSTS") for block in blocks)
        self.copy = self.those(lambda b: b.count("LDGSTS") == most)
        self.keys = self.those(lambda b: b.count("LDGSTS") == 1, 0, self.copy[0])
        self.votes = self.those(lambda b: b.count("VOTE") > 2, self.copy[-1])[:1]
        (votes,) = self.votes

        def sums(pixels: int, selects: bool) -> list[int]:
            most, fewest = pixels * adds + 15, pixels * adds * (3 if selects else 4) // 4
            return self.those(
                lambda b: fewest <= b.count("FADD") <= most and (b.count("R2P") > 0) == selects,
                votes,
            )

        self.whole = sums(32, False)[:1]
        if statistics == SUMS:
            (two, *_), ones = sums(64, True), sums(32, True)  # the first key apart, or not
            self.two, self.one = [([two], [two])], []
            self.heads, self.again = [ones[:1]], ones[-1:]
        else:  # of each 8 pixels: of one key, of two; of the key that is held, some of it
            pure, mixed, some = sums(8, False)[:12], sums(16, True)[:4], sums(8, True)[-4:]
            self.two = [(pure[2 * i : 2 * i + 2], [mixed[i]]) for i in range(4)]
            self.one = [([pure[8 + i]], [some[i]]) for i in range(4)]
            self.heads = [self.those(lambda b, i=i: pure[8 + i] in b.next)[:1] for i in range(4)]
            self.again = self.heads[0]
        self.group = [i for i in range(votes, len(blocks)) if self.whole[0] in blocks[i].next][:1]
        self.table = self.those(
            lambda b: b.count("STS") == tables == b.count("FADD") and b.count("LDS") >= tables,
            votes,
        )
        self.memory = self.those(
            lambda b: b.count("SHFL") == 5 if statistics & SQDISTS else b.count("LDG|STG") > 1,
            self.table[0],
        )
        self.rows = self.those(lambda b: b.count("STS") == 16 * tables, votes)[:1]
        self.generic = self.those(lambda b: b.count(r"LD\.") >= 2, votes)

    def those(self, choice: Choice, first: int = 0, last: int | None = None) -> list[int]:
        return [i for i in range(len(self.blocks))[first:last] if choice(self.blocks[i])]

    def walk(self, *stops: list[int]) -> Path:
        key = tuple(map(tuple, stops))
        if key not in self.ways:
            path = cached(walk(self.blocks, *stops), self.latency)
            # of either memory; if one pixel of two is in global memory, both wait
            self.ways[key] = [
                x._replace(latency=L2) if re.match(r"LD\.", x.opcode) else x for x in path
            ]
        return self.ways[key]

    def tile(self, groups: tuple[Group | None, ...]) -> Path:
        if groups not in self.ways:
            voting = [self.votes] if any(groups) else []
            path = self.walk(self.copy, *voting, self.group)
            for group in groups[:-1]:
                path = path + self.summed(group, self.group)
            self.ways[groups] = path + self.summed(groups[-1], self.keys, self.copy)
        return self.ways[groups]

    def sink(self, in_table: bool) -> list[int]:
        return self.table if in_table else self.memory

    def summed(self, group: Group | None, *end: list[int]) -> Path:
        """From a group to the next, or to the next tile."""
        if group is None:
            return self.walk(self.group, self.whole, *end)
        if group.two:
            sums = [ways[mixed] for ways, mixed in zip(self.two, group.mixed, strict=False)]
            return self.walk(self.group, *sums, self.sink(group.two[0]), *end)
        if group.scattered:
            in_tables, before = group.scattered
            stops = [self.rows] if in_tables else [[i] for i in self.generic]
            return self.walk(self.group, *stops * 2, self.sink(before), *end)
        path, first = self.walk(self.group, self.heads[0]), self.heads[0]
        for i, pixels in enumerate(group.of_keys):
            stops, last = [first], i == len(group.of_keys) - 1
            for head, (whole, part), count in zip(self.heads, self.one, pixels, strict=False):
                stops += [head] * (head != stops[-1])
                stops += [whole] * (count == 8) + [part] * (0 < count < 8)
            sinks = map(self.sink, group.keys[i:] if last else group.keys[i : i + 1])
            path = path + self.walk(*stops, *sinks, *(end if last else [self.again]))
            first = self.again
        return path


def forward(
    blocks: list[Block], itemsize: int, statistics: int, shape: Shape, kind: str
) -> Estimate | None:
    plan = forward_plan(shape, itemsize, statistics)
    if plan is None:
        return None
    keys = label_maps(kind, shape.batch, shape.height, shape.width, shape.classes)
    keys = np.where(keys == 255, -1, keys).reshape(-1)
    if shape.groups > 1:
        drawn = np.random.default_rng(2).integers(0, shape.groups, keys.shape)
        keys = np.where(keys < 0, -1, keys * shape.groups + drawn)
    tile_size = TILE_BYTES // CHANNELS // itemsize
    per_tile = tile_size // 32
    tiles, met = [], 0
    for chunk in np.split(keys, range(0, keys.size, plan.tiles_per_chunk * tile_size)[1:]):
        met += len(np.unique(chunk[chunk >= 0]))
        groups = groups_of_chunk(chunk, plan.rows)
        tiles += [tuple(groups[i : i + per_tile]) for i in range(0, len(groups), per_tile)]
    anchor_bytes = WARPS * met / plan.chunks * CHANNELS * 4
    latency = L1 if anchor_bytes <= CACHE_PER_SM - SHARED_PER_SM else L2
    code = Forward(blocks, statistics, latency)
    order = np.random.default_rng(1).permutation(len(tiles)).tolist()

    def tile(warp: int, r: int) -> Path:
        return code.tile(tiles[order[(warp * 31 + r) % len(order)]])

    one = simulate([[x for r in range(100) for x in tile(0, r)]]) / 100
    every = steady(tile, WARPS, 2 if kind == "random" else 24)
    waves = plan.chunks * plan.blocks / (MULTIPROCESSORS * WARPS)
    last = waves - math.floor(waves)
    full = every * plan.tiles_per_chunk
    # the last wave has fewer warps: it takes as long as one warp, or as its share of the memory
    rest = max(one, every * last) * plan.tiles_per_chunk if last else 0
    bytes_moved = shape.pixels * shape.dim * itemsize
    matrices = (statistics & SUMS > 0) + (statistics & RESIDUALS > 0)
    partial_bytes = 4 * met * (matrices * shape.dim + plan.blocks * bool(statistics & SQDISTS))
    seconds = (math.floor(waves) * full + rest) / CLOCK + LAUNCH
    seconds += 2 * partial_bytes / COPY_BANDWIDTH
    return Estimate(WARPS, one, every, waves, bytes_moved / COPY_BANDWIDTH / seconds)


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
# Random groups of the pixels of each class: OCCL's two and MVSC's four, of which it needs the sums.
GROUPED = {
    f"{title}, {groups} groups": shape._replace(groups=groups)
    for (title, shape), groups in product(SHAPES.items(), (2, 4))
}
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
    cases = list(product(SHAPES.items(), ("images", "random")))
    if forwards and int(forwards[2]) == SUMS:
        cases += product(GROUPED.items(), ("images",))
    for (title, shape), kind in cases:
        if forwards:
            itemsize = 2 if forwards[1] == "BFloat16" else 4
            estimate = forward(blocks, itemsize, int(forwards[2]), shape, kind)
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


def rows_of_tables(num_keys: int) -> str:
    """For sums / both / all three, in bf16; "sorted" where keys are too many."""
    shape = HRNET._replace(classes=num_keys)
    plans = [forward_plan(shape, 2, statistics) for statistics in (1, 3, 7)]
    return " / ".join(str(plan.rows) if plan else "sorted" for plan in plans)
