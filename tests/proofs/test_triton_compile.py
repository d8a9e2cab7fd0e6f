"""The Triton kernels compile ahead of time, without a GPU. They spill no registers, and no variant
takes long."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="CPU builds of torch do not include Triton")

pytestmark = pytest.mark.slow

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
KERNELS = (
    "_several_keys_kernel",
    "_sorted_pixels_kernel",
    "_centroid_info_nce_bwd_kernel",
    "_softmax_moments_kernel",
    "_pixel_kl_divergence_kernel",
)
REPORT = Path(__file__).parents[2] / "bench" / "kernels_report.py"


def test_triton_compiles_without_spills():
    run = subprocess.run([sys.executable, str(REPORT), "--quick"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    for target in TARGETS:
        for kernel in KERNELS:
            assert f"| {target} | {kernel} |" in run.stdout
