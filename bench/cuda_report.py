"""A report of the machine code of the CUDA sources, without a GPU: `make cuda-report`.

It fails on spills, on stack frames, if a streaming kernel has no accesses of 16 bytes, and where a
predicted time is worse than what was reached before (paths.FLOORS). Goals are printed next to what
is reached; a missed goal is no failure.

The budgets of the streaming kernels are those of kernels_report.py, for an H200 (4.3 TB/s, 132
multiprocessors, 1.75 GHz):
- warp instructions for each 512 bytes that a warp loads (stores, if nothing is loaded), on the
  shortest path of the hot loop through its accesses: 110 would take as long as the memory, or 220
  where as much is stored as loaded. Of the forward's tiles this is one that is added by products;
- KB in flight on a multiprocessor: resident threads × the bytes that each has requested; 23 are
  enough.
For the kernels of upsampled logits, instructions determine the time. The report counts those of the
hot loop for each class of a cell of pixels, without staging the logits.
`--times` adds the times that time_model.py predicts along the paths of paths.py and *_paths.py, the
time of each method's whole step, and its launches. Of a whole library, it then also fails if no
path predicts the time of a kernel (WITHOUT_PATH lists the exceptions).
Static shared memory includes the part that the GPU itself uses, 1 KB from sm_90 on.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import backward_paths
import launches
import metric_paths
import paths
import row_paths
import small_paths
import softmax_paths
import step_times
from machine_code import SHARED_PER_SM, THREADS_PER_SM, TOOLS, Block, blocks_of, distances, tool

LIBRARY = Path(__file__).parents[1] / "anchorops" / "_cuda.so"
FORWARD = re.compile(r"class_moments_(sorted_)?kernel<(\w+), (\d), (true|false)")
BACKWARD = re.compile(r"class_moments_backward_(?:planes|rows)_kernel<\w+, \w+, (true|false)")
CELLS = re.compile(r"softmax_(losses|masses|slopes|dlogits)_kernel")
# Instructions. Only features and their gradient are evicted first.
FEATURES, GRADIENT, WIDE_COPY = r"LDG\.E\.EF", r"STG\.E\.EF", r"LDGSTS\S*\.128 "
SPILL = r"\b(STL|LDL)\b"
COLUMNS = (
    "GPU",
    "kernel",
    "registers",
    "stack",
    "spills",
    "static shared",
    "16-byte accesses",
    "instructions per cell and class",
    "instructions per 512 bytes",
    "KB in flight",
)


class Kernel(NamedTuple):
    gpu: str
    name: str
    registers: int
    stack: int
    shared: int
    blocks: list[Block]
    sass: str

    def count(self, pattern: str) -> int:
        return sum(count(block, pattern) for block in self.blocks)

    def holding(self, pattern: str) -> list[int]:
        return [i for i, block in enumerate(self.blocks) if count(block, pattern)]

    def resident(self, threads: int, shared_bytes: int = 0) -> int:
        """Blocks on a multiprocessor."""
        return min(
            65536 // (-(-self.registers // 8) * 8 * threads),
            THREADS_PER_SM.get(self.gpu, 2048) // threads,
            (SHARED_PER_SM[self.gpu] << 10) // (1024 + shared_bytes),
            32,
        )


class Budgets(NamedTuple):
    instructions: float
    kilobytes: list[float]


def count(block: Block, pattern: str) -> int:
    return sum(re.search(pattern, x) is not None for x in block.instructions)


def around(blocks: list[Block], stops: list[int]) -> float:
    """Instructions of the shortest cycle that passes the blocks in this order."""
    far = float("inf")
    return sum(distances(blocks, a).get(b, far) for a, b in pairwise([*stops, stops[0]]))


def shared_reads(block: Block) -> int:
    """Bytes that a lane reads from shared memory; 0 if it also writes there."""
    if count(block, r"\bSTS\b"):
        return 0
    widths = {r"\bLDS ": 4, r"\bLDS\.U16": 2, r"\bLDS\.64": 8, r"\bLDS\.128": 16}
    return sum(count(block, pattern) * width for pattern, width in widths.items())


# Of a block of the forward: a ring of two tiles of 4 KB with padding, and their keys; 33 anchors.
FORWARD_SHARED_BYTES, SORTED_SHARED_BYTES = 17 << 10, 2 * (4096 + 512 + 256)


def forward_budgets(kernel: Kernel, dtype: str, is_sorted: bool) -> Budgets:
    """A tile is copied to shared memory; then it is read at once, for products, or, of sorted
    pixels, in an inner loop over 32 pixels."""
    blocks = kernel.blocks
    copies = max(range(len(blocks)), key=lambda i: count(blocks[i], WIDE_COPY))
    copied = count(blocks[copies], WIDE_COPY)
    if is_sorted:
        group_bytes = 32 * (4 if dtype == "float" else 2)  # of a lane
        times = copied * 16 / group_bytes
        instructions = min(
            around(blocks, [copies, reads]) + (times - 1) * around(blocks, [reads])
            for reads, block in enumerate(blocks)
            if shared_reads(block) == group_bytes and count(block, r"\bFADD\b") >= 32
        )
    else:
        instructions = min(
            around(blocks, [copies, products])
            for products, block in enumerate(blocks)
            if count(block, r"\bHMMA\b")
        )
    shared = SORTED_SHARED_BYTES if is_sorted else FORWARD_SHARED_BYTES
    return Budgets(instructions / copied, [kernel.resident(32, shared) * copied / 2])


def backward_budgets(kernel: Kernel, threads: int, reads_features: bool) -> Budgets:
    pattern = rf"{FEATURES if reads_features else GRADIENT}\.128"
    stops = kernel.holding(rf"({FEATURES}|{GRADIENT})\.128")
    reached = {stop: distances(kernel.blocks, stop) for stop in stops}
    inner = [[stop] for stop in stops if stop in kernel.blocks[stop].next]
    loops = inner or [[b for b in stops if b in reached[a] and a in reached[b]] for a in stops]

    def accesses(loop: list[int]) -> int:
        return sum(count(kernel.blocks[i], pattern) for i in loop)

    hot = max(loops, key=accesses)
    kilobytes = kernel.resident(threads) * threads * accesses(hot) * 16 / 1024
    in_flight = [kilobytes] * reads_features  # nothing waits for a store
    return Budgets(around(kernel.blocks, hot) / accesses(hot), in_flight)


def instructions_per_cell(kernel: Kernel) -> float:
    """Instructions of the shortest loop with four exponentials for each class of a cell."""
    best = float("inf")
    for i, block in enumerate(kernel.blocks):
        classes = count(block, r"\bMUFU\.EX2\b") / 4
        if classes >= 1:
            best = min(best, around(kernel.blocks, [i]) / classes)
    return best


def wide_accesses(kernel: Kernel) -> int:
    return sum(kernel.count(x) for x in (WIDE_COPY, r"LDG\S*\.128\b", r"STG\S*\.128\b"))


def streaming(kernel: Kernel) -> tuple[list[str], Budgets | None]:
    """The missing instructions of a streaming kernel, and its budgets."""
    if match := FORWARD.match(kernel.name):
        is_sorted, rows = match[1] is not None, match[4] == "true"
        if is_sorted and not rows:  # elements of planes, at the positions of sorted pixels
            return [], None
        if not kernel.count(WIDE_COPY):
            return ["no copies of 16 bytes"], None
        budgets = forward_budgets(kernel, match[2], is_sorted)
    elif match := BACKWARD.match(kernel.name):
        reads_features = match[1] == "true"
        wanted = {"stores": GRADIENT} | ({"loads": FEATURES} if reads_features else {})
        missing = [
            f"no {what} of 16 bytes"
            for what, pattern in wanted.items()
            if not kernel.count(rf"{pattern}\.128")
        ]
        if missing:
            return missing, None
        budgets = backward_budgets(kernel, backward_paths.BACKWARD_THREADS, reads_features)
    else:
        return [], None
    return [] if budgets.instructions < float("inf") else ["no hot loop was found"], budgets


def kernels_of(cubin: Path) -> list[Kernel]:
    code = {}
    for section in tool("nvdisasm", "-c", "-hex", str(cubin)).split("\n.text.")[1:]:
        name, _, sass = section.partition(":")
        # sm_80 leaves a loop by a "call" of a label that never returns.
        code[name] = sass.replace("CALL.REL.NOINC `(.L_x", "BRA `(.L_x")
    usage = tool("cuobjdump", "--dump-resource-usage", str(cubin))
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    gpu = cubin.suffixes[-2].removeprefix(".")
    return [
        Kernel(
            gpu,
            name,
            int(registers),
            int(stack) + int(local),
            int(shared),
            blocks_of(code[name]),
            code[name],
        )
        for name, registers, stack, shared, local in found
    ]


def readable(names: list[str]) -> list[str]:
    found = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    ).stdout
    found = re.sub(r"\(anonymous namespace\)::|\b(anchorops|cuda|c10)::", "", found)
    return [line.removeprefix("void ").partition("(")[0] for line in found.splitlines()]


def read(files: list[Path]) -> list[Kernel]:
    """All kernels of shared libraries or object files."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        for i, file in enumerate(files):
            place = Path(folder, str(i))
            place.mkdir()
            command = [TOOLS / "cuobjdump", "-xelf", "all", file.resolve()]
            subprocess.run(command, cwd=place, check=True, capture_output=True)
        cubins = sorted(Path(folder).rglob("*.cubin"))
        kernels = [kernel for some in pool.map(kernels_of, cubins) for kernel in some]
    names = readable([kernel.name for kernel in kernels])
    named = [kernel._replace(name=name) for kernel, name in zip(kernels, names, strict=True)]
    return sorted(named, key=lambda kernel: (int(kernel.gpu.removeprefix("sm_")), kernel.name))


