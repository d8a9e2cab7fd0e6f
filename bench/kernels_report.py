"""A report of the machine code of the Triton kernels, without a GPU: `make kernels-report`.

The launchers are called with tensors on the meta device and a driver that names a GPU; Triton then
compiles what it would launch there, and the table is read off the machine code. Its columns:
- stack: bytes of a thread for spilled registers, on AMD GPUs its scratch memory;
- shared: bytes of a program;
- per 512 bytes: instructions of a warp for each 512 bytes of features that it loads (of the
  gradient that it stores, if nothing is loaded), on the shortest path of the hot loop. On an H200,
  110 instructions take as long as the memory.
The report fails on spills.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
from kernel_variants import jobs
from machine_code import LOADS, blocks_of, distances, loop_through, tool
from markdown_table import markdown_table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Kernel -> instructions that the path must contain, in this order.
PATHS = {
    "_sorted_pixels_kernel": [r"LDG\.E(?!\.EL)"],  # all the others are evicted last
    "_one_key_kernel": [LOADS],
    "_several_keys_kernel": [LOADS, r"MMA"],
    "_class_moments_bwd_kernel": [r"STG"],
}


class Driver(NamedTuple):
    """The parts of a Triton driver that compilation needs."""

    name: str

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0


def compiled(name: str, launch: Callable[..., None], *args: Any) -> dict[str, Any]:
    """The kernels by name, as Triton would launch them on that GPU."""
    kernels = {}

    def getitem(self: Any, grid: Any) -> Any:
        def compile_only(*args: Any, **kwargs: Any) -> None:
            kernel = self.run(*args, grid=grid, warmup=True, **kwargs)
            kernels[kernel.metadata.name] = kernel

        return compile_only

    original, jit.JITFunction.__getitem__ = jit.JITFunction.__getitem__, getitem
    driver.set_active(Driver(name))  # pyright: ignore[reportArgumentType]
    try:
        launch(*args)
    finally:
        jit.JITFunction.__getitem__ = original
    return kernels


def instructions_per_512_bytes(kernel: str, sass: str) -> float:
    """On the shortest path of the hot loop, or of the whole kernel if there is no loop."""
    blocks = blocks_of(sass)

    def holding(pattern: str) -> list[int]:
        return [i for i, block in enumerate(blocks) if block.count(pattern)]

    first, *others = PATHS[kernel]
    pattern = LOADS if holding(LOADS) else first
    best = float("inf")
    for start in holding(first):
        stops = [start, *(max(holding(other)) for other in others)]
        if start in distances(blocks, start):
            length = loop_through(blocks, list(dict.fromkeys(stops)))
        else:
            way = list(dict.fromkeys([0, *stops]))
            legs = (distances(blocks, a).get(b, float("inf")) for a, b in pairwise(way))
            length = sum(legs) + len(blocks[way[-1]].instructions)
        block = blocks[start] if blocks[start].count(pattern) else blocks[min(holding(pattern))]
        accesses = [x for x in block.instructions if re.search(pattern, x)]
        widths = (re.search(r"(?:LDG|STG)\S*?\.U?(128|64|16|8)(?![\w])", x) for x in accesses)
        loaded = sum(int(width[1] if width else 32) // 8 for width in widths)
        best = min(best, length * 16 / loaded)
    return best


class Row(NamedTuple):
    registers: int
    stack: int
    shared: int
    per_512_bytes: float | None


def measure(kernel: Any) -> Row:
    name, shared = kernel.metadata.name, kernel.metadata.shared
    if "amdgcn" in kernel.asm:
        found = dict(re.findall(r"\.(\w+):\s+(\d+)", kernel.asm["amdgcn"]))
        # scalar registers spill into vector registers, and are not counted
        return Row(int(found["vgpr_count"]), int(found["private_segment_fixed_size"]), shared, None)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("nvdisasm", "-c", file.name) if name in PATHS else ""
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK"))
    of_512_bytes = instructions_per_512_bytes(name, sass) if sass else None
    return Row(registers, stack, shared, of_512_bytes)


COLUMNS = ("GPU", "kernel", "variant", *Row._fields)


def rows_of(name: str, quick: bool) -> list[tuple[str, str, Row]]:
    """Kernel, variant and what was measured, for that GPU; each machine code once."""
    rows = {}
    for launch, title, *rest in jobs(quick):
        for kernel_name, kernel in compiled(name, launch, *rest).items():
            if kernel.hash not in rows:
                rows[kernel.hash] = kernel_name, title, measure(kernel)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="a choice of the variants")
    args = parser.parse_args()
    print(f"Triton {triton.__version__}")
    faults: list[str] = []
    lines: list[tuple[object, ...]] = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        pending = pool.map(rows_of, args.targets, repeat(args.quick))
        for name, rows in zip(args.targets, pending, strict=True):
            for kernel, variant, row in rows:
                faults += [f"{name} {kernel}: {row.stack} B of spills"] * (row.stack > 0)
                figures = ("" if x is None else round(x) for x in row)
                lines.append((name, kernel, variant, *figures))
    print(markdown_table(COLUMNS, lines, words=(0, 1, 2)))
    if faults:
        sys.exit("kernels_report:\n" + "\n".join(faults))


if __name__ == "__main__":
    main()
