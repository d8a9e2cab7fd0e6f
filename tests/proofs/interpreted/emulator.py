"""The backend whose kernels run here on the CPU: the Triton kernels in Triton's interpreter, or the
CUDA sources in the emulator (tests/proofs/csrc)."""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

from anchorops._backend import TRITON_INTERPRETED

LIBRARY = os.environ.get("ANCHOROPS_CUDA_ON_HOST")
BACKEND = "cuda" if LIBRARY else "triton"
EMULATED = BACKEND == "cuda" or TRITON_INTERPRETED


def controls() -> ModuleType:
    """The emulator's controls (tests/proofs/csrc/on_host.cpp), of the library that is loaded."""
    assert LIBRARY is not None
    directory = str(Path(LIBRARY).parent)
    if directory not in sys.path:
        sys.path.append(directory)
    return importlib.import_module("on_host")
