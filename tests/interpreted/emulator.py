"""The backend whose kernels run here on the CPU: Triton's in its interpreter, or the CUDA sources
as a C++ compiler built them (tests/csrc)."""

import os

from anchorops._backend import TRITON_INTERPRETED

BACKEND = "cuda" if "ANCHOROPS_CUDA_ON_HOST" in os.environ else "triton"
EMULATED = BACKEND == "cuda" or TRITON_INTERPRETED
