"""The libraries that the backends run: loads them, and says why one is missing or why a GPU cannot
run its code."""

import ctypes
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import sysconfig
from itertools import chain
from pathlib import Path

import torch

_logger = logging.getLogger("anchorops")
# The compute capability that each needs: our CUDA sources for asynchronous copies and sums of a
# warp by one instruction. Triton's kernels compile for 7.5 (T4), which Triton itself does not test.
OLDEST_GPU = {"cuda": (8, 0), "triton": (7, 5)}

# Tests without a GPU run the kernels of a backend on CPU tensors, as compiled: tests/proofs/ptx,
# which sets the variable.
TRITON_ON_HOST = os.getenv("ANCHOROPS_TRITON_ON_HOST") == "1"
ON_HOST = {"triton": TRITON_ON_HOST, "cuda": False}

# They use LibTorch's stable ABI (of torch 2.10) and no Python: one build is for several versions.
CPU_LIBRARY = Path(__file__).with_name("_cpu.so")
CUDA_LIBRARY = Path(__file__).with_name("_cuda.so")


def build_info() -> dict[str, str]:
    """How the C++ library next to this file was built; empty if it cannot be loaded."""
    try:
        record = ctypes.CDLL(str(CPU_LIBRARY)).anchorops_build_info
    except OSError:
        return {}
    record.restype = ctypes.c_char_p
    return json.loads(record())


def _tell_if_older(library: Path, csrc: Path, *sources: str) -> None:
    """After `git pull` in an editable installation: the arguments of operators may have changed,
    which a library does not check. An installed wheel has no csrc/ beside it."""
    if library.exists() and (csrc / "library.cpp").exists():
        files, built = chain(*map(csrc.glob, sources)), library.stat().st_mtime
        if any(file.stat().st_mtime > built for file in files):
            message = "%s is older than its sources in %s: install anchorops again"
            _logger.warning(message, library, csrc)


def _load(library: Path) -> str | None:
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"anchorops/{library.name} does not load: {error.__cause__ or error}"
    return None


def _load_cuda() -> str | None:
    # The file may be left from before a build without CUDA, so the build is asked.
    info = build_info()
    built = info.get("cuda")
    if not built and info.get("cuda_choice") == "0":
        return "anchorops was built with ANCHOROPS_CUDA=0"
    if not built:
        obstacle = info.get("cuda_obstacle") or "it needs nvcc and a CUDA build of torch"
        return f"anchorops was built without CUDA: {obstacle}"
    if torch.version.cuda is None:
        return "this torch is a CPU build"
    # Two CUDA runtimes in one process do not work together.
    if built.split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"anchorops was built with CUDA {built}, this torch with {torch.version.cuda}: "
            "install anchorops again with nvcc of torch's major version"
        )
    return _load(CUDA_LIBRARY)


def _built_for(targets: str) -> list[tuple[tuple[int, int], tuple[float, float]]]:
    """First and last compute capability of the GPUs that can run the code of each target. The
    targets are written as in TORCH_CUDA_ARCH_LIST. Machine code runs on the same major version with
    an equal or higher minor version; PTX runs on every later capability. "9.0a" is for 9.0 only,
    "10.0f" for its family."""
    ranges = []
    for major, minor, kind, ptx in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", targets):
        first = int(major), int(minor)
        later = first if kind == "a" else (first[0], math.inf)
        ranges.append((first, (math.inf, math.inf) if ptx and not kind else later))
    return ranges


def _find_triton() -> str | None:
    """Why Triton could launch nothing, or None. At its first launch it compiles a C module for
    Python, with the compiler and the header that triton/runtime/build.py looks for."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (CPU builds of torch do not include it)"
    if TRITON_ON_HOST:
        return None
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, names)):
        return f"triton found no C compiler ({' or '.join(names)}): install one, or name it in CC"
    scheme = sysconfig.get_default_scheme()  # Debian's posix_local has no headers
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    include = sysconfig.get_path("include", scheme)
    others = [os.environ.get(name, "") for name in ("CPATH", "C_INCLUDE_PATH")]
    if not any(Path(x, "Python.h").exists() for x in (include, *":".join(others).split(":"))):
        return f"triton needs the headers of Python, and found no {include}/Python.h: install them"
    return None


_csrc = Path(__file__).parents[1] / "csrc"
_tell_if_older(CPU_LIBRARY, _csrc, "*.h", "*.cpp", "cpu/*")
_tell_if_older(CUDA_LIBRARY, _csrc, "*.h", "*.cuh", "cuda/**/*.cu*")

# Why the code of a backend is missing, fastest backend first. This is known at import, so choosing
# a backend only reads this table, which torch.compile can trace. It does not say whether there is a
# GPU.
_cpu = (
    _load(CPU_LIBRARY)
    if CPU_LIBRARY.exists()
    else "anchorops/_cpu.so was not compiled: install a C++20 compiler, then anchorops again"
)
MISSING = {"cuda": _load_cuda(), "triton": _find_triton(), "cpu": _cpu, "reference": None}
_CUDA_TARGETS = build_info().get("cuda_arch_list", "")
_CUDA_RANGES = _built_for(_CUDA_TARGETS)


def too_old(device: torch.device | int, name: str) -> str | None:
    """Why `cuda` or `triton` does not run on this GPU, or None. torch.compile traces it."""
    if not torch.cuda.is_available():  # a tensor without values
        return None
    gpu = torch.cuda.get_device_properties(device)
    major, minor = OLDEST_GPU[name]
    if (gpu.major, gpu.minor) >= (major, minor):  # true of every GPU of Triton on ROCm
        return None
    return (
        f"it needs a GPU of compute capability {major}.{minor} or later, {gpu.name} has "
        f"{gpu.major}.{gpu.minor}"
    )


def no_code_for(device: torch.device | int) -> str | None:
    """Why the CUDA library does not run on this GPU, or None. torch.compile traces it."""
    if reason := too_old(device, "cuda"):
        return reason
    gpu = torch.cuda.get_device_properties(device)
    for first, last in _CUDA_RANGES:
        if first <= (gpu.major, gpu.minor) <= last:
            return None
    return (
        f"anchorops was built for compute capability {_CUDA_TARGETS}, the GPU {gpu.name} has "
        f"{gpu.major}.{gpu.minor}: install anchorops again where torch sees this GPU, or with "
        "TORCH_CUDA_ARCH_LIST"
    )


def unusable() -> dict[str, str | None]:
    """For each backend, the reason why it is not usable here, or None."""
    reasons = dict(MISSING)
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for name in ("cuda", "triton"):
        if ON_HOST[name]:
            continue
        old = [too_old(gpu, name) for gpu in gpus]
        if not gpus:
            reasons[name] = reasons[name] or "torch sees no GPU"
        elif None not in old:  # then another installation would not help
            reasons[name] = old[0]
        elif name == "triton" and reasons[name]:
            reasons[name] = f"{reasons[name]}; until then, pixel losses on a GPU take the reference"
        elif name == "cuda" and not reasons[name]:
            obstacles = [no_code_for(gpu) for gpu in gpus]
            reasons[name] = None if None in obstacles else obstacles[0]
    return reasons
