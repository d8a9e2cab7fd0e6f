"""The Triton kernels against the reference, in Triton's interpreter: no GPU needed.

Triton decides whether to interpret when it is imported, so the cases, tests/interpreted/*.py, run
in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="builds of torch for CPUs bring no Triton")

CASES = sorted((Path(__file__).parent / "interpreted").glob("[a-z]*.py"))


@pytest.mark.parametrize(
    "cases", [case for case in CASES if case.stem != "conftest"], ids=lambda c: c.stem
)
def test_triton_interpreter(cases: Path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