# Kernels for which no time is predicted, and why.
WITHOUT_PATH = {
    "add_partials_kernel": "paths.py adds its bytes and its launch to the pass",
    "class_moments_backward_elements_kernel": "only for strides that are not those of a model",
    "group_counts_kernel": "only with more than 1,024 keys",
    "join_chunks_kernel": "sorted_paths.py adds its bytes and its launch to the pass",
    "pixel_slopes_kernel": "only for gradients of maps and overlaps",
    "softmax_masses_kernel": "only with overlaps (Dice); counted from instructions",
    "softmax_slopes_kernel": "only with overlaps (Dice); counted from instructions",
    "sorted_pixels_kernel": "sorted_paths.py adds its bytes and its launch to the pass",
}


def base_name(kernel: str) -> str:
    """Without template arguments."""
    return kernel.partition("<")[0]


class Library(dict[str, tuple[str, softmax_paths.Resident]]):
    """Machine code of kernels by name, and how many blocks are resident. used: base names of the
    kernels that a path has asked for."""

    def __init__(self, kernels: list[Kernel]):
        super().__init__((kernel.name, (kernel.sass, kernel.resident)) for kernel in kernels)
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> tuple[str, softmax_paths.Resident]:
        self.used.add(base_name(name))
        return super().__getitem__(name)

    def faults(self) -> list[str]:
        """A message for each kernel without a path, and for each exception that has one."""
        missing = {base_name(name) for name in self} - self.used - {*WITHOUT_PATH}
        found = [f"{name}: no path predicts its time" for name in sorted(missing)]
        known = sorted(self.used & {*WITHOUT_PATH})
        return found + [f"{name}: in WITHOUT_PATH, but it has a path" for name in known]


