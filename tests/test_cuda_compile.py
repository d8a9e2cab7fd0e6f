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


# Kernel -> registers, of which more would leave fewer warps on a multiprocessor (128: 16, 64: 32,
# 40: 48, 32: 64); instructions for each class of a cell, where it goes through classes.
SOFTMAX = {
    "softmax_losses_kernel<false>": (128, 60),
    "softmax_losses_kernel<true>": (128, 60),
    "softmax_masses_kernel<false>": (128, 85),
    "softmax_masses_kernel<true>": (128, 145),
    "softmax_slopes_kernel": (128, 115),
    "softmax_dlogits_kernel<false>": (128, 100),
    "softmax_dlogits_kernel<true>": (128, 210),
    "pixel_argmax_kernel": (128, None),
    "pixel_slopes_kernel": (48, None),
    "softmax_shifts_kernel<1>": (64, None),
    "softmax_shifts_kernel<32>": (64, None),
    "sum_partials_kernel": (64, None),
}
# From sm_100 on nvcc takes more, and the launch bounds let it.
ONE_BLOCK = "softmax_dlogits_kernel<true>"


@pytest.mark.skipif(not LIBRARY.is_file(), reason="anchorops/_cuda.so was not compiled")
def test_library_has_no_faults():
    run = _report()
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    table = [[cell.strip() for cell in line.split("|")] for line in run.stdout.splitlines()]

    def rows_of(kernel: str) -> list[list[str]]:
        return [row for row in table if len(row) > 2 and row[2] == kernel]

    for kernel, budget in (
        ("class_moments_kernel<BFloat16, 3, false, false>", 110),
        ("class_moments_kernel<BFloat16, 3, false, true>", 110),
        ("class_moments_backward_planes_kernel<BFloat16, true, true, true>", 220),
        ("class_moments_backward_rows_kernel<BFloat16, true, true>", 220),
    ):
        rows = rows_of(kernel)
        assert rows and all(float(row[-3]) < budget for row in rows)
    for kernel, (registers, instructions) in SOFTMAX.items():
        rows = rows_of(kernel)
        assert rows, kernel
        for _, gpu, _, used, *_, of_cell, _, _, _ in rows:
            newer = kernel == ONE_BLOCK and int(gpu.removeprefix("sm_")) >= 100
            assert int(used) <= (255 if newer else registers), (gpu, kernel)
            assert instructions is None or float(of_cell) <= instructions, (gpu, kernel)


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
