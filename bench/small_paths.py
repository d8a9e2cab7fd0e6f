"""The paths of the operators of keys and centroids through their machine code, and the times that
follow: class keys, random groups, centroid InfoNCE, and CeCo's sums of upsampled features.

As in softmax_paths.py, the time of a kernel is the larger one of two times: that of its warps, and
that of moving its bytes. Inputs of centroid InfoNCE and lists of pixels were written by the kernel
before, so they have the latency of the second-level cache; other loads have that of memory. Loops
whose length depends on labels are walked as often as for labels of images.
"""

import math
from typing import NamedTuple

import numpy as np
from label_maps import label_maps
from shapes import HRNET, SEGFORMER, Shape
from softmax_paths import Code, Kernel, Library, seconds, waiting
from time_model import (
    CLOCK,
    EARLY_LAUNCH,
    L1,
    L2,
    LAUNCH,
    MEMORY,
    MULTIPROCESSORS,
    Path,
    simulate,
)

RATIO, LABEL_BYTES = 4, 8  # labels have four times as many rows and columns as features, and int64
MEMSET = LAUNCH
GOALS = {"class keys": 8e-6, "InfoNCE, forward and backward": 25e-6}
THREADS = 256  # of a block, except in the kernels of upsampled sums
SECTOR = 32


class Row(NamedTuple):
    operator: str
    case: str
    kernels: list[tuple[str, float]]  # seconds of each launch

    @property
    def total(self) -> float:
        return sum(time for _, time in self.kernels)


