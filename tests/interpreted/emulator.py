"""The backend whose kernels run here on the CPU: the Triton kernels in Triton's interpreter, or the
CUDA sources in the emulator (tests/csrc)."""

import os

from anchorops._backend import TRITON_INTERPRETED

BACKEND = "cuda" if "ANCHOROPS_CUDA_ON_HOST" in os.environ else "triton"
EMULATED = BACKEND == "cuda" or TRITON_INTERPRETED
