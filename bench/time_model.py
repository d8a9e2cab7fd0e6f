"""Computes, without a GPU, how long warps take along a path of machine code.

SASS contains the issue rules of an instruction: the cycles until the next instruction of the warp,
and which of six scoreboards it sets and waits for. The model adds numbers that are not in the code;
they are below. Instructions of a warp are issued in order. Each of four schedulers issues one
instruction a cycle, from the warp that was ready first. Pipes are busy for some cycles. Memory is a
queue with a multiprocessor's share of the copy bandwidth, followed by a latency. Not modelled:
instruction cache, bank conflicts, taken branches beyond their stall count, barriers between warps,
other multiprocessors. The numbers are estimates for an H200 (sm_90), and must be corrected after a
run on a GPU.
"""

import heapq
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

CLOCK, MULTIPROCESSORS = 1.75e9, 132
COPY_BANDWIDTH = 4.3e12  # bytes a second, read and written together
BYTES_PER_CYCLE = COPY_BANDWIDTH / MULTIPROCESSORS / CLOCK  # of a multiprocessor: 18.6
LAUNCH = 3e-6  # seconds from the end of a kernel to the start of the next of a stream
# The same where the blocks of the next kernel are resident and wait (launch_early in launch.cuh):
# they wait for the last writes, and then load.
EARLY_LAUNCH = 1e-6
MEMORY, L2, L1 = 700, 260, 38  # cycles until a load has its result
OPERANDS = 12  # cycles until a load or store has read its registers

# Opcode -> cycles to the result, cycles that a pipe is busy, pipe. There is one "lsu" for the
# multiprocessor, with 128 bytes a cycle; each scheduler has its own pipes of the other kinds.
PIPES: list[tuple[str, int, int, str]] = [
    (r"LDS|LDSM", 29, 1, "lsu"),
    (r"STS", 30, 1, "lsu"),
    (r"LDG(?!DEP)|LD\.|ATOM|RED", L1, 1, "lsu"),
    (r"STG|ST\.", 30, 1, "lsu"),
    (r"SHFL|MATCH|REDUX", 24, 2, "lsu"),
    (r"U?LDC", 40, 1, "constant"),
    (r"S2U?R|CS2R|R2UR|BAR|DEPBAR|LDGDEPBAR|MEMBAR|WARPSYNC", 25, 2, "other"),
    (r"F2FP", 5, 2, "alu"),
    (r"MUFU|F2I|I2F|F2F|FRND|POPC|FLO|BREV", 20, 8, "special"),
    # 16×8×16: twice the time at the peak rate; warps reach 60 % of this rate
    (r"HMMA", 33, 8, "tensor"),
    (r"[BI]G?MMA|HGMMA", 33, 16, "tensor"),
    (r"DADD|DMUL|DFMA|DSETP", 40, 2, "double"),  # 16 lanes
    (r"FFMA|FADD|FMUL|HFMA2|HADD2|HMUL2", 4, 1, "fma"),
    (r"IMAD|IDP", 5, 2, "imad"),
    (r"BRA|BSSY|BSYNC|BREAK|EXIT|NOP|CALL|RET|YIELD", 5, 1, "branch"),
    (r"", 5, 2, "alu"),
]
RULES = [(re.compile(pattern), (latency, busy, pipe)) for pattern, latency, busy, pipe in PIPES]
STREAM = re.compile(r"LDGSTS|(LDG|STG)\.E\.EF")  # features and their gradient, past the caches


class Instruction(NamedTuple):
    text: str
    opcode: str
    stall: int
    write: int  # scoreboard that the result sets, 7 for none
    read: int  # scoreboard that is set when the registers have been read
    wait: tuple[int, ...]  # scoreboards to wait for
    latency: int
    busy: int
    pipe: str
    bytes: int = 0  # of memory that a warp moves
    pending: int | None = None  # DEPBAR: groups of copies that may be unfinished


class Block(NamedTuple):
    """A basic block; `next` are the blocks that may follow."""

    instructions: list[Instruction]
    next: list[int]

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, x.opcode) is not None for x in self.instructions)


