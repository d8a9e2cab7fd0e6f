"""The C++ kernels with a lower instruction set than this processor has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KNOWN = ["default", "avx2", "avx512"]
TESTS = {
    "guarantees": "",
    "class_moments": "and (test_values_and_gradients or spoil or of_one_class or far_from)",
    "softmax_moments": "and (values_and_gradients or even_regions or confident or steep)",
    "softmax_not_finite": "",
    "pixel_kl_divergence": "and not threads and not compile",
}


@pytest.mark.slow
@pytest.mark.parametrize("instructions", KNOWN[:2])
@pytest.mark.parametrize("name", TESTS)
def test_lower_instruction_sets(name: str, instructions: str):
    """The tests of this file pass in a process that uses the lower instruction set."""
    here = torch.backends.cpu.get_cpu_capability().lower()
    if here not in KNOWN or KNOWN.index(here) <= KNOWN.index(instructions):
        pytest.skip(f"{here} is the best here: the other tests use no more than {instructions}")
    file = Path(__file__).with_name(f"test_{name}.py")
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", str(file)]
    run = subprocess.run(
        [*command, "-k", f"cpu {TESTS[name]}"],
        env=os.environ | {"ATEN_CPU_CAPABILITY": instructions},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
