"""The CUDA kernels as nvcc compiles them, in the PTX machine (ptx/cuda_launches.py): the cases of
all backends, compared with the reference, and the checks of `anchorops-doctor --verify`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ptx import cuda_launches

from tests.helpers.simulated_gpu import CASES_OF_CUDA

OBSTACLE = cuda_launches.obstacle()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))]
HERE = Path(__file__).parent


def check(arch: int, *arguments: str) -> str:
    """The table of what ran."""
    cuda_launches.build()
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        env=os.environ | {"PTX_ARCH": str(arch), "PTX_BACKEND": "cuda", "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    _, _, table = run.stdout.partition("What ran")
    return f"What ran{table}"


def test_cases(record_property):
    in_two_processes = ("-n", "2", "--dist", "worksteal")
    record_property("table", check(80, *in_two_processes, *map(str, CASES_OF_CUDA)))


def test_cases_for_sm_90(record_property):
    """One case of each kernel: its PTX has no other instructions than that for sm_80."""
    record_property("table", check(90, str(HERE.parent / "test_every_kernel.py")))