Path = list[Instruction]
Choice = Callable[[Block], bool]


def opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].rstrip(";")


def decode(text: str, high: int, streams: re.Pattern[str] = STREAM) -> Instruction:
    """high: the upper 64 bits of the instruction. The fields from bit 41 on, and their numbers of
    bits: stall 4, yield 1, write 3, read 3, wait 6."""
    bits, name = high >> 41, opcode(text)
    latency, busy, pipe = next(rule for pattern, rule in RULES if pattern.match(name))
    width = re.search(r"\.(128|64|U?16|U?8)\b", name)
    size = int(width[1].lstrip("U")) // 8 if width else 4
    if name.startswith("LDSM"):  # matrices of 8 rows of 16 bytes
        size = 4 * int(name[-1])
    if pipe == "lsu" and re.match(r"LD|ST", name):
        busy = max(1, size // 4)
    memory = streams.match(name) is not None
    pending = re.search(r"DEPBAR\.LE SB\d, 0x(\w+)", text)
    return Instruction(
        text,
        name,
        max(1, bits & 15),
        bits >> 5 & 7,
        bits >> 8 & 7,
        tuple(b for b in range(6) if bits >> 11 + b & 1),
        MEMORY if memory else latency,
        busy,
        pipe,
        32 * size if memory else 0,
        int(pending[1], 16) if pending else None,
    )


def blocks_of(sass: str, streams: re.Pattern[str] = STREAM) -> list[Block]:
    """The blocks of one function, from the output of `nvdisasm -c -hex`. streams: opcodes that move
    features or their gradient."""
    labels: dict[str, int] = {}
    chunks: list[Path] = [[]]
    pending = ""
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            chunks.append([])
            labels[label[1]] = len(chunks) - 1
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?;)", line):
            pending = found[1]
        elif pending and (high := re.match(r"\s+/\* (0x[0-9a-f]{16}) \*/", line)):
            chunks[-1].append(decode(pending, int(high[1], 16), streams))
            if re.search(r"\b(BRA|EXIT|RET\S*)\b", pending):
                chunks.append([])
            pending = ""
    blocks = []
    for i, chunk in enumerate(chunks):
        last = chunk[-1].text if chunk else ""
        after = [] if re.match(r"(BRA(\.\w+)* `|EXIT ;|RET)", last) else [i + 1]
        if target := re.search(r"BRA.*\((\.L_x_\d+)\)", last):
            after.append(labels[target[1]])
        blocks.append(Block(chunk, [n for n in after if n < len(chunks)]))
    return blocks


def walk(blocks: Sequence[Block], *stops: Choice | Iterable[int]) -> Path:
    """The instructions from the first stop to the last, on the path with the fewest stalls that
    passes a block of each stop; the last block is not included. The last stop of a loop is its
    first one. A stop is a set of blocks, or a function that selects them."""
    sets = [
        [i for i, block in enumerate(blocks) if stop(block)] if callable(stop) else list(stop)
        for stop in stops
    ]
    ways: dict[int, tuple[float, list[int]]] = {i: (0.0, []) for i in sets[0]}
    for following in sets[1:]:
        reached: dict[int, tuple[float, list[int]]] = {}
        for start, (cost, way) in ways.items():
            for end, (more, leg) in _shortest(blocks, start, set(following)).items():
                if end not in reached or cost + more < reached[end][0]:
                    reached[end] = cost + more, way + leg
        ways = reached
    if not ways:
        raise LookupError("no path through the code passes these blocks")
    if len({*sets[0]} & {*sets[-1]}) and len(sets) > 1:  # a loop ends at its first block
        ways = {end: way for end, way in ways.items() if way[1] and way[1][0] == end} or ways
    _, way = min(ways.values())
    return [x for i in way for x in blocks[i].instructions]