def print_times(kernels: list[Kernel]) -> tuple[list[paths.Row], list[str]]:
    """Prints the predictions of paths.py for an H200, next to their goals. Returns these, and a
    message for each share that is smaller than what was reached before."""
    found, faults, goals, missed = [], [], 0, 0
    print("\nPredicted, not measured:\n")
    print("|", " | ".join(paths.HEAD), "|\n|", "---|" * len(paths.HEAD))
    with ProcessPoolExecutor() as pool:
        for rows in pool.map(times_of, kernels):
            found += rows
            for name, case, estimate, goal, floor in rows:
                warps, one, every, waves, share = estimate
                cells = [name, case, warps, f"{one:.0f}", f"{every:.0f}", f"{waves:.1f}"]
                cells += [f"{share:.0%}", "not used" if goal is None else f"{goal:.0%}"]
                below = goal is not None and share < goal
                goals, missed = goals + (goal is not None), missed + below
                cells.append(f"{100 * ((goal or 0) - share):.1f}" if below else "")
                print("|", " | ".join(map(str, cells)), "|", flush=True)
                if share < floor:
                    faults.append(f"{name}, {case}: {share:.1%}, it was at least {floor:.0%}")
    print(
        f"\n{missed} of {goals} shares are below their goal. The report fails only where a share "
        "is smaller than before (paths.FLOORS)."
    )
    return found, faults


