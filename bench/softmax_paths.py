"""The paths of the kernels of softmax moments through their machine code, and the times that
follow: for the cross-entropy, forward and backward, in half precision, with labels of images.

This is like paths.py, with one simplification. The time of a kernel is the larger one of two times:
that of its warps, from time_model.py, and that of moving its bytes. Loads of logits have the
latency of memory. In the kernels that loop over the classes, other loads have the latency of the
second-level cache.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from label_maps import label_maps
from time_model import (
    CLOCK,
    COPY_BANDWIDTH,
    L2,
    LAUNCH,
    MEMORY,
    MULTIPROCESSORS,
    Block,
    Choice,
    Path,
    blocks_of,
    simulate,
    walk,
)

# Most seconds of forward and backward together. Triton's loops wait for their loads.
LIMITS = {"CUDA": 0.8e-3, "Triton": 1.4e-3}
ITEMSIZE, LABEL_BYTES, RATIO = 2, 8, 4
TILE_PIXELS = RATIO**2  # of a thread
LOGITS = re.compile(r"(LDG|STG)\.E\.U16")


class Shape(NamedTuple):
    batch: int
    num_classes: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.batch * self.height * self.width * RATIO**2

    @property
    def logit_bytes(self) -> int:
        return self.batch * self.num_classes * self.height * self.width * ITEMSIZE


SHAPES = {"B16 K150 128² → 512²": Shape(16, 150, 128, 128)}
SHAPES["B8 K19 128×256 → 512×1024"] = Shape(8, 19, 128, 256)


class Kernel(NamedTuple):
    path: Path  # of a warp
    warps: int  # of a block
    blocks: int
    resident: int  # blocks on a multiprocessor
    bytes: float = 0  # of memory, of the whole launch


def seconds(kernel: Kernel) -> float:
    """Until the kernel ends and the next one may start."""
    path, warps, blocks, resident, bytes_moved = kernel
    waves = blocks / MULTIPROCESSORS / resident
    last = math.ceil((waves - math.floor(waves)) * resident)
    cycles = math.floor(waves) * wave(path, warps, resident) + wave(path, warps, last)
    return max(cycles / CLOCK, bytes_moved / COPY_BANDWIDTH) + LAUNCH


def wave(path: Path, warps: int, blocks: int) -> float:
    """Cycles until this number of blocks has finished on one multiprocessor. Each block begins a
    little later than the one before. This is so on a GPU, where it begins when another block ends.
    Otherwise all blocks would wait at the same places."""
    if not blocks:
        return 0
    apart = sum(x.stall for x in path) // 16 // blocks
    first = path[0]
    starts = [[first._replace(stall=1 + apart * b), *path] for b in range(blocks)]
    return simulate([start for start in starts for _ in range(warps)]) - apart * (blocks - 1)


def waiting(path: Path, others: int = L2, lines: int = 1, logits: int = MEMORY) -> Path:
    """The path with the latencies of its loads. lines: how many lines of 128 bytes each load of a
    warp reads, except loads of logits."""
    return [
        x._replace(latency=logits)
        if LOGITS.match(x.opcode)
        else x._replace(latency=others, busy=max(x.busy, lines))
        if x.opcode.startswith("LDG")
        else x
        for x in path
    ]


def labels_of_tile(shape: Shape, height: int, width: int) -> float:
    """Different labels in a tile of pixels, on average."""
    maps = label_maps(
        "images", shape.batch, shape.height * RATIO, shape.width * RATIO, shape.num_classes
    )
    count, total = 0, 0
    for y in range(0, maps.shape[1] - height + 1, height * 4):
        rows = maps[0, y : y + height]
        for x in range(0, rows.shape[1] - width + 1, width):
            count, total = count + 1, total + len(np.unique(rows[:, x : x + width]))
    return total / count


# --- CUDA -----------------------------------------------------------------------------------------


class Code:
    """Blocks of a kernel, found by the instructions that they contain."""

    def __init__(self, sass: str):
        self.blocks = blocks_of(sass)
        self.exits = self.those(
            lambda b: bool(b.instructions) and b.instructions[-1].opcode == "EXIT"
        )

    def those(self, choice: Choice, after: int = -1) -> list[int]:
        return [i for i, b in enumerate(self.blocks) if i > after and choice(b)]

    def walk(self, *stops: list[int]) -> Path:
        return walk(self.blocks, *stops)


def loads_bfloat16(block: Block, count: int) -> bool:
    """Whether the block loads this many bfloat16 numbers. HADD2 would convert float16."""
    return block.count(r"LDG\.E\.U16$") == count and not block.count("HADD2")


class Sweep:
    """The path of a warp for some classes: it stages their logits, nine rows of 33 positions in
    three rounds and the last column separately, and then runs the loop over the classes."""

    def __init__(
        self, code: Code, classes: int, loop: list[int], classes_of_loop: int | None = None
    ):
        self.code, self.loop, self.classes = code, loop, classes
        loads = 3 * classes // 8  # of three rows, planes of a warp
        self.load = code.those(lambda b: loads_bfloat16(b, loads))[:1]
        self.store = code.those(lambda b: b.count("STS") == classes // 8, self.load[0])[:3]
        self.edge = code.those(
            lambda b: loads_bfloat16(b, 1) and b.count("STS") == 1, self.load[0]
        )[:1]
        four = code.blocks[loop[0]].count(r"MUFU\.EX2")  # of a class
        self.classes_of_loop = classes_of_loop or four // 4

    def enter(self) -> Path:
        return self.code.walk([0], self.load)

    def staged(self, first: bool, end: list[int] | None = None) -> Path:
        """From the first load to the loop, or to `end`. All classes except the first ones have been
        prefetched."""
        stores = [[i] for i in self.store]
        rows = self.code.walk(self.load, *stores, self.load)
        path = rows * 2 + self.code.walk(self.load, *stores, self.edge, end or self.loop)
        return waiting(path, lines=4, logits=MEMORY if first else L2)

    def looped(self, count: int) -> Path:
        """All iterations of the loop except the last one."""
        rounds = math.ceil(count / self.classes_of_loop)
        return self.code.walk(self.loop, self.loop) * (rounds - 1)

    def counts(self, num_classes: int) -> list[int]:
        return [min(self.classes, num_classes - i) for i in range(0, num_classes, self.classes)]


def losses_path(code: Code, num_classes: int, labels: int) -> Path:
    """labels: the number of different labels of a warp's pixels. All partials are one part."""
    loop = code.those(lambda b: b.count(r"MUFU\.EX2") == 8 and b.count("LDS") == 8)[:1]
    sweep = Sweep(code, 32, loop)
    loads = code.those(lambda b: b.count(r"LDG\.E\.64$") == TILE_PIXELS, loop[0])[:1]
    stores = code.those(lambda b: b.count(r"STG\.E$") == TILE_PIXELS, loads[0])[:1]
    first_label = code.those(lambda b: b.count("REDUX") == 1, stores[0])[:1]
    logits = code.those(lambda b: loads_bfloat16(b, 4), first_label[0])[:1]
    summed = code.those(lambda b: b.count("REDUX") == 1 and b.count("SHFL") == 10)
    warps = code.those(lambda b: b.count("LDS") == 8, summed[0])  # two statistics
    partials = code.those(lambda b: b.count(r"STG\.E$") == 1, warps[0])
    path = sweep.enter()
    *counts, last = sweep.counts(num_classes)
    for i, count in enumerate(counts):
        path = path + sweep.staged(i == 0) + sweep.looped(count) + code.walk(loop, sweep.load)
    path = path + sweep.staged(not counts) + sweep.looped(last) + code.walk(loop, loads)
    path = path + waiting(code.walk(loads, stores), lines=8)  # prefetched
    path = path + code.walk(stores, first_label)
    each = code.walk(logits, summed, logits)
    path = path + waiting(code.walk(first_label, logits) + each * (labels - 1), logits=L2)
    path = path + waiting(code.walk(logits, summed, warps[:1]), logits=L2)
    return path + code.walk(warps[:1], partials[:1], warps[1:], partials[1:], code.exits)