def _shortest(
    blocks: Sequence[Block], start: int, ends: set[int]
) -> dict[int, tuple[float, list[int]]]:
    found: dict[int, tuple[float, list[int]]] = {}
    seen: set[int] = set()
    heap: list[tuple[float, int, list[int]]] = []

    def leave(cost: float, block: int, way: list[int]) -> None:
        cost += sum(x.stall for x in blocks[block].instructions)
        for after in blocks[block].next:
            heapq.heappush(heap, (cost, after, [*way, block]))

    leave(0, start, [])
    while heap:
        cost, block, way = heapq.heappop(heap)
        if block in seen:
            continue
        seen.add(block)
        if block in ends:
            found[block] = cost, way
        leave(cost, block, way)
    return found


def cached(path: Path, latency: int, lines: int = 1) -> Path:
    """The path with this latency of table loads, each from this number of lines of 128 bytes."""
    return [
        x._replace(latency=latency, busy=max(x.busy, lines))
        if re.match(r"LDG\.", x.opcode) and not x.bytes
        else x
        for x in path
    ]


def simulate(paths: Sequence[Path], block: int = 0) -> float:
    """Cycles until all warps of a multiprocessor have reached the ends of their paths. block: warps
    that wait for each other at barriers, all of which have as many; 0: barriers are not modelled.
    """
    at = [0] * len(paths)
    waiting: dict[int, list[tuple[float, int]]] = {}  # at a barrier, by block
    ready = [[0.0] * 8 for _ in paths]  # by scoreboard; 7 is none
    copies: list[list[float]] = [[0.0] for _ in paths]  # ends of groups; the last is open
    scheduler = [0.0] * 4
    pipes: dict[str | tuple[str, int], float] = {}  # when a pipe is free
    memory = end = 0.0
    heap = [(0.0, w) for w, path in enumerate(paths) if path]
    # This loop takes most of a report's time: comparisons are faster than max().
    while heap:
        time, w = heap[0]
        path, boards = paths[w], ready[w]
        _, opcode, stall, write, read, wait, latency, busy, name, moved, pending = path[at[w]]
        pipe = name if name == "lsu" else (name, w % 4)
        start, other = scheduler[w % 4], pipes.get(pipe, 0.0)
        if other > start:
            start = other
        for board in wait:
            if boards[board] > start:
                start = boards[board]
        if pending is not None:
            start = max([start, *copies[w][: max(0, len(copies[w]) - 1 - pending)]])
        if start > time:
            heapq.heapreplace(heap, (start, w))
            continue
        scheduler[w % 4], pipes[pipe] = time + 1, time + busy
        done = time + latency
        if moved:
            memory = (memory if memory > time else time) + moved / BYTES_PER_CYCLE
            done = memory + latency
            if opcode.startswith("LDGSTS") and done > copies[w][-1]:
                copies[w][-1] = done
        elif opcode == "LDGDEPBAR":
            copies[w].append(0.0)
        if done > boards[write]:
            boards[write] = done
        if time + OPERANDS > boards[read]:
            boards[read] = time + OPERANDS
        at[w] += 1
        after = time + stall
        if after > end:
            end = after
        if block and opcode.startswith("BAR.SYNC"):
            heapq.heappop(heap)
            arrived = waiting.setdefault(w // block, [])
            arrived.append((done, w))
            if len(arrived) == block:
                last, _ = max(waiting.pop(w // block))
                for _, v in arrived:
                    if at[v] < len(paths[v]):
                        heapq.heappush(heap, (last, v))
        elif at[w] < len(path):
            heapq.heapreplace(heap, (after, w))
        else:
            heapq.heappop(heap)
    return max(end, memory)


def steady(
    round_of: Callable[[int, int], Path], warps: int, rounds: int = 6, block: int = 0
) -> float:
    """Cycles of a round after all warps have started: round_of(warp, round) is its path. block: see
    simulate."""

    def run(count: int) -> float:
        paths = [[x for r in range(count) for x in round_of(w, r)] for w in range(warps)]
        return simulate(paths, block)

    return (run(3 * rounds // 2) - run(rounds // 2)) / rounds
