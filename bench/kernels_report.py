"""A report of the machine code of the Triton kernels, without a GPU: `make kernels-report`.

The launchers are called with tensors on the meta device and a driver that names a GPU; Triton then
compiles what it would launch there, and the table is read off the machine code. Its columns:
- stack: bytes of a thread for spilled registers, on AMD GPUs its scratch memory;
- shared: bytes of a program;
- per 512 bytes: instructions of a warp for each 512 bytes of features that it loads (of the
  gradient that it stores, if nothing is loaded), on the shortest path of the hot loop. On an H200,
  110 instructions take as long as the memory;
- seconds: the processor's time for compiling it, ptxas included. On a GPU about half a second of
  gcc is added for the launcher.
The report fails on spills, and if users would wait too long for the first step of a loss: SECONDS
for the kernels of one variant, OF_CROSS_ENTROPY for those of plain cross-entropy.
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import pairwise, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from kernel_variants import jobs, native_sizes
from machine_code import LOADS, blocks_of, distances, loop_through, tool
from markdown_table import markdown_table
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_86": GPUTarget("cuda", 86, 32),  # RTX 30
    "sm_89": GPUTarget("cuda", 89, 32),  # L4, RTX 40
    "sm_90": GPUTarget("cuda", 90, 32),  # H100, H200
    "sm_100": GPUTarget("cuda", 100, 32),  # B200
    "sm_120": GPUTarget("cuda", 120, 32),  # RTX 50
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300
}
SECONDS, OF_CROSS_ENTROPY = 12, 4
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


@contextmanager
def instead_of_launches(name: str, do: Callable[..., None]) -> Iterator[None]:
    """Where a kernel would be launched on that GPU, do(kernel, its arguments) is called."""

    def getitem(self: Any, grid: Any) -> Any:
        return lambda *args, **kwargs: do(self, *args, **kwargs)

    patch = mock.patch.object
    with patch(jit.JITFunction, "__getitem__", getitem), patch(driver, "_active", Driver(name)):
        yield


def _processor_seconds() -> float:
    """Of this process and of ptxas, which it runs."""
    return sum(os.times()[:4])


def compiled(name: str, launch: Callable[..., None], *args: Any) -> dict[str, tuple[Any, float]]:
    """The kernels by name, as Triton would launch them on that GPU, and the seconds for each."""
    kernels = {}

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
        start = _processor_seconds()
        kernel = self.run(*args, grid=None, warmup=True, **kwargs)
        kernels[kernel.metadata.name] = kernel, _processor_seconds() - start

    with instead_of_launches(name, compile_only), knobs.compilation.scope():
        knobs.compilation.always_compile = True
        launch(*args)
    return kernels


def variants(name: str, calls: Iterable[Callable[[], object]]) -> dict[str, int]:
    """How many variants of each kernel Triton would compile for these calls."""
    keys: dict[str, set[str]] = {}

    def count(self: Any, *args: Any, **kwargs: Any) -> None:
        _, keys_so_far, *_, binder = self.device_caches[name]
        _, specialization, options = binder(*args, **kwargs)
        key = jit.compute_cache_key(keys_so_far, specialization, options)
        keys.setdefault(self.fn.__name__, set()).add(key)

    with instead_of_launches(name, count):
        for call in calls:
            call()
    return {kernel: len(variants) for kernel, variants in keys.items()}


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
    seconds: float


def measure(kernel: Any, seconds: float) -> Row:
    name, shared = kernel.metadata.name, kernel.metadata.shared
    if "amdgcn" in kernel.asm:
        counts = dict(re.findall(r"\.(\w+):\s+(\d+)", kernel.asm["amdgcn"]))
        # scalar registers spill into vector registers, and are not counted
        stack = int(counts["private_segment_fixed_size"])
        return Row(int(counts["vgpr_count"]), stack, shared, None, seconds)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("nvdisasm", "-c", file.name) if name in PATHS else ""
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK"))
    of_512_bytes = instructions_per_512_bytes(name, sass) if sass else None
    return Row(registers, stack, shared, of_512_bytes, seconds)


COLUMNS = ("GPU", "kernel", "variant", *Row._fields)


def rows_of(name: str, quick: bool) -> list[tuple[str, str, Row]]:
    """Kernel, variant and what was measured, for that GPU; each machine code once."""
    rows = {}
    for launch, title, *rest in jobs(quick):
        for kernel_name, (kernel, seconds) in compiled(name, launch, *rest).items():
            if kernel.hash not in rows:
                rows[kernel.hash] = kernel_name, title, measure(kernel, seconds)
    return list(rows.values())


def seconds_alone(name: str, variant: str) -> float:
    """For compiling a variant's kernels again, when the other processes have ended."""
    launch, _, *rest = next(job for job in jobs(False) if job[1] == variant)
    return sum(seconds for _, seconds in compiled(name, launch, *rest).values())


def faults_of(name: str, rows: list[tuple[str, str, Row]]) -> list[str]:
    faults = [f"{name} {kernel}: {row.stack} B of spills" for kernel, _, row in rows if row.stack]
    waits: dict[str, float] = {}
    for _, variant, row in rows:
        waits[variant] = waits.get(variant, 0) + row.seconds
    for variant, seconds in waits.items():
        most = OF_CROSS_ENTROPY if variant.endswith(", cross-entropy") else SECONDS
        if seconds > most and (seconds := seconds_alone(name, variant)) > most:
            faults.append(f"{name} {variant}: {seconds:.1f} s to compile, more than {most}")
    return faults


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
        compiled_rows = dict(zip(args.targets, pending, strict=True))
    for name, rows in compiled_rows.items():
        faults += faults_of(name, rows)
        for kernel, variant, row in rows:
            *counts, seconds = row
            figures = ("" if x is None else round(x) for x in counts)
            lines.append((name, kernel, variant, *figures, f"{seconds:.1f}"))
    print(markdown_table(COLUMNS, lines, words=(0, 1, 2)))
    for stride in (4, 8):
        print(
            f"variants for 40 sizes, logits of stride {stride}:",
            variants("sm_90", native_sizes(stride)),
        )
    if faults:
        sys.exit("kernels_report:\n" + "\n".join(faults))


if __name__ == "__main__":
    main()