def dlogits_path(code: Code, num_classes: int, labels: int) -> Path:
    """labels: the number of different labels of a warp's pixels. Each is processed in one of the
    first groups of classes."""
    loop = code.those(
        lambda b: b.count(r"MUFU\.EX2") == 4 and b.count("LDS") >= 4 and b.count("SHFL") == 2
    )[:1]
    sweep = Sweep(code, 16, loop)
    loads = code.those(lambda b: b.count(r"LDG\.E\.64$") == TILE_PIXELS)[:1]
    lse, dlosses = (
        [i] for i in code.those(lambda b: b.count(r"LDG\.E$") == TILE_PIXELS, loads[0])[:2]
    )
    factors = code.those(lambda b: b.count(r"MUFU\.EX2") == TILE_PIXELS)[:1]
    next_label = code.those(lambda b: b.count("REDUX") == 1 and not b.count("STS"))[:1]
    of_label = code.those(lambda b: b.count(r"LDG\.E$") == 1, next_label[0])[:1]
    written = code.those(lambda b: b.count("REDUX") == 1 and b.count("STS") == 2)
    stores = code.those(lambda b: b.count("F2FP.BF16") == 1 and b.count("STG") == 1)[:7]
    path = sweep.enter()
    for i, count in enumerate(sweep.counts(num_classes)):
        path = path + sweep.staged(i == 0, loads if i == 0 else None)
        if i == 0:
            path = path + waiting(code.walk(loads, lse), lines=8)  # prefetched, as lse
            path = path + waiting(code.walk(lse, dlosses), lines=4)
            path = path + waiting(code.walk(dlosses, factors, loop))
        path = path + sweep.looped(count) + code.walk(loop, next_label)
        start = next_label
        if i < labels:
            path = path + waiting(code.walk(next_label, of_label, written))
            start = written
        plane = [[s] for s in stores]
        path = path + code.walk(start, *plane, plane[0])  # two planes for each of eight warps
        last = (i + 1) * sweep.classes >= num_classes
        path = path + code.walk(*plane, code.exits if last else sweep.load)
    return path


