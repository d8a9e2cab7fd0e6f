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
    cached,
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


def label_keys_path(code: Code) -> Path:
    """The same without resizing."""
    three = code.those(lambda b: b.count("LDG") == 3)[:1]
    stores = code.those(lambda b: b.count("STG") == 4)
    bins = code.those(lambda b: b.count("ATOMS") == 1)
    last = [i for i in code.blocks[three[0]].next if code.blocks[i].count("LDG")]
    return code.walk([0], three, last, stores, *([i] for i in bins), code.exits)


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
    add_zeros(alone)
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


def add_zeros(launches: Launches) -> None:
    zeros = "zero_counts_kernel"
    code = launches.code(zeros)
    launches.add(zeros, code.walk([0], code.exits), 1)


def label_keys(library: Library, shape: Shape) -> list[tuple[str, float]]:
    """The keys, of 8 bits, of CeCo's labels, which are not resized."""
    launches, name = Launches(library), "class_keys_kernel<long, unsigned char>"
    add_zeros(launches)
    labels, of_image = RATIO**2 * shape.pixels, RATIO**2 * shape.plane
    path = waiting(label_keys_path(launches.code(name)), MEMORY, LABEL_BYTES * 32 // 128)
    blocks = shape.batch * math.ceil(of_image / 1024)
    launches.add(name, path, blocks, 4 * shape.classes, (LABEL_BYTES + 1) * labels)
    return launches.times


# --- centroid InfoNCE -----------------------------------------------------------------------------


class Products:
    """The loop of a warp's product. products: instructions of the tensor cores in a step, which are
    in one block; start: a block before the loads of the first step."""

    def __init__(self, code: Code, products: int, groups: int, start: int = 0, which: int = 0):
        self.code, self.groups = code, groups
        self.end = code.those(lambda b: b.count("HMMA") == products)[which]
        self.first = min(code.blocks[self.end].next)
        self.before = self.stops(range(start, self.first))
        self.within = [*self.stops(range(self.first + 1, self.end)), [self.end]]

    def stops(self, region: range) -> list[list[int]]:
        """Where operands, masks and the losses of rows are loaded and converted: blocks that the
        shortest path would avoid."""
        count = {i: self.code.blocks[i].count for i in region}
        wide = [i for i in region if count[i](r"LDG\.E\.128") == 1][1::2]  # float32: two for eight
        wide += [i for i in region if count[i](r"LDG\.E\.128") == 2]
        # after the conversion of float16, and without it
        wide += [self.code.blocks[i].next[0] for i in region if count[i]("HADD2")]
        losses = [i for i in region if count[i](r"LDG\.E$") == 4]
        rows = [i for i in region if count[i]("I2F") and count[i + 1](r"LDG\.E\.U8")]
        gradients = [i for i in region if count[i](r"MUFU\.EX2") == 1 and count[i]("FADD") == 5]
        if self.groups == 1:  # a query has its own key
            gradients += [i + 1 for i in gradients]
        # over two groups of a class at a time, of keys that are given and of others
        loops = [i for i in region if count[i](r"LDG\.E\.U8") and i in self.code.blocks[i].next]
        masks = [loops[i : i + 2] for i in range(0, len(loops), 2)]
        single = [[i] for i in [*wide, *losses, *[i + 1 for i in rows], *gradients]]
        return sorted([*single, *masks * math.ceil(self.groups / 2)])

    def path(self, steps: int, *after: list[int]) -> Path:
        walk = self.code.walk
        entry = walk([0], *self.before, [self.first])
        step = walk([self.first], *self.within, [self.first])
        return entry + step * steps + walk([self.end + 1], *after, self.code.exits)


def from_caches(path: Path) -> Path:
    """Masks are in the first-level cache after the first step. A wide load of a warp reads eight
    rows, or two lines of four rows."""
    seen: set[str] = set()
    found = []
    for x in waiting(path, L2, 4):
        if x.opcode.startswith("LDG.E.128"):
            x = x._replace(busy=max(x.busy, 8))
        again = x.opcode.startswith("LDG.E.U8") and x.text in seen
        found.append(x._replace(latency=L1) if again else x)
        seen.add(x.text)
    return found


def logits_path(code: Code, dim: int, groups: int) -> Path:
    """Of a warp, with one eighth of the channels, 32 at a time."""
    start = code.those(lambda b: b.count(r"SHFL\.BFLY") == 5)[0]  # after the positives
    products = Products(code, 24, groups, start)
    sums = code.those(lambda b: b.count(r"STS\.64") == 4)
    masks = products.stops(range(sums[0], len(code.blocks) - 1))[: math.ceil(groups / 2)]
    exponentials = code.those(lambda b: b.count(r"MUFU\.EX2") == 2, sums[0])
    rows_done = code.those(lambda b: b.count(r"SHFL\.BFLY") == 8)
    path = products.path(math.ceil(dim / 256), sums, *masks, exponentials, rows_done)
    return from_caches(path)


def gradient_paths(
    code: Code, rows: int, num_classes: int, groups: int
) -> tuple[list[Path], list[Path]]:
    """Of the eight warps of a block of dqueries and of one of dkeys. In the code those of dkeys
    come first."""
    start = code.those(lambda b: b.count(r"STS$") == 1)[0]  # after those of dbias
    of_keys = Products(code, 48, groups, start)
    of_rows = Products(code, 48, groups, of_keys.end + 1, which=1)
    summed = code.those(lambda b: b.count(r"STS\.128") == 8)
    stored = code.those(lambda b: b.count(r"STG\.E\.128") == 2)  # float32
    positive = []
    if groups > 1:  # each query is the positive of the other
        losses = code.those(lambda b: 3 <= b.count(r"LDG\.E$") <= 4, of_rows.end)
        wide = code.those(lambda b: b.count(r"LDG\.E\.128") == 1, of_rows.end)
        positive = [[losses[0]], [wide[1]], [losses[1]]]
    keys = [of_keys.path(n, summed, stored) for n in steps_of_warps(rows, 8)]
    queries = [of_rows.path(n, summed, *positive, stored) for n in steps_of_warps(num_classes, 4)]
    return [from_caches(x) for x in queries], [from_caches(x) for x in keys]


def steps_of_warps(terms: int, splits: int) -> list[int]:
    """Steps of 16 terms, of the eight warps of a block."""
    return [math.ceil((math.ceil(terms / 16) - warp % splits) / splits) for warp in range(8)]


def reduce_path(code: Code, rows: int, chunks: int) -> Path:
    """For the mean of the losses."""
    chunks_of_row = code.those(lambda b: b.count(r"LDG\.E\.64") == 8)[-1:]
    row = [chunks_of_row] * math.ceil(chunks / 8)
    summed = code.those(lambda b: b.count(r"SHFL\.BFLY") == 10)
    return waiting(code.walk([0], *row * math.ceil(rows / 512), summed, code.exits), L2)


def gradient_seconds(
    library: Library, name: str, of_rows: list[Path], of_keys: list[Path], blocks: list[int]
) -> float:
    """of_rows, of_keys: of the warps of a block of dqueries and of one of dkeys; blocks: how many
    there are of both."""
    shorter, longer = sorted(
        zip((of_rows, of_keys), blocks, strict=True), key=lambda x: len(x[0][0])
    )
    here = math.ceil(sum(blocks) / MULTIPROCESSORS)  # blocks of a multiprocessor
    resident = library[name][1](THREADS, 4 * 8 * 16 * 72)
    long = min(math.ceil(longer[1] / MULTIPROCESSORS), here)
    paths = [*[longer[0]] * long, *[shorter[0]] * (here - long)]
    # a block that is not resident at first follows the shortest one
    while len(paths) > max(resident, 1):
        *paths, first, second = paths
        paths.append([a + b for a, b in zip(first, second, strict=True)])
    return simulate([path for block in paths for path in block]) / CLOCK + LAUNCH


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
    shared = 4 * 8 * 16 * 24
    path = logits_path(launches.code(names[0]), dim, groups)
    # the blocks of the positives have a tenth of the work
    launches.add(names[0], path, row_blocks * (chunks + 0.2 * (groups > 1)), shared)
    launches.add(names[1], reduce_path(launches.code(names[1]), rows, chunks), 1, threads=512)
    gradients = "centroid_info_nce_backward_kernel<16, 1>"
    of_rows, of_keys = gradient_paths(launches.code(gradients), rows, num_classes, groups)
    channel_blocks = math.ceil(dim / 64)
    blocks = [math.ceil(rows / 32) * channel_blocks, math.ceil(num_classes / 16) * channel_blocks]
    time = gradient_seconds(library, gradients, of_rows, of_keys, blocks)
    launches.times.append((gradients, time))
    case = f"{num_classes} classes, {groups} {'query' if groups == 1 else 'queries'} of each"
    return Row("InfoNCE, forward and backward", case, launches.times)


# --- CeCo's sums of upsampled features ------------------------------------------------------------

CHANNELS, TILE, MOST_BYTES = 128, 128, 10 << 20
SLOTS = 16  # for the keys of a tile
FORWARD_THREADS, BACKWARD_THREADS, ADD_THREADS = 512, 256, 128


def keys_of_tile(shape: Shape) -> int:
    """Different labels around a row of TILE features, on average."""
    maps = label_maps("images", 1, shape.height * RATIO, shape.width * RATIO, shape.classes)[0]
    tiles = [
        len(np.unique(rows[rows != 255]))
        for y in range(0, shape.height - 2, 8)
        for rows in np.split(maps[y * RATIO : (y + 2) * RATIO], shape.width // TILE, axis=1)
    ]
    return round(float(np.mean(tiles)))


class Upsampling:
    """Blocks of both kernels: the features of a patch in planes are requested; then the weights of
    the tile are computed, a row of labels at a time, and those of the threads of a pixel are added;
    one warp sorts the keys, and the others wait for it; then the keys follow."""

    def __init__(self, code: Code, threads: int, keys: int):
        self.code = code
        self.load = code.those(lambda b: b.count(r"LDG\.E\.EF\.128") == 4)[:1]
        labels = code.those(lambda b: b.count(r"LDG\.E\.U8") == 8)[:1]
        key = code.those(lambda b: b.count("FFMA") == 32 and b.count(r"LDS\.128") == 2)[:1]
        parts = threads // TILE
        sums = code.those(lambda b: b.count("LDS$") >= parts and b.count("STS$") == 1, labels[0])
        added = sums[:1]
        compared = code.those(lambda b: b.count("LDS$") == 1, added[0])[:1]
        sorted_ = code.those(lambda b: b.count("STS$") == 2)
        # a label row for each of the threads of a pixel in turn
        self.tile = [
            *[labels] * (2 * RATIO // parts),
            *[added] * math.ceil(keys / parts),
            *[compared] * keys,
            sorted_,
            *[key] * keys,
        ]

    def walk(self, *stops: list[int]) -> Path:
        return cached(self.code.walk(*stops), L2)


def upsampled_path(code: Code, tiles: int, keys: int) -> Path:
    """The tiles of a block: their features, weights, sums of each key, and moments."""
    way = Upsampling(code, FORWARD_THREADS, keys)
    tile = way.walk(way.load, *way.tile, way.load)
    first, last = way.walk([0], way.load), way.walk(way.load, *way.tile, code.exits)
    return first + tile * (tiles - 1) + last


def upsampled_backward_path(code: Code, keys: int) -> Path:
    """One tile: its weights, then the gradients of all channels, in parts."""
    way = Upsampling(code, BACKWARD_THREADS, keys)
    stored = [[i] for i in code.those(lambda b: b.count(r"STG\.E\.EF\.128") >= 1)]
    channels = [*way.tile[-keys:], *stored]
    first = way.walk([0], way.load, *way.tile, *stored, way.load)
    parts = CHANNELS // (BACKWARD_THREADS // 4)
    again = way.walk(way.load, *channels, way.load)
    return first + again * (parts - 2) + way.walk(way.load, *channels, code.exits)


def upsampled_rows(library: Library, shape: Shape, title: str) -> list[Row]:
    """The map of 128 channels in planes of bfloat16; keys of the labels in 8 bits."""
    tiles = shape.batch * shape.height * math.ceil(shape.width / TILE)
    keys = keys_of_tile(shape)
    entries = 4 * shape.classes * CHANNELS
    most = MOST_BYTES // entries
    most = min(most, MULTIPROCESSORS)
    of_image = tiles // shape.batch
    each = math.ceil(of_image / max(most // shape.batch, 1))
    blocks = shape.batch * math.ceil(of_image / each)
    lists = 4 * (2 * SLOTS + 2)
    features, labels = 2 * CHANNELS * shape.pixels, RATIO**2 * shape.pixels
    names = [
        f"upsampled_sums_{which}kernel<BFloat16, unsigned char>" for which in ("", "backward_")
    ]
    forward = Launches(library)
    path = upsampled_path(forward.code(names[0]), each, keys)
    shared, moved = 4 * SLOTS * FORWARD_THREADS + lists, features + labels + blocks * entries
    forward.add(names[0], path, blocks, shared, moved, FORWARD_THREADS)
    add = "add_upsampled_partials_kernel"
    code = forward.code(add)
    sixteen = code.those(lambda b: b.count("LDG") == b.count("FADD") == 16)[:1]
    path = code.walk(
        [0], *[sixteen] * (blocks // 16), code.those(lambda b: b.count("STG") == 1)[-1:]
    )
    blocks_of_sums = math.ceil(entries / 4 / ADD_THREADS) + CHANNELS * 32 // ADD_THREADS
    moved = blocks * entries
    forward.add(add, waiting(path, L2), blocks_of_sums, 0, moved, ADD_THREADS)
    backward = Launches(library)
    path = upsampled_backward_path(backward.code(names[1]), keys)
    shared, moved = 4 * SLOTS * BACKWARD_THREADS + lists, 2 * features + labels
    backward.add(names[1], path, tiles, shared, moved, BACKWARD_THREADS)
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


def print_times(title: str, rows: list[Row]) -> None:
    """Prints a table of microseconds, next to the goals."""
    print(f"\n{title}: predicted µs, not measured\n")
    print("| operator | case | launches | µs | goal |\n|---|---|---|---|---|")
    for row in rows:
        launches = " + ".join(f"{1e6 * time:.1f}" for _, time in row.kernels)
        goal = GOALS.get(row.operator)
        cells = row.operator, row.case, launches, f"{1e6 * row.total:.1f}"
        print("|", " | ".join(cells), f"| {1e6 * goal:.0f} |" if goal else "| |", flush=True)
