"""A report of the machine code of the CUDA library, without a GPU: `make cuda-report`.

The first table has every architecture: how many kernels, how much code, the most registers, spills.
The second one has the big kernels of one architecture: those with a hot loop, or with more than 16
KB of code. Its columns:
- spills: instructions that move registers to the stack and back;
- shared: static shared memory, with the part that the GPU itself uses, 1 KB from sm_90 on;
- per 512 bytes: instructions of a warp for each 512 bytes of features in the hot loop. On an H200,
  110 instructions take as long as the memory, or 220 where as much is stored as loaded;
- per cell and class: instructions of the loop over classes of a kernel for upsampled logits,
  without copying the logits.
The report fails if a kernel of any architecture has a stack frame or spills.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from machine_code import (
    SPILLS,
    blocks_of,
    instructions_per_512_bytes,
    instructions_per_cell,
    tool,
)
from markdown_table import markdown_table

LIBRARY = Path(__file__).parents[1] / "anchorops" / "_cuda.so"
USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
BIG = 16  # KB
INSTRUCTION_BYTES = 16
CELLS = "softmax_"  # kernels for upsampled logits, by the beginnings of their names


class Code(NamedTuple):
    """What only the instructions tell. size: in KB."""

    size: float
    spills: int
    per_512_bytes: float | None
    per_cell_and_class: float | None


class Kernel(NamedTuple):
    gpu: str
    name: str
    registers: int
    stack: int
    shared: int
    code: Code | None = None  # of the chosen architecture, and where there is a stack frame


class Cubin(NamedTuple):
    """The code of one source file for one architecture."""

    path: Path
    gpu: str
    kernels: list[Kernel]


def readable(names: list[str]) -> list[str]:
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    ).stdout
    text = re.sub(r"\(anonymous namespace\)::|\b(anchorops|cuda|c10)::", "", text)
    return [line.removeprefix("void ").partition("(")[0] for line in text.splitlines()]


def cubins(file: Path, folder: Path) -> list[Cubin]:
    """The parts of a shared library or an object file, extracted to the folder."""
    folder.mkdir()
    tool("cuobjdump", "-xelf", "all", file.resolve(), cwd=folder)
    parts = []
    for path in sorted(folder.glob("*.cubin")):
        gpu = path.suffixes[-2].removeprefix(".")
        kernels = [
            Kernel(gpu, name, int(registers), int(stack) + int(local), int(shared))
            for name, registers, stack, shared, local in USAGE.findall(
                tool("cuobjdump", "--dump-resource-usage", path)
            )
        ]
        parts.append(Cubin(path, gpu, kernels))
    return parts


def disassembled(cubin: Cubin, chosen: str) -> list[Kernel]:
    """The kernels with their code, if the architecture is the chosen one or a kernel has a stack
    frame: disassembling takes most of the report's time."""
    if cubin.gpu != chosen and not any(kernel.stack for kernel in cubin.kernels):
        return cubin.kernels
    functions = {}
    for section in tool("nvdisasm", "-c", cubin.path).split("\n.text.")[1:]:
        name, _, functions[name] = section.partition(":")

    def code(name: str) -> Code:
        blocks = blocks_of(functions[name])
        return Code(
            sum(len(block.instructions) for block in blocks) * INSTRUCTION_BYTES / 1024,
            sum(block.count(SPILLS) for block in blocks),
            instructions_per_512_bytes(blocks),
            instructions_per_cell(blocks),
        )

    return [kernel._replace(code=code(kernel.name)) for kernel in cubin.kernels]


def read(files: list[Path], gpu: str) -> tuple[list[Kernel], dict[str, int]]:
    """All kernels, sorted by architecture and name, and the bytes of each architecture's code with
    its tables. gpu: the architecture to disassemble; if it is not there, the newest one is."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor() as pool:
        parts = [x for i, file in enumerate(files) for x in cubins(file, Path(folder, str(i)))]
        gpus = sorted({part.gpu for part in parts}, key=number)
        chosen = gpu if gpu in gpus else [gpu, *gpus][-1]
        work = partial(disassembled, chosen=chosen)
        kernels = [kernel for some in pool.map(work, parts) for kernel in some]
        sizes = dict.fromkeys(gpus, 0)
        for part in parts:
            sizes[part.gpu] += part.path.stat().st_size
    names = readable([kernel.name for kernel in kernels])
    named = [kernel._replace(name=name) for kernel, name in zip(kernels, names, strict=True)]
    return sorted(named, key=lambda kernel: (number(kernel.gpu), kernel.name)), sizes


def number(gpu: str) -> int:
    return int(re.sub(r"\D", "", gpu))


def rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def print_tables(kernels: list[Kernel], sizes: dict[str, int]) -> None:
    rows = []
    for name, size in sizes.items():
        gpu_kernels = [kernel for kernel in kernels if kernel.gpu == name]
        most = max((kernel.registers for kernel in gpu_kernels), default=0)
        frames = sum(kernel.stack > 0 for kernel in gpu_kernels)
        rows.append([name, len(gpu_kernels), f"{size / 1e6:.1f}", most, frames])
    header = "GPU", "kernels", "code, MB", "most registers", "with a stack frame"
    print(markdown_table(header, rows))
    rows = []
    for kernel in kernels:
        code = kernel.code
        if code is None:
            continue
        per_cell = code.per_cell_and_class if kernel.name.startswith(CELLS) else None
        if code.size >= BIG or kernel.stack or code.per_512_bytes or per_cell:
            counts = map(rounded, (code.size, code.per_512_bytes, per_cell))
            rows.append([*kernel[:4], code.spills, kernel.shared, *counts])
    columns = "registers", "stack", "spills", "shared", "code, KB"
    header = "GPU", "kernel", *columns, "per 512 bytes", "per cell and class"
    print("\n" + markdown_table(header, rows, words=(0, 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="libraries or objects")
    parser.add_argument("--gpu", default="sm_90", help="the architecture of the second table")
    args = parser.parse_args()
    files: list[Path] = args.files or [LIBRARY]
    for file in files:
        if not file.is_file():
            sys.exit(f"cuda_report: {file} does not exist: compile it with nvcc")
        print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB\n")
    kernels, sizes = read(files, args.gpu)
    if not kernels:
        sys.exit("cuda_report: no kernel was found: was the file compiled for a GPU?")
    print_tables(kernels, sizes)
    faults = [
        f"{kernel.gpu} {kernel.name}: stack {kernel.stack} B, {kernel.code.spills} spills"
        for kernel in kernels
        if kernel.stack and kernel.code
    ]
    if faults:
        sys.exit("cuda_report:\n" + "\n".join(faults))


if __name__ == "__main__":
    main()
