"""The machine code of the CUDA sources: no spills, no stack frames, accesses of 16 bytes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton, which contains the disassembler, is missing")

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "anchorops" / "_cuda.so"

# Named like one of our kernels, but with an array that must be in memory, and with 4-byte accesses.
FAULTY = """
namespace anchorops::cuda {
template <class T, bool HAS_DSUMS, bool HAS_DSQDISTS>
__global__ void class_moments_backward_rows_kernel(const T* features, const int* order, T* out) {
  T values[64];
  for (int i = 0; i < 64; ++i) values[order[i]] = features[i];
  for (int i = 0; i < 64; ++i) out[i] = values[order[i + 64]];
}
template __global__ void class_moments_backward_rows_kernel<float, true, true>(
    const float*, const int*, float*);
}  // namespace anchorops::cuda
"""


def _report(*files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "cuda_report.py"), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(not LIBRARY.is_file(), reason="anchorops/_cuda.so was not compiled")
def test_library_has_no_faults():
    run = _report()
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    for kernel, budget in (
        ("class_moments_kernel<BFloat16, 3, false, false>", 110),
        ("class_moments_backward_planes_kernel<BFloat16, 8, 1, true, true>", 220),
        ("class_moments_backward_rows_kernel<BFloat16, true, true>", 220),
    ):
        rows = [line.split("|") for line in run.stdout.splitlines() if f"| {kernel} |" in line]
        assert rows and all(float(row[-3]) < budget for row in rows)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
def test_faults_are_found(tmp_path):
    source, compiled = tmp_path / "faulty.cu", tmp_path / "faulty.o"
    source.write_text(FAULTY)
    options = "-gencode=arch=compute_90,code=sm_90", "-c", "-o"
    subprocess.run(["nvcc", str(source), *options, str(compiled)], check=True)
    run = _report(compiled)
    assert run.returncode == 1
    kernel = "sm_90 class_moments_backward_rows_kernel<float, true, true>"
    for fault in ("no stores of 16 bytes", "no loads of 16 bytes", "stack 256 B"):
        assert f"{kernel}: {fault}" in run.stderr
    assert "spills" in run.stderr
