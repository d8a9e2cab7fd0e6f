"""The times of Triton's class moments as whole passes, from the machine code of their loops.

As in kernels_report.py, the shortest path through a loop is taken, on each multiprocessor by as
many programs as are resident. Whole waves are assumed. Partials that are added in the second-level
cache take no bandwidth.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from label_maps import lines_of_loads
from shapes import SHAPES, SQDISTS, SUMS, Shape, keys_of
from sorted_paths import other_seconds
from time_model import (
    CLOCK,
    COPY_BANDWIDTH,
    L1,
    L2,
    LAUNCH,
    MULTIPROCESSORS,
    Block,
    Path,
    blocks_of,
    cached,
    steady,
    walk,
)

BLOCK_D, BLOCK_P, BLOCK_K = 64, 128, 16  # of kernels/launch.py; BLOCK_D is 32 in float32
PROGRAMS, PARTIALS_IN_CACHE = 2048, 16 << 20  # the same
FEATURES = r"LDG\.E\.EF"  # the only loads that are evicted first
STREAM = re.compile(rf"{FEATURES}|STG")  # of the backward pass
SORTED_STREAM = re.compile(r"LDG\.E(?!\.EL)")  # all other loads are evicted last
RANGE_PIXELS = 1024
# A sort of 32-bit keys instead of 16, without their conversion; and three joins instead of one.
MORE_SORTED_LAUNCHES = 2 - 1 + 2


class Program(NamedTuple):
    sass: str
    warps: int
    resident: int  # programs on a multiprocessor


def holding(blocks: list[Block], pattern: str) -> list[int]:
    return [i for i, block in enumerate(blocks) if block.count(pattern)]


def cycles(program: Program, path: Path) -> float:
    """Of a multiprocessor for each tile."""
    warps = program.warps * program.resident
    return steady(lambda warp, r: path, warps) / program.resident


def tiles_of(shape: Shape, kind: str) -> tuple[int, dict[int, int]]:
    """Tiles of one key; and tiles of several keys, by the products that they need."""
    tiles = keys_of(shape, kind).reshape(-1, BLOCK_P)
    one = (tiles == tiles[:, :1]).all(1)
    several: dict[int, int] = {}
    for tile in tiles[~one]:
        products = math.ceil(len(np.unique(tile[tile >= 0])) / BLOCK_K)
        several[products] = several.get(products, 0) + 1
    return int(one.sum()), several


def rows_of_loads(shape: Shape, kind: str, in_planes: bool) -> int:
    """How many rows of a table a warp reads at once, on average: those of 32 pixels, or of 4 if
    channels are contiguous."""
    warps = keys_of(shape, kind).reshape(-1, 32 if in_planes else 4)
    some = warps[:: max(1, len(warps) // 500)]
    return round(float(np.mean([len(np.unique(warp)) for warp in some])))


def forward_seconds(
    programs: Mapping[str, Program],
    shape: Shape,
    kind: str,
    itemsize: int,
    in_planes: bool,
    sqdists: bool,
) -> float:
    """programs: by kernel. Sums, and sqdists if requested."""
    block_d = BLOCK_D * 2 // itemsize
    blocks = math.ceil(shape.dim / block_d)
    ones, several = tiles_of(shape, kind)
    lines = rows_of_loads(shape, kind, in_planes)
    one_key, several_keys = programs["_one_key_kernel"], programs["_several_keys_kernel"]
    code = blocks_of(one_key.sass)
    loads = holding(code, FEATURES)
    total = ones * cycles(one_key, cached(walk(code, loads, loads), L1))
    code = blocks_of(several_keys.sass)
    loads = holding(code, FEATURES)
    products = holding(code, "HMMA|HGMMA")[-1:]
    for times, tiles in several.items():
        path = walk(code, loads, *[products] * times, loads)
        total += tiles * cycles(several_keys, cached(path, L1, lines))
    # chunks and partials: kernels/launch.py
    tiles = shape.pixels // BLOCK_P
    chunk_bytes = 4 * shape.num_keys * (shape.dim + blocks * sqdists)
    half = min(math.ceil(PROGRAMS / 8 / blocks), tiles)
    full = min(math.ceil(PROGRAMS / blocks), tiles)
    feature_bytes = shape.pixels * shape.dim * itemsize
    chunks = max(half, min(full, feature_bytes // 32 // chunk_bytes))
    moved = 2 * chunks * chunk_bytes + (4 + 4 + 2) * shape.pixels  # zeros, reduction; lists
    launches = 4 + sqdists
    return total * blocks / MULTIPROCESSORS / CLOCK + moved / COPY_BANDWIDTH + launches * LAUNCH


def sorted_seconds(
    program: Program, shape: Shape, kind: str, itemsize: int, in_planes: bool, sqdists: bool
) -> float:
    """Forward, if the pixels are sorted."""
    lines = 1
    if in_planes:
        order = np.argsort(keys_of(shape, kind), kind="stable")
        lines = round(lines_of_loads(order, itemsize))
    code = blocks_of(program.sass, SORTED_STREAM)
    loads = holding(code, SORTED_STREAM.pattern)
    path = [x._replace(busy=max(x.busy, lines)) if x.bytes else x for x in walk(code, loads, loads)]
    warps = program.warps * program.resident
    moved = warps * sum(x.bytes for x in path)
    total = shape.pixels * shape.dim * itemsize
    loops = total / moved * steady(lambda warp, r: path, warps) / MULTIPROCESSORS / CLOCK
    statistics = SUMS | SQDISTS * sqdists
    ranges, blocks = shape.pixels // RANGE_PIXELS, math.ceil(shape.dim / 32)
    others = other_seconds(shape, statistics, ranges, blocks)
    return loops + others + MORE_SORTED_LAUNCHES * LAUNCH


def backward_seconds(
    program: Program, shape: Shape, kind: str, itemsize: int, in_planes: bool
) -> float:
    ones, several = tiles_of(shape, kind)
    lines = rows_of_loads(shape, kind, in_planes)
    code = blocks_of(program.sass, STREAM)
    most = max(block.count("STG") for block in code)
    stores = [i for i, block in enumerate(code) if block.count("STG") == most]
    # tiles of one key are the first branch; tiles of several gather from the first-level cache

    def to_the_end(store: int) -> Path:  # the last store has its own block, which exits
        (last,) = code[store].next
        return walk(code, [0], [store], [last]) + code[last].instructions

    one, other = cached(to_the_end(stores[0]), L2), cached(to_the_end(stores[-1]), L1, lines)
    total = ones * cycles(program, one) + sum(several.values()) * cycles(program, other)
    blocks = math.ceil(shape.dim / (BLOCK_D * 2 // itemsize))
    return total * blocks / MULTIPROCESSORS / CLOCK + LAUNCH


def print_times(columns: Mapping[tuple[str, int, bool], Mapping[str, Program]]) -> None:
    """Prints the shares of the copy bandwidth. columns: the kernels by name, for a title, the bytes
    of an element, and whether there are anchors."""
    print("\nClass moments, Triton, whole passes: predicted shares, not measured\n")
    titles = [title for title, _, _ in columns]
    print("| pass |", " | ".join(titles), "|\n|", "---|" * (1 + len(titles)))
    for name, shape in SHAPES.items():
        for kind in ("images", "random"):
            rows: dict[str, list[str]] = {"forward": [], "forward, sorted": [], "backward": []}
            for (title, itemsize, sqdists), programs in columns.items():
                ideal = shape.pixels * shape.dim * itemsize / COPY_BANDWIDTH
                given = shape, kind, itemsize, "NCHW" in title
                forward = forward_seconds(programs, *given, sqdists)
                program = programs["_class_moments_bwd_kernel"]
                backward = backward_seconds(program, *given)
                program = programs["_sorted_pixels_kernel"]
                in_order = sorted_seconds(program, *given, sqdists)
                rows["forward, sorted"].append(f"{ideal / in_order:.0%}")
                rows["forward"].append(f"{ideal / forward:.0%}")
                rows["backward"].append(f"{ideal * (1 + sqdists) / backward:.0%}")
            for which, cells in rows.items():
                print(f"| {which}, {name}, {kind} |", " | ".join(cells), "|", flush=True)
