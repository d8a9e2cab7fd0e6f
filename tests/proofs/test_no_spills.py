"""Compiled ahead of time, without a GPU, no kernel spills registers or uses a stack, and none of
Triton's is longer than what users would wait for."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="CPU builds of torch do not include Triton")

from kernels_report import QUICK
from without_gpu.machine_code import CODE, CUOBJDUMP, NVDISASM, instructions_of

from anchorops._libraries import CUDA_LIBRARY

pytestmark = pytest.mark.slow

KERNELS = (
    "_several_keys_kernel",
    "_sorted_pixels_kernel",
    "_softmax_moments_kernel",
    "_pixel_kl_divergence_kernel",
    "_error_loss_bwd_kernel",
)
REPORT = Path(__file__).parents[2] / "bench" / "kernels_report.py"
USAGE = re.compile(r"Function (\w+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
# An array that must be in memory, because it is indexed at run time.
FAULTY = """
__global__ void faulty_kernel(const float* in, const int* order, float* out) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[order[i]] = in[i];
  for (int i = 0; i < 64; ++i) out[i] = values[order[i + 64]];
}
"""


def test_triton():
    run = subprocess.run([sys.executable, str(REPORT), "--quick"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    for target in QUICK:
        for kernel in KERNELS:
            assert f"| {target} | {kernel} |" in run.stdout


def cuda_stacks(file: Path) -> list[tuple[str, int]]:
    """Each kernel of each architecture, and the bytes of its stack; spilled registers are there."""
    command = [CUOBJDUMP, "--dump-resource-usage", file]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [(name, int(stack) + int(local)) for name, stack, local in USAGE.findall(usage)]


@pytest.mark.skipif(not CUDA_LIBRARY.is_file(), reason="anchorops/_cuda.so was not compiled")
def test_cuda():
    stacks = cuda_stacks(CUDA_LIBRARY)
    assert any("class_moments_kernel" in name for name, _ in stacks)
    assert [kernel for kernel in stacks if kernel[1]] == []


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
def test_stack_and_instructions_are_found(tmp_path: Path):
    source, compiled = tmp_path / "faulty.cu", tmp_path / "faulty.cubin"
    source.write_text(FAULTY)
    subprocess.run(["nvcc", source, "-arch=sm_90", "-cubin", "-o", compiled], check=True)
    [(name, stack)] = cuda_stacks(compiled)
    assert "faulty_kernel" in name and stack >= 64 * 4
    sass = subprocess.run([NVDISASM, "-c", compiled], check=True, capture_output=True, text=True)
    listed = [instruction for _, instruction in CODE.findall(sass.stdout) if instruction]
    assert instructions_of(compiled.read_bytes()) == len(listed) > 64
