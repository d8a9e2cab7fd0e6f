"""Some cases of the Triton kernels in Triton's interpreter: each method, the statistics of the
logits, predictions and confusion matrices. `make proofs` runs all cases."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch.torch_version import TorchVersion

triton = pytest.importorskip("triton", reason="CPU builds of torch do not include Triton")

METHODS = ("SAR-channels last", "OCCL-odd planes", "MVSC-crop", "CeCo-bfloat16", "CBP-crop")
CASES = [
    *(f"test_methods.py::test_losses_gradients_and_state[interpreter-{case}]" for case in METHODS),
    "test_softmax_moments.py::test_gradient_through_some",
    "test_confusion.py::test_hits_are_the_diagonal",
]


@pytest.mark.skipif(
    TorchVersion(triton.__version__) < "3.7" and TorchVersion(np.__version__) >= "2.4",
    reason="the interpreter of Triton 3.6 does not work with NumPy 2.4 and later",
)
def test_some_kernels():
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(folder / case) for case in CASES]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
