"""The backend whose kernels run here on the CPU: the Triton kernels in Triton's interpreter, or the
CUDA sources in the emulator (tests/proofs/csrc). In other processes it is "".

The processes that tests/proofs starts with one of them run CASES; under a sanitizer, which looks at
kernels, CASES_OF_KERNELS."""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

from anchorops._backend import TRITON_INTERPRETED

LIBRARY = os.environ.get("ANCHOROPS_CUDA_ON_HOST")
BACKEND = "cuda" if LIBRARY else "triton" if TRITON_INTERPRETED else ""
EMULATED = bool(BACKEND)
HERE = Path(__file__).parent
OF_PYTORCH = (
    "guarantees_of_torch",
    "class_moments_torch",
    "softmax_moments_torch",
)  # compile, opcheck, …
OF_KERNELS = (
    "guarantees",
    "class_keys",
    "class_moments",
    "class_moments_backward",
    "softmax_moments",
    "softmax_not_finite",
    "centroid_info_nce",
    "upsampled_sums",
    "confusion",
    "pixel_kl_divergence",
    "methods",
    "every_kernel",
)
CASES_OF_KERNELS = [HERE.parents[1] / f"test_{name}.py" for name in OF_KERNELS]
CASES_OF_KERNELS += sorted(HERE.glob("test_*.py"))
CASES = [*CASES_OF_KERNELS, *(HERE.parents[1] / f"test_{name}.py" for name in OF_PYTORCH)]


def controls() -> ModuleType:
    """The emulator's controls (tests/proofs/csrc/on_host.cpp), of the library that is loaded."""
    assert LIBRARY is not None
    directory = str(Path(LIBRARY).parent)
    if directory not in sys.path:
        sys.path.append(directory)
    return importlib.import_module("on_host")