def print_other_times(library: Library, rows: list[paths.Row]) -> list[str]:
    """Prints the predictions for the other operators, and for whole steps. Returns a message for
    each time above its limit."""
    faults = softmax_paths.print_times(
        "CUDA",
        lambda shape: softmax_paths.cuda_kernels(library, shape),
        others=0,
    )
    small_paths.print_times("Operators of keys and centroids", small_paths.rows(library))
    small_paths.print_times("Operators of rows", row_paths.rows(library))
    small_paths.print_times("Predicted classes and their counts", metric_paths.rows(library))
    step_times.print_times(library, rows)
    return faults


def times_of(kernel: Kernel) -> list[paths.Row]:
    return paths.estimates(kernel.name, kernel.sass, kernel.resident)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "files", nargs="*", type=Path, help="libraries or objects", default=[LIBRARY]
    )
    parser.add_argument("--times", action="store_true", help="predict times, which takes minutes")
    args = parser.parse_args()
    files = args.files
    for file in files:
        if not file.is_file():
            sys.exit(f"cuda_report: {file} does not exist: compile it with nvcc")
    print("|", " | ".join(COLUMNS), "|\n|", "---|" * len(COLUMNS))
    faults, budgeted = [], 0
    kernels = read(files)
    for kernel in kernels:
        missing, budgets = streaming(kernel)
        spills = kernel.count(SPILL)
        missing += [f"{spills} spills"] * (spills > 0) + [f"stack {kernel.stack} B"] * (
            kernel.stack > 0
        )
        faults += [f"{kernel.gpu} {kernel.name}: {x}" for x in missing]
        cells = [*kernel[:4], spills, kernel.shared, wide_accesses(kernel)]
        of_cell = instructions_per_cell(kernel) if CELLS.match(kernel.name) else None
        if of_cell == float("inf"):
            faults.append(f"{kernel.gpu} {kernel.name}: no loop over classes was found")
        cells.append("" if of_cell is None else f"{of_cell:.0f}")
        if budgets:
            budgeted += 1
            in_flight = " / ".join(f"{x:.0f}" for x in budgets.kilobytes)
            cells += [f"{budgets.instructions:.0f}", in_flight]
        else:
            cells += ["", ""]
        print("|", " | ".join(map(str, cells)), "|")
    if files == [LIBRARY] and not budgeted:
        faults.append("no streaming kernel was found under the names that this report knows")
    if args.times:
        hopper = [kernel for kernel in kernels if kernel.gpu == "sm_90"]
        rows, missed = print_times(hopper)
        faults += missed
        if hopper and any(file.suffix == ".so" for file in files):  # not single objects
            library = Library(hopper)
            library.used |= {base_name(row.kernel) for row in rows}
            faults += print_other_times(library, rows) + library.faults()
        faults += launches.print_launches()
    if faults:
        sys.exit("cuda_report:\n" + "\n".join(faults))


if __name__ == "__main__":
    main()
