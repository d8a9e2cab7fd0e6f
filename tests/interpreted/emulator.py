"""The backend whose kernels run here on the CPU: Triton's in its interpreter, or the CUDA sources
as a C++ compiler built them (tests/csrc)."""

import os

BACKEND = "cuda" if "ANCHOROPS_CUDA_ON_HOST" in os.environ else "triton"