def shifts_path(code: Code, num_classes: int) -> Path:
    many, one = (code.those(lambda b, n=n: loads_bfloat16(b, n))[:1] for n in (24, 3))
    path = code.walk([0], many) + code.walk(many, many) * (num_classes // 8 - 1)
    if not num_classes % 8:
        return path + code.walk(many, code.exits)
    path = path + code.walk(many, one) + code.walk(one, one) * (num_classes % 8 - 1)
    return path + code.walk(one, code.exits)


def sums_path(code: Code, rows: int) -> Path:
    loop = code.those(lambda b: b.count(r"LDG\.E$") == 8)[:1]
    path = code.walk([0], loop) + code.walk(loop, loop) * max(math.ceil(rows / 8) - 1, 0)
    return path + code.walk(loop, code.exits)


# Resident blocks of a kernel by threads of a block and its bytes of shared memory.
Resident = Callable[[int, int], int]
# Kernels of a library by name: machine code, and how many blocks are resident.
Library = Mapping[str, tuple[str, Resident]]


def cuda_kernels(library: Library, shape: Shape) -> list[tuple[str, Kernel]]:
    """What the operators launch, in order; the sizes are those of csrc/cuda/softmax_*.cu."""
    batch, num_classes, height, width = shape
    across = math.ceil(batch * (width + 2) / 32)
    labels = round(labels_of_tile(shape, RATIO, 32 * RATIO))

    def kernel(
        name: str, threads: int, shared: int, blocks: int, bytes_moved: float, path: Path
    ) -> tuple[str, Kernel]:
        resident = library[name][1](threads, shared)
        return name, Kernel(path, threads // 32, blocks, resident, bytes_moved)

    def code(name: str) -> Code:
        return Code(library[name][0])

    def stage(classes: int) -> int:
        return 9 * 33 * (12 + 4 * classes)

    shifts, losses = "softmax_shifts_kernel<1>", "softmax_losses_kernel<false>"
    dlogits = "softmax_dlogits_kernel<false>"
    positions, pixels = batch * height * width, shape.pixels
    shift_pass = kernel(
        *(shifts, 256, 0, math.ceil(positions / 256), shape.logit_bytes + 8 * positions),
        waiting(shifts_path(code(shifts), num_classes)),
    )
    blocks = across * math.ceil((height + 1) / 8)
    statistics = 2  # losses and counts
    forward = kernel(
        *(losses, 256, stage(32), blocks, shape.logit_bytes + (LABEL_BYTES + 4) * pixels),
        losses_path(code(losses), num_classes, labels),
    )
    sums = kernel(
        *("sum_partials_kernel", 1024, 8192, statistics * math.ceil(num_classes / 32)),
        4 * statistics * blocks * num_classes,
        waiting(sums_path(code("sum_partials_kernel"), math.ceil(blocks / 32))),
    )
    gradient = kernel(
        *(dlogits, 256, stage(16) + 4 + 256 * 8 + 2 * 16 * 257 * 4),
        math.ceil((batch * (width + 2) - 1) / 31) * math.ceil(height / 7),
        2 * shape.logit_bytes + (LABEL_BYTES + 4) * pixels,
        dlogits_path(code(dlogits), num_classes, labels),
    )
    return [shift_pass, forward, sums, shift_pass, gradient]


# --- Triton ---------------------------------------------------------------------------------------


def forward_program(sass: str, num_classes: int, labels: int) -> Path:
    code = Code(sass)
    loop = code.those(lambda b: b.count(r"MUFU\.EX2") > b.count("LDG") > 0)[:1]
    of_label = code.those(lambda b: b.count("REDUX.SUM") == 1)[:1]
    path = code.walk([0], loop) + code.walk(loop, loop) * (num_classes - 1)
    path = path + code.walk(loop, of_label) + code.walk(of_label, of_label) * (labels - 1)
    return path + code.walk(of_label, code.exits)


def backward_program(sass: str, num_classes: int) -> Path:
    code = Code(sass)
    loop = code.those(lambda b: b.count("STG") == 1 and b.count(r"MUFU\.EX2") > 0)[:1]
    path = code.walk([0], loop) + code.walk(loop, loop) * (num_classes - 1)
    return path + code.walk(loop, code.exits)


class Program(NamedTuple):
    sass: str
    warps: int
    resident: int


FILLS = 3  # launches by torch: zeros for counts and for partials, and the sum of the partials


def triton_kernels(forward: Program, backward: Program, shape: Shape) -> list[tuple[str, Kernel]]:
    """The sizes are those of kernels/softmax_moments*.py."""
    batch, num_classes, height, width = shape
    labels = round(labels_of_tile(shape, RATIO, 32 * RATIO))
    tiles = math.ceil((height + 1) * (width + 1) / 32)
    gradient_tiles = min(
        math.ceil(height / (y - 1)) * math.ceil(width / (x - 1)) for y, x in ((16, 16), (8, 32))
    )
    maps = (LABEL_BYTES + 4) * shape.pixels
    return [
        (
            "_softmax_moments_kernel",
            Kernel(
                waiting(forward_program(forward.sass, num_classes, labels), MEMORY),
                forward.warps,
                batch * tiles,
                forward.resident,
                shape.logit_bytes + maps,
            ),
        ),
        (
            "_softmax_moments_bwd_kernel",
            Kernel(
                waiting(backward_program(backward.sass, num_classes), L2),
                backward.warps,
                batch * gradient_tiles,
                backward.resident,
                2 * shape.logit_bytes + maps,
            ),
        ),
    ]


# --- reports --------------------------------------------------------------------------------------


def print_times(
    title: str, kernels_of: Callable[[Shape], list[tuple[str, Kernel]]], others: int
) -> list[str]:
    """Prints a table of microseconds. others: launches with almost no work, in addition to the
    kernels. Returns a message for a total above the limit."""
    columns = {name: kernels_of(shape) for name, shape in SHAPES.items()}
    times = [[seconds(kernel) for _, kernel in kernels] for kernels in columns.values()]
    names = [name for name, _ in next(iter(columns.values()))]
    print(f"\nCross-entropy forward and backward, {title}, bf16: predicted µs, not measured\n")
    print("| kernel |", " | ".join(columns), "|\n|", "---|" * (1 + len(columns)))
    for name, *row in zip(names, *times, strict=True):
        print("|", name, "|", " | ".join(f"{1e6 * x:.0f}" for x in row), "|")
    totals = [sum(row) + others * LAUNCH for row in times]
    launches = len(names) + others
    print(f"| {launches} launches |", " | ".join(f"{1e6 * x:.0f}" for x in totals), "|")
    print("| limit |", " | ".join([f"{1e6 * LIMITS[title]:.0f}"] * len(totals)), "|", flush=True)
    return [
        f"{title}, {name}: {1e3 * total:.2f} ms predicted for softmax moments"
        for name, total in zip(columns, totals, strict=True)
        if total > LIMITS[title]
    ]
