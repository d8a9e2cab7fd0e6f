"""The paths of our CUDA kernels through their machine code, and the times that follow from them.

NOTES.md says how to add a kernel. A path is described by the instructions in its blocks, not by
addresses, so it is still valid with another compiler. If a kernel is rewritten, its path must be
rewritten too.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
from backward_paths import backward
from label_maps import SLOTS, Tile, Uniform, tiles_of_chunk
from random_paths import SECONDS_TO_CHOOSE, is_used, random_forward
from shapes import (
    GROUPED,
    MORE_CLASSES,
    RESIDUALS,
    SHAPES,
    SQDISTS,
    SUMS,
    UNALIGNED,
    Estimate,
    Shape,
    keys_of,
)
from sorted_paths import SHARED_BYTES, sorted_forward
from time_model import (
    CLOCK,
    COPY_BANDWIDTH,
    EARLY_LAUNCH,
    L2,
    LAUNCH,
    MEMORY,
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

CHANNELS = 32
TILE_BYTES = 4096
MAX_UNSORTED_KEYS = 1024
SHARED_PER_SM, CACHE_PER_SM = 227 << 10, 256 << 10
ORDERS = 3  # of the tiles of images, for an average: the order alone changes a share by a point


# --- forward: a warp, 32 channels, tile after tile ------------------------------------------------


class ForwardPlan(NamedTuple):
    """The plan of class_moments_plan.cuh."""

    blocks: int  # of channels
    chunks: int
    tiles: int  # of all chunks; these differ by at most one tile
    period: int  # from a channel of a block to the next; not 1 if planes are not aligned


def warps_of(itemsize: int, statistics: int) -> int:
    """Resident on a multiprocessor."""
    return 8 if itemsize == 4 and statistics == SUMS | SQDISTS | RESIDUALS else 12


def forward_plan(shape: Shape, itemsize: int, statistics: int) -> ForwardPlan | None:
    """None where pixels are sorted."""
    if shape.num_keys > MAX_UNSORTED_KEYS:
        return None
    tile = TILE_BYTES // CHANNELS // itemsize
    matrices = (statistics & SUMS > 0) + (statistics & RESIDUALS > 0)
    size = 16 // itemsize
    period = size // math.gcd(size, shape.plane)
    blocks = period * math.ceil(math.ceil(shape.dim / period) / CHANNELS)
    width = blocks * CHANNELS if period > 1 else shape.dim
    chunk_bytes = 4 * shape.num_keys * (matrices * width + blocks * bool(statistics & SQDISTS))
    feature_bytes = shape.pixels * shape.dim * itemsize
    once = max(MULTIPROCESSORS * warps_of(itemsize, statistics) // blocks, 1)
    times = min(max(feature_bytes // 64 // (once * chunk_bytes), 1), 4)
    wanted = min(once * times, max(feature_bytes // 4, 16 << 20) // chunk_bytes)
    most_before = size - 1 if period > 1 else 0
    tiles = shape.batch * math.ceil((shape.plane + most_before) / tile)
    return ForwardPlan(blocks, min(max(wanted, 1), tiles), tiles, period)


def sorts_random_labels(shape: Shape, itemsize: int, statistics: int) -> bool:
    """Whether class_moments_random_kernel is launched. It has no shifted tiles."""
    aligned = shape.plane * itemsize % 16 == 0
    return aligned and is_used(shape.num_keys, shape.groups, itemsize, statistics)


class Forward:
    """Paths of class_moments_kernel: one or more passes over the features of each tile."""

    def __init__(self, blocks: list[Block], itemsize: int, part: float = 1):
        """part: of 32 channels, in the blocks that have fewer."""
        self.blocks, self.itemsize, self.part = blocks, itemsize, part
        self.ways: dict[object, Path] = {}
        copies, part_of_copies = r"LDGSTS(?!.*ZFILL)", r"LDGSTS.*ZFILL"
        most = max(block.count(copies) for block in blocks)
        self.copy = self.those(lambda b: b.count(copies) == most)
        self.copy_part = self.those(lambda b: b.count(part_of_copies) == most)
        self.elements = self.those(lambda b: b.count(r"LDG\.E(\.U16)?$") == b.count("STS") == 16)
        self.keys = self.those(lambda b: 0 < b.count(copies) < most, 0, self.copy[0])
        self.find = self.those(lambda b: b.count(r"LDS\.U8") == 2, self.copy[-1])[:1]
        # uniform tiles: the vote that finds them, their residuals, the end of a run
        self.same = self.those(lambda b: b.count("VOTE") > 0, self.copy[-1], self.find[0])
        self.residuals = self.those(lambda b: b.count("FFMA") >= 32)
        self.run = self.those(lambda b: b.count("SHFL") >= 3 and not b.count("FFMA|LDG"))
        self.slots = self.those(lambda b: b.count("MATCH") > 0, self.find[0])[:1]
        self.anchors = self.those(lambda b: b.count("LDG") == b.count("STS") > 0, self.find[0])
        self.features = self.those(lambda b: b.count("LDSM|LDS$|LDS.64") >= 8, self.find[0])[:1]
        products = self.those(lambda b: b.count("HMMA") > 0, self.features[0])
        # each product is computed for the lower half of the slots, the upper half, or both
        self.lower, self.upper = products[::2], products[1::2]
        evict = self.those(lambda b: b.count("STG|SHFL") > 0, products[-1])
        self.evict = [i for i in evict if i not in self.run][:1]

    def those(self, choice: Choice, first: int = 0, last: int | None = None) -> list[int]:
        return [i for i in range(len(self.blocks))[first:last] if choice(self.blocks[i])]

    def walk(self, *stops: list[int]) -> Path:
        key = tuple(map(tuple, stops))
        if key not in self.ways:
            of_memory: dict[int, tuple[int, int]] = {}  # bytes, latency
            for blocks, change in (
                # keys come from the second-level cache, except for the first block of channels
                (self.keys, (0, L2)),
                (self.copy_part, (round(512 * self.part), MEMORY)),
                (self.elements, (32 * self.itemsize, MEMORY)),
            ):
                of_memory |= {id(x): change for i in blocks for x in self.blocks[i].instructions}
            path = [
                x._replace(bytes=of_memory[id(x)][0], latency=of_memory[id(x)][1])
                if id(x) in of_memory and x.opcode.startswith("LDG")
                else x
                for x in walk(self.blocks, *stops)
            ]
            self.ways[key] = cached(path, L2)
        return self.ways[key]

    def tile(self, tile: Tile, copy: str = "whole") -> Path:
        """copy: of the tile's features; "whole", "part" of the channels, or single "elements"."""
        if (tile, copy) in self.ways:
            return self.ways[tile, copy]
        again = self.copy_part if copy == "part" else self.copy
        # for each 32 pixels, two times 16 channels
        first = [self.elements] * (4 // self.itemsize * 2) if copy == "elements" else [again]
        if isinstance(tile, Uniform):
            residuals = [] if tile.ignored else [self.residuals]
            run = [self.run] * tile.ends_run
            path = self.walk(*first, self.same, *run, *residuals, self.keys, again)
        else:
            path = self.walk(*first, self.find)
            for one in tile:
                slots = [self.slots] * (one.found > 0)
                if one.found and self.anchors:
                    most = max(self.blocks[i].count("LDG") for i in self.anchors)
                    slots += [self.anchors] * math.ceil(one.found / most)
                halves = self.lower * one.lower + self.upper * one.upper
                after = [self.evict, self.find] if one.evicts else [self.keys, again]
                path = path + self.walk(
                    self.find, *slots, self.features, *([i] for i in sorted(halves)), *after
                )
        self.ways[tile, copy] = path
        return path


def sample(tiles: list[Tile], count: int, seed: int) -> list[Tile]:
    """As many tiles, at equal distances in the list, in a random order. So the sample of a sorted
    list has the same average as all tiles."""
    chosen = np.linspace(0, len(tiles) - 1, count).round().astype(int)
    return [tiles[i] for i in np.random.default_rng(seed).permutation(chosen)]


def forward(
    blocks: list[Block],
    itemsize: int,
    statistics: int,
    channels_last: bool,
    shape: Shape,
    kind: str,
) -> Estimate | None:
    plan = forward_plan(shape, itemsize, statistics)
    if plan is None:
        return None
    # SKIPS_UPPER in class_moments_kernel.cuh
    two_of_three = statistics in (SUMS | SQDISTS, SQDISTS | RESIDUALS)
    skips = itemsize == 4 or channels_last or not two_of_three
    # slots_of there
    few = itemsize == 2 and statistics == SUMS | SQDISTS | RESIDUALS and plan.period == 1
    slots = SLOTS // 2 if few else SLOTS
    tile_size = TILE_BYTES // CHANNELS // itemsize
    tiles_per_line = plan.tiles // shape.batch
    keys = np.full((shape.batch, tiles_per_line * tile_size), -1)
    before = plan.period // 2  # pixels, on average
    keys[:, before : before + shape.plane] = keys_of(shape, kind).reshape(shape.batch, -1)
    tiles, met = [], 0
    for chunk in np.array_split(keys.reshape(-1, tile_size), plan.chunks):
        met += len(np.unique(chunk[chunk >= 0]))
        tiles += tiles_of_chunk(chunk, tile_size, bool(statistics & SQDISTS), skips, slots)
    channels = math.ceil(shape.dim / plan.period)
    code = Forward(blocks, itemsize, channels % CHANNELS / CHANNELS)
    # of as many warps, one has a block with fewer channels
    group = plan.blocks // plan.period if plan.period > 1 and channels % CHANNELS else math.inf
    warps = warps_of(itemsize, statistics)
    # tiles of random labels at K = 150 take long to simulate
    rounds = 4 if kind == "random" and plan.period == 1 else 96
    orders = ORDERS if kind == "images" else 1
    tiles.sort(key=lambda tile: len(code.tile(tile)))
    samples = [sample(tiles, warps * rounds * 3 // 2, seed) for seed in range(1, orders + 1)]

    def tile(order: list[Tile], warp: int, r: int) -> Path:
        copy = "part" if warp % group == group - 1 else "whole"
        if plan.period > 1 and (r - warp * tiles_per_line // warps) % tiles_per_line == 0:
            copy = "elements"
        return code.tile(order[(warp * rounds * 3 // 2 + r) % len(order)], copy)

    one = simulate([[x for r in range(100) for x in tile(samples[0], 0, r)]]) / 100
    every = sum(steady(partial(tile, order), warps, rounds) for order in samples) / orders
    waves = plan.chunks * plan.blocks / (MULTIPROCESSORS * warps)
    tiles_per_chunk, longer = divmod(plan.tiles, plan.chunks)

    def cycles(waves: float) -> float:
        """Of a tile of each warp. The last wave has fewer warps: it takes the time of one warp, or
        its part of a full wave."""
        last = waves - math.floor(waves)
        return math.floor(waves) * every + (max(one, every * last) if last else 0)

    bytes_moved = shape.pixels * shape.dim * itemsize
    matrices = (statistics & SUMS > 0) + (statistics & RESIDUALS > 0)
    width = plan.blocks * CHANNELS if plan.period > 1 else shape.dim
    partial_bytes = 4 * met * (matrices * width + plan.blocks * bool(statistics & SQDISTS))
    permits = any(block.count("PREEXIT") for block in blocks)
    # the chunks with one tile more are the first ones
    total = tiles_per_chunk * cycles(waves) + cycles(waves * longer / plan.chunks)
    seconds = total / CLOCK + (EARLY_LAUNCH if permits else LAUNCH)
    seconds += 2 * partial_bytes / COPY_BANDWIDTH
    seconds += SECONDS_TO_CHOOSE * sorts_random_labels(shape, itemsize, statistics)
    return Estimate(warps, one, every, waves, bytes_moved / COPY_BANDWIDTH / seconds)


# --- what cuda_report.py prints -------------------------------------------------------------------

GOALS = {"forward": 0.9, "backward": 0.85}
GOAL_OF_RANDOM = 0.6
# Shares that the forward pass must reach in both layouts, in percent; the report fails below them.
# They are slightly smaller than the shares reached before. Labels of images with HRNet and
# SegFormer, then random labels with both. The backward pass must reach its goals.
FLOORS = {
    (2, SUMS): (95, 94, 91, 73),
    (2, SQDISTS): (93, 92, 86, 68),
    (2, SUMS | SQDISTS): (92, 90, 57, 63),
    (2, SQDISTS | RESIDUALS): (91, 90, 51, 62),
    (2, SUMS | SQDISTS | RESIDUALS): (92, 91, 68, 61),
    (4, SUMS): (95, 95, 76, 75),
    (4, SQDISTS): (96, 96, 86, 71),
    (4, SUMS | SQDISTS): (94, 94, 77, 67),
    (4, SQDISTS | RESIDUALS): (93, 93, 78, 67),
    (4, SUMS | SQDISTS | RESIDUALS): (92, 90, 76, 63),
}
# The same for planes that are not aligned: labels of images, then random labels.
FLOORS_OF_UNALIGNED = {
    (2, SUMS): (96, 94),
    (2, SQDISTS): (92, 73),
    (2, SUMS | SQDISTS): (90, 61),
    (2, SQDISTS | RESIDUALS): (89, 56),
    (2, SUMS | SQDISTS | RESIDUALS): (83, 50),
    (4, SUMS): (94, 71),
    (4, SQDISTS): (96, 91),
    (4, SUMS | SQDISTS): (92, 55),
    (4, SQDISTS | RESIDUALS): (92, 48),
    (4, SUMS | SQDISTS | RESIDUALS): (85, 44),
}
HEAD = (
    "kernel",
    "shape, labels",
    "warps",
    "cycles of a tile: one warp",
    "all warps",
    "waves",
    "share",
    "goal",
    "below the goal by",
)


class Row(NamedTuple):
    kernel: str
    case: str
    estimate: Estimate
    goal: float | None  # None where the launches take another kernel
    floor: float = 0  # the share reached before


FORWARD = re.compile(r"class_moments_kernel<(BFloat16|float), (\d), (true|false), (true|false)>")
SORTED = re.compile(r"class_moments_sorted_kernel<(BFloat16|float), (\d), (true|false)>")
RANDOM = re.compile(r"class_moments_random_kernel<(BFloat16|float), (\d), (true|false)>")
# Only with tables in shared memory: those in global memory have no paths here.
BACKWARD = re.compile(
    r"class_moments_backward_(planes|rows)_kernel<(BFloat16|float), (\w+), (\w+)(, true)?>"
)


def floor_of(forward: re.Match[str], title: str, kind: str) -> float:
    """The share that a row must have."""
    case = itemsize_of(forward[1]), int(forward[2])
    if title in UNALIGNED:
        return FLOORS_OF_UNALIGNED[case][kind == "random"] / 100
    row = FLOORS[case]
    if title not in SHAPES:
        return 0
    return row[list(SHAPES).index(title) + 2 * (kind == "random")] / 100


def estimates(name: str, sass: str, resident: Callable[[int, int], int]) -> list[Row]:
    """Rows of the table for a kernel of sm_90; none for a kernel whose paths are not known here.
    resident: blocks on a multiprocessor, by threads and shared bytes."""
    matches = FORWARD.match(name), SORTED.match(name), RANDOM.match(name), BACKWARD.match(name)
    if not any(matches):
        return []
    forwards, in_order, of_random, backwards = matches
    blocks, rows = blocks_of(sass), []
    cases = list(product(SHAPES.items(), ("images", "random")))
    moments = forwards or in_order
    if not in_order:
        cases += product(MORE_CLASSES.items(), ("images",))
    of_sums = int(moments[2]) == SUMS if moments else backwards and backwards[4] == "false"
    if of_sums:
        cases += product(GROUPED.items(), ("images",))
    if backwards and backwards[1] == "planes":
        cases += product(UNALIGNED.items(), ("images", "random"))
    if forwards and forwards[4] == "true":  # tiles begin at multiples of 16 bytes
        cases = list(product(UNALIGNED.items(), ("images", "random")))
    for (title, shape), kind in cases:
        goal: float | None = GOALS["backward" if backwards else "forward"]
        goal, floor = GOAL_OF_RANDOM if kind == "random" else goal, 0.0
        if forwards:
            itemsize, statistics = itemsize_of(forwards[1]), int(forwards[2])
            channels_last = forwards[3] == "true"
            if kind == "random" and sorts_random_labels(shape, itemsize, statistics):
                continue  # another kernel sums these
            estimate = forward(blocks, itemsize, statistics, channels_last, shape, kind)
            floor = floor_of(forwards, title, kind)
        elif of_random:
            itemsize, statistics = itemsize_of(of_random[1]), int(of_random[2])
            if kind != "random" or not sorts_random_labels(shape, itemsize, statistics):
                continue
            estimate = random_forward(blocks, itemsize, statistics, shape, kind)
            floor = floor_of(of_random, title, kind)
        elif in_order:
            itemsize, statistics = itemsize_of(in_order[1]), int(in_order[2])
            warps, channels_last = resident(32, SHARED_BYTES), in_order[3] == "true"
            estimate = sorted_forward(
                blocks, itemsize, statistics, channels_last, warps, shape, kind
            )
            goal = goal if shape.num_keys > MAX_UNSORTED_KEYS else None
        else:
            assert backwards is not None
            planes, itemsize = backwards[1] == "planes", itemsize_of(backwards[2])
            statistics = SUMS * (backwards[3] == "true") | SQDISTS * (backwards[4] == "true")
            estimate = backward(blocks, itemsize, resident, planes, statistics, shape, kind)
            floor = goal
        if estimate:
            rows.append(Row(name, f"{title}, {kind}", estimate, goal, floor))
    return rows


def itemsize_of(dtype: str) -> int:
    return 2 if dtype == "BFloat16" else 4
