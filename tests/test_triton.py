"""Some cases of the Triton kernels, as compiled, in the machine for PTX: each method, the
statistics of the logits, predictions and confusion matrices. `make proofs` runs all cases. And how
many variants of the kernels images of many sizes need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="CPU builds of torch do not include Triton")

METHODS = ("SAR-channels last", "OCCL-odd planes", "MVSC-crop", "CeCo-bfloat16", "CBP-crop")
CASES = [
    *(
        f"test_methods.py::test_losses_gradients_and_state[simulated_triton-{case}]"
        for case in METHODS
    ),
    "test_softmax_moments.py::test_gradient_through_some",
    "test_confusion.py::test_correct_is_the_diagonal",
]


def test_some_kernels():
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(folder / case) for case in CASES]
    environment = os.environ | {"PTX_ARCH": "80"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


@pytest.mark.parametrize("stride", [4, 8])
def test_sizes_share_variants(stride: int):
    """Images are evaluated, and some are trained, in their own sizes. Each variant takes seconds to
    compile."""
    from kernels_report import native_sizes, variants

    found = variants("sm_90", native_sizes(stride))
    assert found["_softmax_moments_kernel"] <= 3
    assert found["_softmax_moments_bwd_kernel"] <= 4