class Launches:
    """The kernels of a library as launches of an operator, in order."""

    def __init__(self, library: Library):
        self.library, self.times, self.permitted = library, [], False

    def code(self, name: str) -> Code:
        return Code(self.library[name][0])

    def add(
        self,
        name: str,
        path: Path,
        blocks: float,
        shared: int = 0,
        bytes_moved: float = 0,
        threads: int = THREADS,
    ) -> None:
        """A kernel that waits for the one before is resident when that one ends."""
        resident = self.library[name][1](threads, shared)
        time = seconds(Kernel(path, threads // 32, math.ceil(blocks), resident, bytes_moved))
        waits = any(block.count("ACQBULK") for block in self.code(name).blocks)
        if waits and self.permitted:
            time += EARLY_LAUNCH - LAUNCH
        self.permitted = any(block.count("PREEXIT") for block in self.code(name).blocks)
        self.times.append((name, time))


# --- class keys and random groups -----------------------------------------------------------------


def resized_keys_path(code: Code) -> Path:
    """Four labels of a thread, whose rows and columns are both resized."""
    scaled = code.those(lambda b: b.count("I2F") == 1 and not b.count("LDG|MUFU"))
    last = code.those(lambda b: b.count("I2F") == 2 and b.count("LDG") == 1)
    stores = code.those(lambda b: b.count("STG") == 4)
    bins = code.those(lambda b: b.count("ATOMS") == 1)
    return code.walk([0], *([i] for i in scaled), last, stores, *([i] for i in bins), code.exits)


def largest_bucket() -> int:
    """The pixels of the largest bucket of a warp, on average: a bucket has one pixel on average."""
    return round(np.random.default_rng(0).poisson(1, (10_000, 32)).max(1).mean())


def link_path(code: Code) -> Path:
    """Up to 256 keys."""
    counted = code.those(lambda b: b.count(r"LDG\.E\.64") == 1 and not b.count("ST"))[:1]
    kept = code.those(lambda b: b.count(r"LDG\.E\.64") == b.count(r"STS\.64") == 1)[:1]
    linked = code.those(lambda b: b.count("ATOMG") == 1)
    return code.walk([0], counted, kept, linked) + code.blocks[linked[0]].instructions


def rank_path(code: Code, size: int) -> Path:
    """The lanes of a warp wait for the largest of their buckets, of this size, at most four."""
    loops = [i for i in range(len(code.blocks)) if i in code.blocks[i].next]
    sizes = [i for i in loops if code.blocks[i].count("LDG") == 1][:1]
    totals = code.those(lambda b: b.count("LDG") == 4)[:1]
    held = code.those(lambda b: b.count("LDG") == 8)  # keys, and where the pixels of keys begin
    written = code.those(lambda b: b.count("STG") == 1, held[0])
    path = code.walk([0], *[sizes] * size, totals, held, *([i] for i in written))
    return path + code.blocks[written[-1]].instructions


def key_rows(library: Library, shape: Shape, title: str) -> list[Row]:
    keys, pixels, case = "class_keys_kernel<long, int>", shape.pixels, f"{title}, labels ×{RATIO}"
    blocks = shape.batch * math.ceil(shape.plane / 1024)
    moved = (min(SECTOR, LABEL_BYTES * RATIO) + 4) * pixels

    def add_keys(launches: Launches) -> None:
        lines = RATIO * LABEL_BYTES * 32 // 128
        path = waiting(resized_keys_path(launches.code(keys)), MEMORY, lines)
        launches.add(keys, path, blocks, 4 * shape.classes, moved)

    alone = Launches(library)
    zeros = "zero_counts_kernel"
    alone.add(zeros, launches_path(alone.code(zeros)), 1)
    add_keys(alone)
    groups = Launches(library)
    groups.times.append(("memset", MEMSET))
    add_keys(groups)
    link, rank = "link_pixels_kernel", "rank_pixels_kernel"
    blocks_of_pixels = math.ceil(pixels / THREADS)
    path = waiting(link_path(groups.code(link)), L2)
    groups.add(link, path, blocks_of_pixels, 64 + 8 * shape.classes)
    size = largest_bucket()
    # a pixel of a bucket of m pixels is read m times; E[m²] = 2
    lines = round(32 * 2 / size**2)
    path = waiting(rank_path(groups.code(rank), size), L2, lines)
    groups.add(rank, path, blocks_of_pixels, 64)
    return [Row("class keys", case, alone.times), Row("keys of groups", case, groups.times)]


def launches_path(code: Code) -> Path:
    return code.walk([0], code.exits)


# --- centroid InfoNCE -----------------------------------------------------------------------------


class Products:
    """The loop of a block's product of two tiles: it stores the operands of a step to shared
    memory, requests those of the next step, and multiplies."""

    def __init__(self, code: Code, which: int, groups: int):
        self.code = code
        ends = code.those(lambda b: b.count("FFMA") == 256)
        self.product, before = [ends[which]], ends[which - 1] if which else 0
        again = ends[which] in code.blocks[ends[which]].next
        self.products = [self.product] * (2 if again else 1)
        region = range(before, ends[which])
        count = {i: code.blocks[i].count for i in region}
        self.stores = [[i] for i in region if count[i](r"STS\.128") == 2]
        requests = range(self.stores[-1][0], ends[which])
        wide = [i for i in requests if count[i](r"LDG\.E\.128") == 1]  # float32: two for eight
        masks = [i for i in requests if count[i](r"LDG\.E\.U8") == 1]
        loops = [i for i in masks if i in code.blocks[i].next][:1]  # over the groups of a class
        others = [i for i in requests if count[i](r"LDG\.E$") == 4]  # of the losses of rows
        if loops:
            masks = [i for i in masks if i < others[0]]
        stops = sorted([*wide[1::2], *masks, *others, *loops])
        self.requests = [[i] for i in stops for _ in range(groups if i in loops else 1)]

    def path(self, steps: int, *before: list[int]) -> Path:
        """Up to the block after the product. before: blocks on the way from the start."""
        first = self.code.walk([0], *before, *self.requests, self.stores[0])
        again = self.code.walk(*self.stores, *self.requests, *self.products, self.stores[0])
        return first + again * (steps - 1)

    def last(self, *after: list[int]) -> Path:
        return self.code.walk(*self.stores, *self.products, *after, self.code.exits)


def from_caches(path: Path) -> Path:
    """Masks are in the first-level cache after the first step."""
    seen: set[str] = set()
    found = []
    for x in waiting(path, L2, 4):
        again = x.opcode.startswith("LDG.E.U8") and x.text in seen
        found.append(x._replace(latency=L1) if again else x)
        seen.add(x.text)
    return found


def logits_path(code: Code, dim: int, groups: int) -> Path:
    products = Products(code, 0, groups)
    loops = [i for i in code.those(lambda b: b.count(r"LDG\.E\.U8") == 1)
             if i in code.blocks[i].next and i < products.stores[0][0]][-4:]  # fmt: skip
    masks = [loops[:2]] * groups + [loops[2:]] * groups  # of two keys
    sums = code.those(lambda b: b.count(r"STS$") == 16)
    path = products.path(math.ceil(dim / 256), *masks) + products.last(sums)
    return from_caches(path)


def gradient_paths(code: Code, rows: int, num_classes: int, groups: int) -> tuple[Path, Path]:
    """Of blocks of dqueries and of dkeys. In the code those of dkeys come first."""
    paths = []
    for which, terms in ((1, num_classes), (0, rows)):
        products = Products(code, which, groups)
        stored = code.those(lambda b: b.count(r"STG\.E\.128") == 2)  # float32
        paths.append(from_caches(products.path(math.ceil(terms / 64)) + products.last(stored)))
    return paths[0], paths[1]


def reduce_path(code: Code, rows: int, chunks: int) -> Path:
    """For the mean of the losses."""
    eight = code.those(lambda b: b.count(r"LDG\.E\.64") == 8)[-1:]
    singles = code.those(lambda b: b.count(r"LDG\.E\.64") == 1, eight[0])[: chunks % 8]
    row = [eight] * (chunks // 8) + [[i] for i in singles]
    summed = code.those(lambda b: b.count(r"SHFL\.BFLY") == 10)
    return waiting(code.walk([0], *row * math.ceil(rows / THREADS), summed, code.exits), L2)


def info_nce_row(library: Library, shape: Shape, groups: int) -> Row:
    """float32. groups: of the queries of a class; with two, each is the positive of the other, as
    in OCCL."""
    num_classes, dim = shape.classes, shape.dim
    rows, row_blocks = groups * num_classes, math.ceil(groups * num_classes / 16)
    tiles = math.ceil(num_classes / 16)
    each = math.ceil(tiles / math.ceil(4 * MULTIPROCESSORS / row_blocks))
    chunks = math.ceil(tiles / each)
    assert each == 1  # the path has one tile
    launches = Launches(library)
    names = "centroid_info_nce_kernel<16, 1>", "reduce_kernel"
    shared = 4 * 2 * 16 * 260
    path = logits_path(launches.code(names[0]), dim, groups)
    # the blocks of the positives have a tenth of the work
    launches.add(names[0], path, row_blocks * (chunks + 0.2 * (groups > 1)), shared)
    launches.add(names[1], reduce_path(launches.code(names[1]), rows, chunks), 1)
    gradients = "centroid_info_nce_backward_kernel<32, 1>"
    of_rows, of_keys = gradient_paths(launches.code(gradients), rows, num_classes, groups)
    channel_blocks = math.ceil(dim / 64)
    blocks = [math.ceil(rows / 32) * channel_blocks, math.ceil(num_classes / 32) * channel_blocks]
    longer, shorter = sorted(zip((of_rows, of_keys), blocks, strict=True), key=lambda x: -len(x[0]))
    here = math.ceil(sum(blocks) / MULTIPROCESSORS)  # blocks of a multiprocessor; all are resident
    assert here <= library[gradients][1](THREADS, 4 * (32 + 64) * 68)
    long = min(math.ceil(longer[1] / MULTIPROCESSORS), here)
    paths = [longer[0]] * long + [shorter[0]] * (here - long)
    cycles = simulate([path for path in paths for _ in range(THREADS // 32)])
    launches.times.append((gradients, cycles / CLOCK + LAUNCH))
    case = f"{num_classes} classes, {groups} {'query' if groups == 1 else 'queries'} of each"
    return Row("InfoNCE, forward and backward", case, launches.times)


# --- CeCo's sums of upsampled features ------------------------------------------------------------

CHANNELS, TILE, MOST_BYTES = 128, 128, 10 << 20
HELD = 32  # channels of a thread in the backward pass


def keys_of_tile(shape: Shape) -> int:
    """Different labels around a row of TILE features, on average."""
    maps = label_maps("images", 1, shape.height * RATIO, shape.width * RATIO, shape.classes)[0]
    tiles = [
        len(np.unique(rows[rows != 255]))
        for y in range(0, shape.height - 2, 8)
        for rows in np.split(maps[y * RATIO : (y + 2) * RATIO], shape.width // TILE, axis=1)
    ]
    return round(float(np.mean(tiles)))


def upsampled_path(code: Code, tiles: int, keys: int) -> Path:
    """The tiles of a block, in planes: their features, weights, moments, and sums of each key."""
    load = code.those(lambda b: b.count(r"LDG\.E\.U16") == 64)[:1]
    labels = code.those(lambda b: b.count(r"LDG\.E\.U8") == 8)[:1]
    mean = code.those(lambda b: b.count("FADD") == 16 and not b.count("FFMA"), labels[0])[:1]
    squares = code.those(lambda b: b.count("FADD") == b.count("FFMA") == 16, mean[0])[:1]
    sums = code.those(lambda b: b.count(r"LDS\.128") == 4, squares[0])[:1]
    added = code.those(lambda b: b.count("LDG") == b.count("STG") == 1, sums[0])[:1]
    key = [*[sums] * (TILE // 16), added]
    stops = [*[load] * 2, *[labels] * 2 * RATIO, *[mean] * 8, *[squares] * 8, *key * keys]
    entry, tile = code.walk([0], load), code.walk(*stops, load)
    return entry + tile * (tiles - 1) + code.walk(*stops, code.exits)


def upsampled_backward_path(code: Code, keys: int) -> Path:
    """One tile: its weights, then the gradients of all channels, HELD at a time."""
    labels = code.those(lambda b: b.count(r"LDG\.E\.U8") == 8)[:1]
    features = code.those(lambda b: b.count(r"LDG\.E\.U16") == HELD)[:1]
    added = code.those(lambda b: b.count(r"LDG\.E$") == b.count("FFMA") == HELD)[:1]
    stored = code.those(lambda b: b.count(r"STG\.E\.U16") == 1)[-HELD:]
    channels = [*[added] * keys, *([i] for i in stored)]
    first = code.walk([0], features, *[labels] * 2 * RATIO, *channels, features)
    again = code.walk(features, *channels, features)
    last = code.walk(features, *channels, code.exits)
    return first + again * (CHANNELS // HELD - 2) + last


def upsampled_rows(library: Library, shape: Shape, title: str) -> list[Row]:
    """The map of 128 channels in planes of bfloat16; keys of the labels in 8 bits."""
    tiles = shape.batch * shape.height * math.ceil(shape.width / TILE)
    keys = keys_of_tile(shape)
    entries = 4 * shape.classes * CHANNELS
    most = MOST_BYTES // entries
    most = MULTIPROCESSORS * min(most // MULTIPROCESSORS, 4) if most >= MULTIPROCESSORS else most
    of_image = tiles // shape.batch
    each = math.ceil(of_image / max(most // shape.batch, 1))
    blocks = shape.batch * math.ceil(of_image / each)
    weights = 4 * 32 * TILE + 4 * (32 + 4 + math.ceil(shape.classes / 32))
    features, labels = 2 * CHANNELS * shape.pixels, RATIO**2 * shape.pixels
    names = [
        f"upsampled_sums_{which}kernel<BFloat16, unsigned char>" for which in ("", "backward_")
    ]
    forward = Launches(library)
    path = waiting(upsampled_path(forward.code(names[0]), each, keys), L2)
    shared, moved = 2 * CHANNELS * (TILE + 2) + weights, features + labels + blocks * entries
    forward.add(names[0], path, blocks, shared, moved, TILE)
    add = "add_upsampled_partials_kernel"
    code = forward.code(add)
    sixteen = code.those(lambda b: b.count("LDG") == b.count("FADD") == 16)[:1]
    path = code.walk(
        [0], *[sixteen] * (blocks // 16), code.those(lambda b: b.count("STG") == 1)[-1:]
    )
    forward.add(add, waiting(path, L2), entries // 4 // TILE + 32, 0, blocks * entries, TILE)
    backward = Launches(library)
    path = waiting(upsampled_backward_path(backward.code(names[1]), keys), L2)
    backward.add(names[1], path, tiles, weights, 2 * features + labels, TILE)
    case = f"{title}, labels ×{RATIO}"
    return [
        Row("upsampled sums, forward", case, forward.times),
        Row("upsampled sums, backward", case, backward.times),
    ]


# --- the report -----------------------------------------------------------------------------------


def rows(library: Library) -> list[Row]:
    found = []
    for title, shape in {"HRNet": HRNET, "SegFormer": SEGFORMER}.items():
        found += key_rows(library, shape, title)
        found += upsampled_rows(library, shape, title)
    for shape in (HRNET, SEGFORMER, SEGFORMER._replace(classes=171)):
        for groups in (1, 2):
            found.append(info_nce_row(library, shape, groups))
    return found


def print_times(library: Library) -> None:
    """Prints a table of microseconds, next to the goals."""
    print("\nOperators of keys and centroids: predicted µs, not measured\n")
    print("| operator | case | launches | µs | goal |\n|---|---|---|---|---|")
    for row in rows(library):
        launches = " + ".join(f"{1e6 * time:.1f}" for _, time in row.kernels)
        goal = GOALS.get(row.operator)
        cells = row.operator, row.case, launches, f"{1e6 * row.total:.1f}"
        print("|", " | ".join(cells), f"| {1e6 * goal:.0f} |" if goal else "| |", flush=True)
