"""The paths of the backward kernels of class moments through their machine code. A thread processes
16 bytes of pixels or of channels at a time."""

import math
from collections.abc import Callable
from typing import NamedTuple

from label_maps import bank_cycles
from shapes import SUMS, Estimate, Shape, keys_of
from time_model import (
    BYTES_PER_CYCLE,
    COPY_BANDWIDTH,
    L1,
    L2,
    LAUNCH,
    MULTIPROCESSORS,
    Block,
    Choice,
    Path,
    cached,
    simulate,
    steady,
    walk,
)

GRADIENT = r"STG\.E\.EF\.128"
BACKWARD_THREADS = 256  # of a block
TABLES_IN_SHARED = 48 << 10


class Slices(NamedTuple):
    """The plan of class_moments_backward.cu for planes of contiguous pixels, with its tables in
    shared memory."""

    blocks: int
    rounds: int  # of 16 bytes of pixels, of a thread
    steps: int  # of channels, in a round
    row_vectors: int  # of 16 bytes, from a row of the tables to the next
    fills: int  # rounds of the loop that fills the tables


def slices_of(shape: Shape, itemsize: int, statistics: int) -> Slices:
    size, tables = 16 // itemsize, statistics.bit_count()
    step = size if statistics == SUMS else 4
    period = size // math.gcd(size, shape.plane)
    vectors_per_line = math.ceil((shape.plane + (size - 1 if period > 1 else 0)) / size)
    vector_blocks = math.ceil(shape.batch * vectors_per_line / BACKWARD_THREADS)
    most = (TABLES_IN_SHARED // shape.num_keys // 16 - 1 | 1) // tables * step
    if most < 8:
        raise LookupError("the paths of tables in global memory are not known here")
    enough = max(shape.dim * vector_blocks // 528, 16)
    channels = math.ceil(shape.dim / period)
    ranges = math.ceil(channels / min(most, enough, 64))
    steps = math.ceil(math.ceil(channels / ranges) / step)
    rounds = math.ceil(vector_blocks * ranges * period / 528)
    return Slices(
        ranges * period * math.ceil(vector_blocks / rounds),
        rounds,
        steps,
        steps * tables | 1,
        math.ceil(shape.num_keys / (4 * (BACKWARD_THREADS // (steps * step)))),
    )


def ends(block: Block) -> bool:
    return bool(block.instructions) and block.instructions[-1].text == "EXIT ;"


class Planes:
    """Paths of class_moments_backward_planes_kernel."""

    def __init__(self, blocks: list[Block], itemsize: int, bank_cycles: float):
        def path(*stops: list[int]) -> Path:
            """Tables come from the second-level cache, 16 bytes of each lane's keys from as many
            lines as a lane has pixels. The rows of the steps come from shared memory."""
            return [
                x._replace(busy=bank_cycles, latency=round(x.latency + bank_cycles - x.busy))
                if x.opcode == "LDS.128"
                else x
                for x in cached(walk(blocks, *stops), L2, 16 // itemsize)
            ]

        def those(choice: Choice, first: int = 0) -> list[int]:
            return [i for i in range(first, len(blocks)) if choice(blocks[i])]

        most = max(block.count(GRADIENT) for block in blocks)
        step = those(lambda b: b.count(GRADIENT) == most)
        barrier = those(lambda b: b.count("BAR") > 0)[:1]
        fill = [i for i in those(lambda b: b.count("STS") > 0) if i < barrier[0]][-1:]
        loads = those(lambda b: b.count("LDG") >= 16 // itemsize, barrier[0])[:1]
        part = those(lambda b: b.count(r"STG\.E(\.U16)?$") == 16 // itemsize)[:1]
        self.enter = path([0], fill)
        self.fill = path(fill, fill)
        self.filled = path(fill, barrier, loads)
        self.begin = path(loads, step)
        self.step = path(step, step)
        self.next = path(step, loads)
        self.leave = path(step, those(ends))
        # the lanes that have a part of 16 bytes follow the others, channel by channel
        self.part = path(part, part) * most

    def thread(self, plan: Slices, has_part: Callable[[int], bool]) -> Path:
        path = self.enter + self.fill * (plan.fills - 1) + self.filled
        for n in range(plan.rounds):
            path = path + self.begin + self.step * (plan.steps - 1)
            path = path + self.part * (plan.steps if has_part(n) else 0)
            path = path + (self.next if n < plan.rounds - 1 else self.leave)
        return path


def backward(
    blocks: list[Block],
    itemsize: int,
    resident: Callable[[int, int], int],
    planes: bool,
    statistics: int,
    shape: Shape,
    kind: str,
) -> Estimate:
    """resident: blocks on a multiprocessor, for a number of threads and bytes of shared memory.
    planes: whether pixels are contiguous, and not channels."""
    if not planes:
        warps = resident(BACKWARD_THREADS, 0) * BACKWARD_THREADS // 32
        return rows(blocks, itemsize, warps, shape, statistics != SUMS)
    plan = slices_of(shape, itemsize, statistics)
    keys = keys_of(shape, kind)
    code = Planes(blocks, itemsize, bank_cycles(keys, 16 // itemsize, plan.row_vectors))
    shared = shape.num_keys * plan.row_vectors * 16
    warps = resident(BACKWARD_THREADS, shared) * BACKWARD_THREADS // 32
    aligned = shape.plane * itemsize % 16 == 0
    # a plane has two warps with a part of 16 bytes
    nth = math.inf if aligned else shape.plane * itemsize // (2 * 32 * 16)

    def thread(warp: int, r: int) -> Path:
        return code.thread(plan, lambda n: (5 * warp + 7 * r + 3 * n) % nth == 0)

    one = simulate([code.thread(plan, lambda n: False)])
    every = steady(thread, warps, 2)
    steps = plan.rounds * plan.steps
    stores = steps * (16 // itemsize if statistics == SUMS else 4)
    reads = statistics != SUMS
    return estimate(shape, itemsize, reads, warps, one, every, steps, stores, plan.blocks)


def rows(blocks: list[Block], itemsize: int, warps: int, shape: Shape, reads: bool) -> Estimate:
    """A round stores in several blocks with separate conditions."""
    vectors = shape.pixels * shape.dim * itemsize // 16
    rounds = min(max(vectors // (BACKWARD_THREADS * 4 * 2048), 1), 8)
    loop = [[i] for i, block in enumerate(blocks) if block.count(GRADIENT)]
    exits = [i for i, block in enumerate(blocks) if ends(block)]
    lines = 16 // itemsize  # of channels in a row of a table
    enter = cached(walk(blocks, [0], loop[0]), L2)
    again = cached(walk(blocks, *loop, loop[0]), L1, lines) if rounds > 1 else []
    leave = cached(walk(blocks, *loop, exits), L1, lines)
    path = enter + again * (rounds - 1) + leave
    one, every = simulate([path]), steady(lambda warp, r: path, warps, 2)
    stores = rounds * sum(blocks[i].count(GRADIENT) for [i] in loop)
    grid = vectors // (BACKWARD_THREADS * stores)
    return estimate(shape, itemsize, reads, warps, one, every, rounds, stores, grid)


def estimate(
    shape: Shape,
    itemsize: int,
    reads: bool,
    warps: int,
    one: float,
    every: float,
    steps: int,
    stores: int,
    grid: int,
) -> Estimate:
    """one, every: cycles of a thread with this number of steps, and of stores of 16 bytes."""
    ideal = shape.pixels * shape.dim * itemsize * (1 + reads) / COPY_BANDWIDTH
    moved = 512 * stores * (1 + reads)  # by a warp
    every = max(every, moved * warps / BYTES_PER_CYCLE)
    seconds = ideal / (moved * warps / every / BYTES_PER_CYCLE) + LAUNCH
    waves = grid * BACKWARD_THREADS / 32 / (MULTIPROCESSORS * warps)
    return Estimate(warps, one / steps, every / steps, waves, ideal / seconds)
