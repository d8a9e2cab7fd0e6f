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
CSRC = HERE.parents[1] / "csrc"


def test_no_code_of_one_architecture():
    """So the PTX for sm_80, which runs here, is that for later GPUs too, but for the instruction
    with which CUDA's headers convert bfloat16."""
    sources = [path.read_text() for path in CSRC.rglob("*.*")]
    assert sources and not [text for text in sources if "__CUDA_ARCH" in text]


def test_cases(record_property):
    cuda_launches.build()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-n", "2", "--dist", "worksteal", *map(str, CASES_OF_CUDA)]
    run = subprocess.run(
        command,
        env=os.environ | {"PTX_ARCH": "80", "PTX_BACKEND": "cuda", "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    _, _, table = run.stdout.partition("What ran")
    record_property("table", f"What ran{table}")
