"""The kernels of a backend, and those that a call launches: on a GPU or in the PTX machine. A
kernel of Triton has one name for all its variants; each instance of a CUDA template is a kernel of
its own, as class_moments_kernel<float, true, false>."""

import importlib
import pkgutil
import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from ptx import cuda_launches
from ptx.cuda_launches import readable
from ptx.triton_launches import launches
from torch.profiler import ProfilerActivity, profile

from anchorops._libraries import CUDA_LIBRARY
from tests.helpers.simulated_gpu import SIMULATED

SOURCES = Path(__file__).parents[2] / "csrc"
KERNEL = re.compile(r"__global__[^;{]*?(\w+_kernel)\(")


@cache
def _cuda_kernels() -> set[str]:
    if SIMULATED:
        return set(cuda_launches.machine.names.values())
    command = ["nm", CUDA_LIBRARY]
    symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = readable([line.split()[-1] for line in symbols.splitlines()])
    sources = (path.read_text() for path in SOURCES.rglob("*.cu*"))
    kernels = {name for source in sources for name in KERNEL.findall(source)}
    return {name for name in names if name.partition("<")[0] in kernels}


def kernels_of(backend: str) -> set[str]:
    if backend == "cuda":
        return _cuda_kernels()
    from anchorops import kernels

    modules = [m.name for m in pkgutil.iter_modules(kernels.__path__, "anchorops.kernels.")]
    names = {name for module in modules for name in vars(importlib.import_module(module))}
    return {name for name in names if name.endswith("_kernel")}


def launched_by(run: Callable[[], object], backend: str) -> set[str]:
    """Those of our kernels that a call launches."""
    if torch.get_default_device().type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        return set(readable([event.key for event in profiler.key_averages()])) & kernels_of(backend)
    before = launches.copy()
    run()
    return set(launches - before)
