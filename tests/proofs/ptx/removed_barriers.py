"""Takes each barrier, fence and wait out of the kernels' PTX, one at a time: does the machine
notice by a finding, or by other results?

    PYTHONPATH=tests/proofs python -m ptx.removed_barriers 80 [pytest's arguments]
    PTX_BACKEND=cuda PYTHONPATH=tests/proofs python -m ptx.removed_barriers 80

The launches are those of these tests. A launch that runs such an instruction of its kernel more
often than those before is run again without it, on the same memory: in the usual order of the
warps, then in two random ones. An instruction of a source line that was noticed in one variant of
the kernel is not taken out of others. For those that are never noticed there must be a reason.
Without pytest's arguments all must have run."""

import copy
import linecache
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from . import cuda_launches, triton_launches
from .instructions import Waits
from .machine import Finding, Launch, run
from .memory import Region
from .program import Program, Step

TESTS = (
    "tests/test_every_kernel.py::test_every_kernel_is_launched",
    "tests/test_class_moments.py::test_values_and_gradients",
    "tests/test_class_moments.py::test_not_finite_pixels_spoil_their_class_alone",
    "tests/test_verify.py::test_case",
    # of test_values_and_gradients and the next those of tiles, with many or few pixels of a class
    "-k=launched or test_case or tiles and (long or few or spoil)",
)
SEEDS = (1, 2)
ROOT = Path(__file__).parents[3]
BY_TRITON = "Triton's compiler put it there: it alone orders no accesses of different threads"
BY_A_SUM = "a sum over threads that follows has a barrier too, which Triton does not promise"
# By kernel; in Triton's for tl.debug_barrier() alone, in CUDA's for every barrier.
NOT_NEEDED = {
    "_upsampled_sums_kernel": BY_A_SUM,
    "_one_key_kernel": BY_A_SUM,
    "_several_keys_kernel": BY_A_SUM,
    "link_pixels_kernel": "nothing is stored there after the sum; rank_pixels_kernel needs it",
}


class Place(NamedTuple):
    """The n-th such instruction of a source line."""

    kernel: str
    instruction: str
    source: str  # folder/file:line
    n: int

    @property
    def line(self) -> str:
        name, _, line = self.source.partition(":")
        files = [ROOT / name, *(ROOT / "csrc").rglob(name)]
        lines = (linecache.getline(str(file), int(line)).strip() for file in files)
        return next(filter(None, lines), "")

    @property
    def reason(self) -> str | None:
        """Why it is not needed."""
        is_barrier = self.instruction.startswith("bar")
        if is_barrier and ".py:" in self.source and "tl.debug_barrier()" not in self.line:
            return BY_TRITON
        return NOT_NEEDED.get(self.kernel)


places: dict[Place, bool | None] = {}  # whether it is noticed; None: nothing has run it
tried: Counter[tuple[int, Place]] = Counter()  # with the program: how often its block ran


def removable(program: Program) -> dict[Place, tuple[int, Step]]:
    """With the number of the block."""
    found: dict[Place, tuple[int, Step]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    kernel = program.kernel.name.partition("<")[0]  # without the arguments of a CUDA template
    for b, steps in enumerate(program.steps):
        for step in steps:
            i = step.instruction
            waits = step.is_method("barrier", "warp_barrier", "fence_async", "await_copies")
            if waits or (i.name == "wgmma" and "mma_async" not in i.modifiers):
                name = i.text.split()[0]
                found[Place(kernel, name, i.source, seen[name, i.source])] = b, step
                seen[name, i.source] += 1
    return found


def without(program: Program, block: int, step: Step) -> Program:
    """Barriers, fences and waits use no registers, so that other blocks stay as they are."""
    result = copy.copy(program)
    result.hits = [0] * len(program.hits)
    result.steps, result.blocks = program.steps.copy(), program.blocks.copy()
    result.waits, result.constants = program.waits.copy(), program.constants.copy()
    result.steps[block] = [one for one in program.steps[block] if one is not step]
    result.waits[block] = max((s.operation.waits for s in result.steps[block]), default=Waits.NO)
    number = sum(map(len, program.steps[:block]))
    exec("\n".join(result._block(block, number)), result.constants)
    result.blocks[block] = result.constants[f"block{block}"]
    return result


class Memory:
    """A copy of the memory of a launch."""

    def __init__(self, launch: Launch):
        self.launch = launch
        self.bytes = [self._of(region).copy() for region in launch.regions]
        self.unwritten = [copy.copy(region.unwritten) for region in launch.regions]

    @staticmethod
    def _of(region: Region):
        return region.bytes[region.begin - region.start : region.end - region.start]

    def restore(self) -> None:
        saved = zip(self.launch.regions, self.bytes, self.unwritten, strict=True)
        for region, values, unwritten in saved:
            self._of(region)[:] = values
            region.unwritten = copy.copy(unwritten)
            if region.tracked:
                region.track(self.launch.threads, replicas=True)

    def differs(self) -> bool:
        pairs = zip(self.launch.regions, self.bytes, strict=True)
        return any((self._of(region) != values).any() for region, values in pairs)


def run_and_try(launch: Launch, *arguments: Any) -> None:
    """Instead of machine.run. Fills `places`."""
    program, hits, before = launch.program, launch.program.hits.copy(), Memory(launch)
    run(launch, *arguments)
    after = Memory(launch)

    def is_noticed(program: Program, seed: int | None) -> bool:
        before.restore()
        try:
            run(launch._replace(program=program), seed)
        except Finding:
            return True
        return after.differs()

    for place, (block, step) in removable(program).items():
        places.setdefault(place, None)
        runs = program.hits[block] - hits[block]
        if places[place] or runs <= tried[id(program), place]:
            continue
        tried[id(program), place] = runs
        changed = without(program, block, step)
        # the order of the warps may change the memory, as that of lists, without a fault
        places[place] = is_noticed(changed, None) or any(
            is_noticed(changed, seed) and not is_noticed(program, seed) for seed in SEEDS
        )
    after.restore()


def main() -> int:
    arch, *tests = sys.argv[1:]
    os.environ["PTX_ARCH"] = arch
    triton_launches.run = cuda_launches.run = run_and_try  # type: ignore[assignment]
    status = pytest.main(["-q", "-p", "no:cacheprovider", *(tests or TESTS)])
    counts: Counter[str] = Counter()
    for place, noticed in sorted(places.items()):
        missed = place.reason or "NOT NOTICED"
        verdict = "noticed" if noticed else "not run" if noticed is None else missed
        counts[verdict] += 1
        if not noticed:
            print(f"{verdict}: {place}: {place.line}")
    print(f"sm_{arch}: {len(places)} places; {dict(counts)}")
    not_run = 0 if tests else counts["not run"]
    return status or int(counts["NOT NOTICED"] + not_run > 0)


if __name__ == "__main__":
    raise SystemExit(main())
