"""The Triton kernels in Triton's interpreter, compared with the reference. This needs no GPU.

Triton decides whether to interpret when it is imported, so the cases, helpers/emulator.py, run
in a separate process.
"""

import os
import subprocess
import sys

import pytest
from emulator import CASES_OF_TRITON

pytest.importorskip("triton", reason="CPU builds of torch do not include Triton")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("first", [0, 1])  # two halves, for two processes
def test_triton_interpreter(first: int):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += map(str, CASES_OF_TRITON[first::2])
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "True"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


def test_verify():
    command = [sys.executable, "-m", "anchorops.doctor", "--verify", "--backend", "triton"]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "True"}, capture_output=True, text=True
    )
    assert run.returncode == 0 and ", 0 WRONG, 0 not checked, 0 not served" in run.stdout, (
        run.stdout + run.stderr
    )
