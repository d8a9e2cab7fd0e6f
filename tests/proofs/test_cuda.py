"""The CUDA kernels as nvcc compiles them, in the PTX machine (ptx/cuda_launches.py): the cases of
all backends, compared with the reference, and the checks of `anchorops-doctor --verify`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import CASES_OF_CUDA
from ptx import cuda_launches

OBSTACLE = cuda_launches.obstacle()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))]
HERE = Path(__file__).parent


VERIFY = """
import sys
from ptx import cuda_launches
cuda_launches.install(80)
from anchorops import doctor
sys.exit(doctor.main(["--verify", "--backend", "cuda"]))
"""


def check(*arguments: str, **variables: str) -> str:
    cuda_launches.build()
    command, environment = [sys.executable, *arguments], os.environ | variables
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    return run.stdout


def check_cases(arch: str, *files: Path) -> None:
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
    check(*command, PTX_ARCH=arch, PTX_BACKEND="cuda")


@pytest.mark.parametrize("first", [0, 1])  # two halves, for two processes
def test_cases(first: int):
    check_cases("80", *CASES_OF_CUDA[first::2])


def test_cases_for_sm_90():
    """One case of each kernel: its PTX has no other instructions than that for sm_80."""
    check_cases("90", HERE.parent / "test_every_kernel.py")


def test_verify():
    assert ", 0 WRONG, 0 not checked" in check("-c", VERIFY, PYTHONPATH=str(HERE))
