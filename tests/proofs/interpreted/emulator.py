"""The backend whose kernels run here on the CPU: the Triton kernels, as compiled in the PTX machine
(tests/proofs/ptx) or in Triton's interpreter, or the CUDA sources in the emulator
(tests/proofs/csrc). In other processes it is "".

The processes that tests/proofs starts with one of them run CASES_OF_TRITON or CASES_OF_CUDA; under
a sanitizer, which looks at kernels, CUDA_KERNELS."""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

PTX_ARCH = os.environ.get("PTX_ARCH")  # of the GPU for which is compiled: 80 or 90
PTX_BACKEND = os.environ.get("PTX_BACKEND", "triton")
if PTX_ARCH is not None and PTX_BACKEND == "cuda":
    from ptx import cuda_launches

    cuda_launches.install(int(PTX_ARCH))
elif PTX_ARCH is not None:
    from ptx import triton_launches

    triton_launches.install(int(PTX_ARCH))

from anchorops._backend import TRITON_INTERPRETED  # noqa: E402

LIBRARY = os.environ.get("ANCHOROPS_CUDA_ON_HOST")
BACKEND = "cuda" if LIBRARY or PTX_BACKEND == "cuda" else "triton" if TRITON_INTERPRETED else ""
EMULATED = bool(BACKEND)
HERE = Path(__file__).parent
OF_CUDA = (  # files of the operators that have CUDA kernels
    "guarantees",
    "class_keys",
    "class_moments",
    "class_moments_backward",
    "centroid_info_nce",
    "methods",
    "every_kernel",
)
OF_TRITON = (
    *OF_CUDA,
    "softmax_moments",
    "softmax_not_finite",
    "wrong_labels",
    "upsampled_sums",
    "confusion",
    "pixel_kl_divergence",
    "lovasz",
    "default_dtype",
    "inference_tensors",
)
OF_PYTORCH = ("guarantees_of_torch", "class_moments_torch")  # compile, opcheck, …


def _files(*names: str) -> list[Path]:
    return [HERE.parents[1] / f"test_{name}.py" for name in names]


CASES_OF_TRITON = _files(*OF_TRITON, *OF_PYTORCH, "softmax_moments_torch")
CUDA_KERNELS = [*_files(*OF_CUDA), *sorted(HERE.glob("test_*.py"))]
CASES_OF_CUDA = [*CUDA_KERNELS, *_files(*OF_PYTORCH)]


def controls() -> ModuleType:
    """The emulator's controls (tests/proofs/csrc/on_host.cpp), of the library that is loaded."""
    assert LIBRARY is not None
    directory = str(Path(LIBRARY).parent)
    if directory not in sys.path:
        sys.path.append(directory)
    return importlib.import_module("on_host")
