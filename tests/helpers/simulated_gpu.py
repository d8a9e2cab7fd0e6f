"""The backend whose kernels run here on the CPU: those of Triton or of CUDA as compiled, in the PTX
machine (tests/proofs/ptx). In other processes it is "".

tests/proofs/test_cuda.py runs CASES_OF_CUDA."""

import gc
import os
from pathlib import Path

PTX_ARCH = os.environ.get("PTX_ARCH")  # of the GPU for which is compiled: 75, 80 or 90; CUDA: 80
PTX_BACKEND = os.environ.get("PTX_BACKEND", "triton")
if PTX_ARCH is not None:
    # translated programs stay, and looking through them for garbage took an eighth of the time
    gc.set_threshold(100_000)
if PTX_ARCH is not None and PTX_BACKEND == "cuda":
    from ptx import cuda_launches

    if PTX_ARCH != "80":
        raise ValueError(f"PTX_ARCH of PTX_BACKEND=cuda must be 80, got {PTX_ARCH}")
    cuda_launches.install()
elif PTX_ARCH is not None:
    from ptx import triton_launches

    triton_launches.install(int(PTX_ARCH))

BACKEND = "" if PTX_ARCH is None else PTX_BACKEND
SIMULATED = bool(BACKEND)
HERE = Path(__file__).parent
CUDA_FILES = (  # files of the operators that have CUDA kernels
    "guarantees",
    "class_keys",
    "class_moments",
    "methods",
    "every_kernel",
)
TORCH_FILES = ("guarantees_of_torch", "class_moments_torch")  # compile, opcheck, …


def _files(*names: str) -> list[Path]:
    return [HERE.parent / f"test_{name}.py" for name in names]


CASES_OF_CUDA = [
    *_files(*CUDA_FILES, *TORCH_FILES, "verify"),
    *sorted((HERE.parent / "proofs").glob("test_cuda_*.py")),
]
