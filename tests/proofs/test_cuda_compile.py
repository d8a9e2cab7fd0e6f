"""The machine code of the CUDA sources: no spills, no stack frames, short hot loops."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton, which contains the disassembler, is missing")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "anchorops" / "_cuda.so"

# With an array that must be in memory.
FAULTY = """
__global__ void faulty_kernel(const float* in, const int* order, float* out) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[order[i]] = in[i];
  for (int i = 0; i < 64; ++i) out[i] = values[order[i + 64]];
}
"""
# Kernels by the beginnings of their names -> instructions for each 512 bytes that take as long as
# the memory, with features loaded, and stored or not.
STREAMING = {
    "class_moments_kernel<": 110,
    "class_moments_backward_planes_kernel<": 220,
    "class_moments_backward_rows_kernel<": 220,
}


def _report(*files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "cuda_report.py"), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(not LIBRARY.is_file(), reason="anchorops/_cuda.so was not compiled")
def test_library_has_no_faults():
    run = _report()
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert re.search(r"^_cuda.so: [\d.]+ MB$", run.stdout, re.M)
    table = [[cell.strip() for cell in line.split("|")] for line in run.stdout.splitlines()]

    def rows_of(kernel: str) -> list[list[str]]:
        rows = [row[1:-1] for row in table if len(row) > 2 and row[2].startswith(kernel)]
        assert rows, kernel
        return rows

    for kernel, most in STREAMING.items():
        for _, name, *_, per_512_bytes, _ in rows_of(kernel):
            assert per_512_bytes and float(per_512_bytes) < most, name


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
def test_faults_are_found(tmp_path):
    source, compiled = tmp_path / "faulty.cu", tmp_path / "faulty.o"
    source.write_text(FAULTY)
    options = "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"
    subprocess.run(["nvcc", str(source), *options, "-c", "-o", str(compiled)], check=True)
    run = _report(compiled)
    assert run.returncode == 1
    for gpu in ("sm_80", "sm_90"):
        assert re.search(rf"^{gpu} faulty_kernel: stack 256 B, [1-9]\d* spills$", run.stderr, re.M)


def test_a_missing_library_is_named(tmp_path):
    run = _report(tmp_path / "_cuda.so")
    assert run.returncode == 1 and "_cuda.so does not exist: compile it with nvcc" in run.stderr
