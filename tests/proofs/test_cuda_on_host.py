"""The CUDA sources in the emulator on the CPU, compared with the reference: without a sanitizer,
and under two sanitizers.

The cases, interpreted/emulator.py, are those of all backends, with the library that csrc/Makefile
makes instead of the CUDA library. csrc/planted_faults.cu shows which faults are found.
"""

import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from emulator import CASES_OF_CUDA, CUDA_KERNELS

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build/on_host"
RUNTIME = {"thread": "libtsan.so", "address": "libasan.so", "plain": None}  # the longest first
CAUGHT = 86  # the exit status of a sanitizer that has found something

ROTATE = """
import os, sys

library, fault = sys.argv[1:]
sys.path.append(os.path.dirname(library))
import on_host

numbers = [float(i) for i in range(3 * 64)]
rotated = [64 * (i // 64) + (i + 1) % 64 for i in range(3 * 64)]
print("right" if on_host.rotate(fault, numbers) == rotated else "wrong")
"""


def _runtime(flavour: str) -> str:
    """The sanitizer's library, which must be loaded before Python; and libstdc++, because
    AddressSanitizer looks for the function that throws exceptions when it is loaded."""
    if RUNTIME[flavour] is None:
        return ""
    compiler = os.environ.get("CXX", "g++")
    paths = []
    for library in (RUNTIME[flavour], "libstdc++.so.6"):
        command = [compiler, f"-print-file-name={library}"]
        paths.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
        if not Path(paths[-1]).is_file():
            pytest.skip(f"{compiler} has no {library}")
    return " ".join(paths)


def _environment(flavour: str) -> dict[str, str]:
    options = f"exitcode={CAUGHT}:halt_on_error=1"
    return os.environ | {
        "ANCHOROPS_CUDA_ON_HOST": str(BUILD / flavour / "cuda_on_host.so"),
        "LD_PRELOAD": _runtime(flavour),
        "ASAN_OPTIONS": f"{options}:detect_leaks=0",
        "TSAN_OPTIONS": options,
        "OMP_NUM_THREADS": "1",  # ThreadSanitizer does not understand OpenMP's barriers
    }


def _build(flavour: str) -> None:
    if not (shutil.which("make") and shutil.which(os.environ.get("CXX", "g++"))):
        pytest.skip("building the CUDA sources for the CPU needs make and g++")
    pytest.importorskip("pybind11", reason="the emulator's controls need pybind11")
    _runtime(flavour)
    command = ["make", "-s", "-j", str(os.cpu_count()), "-C", str(HERE / "csrc")]
    command += [f"FLAVOUR={flavour}", f"PYTHON={sys.executable}"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-4000:]


def _run(flavour: str, fault: str) -> subprocess.CompletedProcess:
    library = str(BUILD / flavour / "on_host.so")
    command = [sys.executable, "-c", ROTATE, library, fault]
    return subprocess.run(command, env=_environment(flavour), capture_output=True, text=True)


# Where and how each fault is found. Faults that no sanitizer reports make the numbers wrong: fibers
# run one after the other, from the first or from the last, so a missing barrier always matters.
# Blocks run at the same time, so any block may be the first that finds a fault.
WRONG = "wrong"
PLANTED = [
    ("address", "SHARED_OUT_OF_BOUNDS", "heap-buffer-overflow"),
    ("address", "GLOBAL_OUT_OF_BOUNDS", "heap-buffer-overflow"),
    ("thread", "NO_BARRIER", "data race"),
    ("thread", "NO_SYNCTHREADS", "data race"),
    ("thread", "NO_SYNCWARP", "data race"),
    ("thread", "BLOCKS_RACE", "data race"),
    ("plain", "NO_SYNCTHREADS", WRONG),
    ("plain", "NO_SYNCWARP", WRONG),
    ("plain", "COPY_NOT_WAITED_FOR", WRONG),
    ("plain", "MISALIGNED", "0, 0), thread 3: a vector access to a misaligned address"),
    ("plain", "BARRIER_FOR_SOME", "waits for threads that wait for others or have ended"),
    ("plain", "TOO_MUCH_SHARED", "rotate_kernel: more shared memory than every GPU has"),
    ("plain", "TOO_MANY_ROWS_OF_BLOCKS", "rotate_kernel: more blocks or threads than a GPU takes"),
]


def _check_planted_faults(flavour: str) -> None:
    right = _run(flavour, "NONE")
    assert right.returncode == 0 and right.stdout == "right\n", right.stderr
    for where, fault, report in PLANTED:
        if where != flavour:
            continue
        run = _run(flavour, fault)
        if report == WRONG:
            assert run.stdout == "wrong\n", (fault, run.stdout, run.stderr)
        else:
            caught = {CAUGHT} if where != "plain" else {-signal.SIGABRT, 1}  # 1: an exception
            assert run.returncode in caught and report in run.stderr, (fault, run.stderr)


# One test for each, so that one process builds its library.
@pytest.mark.parametrize("flavour", RUNTIME)
def test_kernels(flavour: str):
    _build(flavour)
    _check_planted_faults(flavour)
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
    command += map(str, CASES_OF_CUDA if flavour == "plain" else CUDA_KERNELS)
    run = subprocess.run(command, env=_environment(flavour), capture_output=True, text=True)
    if flavour == "thread" and run.returncode == CAUGHT:
        # Something was reported once, on a busy machine, and not in seven later runs. That report
        # was not kept, so its cause is not known; the next one is shown as a warning. Whether a
        # kernel has a race does not depend on timing: only barriers order its accesses (no fences,
        # no locks, relaxed atomic additions). So a second run reports it too, unless it is among
        # the accesses that ThreadSanitizer forgets (it remembers four to any 8 bytes). What torch's
        # threads and allocator do, which are not instrumented, does depend on timing.
        warnings.warn(f"ThreadSanitizer, first run:\n{run.stderr[-8000:]}", stacklevel=1)
        run = subprocess.run(command, env=_environment(flavour), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-8000:]
    if flavour == "plain":
        command = [sys.executable, "-m", "anchorops.doctor", "--verify", "--backend", "cuda"]
        run = subprocess.run(command, env=_environment(flavour), capture_output=True, text=True)
        assert run.returncode == 0 and ", 0 WRONG, 0 not checked" in run.stdout, (
            run.stdout + run.stderr
        )
