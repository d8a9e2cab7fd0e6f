"""A GPU's machine code, as CUDA's tools print it: basic blocks, and paths between them."""

import heapq
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_PER_SM = {"sm_80": 164, "sm_90": 228, "sm_100": 228, "sm_120": 100}  # KB
THREADS_PER_SM = {"sm_120": 1536}  # others 2048


def tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], check=True, capture_output=True, text=True).stdout


class Block(NamedTuple):
    """A basic block of machine code; `next` are the blocks that may follow."""

    instructions: list[str]
    next: list[int]


def blocks_of(sass: str) -> list[Block]:
    labels, chunks = {}, [[]]
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            chunks.append([])
            labels[label[1]] = len(chunks) - 1
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?;)", line):
            chunks[-1].append(instruction[1])
            if re.search(r"\b(BRA|EXIT)\b", instruction[1]):
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
    found: dict[int, int] = {}
    heap = [(len(blocks[source].instructions), n) for n in blocks[source].next]
    while heap:
        distance, n = heapq.heappop(heap)
        if n not in found:
            found[n] = distance
            for after in blocks[n].next:
                heapq.heappush(heap, (distance + len(blocks[n].instructions), after))
    return found
