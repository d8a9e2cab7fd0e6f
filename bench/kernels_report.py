"""A report of the machine code of the Triton kernels, without a GPU: `make kernels-report`.

The launchers are called with tensors on the meta device and a driver that names a GPU; Triton then
compiles what it would launch there, and the table is read off the machine code.

There are two budgets for streaming kernels, both for an H200 (4.3 TB/s, 132 multiprocessors, 1.75
GHz):
- warp instructions for each 512 bytes that a warp loads (stores, if nothing is loaded), on the
  shortest path of the hot loop through its loads: 110 would take as long as the memory;
- KB in flight on a multiprocessor: resident threads × the bytes that each has requested; 23 are
  enough.
The table also has the share of the copy bandwidth that time_model.py predicts for the same loop on
sm_90. The report fails on spills, and if softmax moments would take longer than softmax_paths.py
allows.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise, product, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import softmax_paths
import time_model
import triton
import triton_paths
from kernel_variants import (
    BF16,
    FP32,
    MANY,
    QUICK_PIXELS,
    Variant,
    jobs,
    launch_moments,
    launch_pixels,
)
from machine_code import SHARED_PER_SM, THREADS_PER_SM, blocks_of, distances, tool
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Instructions that the path must contain, in this order.
FEATURES = r"LDG\.E\.EF"  # the only loads that are evicted first
PATHS = {
    "_sorted_pixels_kernel": [r"LDG\.E(?!\.EL)"],  # all the others are evicted last
    "_one_key_kernel": [FEATURES],
    "_several_keys_kernel": [FEATURES, r"MMA"],
    "_class_moments_bwd_kernel": [r"STG"],
}


# The instructions that move features or their gradient there.
STREAMS = {
    "_sorted_pixels_kernel": re.compile(r"LDG\.E(?!\.EL)"),
    "_class_moments_bwd_kernel": re.compile(rf"{FEATURES}|STG"),
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


def hot_path(kernel: str, sass: str) -> tuple[float, int]:
    """Warp instructions for each 512 bytes that a warp loads or stores on the hot path, and the
    bytes of a thread's loads on it."""
    blocks = blocks_of(sass)

    def holding(pattern: str) -> list[int]:
        return [
            i
            for i, block in enumerate(blocks)
            if any(re.search(pattern, x) for x in block.instructions)
        ]

    first = holding(PATHS[kernel][0])
    best = float("inf"), 0
    for start in first:
        stops = [start, *(max(holding(pattern)) for pattern in PATHS[kernel][1:])]
        loops = start in distances(blocks, start)
        legs = pairwise([*stops, start] if loops else [0, *stops])
        length = sum(distances(blocks, a).get(b, 10**6) if a != b else 0 for a, b in legs)
        if stops == [start] and loops:
            length = distances(blocks, start)[start]
        if not loops:
            length += len(blocks[stops[-1]].instructions)
        pattern = FEATURES if holding(FEATURES) else PATHS[kernel][0]
        accesses = [x for x in blocks[start].instructions if re.search(pattern, x)]
        if not accesses:  # loaded in a block before
            accesses = [
                x for x in blocks[min(holding(pattern))].instructions if re.search(pattern, x)
            ]
        widths = (re.search(r"(?:LDG|STG)\S*?\.U?(128|64|16|8)(?![\w])", x) for x in accesses)
        sizes = [int(width[1] if width else 32) // 8 for width in widths]
        best = min(best, (length * 16 / sum(sizes), sum(sizes)))
    return best


def loop_share(kernel: str, sass: str, warps: int) -> float:
    """Predicted share of the copy bandwidth while this number of warps of a multiprocessor run the
    hot path, with tables in the first-level cache (time_model.py)."""
    blocks = time_model.blocks_of(sass, STREAMS.get(kernel, time_model.STREAM))

    def holding(pattern: str) -> list[int]:
        return [
            i
            for i, block in enumerate(blocks)
            if any(re.search(pattern, x.text) for x in block.instructions)
        ]

    starts, *others = map(holding, PATHS[kernel])
    try:
        path = time_model.walk(blocks, starts, *others, starts)
    except LookupError:  # no loop
        path = time_model.walk(blocks, [0], starts, *others, holding("EXIT"))
    cycles = time_model.steady(lambda warp, r: path, warps)
    moved = warps * sum(x.bytes for x in path)
    return moved / cycles / time_model.BYTES_PER_CYCLE


class Row(NamedTuple):
    registers: int
    shared: int
    spills: int
    instructions_per_512_bytes: float | None
    kilobytes_in_flight: float | None
    predicted_percent: float | None  # of the copy bandwidth, in the hot loop on sm_90
    goal: int | None


def machine_code(kernel: Any, with_sass: bool) -> tuple[int, int, str]:
    """Registers, bytes of stack, SASS."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("nvdisasm", "-c", "-hex", file.name) if with_sass else ""
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK"))
    return registers, stack, sass


def resident_programs(name: str, kernel: Any, registers: int) -> int:
    """On a multiprocessor."""
    threads = 32 * kernel.metadata.num_warps
    return min(
        65536 // (-(-registers // 8) * 8 * threads),
        THREADS_PER_SM.get(name, 2048) // threads,
        int(SHARED_PER_SM[name] // (1 + kernel.metadata.shared / 1024)),
        32,
    )


def measure(name: str, kernel: Any) -> Row:
    nothing = None, None, None, None
    if "amdgcn" in kernel.asm:
        found = dict(re.findall(r"\.(\w+):\s+(\d+)", kernel.asm["amdgcn"]))
        scratch = int(
            found["private_segment_fixed_size"]
        )  # scalar registers spill into vector ones
        return Row(int(found["vgpr_count"]), kernel.metadata.shared, scratch, *nothing)
    streams = kernel.metadata.name in PATHS
    registers, stack, sass = machine_code(kernel, streams)
    if not streams:
        return Row(registers, kernel.metadata.shared, stack, *nothing)
    instructions, bytes_per_thread = hot_path(kernel.metadata.name, sass)
    programs, warps = resident_programs(name, kernel, registers), kernel.metadata.num_warps
    in_flight = programs * 32 * warps * bytes_per_thread / 1024
    share = goal = None
    if name == "sm_90":
        share = 100 * loop_share(kernel.metadata.name, sass, programs * warps)
        goal = 85 if kernel.metadata.name == "_class_moments_bwd_kernel" else 90
    return Row(registers, kernel.metadata.shared, stack, instructions, in_flight, share, goal)


def softmax_program(name: str, kernel: Any) -> softmax_paths.Program:
    registers, _, sass = machine_code(kernel, True)
    resident = resident_programs(name, kernel, registers)
    return softmax_paths.Program(sass, kernel.metadata.num_warps, resident)


COLUMNS = ("GPU", "kernel", "variant", *Row._fields)


def rows_of(name: str, quick: bool) -> list[tuple[str, str, Row]]:
    """Kernel, variant and what was measured, for that GPU; each machine code once."""
    rows = {}
    for launch, title, *rest in jobs(quick):
        for kernel_name, kernel in compiled(name, launch, *rest).items():
            if kernel.hash not in rows:
                rows[kernel.hash] = kernel_name, title, measure(name, kernel)
    return list(rows.values())


def softmax_programs() -> tuple[softmax_paths.Program, softmax_paths.Program]:
    """The kernels of the cross-entropy, forward and backward, for sm_90. Their code is the same for
    every number of classes and every size."""
    found = compiled("sm_90", launch_pixels, QUICK_PIXELS[0])
    forward, backward = (
        softmax_program("sm_90", found[kernel])
        for kernel in ("_softmax_moments_kernel", "_softmax_moments_bwd_kernel")
    )
    return forward, backward


def moments_programs() -> dict[tuple[str, int, bool], dict[str, triton_paths.Program]]:
    """The kernels of class moments for sm_90, without and with anchors."""
    found = {}
    for dtype, layout, anchors in product((BF16, FP32), ("NCHW", "NHWC"), (False, True)):
        variant = Variant(dtype, layout, anchors, False)
        few, many = (compiled("sm_90", launch_moments, variant, n) for n in (19, MANY))
        kernels = many | few
        programs = {}
        for name, kernel in kernels.items():
            if name in PATHS:
                registers, _, sass = machine_code(kernel, True)
                resident = resident_programs("sm_90", kernel, registers)
                programs[name] = triton_paths.Program(sass, kernel.metadata.num_warps, resident)
        found[str(variant), dtype.itemsize, anchors] = programs
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="a choice of the variants")
    args = parser.parse_args()
    print(f"Triton {triton.__version__}")
    print("|", " | ".join(COLUMNS), "|\n|", "---|" * len(COLUMNS))
    faults: list[str] = []
    goals = missed = 0
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        pending = pool.map(rows_of, args.targets, repeat(args.quick))
        hopper = "sm_90" in args.targets
        programs = pool.submit(softmax_programs) if hopper else None
        moments = pool.submit(moments_programs) if hopper and not args.quick else None
        for name, rows in zip(args.targets, pending, strict=True):
            for kernel, variant, row in rows:
                faults += [f"{name} {kernel}: spills registers"] * (row.spills > 0)
                if row.predicted_percent is not None and row.goal is not None:
                    goals, missed = goals + 1, missed + (row.predicted_percent < row.goal)
                cells = name, kernel, variant, *("" if x is None else round(x) for x in row)
                print("|", " | ".join(map(str, cells)), "|", flush=True)
    print(f"\n{missed} of {goals} shares are below their goal; this is no failure.")
    if moments:
        triton_paths.print_times(moments.result())
    if programs:
        given = programs.result()
        faults += softmax_paths.print_times(
            "Triton",
            lambda shape: softmax_paths.triton_kernels(*given, shape),
            softmax_paths.FILLS,
        )
    if faults:
        sys.exit("kernels_report:\n" + "\n".join(faults))


if __name__ == "__main__":
    main()
