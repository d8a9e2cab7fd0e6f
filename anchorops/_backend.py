"""Which implementation serves a call: `cuda`, `triton`, `cpu` (C++) or `reference` (PyTorch)."""

import ctypes
import importlib
import importlib.util
import json
import math
import os
import re
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ._checks import check_choice

NAMES = ("cuda", "triton", "cpu", "reference")
GPU_MAX_CLASSES = 16_384  # of cuda and triton; the others take MAX_CLASSES of _checks

# Proofs without a GPU run a backend's kernels on CPU tensors: Triton's in its interpreter (Triton
# reads the variable when it is imported), the CUDA sources from a library that a C++ compiler made.
TRITON_INTERPRETED = os.getenv("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
_CUDA_ON_HOST = os.getenv("ANCHOROPS_CUDA_ON_HOST")
_ON_HOST = {"triton": TRITON_INTERPRETED, "cuda": bool(_CUDA_ON_HOST)}

# LibTorch's stable ABI and no Python: one build serves every torch from 2.10 on and every Python.
CPU_LIBRARY = Path(__file__).with_name("_cpu.so")
CUDA_LIBRARY = Path(__file__).with_name("_cuda.so")


class _Choice(threading.local):
    """Of each thread. The attribute is the instance's, not the class's: only that one does
    torch.compile guard. A context variable could not be set inside a compiled function."""

    def __init__(self) -> None:
        self.backend = "auto"


_choice = _Choice()


def register_triton(library: torch.library.Library, operator: str) -> None:
    """Implement `operator`.triton by the function of that name in the module of that name in
    anchorops.kernels, which is imported, and Triton with it, at the first call."""

    def launch(*args: Any) -> Any:
        kernels = importlib.import_module(f"anchorops.kernels.{operator}")
        tensor = next(x for x in args if isinstance(x, Tensor))
        with torch.cuda.device_of(tensor):  # Triton launches on the current device
            return getattr(kernels, operator)(*args)

    library.impl(f"{operator}.triton", launch, "CUDA")
    if TRITON_INTERPRETED:
        library.impl(f"{operator}.triton", launch, "CPU")


def build_info() -> dict[str, str]:
    """What the C++ library beside this file was built with; empty where it does not load."""
    try:
        record = ctypes.CDLL(str(CPU_LIBRARY)).anchorops_build_info
    except OSError:
        return {}
    record.restype = ctypes.c_char_p
    return json.loads(record())


def _load_cpu() -> str | None:
    if not CPU_LIBRARY.exists():
        return "anchorops/_cpu.so was not compiled: install a C++20 compiler, then anchorops again"
    try:
        torch.ops.load_library(CPU_LIBRARY)
    except OSError as error:
        return f"anchorops/_cpu.so does not load: {error.__cause__ or error}"
    return None


def _load_cuda() -> str | None:
    if _CUDA_ON_HOST:
        torch.ops.load_library(_CUDA_ON_HOST)
        return None
    # An older library may lie there from before a build without CUDA: ask the build.
    built = build_info().get("cuda")
    if not built:
        return "anchorops was built without CUDA: it needs nvcc and a CUDA build of torch"
    if torch.version.cuda is None:
        return "this torch is a CPU build"
    if built.split(".")[0] != torch.version.cuda.split(".")[0]:  # two runtimes in one process
        return (
            f"anchorops was built with CUDA {built}, this torch with {torch.version.cuda}: "
            "install anchorops again with nvcc of torch's major version"
        )
    try:
        torch.ops.load_library(CUDA_LIBRARY)
    except OSError as error:
        return f"anchorops/_cuda.so does not load: {error.__cause__ or error}"
    return None


def _built_for(targets: str) -> list[tuple[tuple[int, int], tuple[float, float]]]:
    """First and last compute capability of the GPUs on which code for each of the targets runs,
    which are as in TORCH_CUDA_ARCH_LIST. Machine code serves its own major version from its minor
    version on, PTX every later capability; "9.0a" is for 9.0 alone, "10.0f" is for its family."""
    ranges = []
    for major, minor, kind, ptx in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", targets):
        first = int(major), int(minor)
        later = first if kind == "a" else (first[0], math.inf)
        ranges.append((first, (math.inf, math.inf) if ptx and not kind else later))
    return ranges


def _find_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (CPU builds of torch do not bring it)"
    return None


# Why a backend's code is not here, fastest backend first. Known at import, so that choosing one is
# a look into this table, which torch.compile can trace; whether there is a GPU is asked elsewhere.
_cpu = _load_cpu()
_MISSING = {"cuda": _load_cuda(), "triton": _find_triton(), "cpu": _cpu, "reference": None}
_CUDA_TARGETS = build_info().get("cuda_arch_list", "")
_CUDA_RANGES = _built_for(_CUDA_TARGETS)


def _no_code_for(device: torch.device | int) -> str | None:
    """Why the CUDA library does not run on this GPU, or None. torch.compile traces it."""
    gpu = torch.cuda.get_device_properties(device)
    for first, last in _CUDA_RANGES:
        if first <= (gpu.major, gpu.minor) <= last:
            return None
    return (
        f"anchorops was built for compute capability {_CUDA_TARGETS}, the GPU {gpu.name} has "
        f"{gpu.major}.{gpu.minor}: install anchorops again where torch sees this GPU, or with "
        "TORCH_CUDA_ARCH_LIST"
    )


def backends() -> dict[str, str | None]:
    """Every backend, fastest first: None where it is usable here, else the reason it is not. Of
    several GPUs, `cuda` is usable where it is on one."""
    reasons = dict(_MISSING)
    for name in ("cuda", "triton"):
        if not reasons[name] and not _ON_HOST[name] and not torch.cuda.is_available():
            reasons[name] = "torch sees no GPU"
    if not reasons["cuda"] and not _ON_HOST["cuda"]:
        obstacles = [_no_code_for(i) for i in range(torch.cuda.device_count())]
        reasons["cuda"] = None if None in obstacles else obstacles[0]
    return reasons


class use_backend:
    """Choose the backend of this thread's later calls; as a context manager, of the calls inside.

    Like torch.no_grad() it is this thread's alone: other threads begin with "auto", and asyncio's
    tasks share the choice of their thread. Where torch.utils.checkpoint recomputes on a GPU, it
    does so in a thread of autograd's: choose inside the checkpointed function.

    "auto" (the default) takes, for the features' device and dtype, the fastest that is usable:
    on CUDA `cuda` where it was built for that GPU, then `triton` (float64, and more classes than
    they take, go to `reference`); on CPU `cpu`; everywhere else `reference`. A backend asked for by
    name that cannot serve a call raises; nothing falls back in silence.

    Raises ValueError for an unknown name, RuntimeError for a backend that is not usable here.
    """

    def __init__(self, name: str) -> None:
        check_choice("use_backend", "name", name, ("auto", *NAMES))
        reason = None if name == "auto" else backends()[name]
        if reason:
            raise RuntimeError(f"use_backend: {name} is not usable here: {reason}")
        self._name = name
        self._previous, _choice.backend = _choice.backend, name

    def __enter__(self) -> "use_backend":
        if _choice.backend != self._name:  # entered again, or after another choice
            self._previous, _choice.backend = _choice.backend, self._name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _choice.backend = self._previous


def _why_not(name: str, features: Tensor, num_classes: int) -> str | None:
    """Why the backend cannot serve this call, or None."""
    device = "cpu" if name == "cpu" or _ON_HOST.get(name) else "cuda"
    if name != "reference" and features.device.type != device:
        return f"it serves {device} tensors, features are on {features.device}"
    if name in ("cuda", "triton") and features.dtype == torch.float64:
        return "it does not serve float64 (the reference does)"
    if name in ("cuda", "triton") and num_classes > GPU_MAX_CLASSES:
        return f"it serves at most {GPU_MAX_CLASSES} classes, num_classes is {num_classes}"
    return _no_code_for(features.device) if name == "cuda" and device == "cuda" else None


def select(function: str, features: Tensor, num_classes: int) -> str:
    """The backend that serves this call. Raises ValueError where the chosen one cannot."""
    chosen = _choice.backend
    if chosen != "auto":
        reason = _why_not(chosen, features, num_classes)
        if reason:
            raise ValueError(f"{function}: backend {chosen} cannot serve this call: {reason}")
        return chosen
    for name, missing in _MISSING.items():
        # What runs on the host for proofs is not for work.
        if not (missing or _ON_HOST.get(name) or _why_not(name, features, num_classes)):
            return name
    return "reference"
