"""Triton's kernels as they are compiled for a GPU, without one: which there are, and their machine
code."""

import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

PROGRAMS = Path(triton.__file__).parent / "backends/nvidia/bin"
CUOBJDUMP, NVDISASM = PROGRAMS / "cuobjdump", PROGRAMS / "nvdisasm"
# A label, or an instruction without its condition.
CODE = re.compile(r"^(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([^;]+?)\s*;", re.MULTILINE)
TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),  # T4, RTX 20
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_86": GPUTarget("cuda", 86, 32),  # RTX 30
    "sm_89": GPUTarget("cuda", 89, 32),  # L4, RTX 40
    "sm_90": GPUTarget("cuda", 90, 32),  # H100, H200
    "sm_100": GPUTarget("cuda", 100, 32),  # B200
    "sm_120": GPUTarget("cuda", 120, 32),  # RTX 50
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300
}


@contextmanager
def instead_of_launches(name: str, do: Callable[..., None]) -> Iterator[None]:
    """Where a kernel would be launched on that GPU, do(kernel, its arguments) is called."""

    def getitem(self: Any, grid: Any) -> Any:
        return lambda *args, **kwargs: do(self, *args, **kwargs)

    needed = SimpleNamespace(  # by compilation
        get_current_target=lambda: TARGETS[name],
        get_current_device=lambda: name,
        get_current_stream=lambda device: 0,
    )
    patch = mock.patch.object
    with patch(jit.JITFunction, "__getitem__", getitem), patch(driver, "_active", needed):
        yield


def compiled(name: str, launch: Callable[[], object]) -> dict[str, tuple[Any, float]]:
    """The kernels by their hash, as Triton would launch them on that GPU, and the seconds for
    each."""
    kernels = {}

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
        start = sum(os.times()[:4])  # of the processor, by this process and by ptxas
        kernel = self.run(*args, grid=None, warmup=True, **kwargs)
        kernels[kernel.hash] = kernel, sum(os.times()[:4]) - start

    with instead_of_launches(name, compile_only), knobs.compilation.scope():
        knobs.compilation.always_compile = True
        launch()
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


class Loop(NamedTuple):
    instructions: int
    exponentials: int
    loads: int
    distance: int


def _distance(body: list[str], load: int) -> int:
    """The number of instructions to the first use, which may be in the next iteration."""
    opcode, register = re.match(r"(\S+) R(\d+)", body[load]).groups()  # type: ignore[union-attr]
    count = 4 if ".128" in opcode else 2 if ".64" in opcode else 1
    loaded = {f"R{int(register) + i}" for i in range(count)}
    for distance in range(1, len(body)):
        opcode, _, operands = body[(load + distance) % len(body)].partition(" ")
        read = operands if opcode.startswith("ST") else operands.partition(",")[2]
        if loaded & set(re.findall(r"\bR\d+", read)):
            return distance
    return len(body)


def instructions_of(cubin: bytes) -> int:
    """The number of instructions, of 16 bytes each: those of all sections that can be executed."""
    (begin,) = struct.unpack_from("<Q", cubin, 0x28)  # of the headers of sections in an ELF file
    size, number = struct.unpack_from("<HH", cubin, 0x3A)
    headers = (struct.unpack_from("<IIQQQQ", cubin, begin + i * size) for i in range(number))
    return sum(length for _, _, flags, _, _, length in headers if flags & 4) // 16


def loops_of(sass: str) -> list[Loop]:
    """The loops of machine code as nvdisasm -c prints it."""
    labels, code = {}, []
    for label, instruction in CODE.findall(sass):
        if label:
            labels[label] = len(code)
        else:
            code.append(instruction)
    jumps = ((re.search(r"^BRA.*`\((\.L_x_\d+)\)", x), i + 1) for i, x in enumerate(code))
    spans = [(labels[jump[1]], end) for jump, end in jumps if jump and labels[jump[1]] < end]
    loops = [x for x in spans if any(line.startswith("LDG.") for line in code[slice(*x)])]
    found = []
    for begin, end in loops:
        if not any(begin <= b and e <= end for b, e in loops if (b, e) != (begin, end)):
            body = code[begin:end]
            loads = [i for i, x in enumerate(body) if x.startswith("LDG.")]
            distance = min(_distance(body, load) for load in loads)
            exponentials = sum(x.startswith("MUFU") for x in body)
            found.append(Loop(len(body), exponentials, len(loads), distance))
    return found


class Row(NamedTuple):
    registers: int
    stack: int
    shared: int
    warps: int | str
    loops: str
    instructions: int
    seconds: float


def measure(kernel: Any, seconds: float, with_loops: bool) -> Row:
    """with_loops: nvdisasm takes half a second for a kernel."""
    shared = kernel.metadata.shared
    if "amdgcn" in kernel.asm:
        counts = dict(re.findall(r"\.(\w+):\s+(\d+)", kernel.asm["amdgcn"]))
        # scalar registers spill into vector registers, and are not counted; nor are instructions
        stack = int(counts["private_segment_fixed_size"])
        return Row(int(counts["vgpr_count"]), stack, shared, "", "", 0, seconds)
    cubin, loops = kernel.asm["cubin"], ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        if with_loops:
            command = [NVDISASM, "-c", file.name]
            sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            loops = "; ".join(" ".join(map(str, loop)) for loop in loops_of(sass))
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK"))
    most = {75: 32, 80: 64, 90: 64, 100: 64}.get(kernel.metadata.target.arch, 48)
    warps = min(2**16 // (32 * triton.cdiv(registers, 8) * 8), most)
    warps -= warps % kernel.metadata.num_warps
    return Row(registers, stack, shared, warps, loops, instructions_of(cubin), seconds)
