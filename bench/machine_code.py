"""A GPU's machine code, as CUDA's tools print it: basic blocks, and the shortest paths through them
that do the work of a kernel."""

import heapq
import re
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Features and their gradient are evicted first, and copied to shared memory by 16 bytes.
LOADS, STORES, COPIES = r"LDG\.E\.EF", r"STG\.E\.EF", r"LDGSTS\S*\.128 "
PRODUCTS, EXPONENTIALS, SPILLS = r"\bHMMA\b", r"\bMUFU\.EX2\b", r"\b(STL|LDL)\b"


def tool(name: str, *args: str | Path, cwd: Path | None = None) -> str:
    command = [str(x) for x in (TOOLS / name, *args)]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


class Block(NamedTuple):
    """A basic block of machine code; `next` are the blocks that may follow."""

    instructions: list[str]
    next: list[int]

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, x) is not None for x in self.instructions)


def blocks_of(sass: str) -> list[Block]:
    """sass: of one function, from `nvdisasm -c`."""
    labels, chunks = {}, [[]]
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            chunks.append([])
            labels[label[1]] = len(chunks) - 1
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?;)", line):
            # sm_80 leaves a loop by a "call" of a label that never returns
            text = instruction[1].replace("CALL.REL.NOINC `(.L_x", "BRA `(.L_x")
            chunks[-1].append(text)
            if re.search(r"\b(BRA|EXIT)\b", text):
                chunks.append([])
    blocks = []
    for i, chunk in enumerate(chunks):
        last = chunk[-1] if chunk else ""
        after = [] if re.match(r"BRA(\.\w+)* `|EXIT ;", last) else [i + 1]
        if target := re.search(r"BRA.*\((\.L_x_\d+)\)", last):
            after.append(labels[target[1]])
        blocks.append(Block(chunk, [n for n in after if n < len(chunks)]))
    return blocks


def distances(blocks: list[Block], source: int) -> dict[int, int]:
    """The smallest number of instructions from the start of block `source` to the start of every
    block. For `source` itself, this is the shortest loop."""
    reached: dict[int, int] = {}
    heap = [(len(blocks[source].instructions), n) for n in blocks[source].next]
    while heap:
        distance, n = heapq.heappop(heap)
        if n not in reached:
            reached[n] = distance
            for after in blocks[n].next:
                heapq.heappush(heap, (distance + len(blocks[n].instructions), after))
    return reached


def loop_through(blocks: list[Block], stops: list[int]) -> float:
    """Instructions of the shortest loop through these blocks in this order; inf without one."""
    far = float("inf")
    return sum(distances(blocks, a).get(b, far) for a, b in pairwise([*stops, stops[0]]))


def instructions_per_512_bytes(blocks: list[Block]) -> float | None:
    """Instructions of a warp for each access of 512 bytes, in the hot loop of a kernel that streams
    the features: through the copies of a tile and its products, or through the loads and stores of
    16 bytes. Where features are loaded, only loads count. None if there is no such loop."""
    copies = max(range(len(blocks)), key=lambda i: blocks[i].count(COPIES), default=0)
    products = [i for i, block in enumerate(blocks) if block.count(PRODUCTS)]
    if products and (copied := blocks[copies].count(COPIES)):
        length = min(loop_through(blocks, [copies, product]) for product in products)
        return length / copied if length < float("inf") else None
    for counted in (LOADS, STORES):
        wide = rf"{counted}\.128"
        if any(block.count(wide) for block in blocks):
            break
    else:
        return None
    both = rf"({LOADS}|{STORES})\.128"
    stops = [i for i, block in enumerate(blocks) if block.count(both)]
    reached = {stop: distances(blocks, stop) for stop in stops}
    loops = [[stop] for stop in stops if stop in blocks[stop].next]
    loops = loops or [[b for b in stops if b in reached[a] and a in reached[b]] for a in stops]
    hot = max(loops, key=lambda loop: sum(blocks[i].count(wide) for i in loop))
    accesses = sum(blocks[i].count(wide) for i in hot)
    length = loop_through(blocks, hot) if accesses else float("inf")
    return length / accesses if length < float("inf") else None


def instructions_per_cell(blocks: list[Block]) -> float | None:
    """Instructions of the shortest loop with four exponentials for each class of a cell of pixels;
    None if there is no such loop."""
    loops = [
        loop_through(blocks, [i]) / (block.count(EXPONENTIALS) / 4)
        for i, block in enumerate(blocks)
        if block.count(EXPONENTIALS) >= 4
    ]
    shortest = min(loops, default=float("inf"))
    return shortest if shortest < float("inf") else None
