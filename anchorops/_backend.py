"""Which implementation serves a call: `cuda`, `triton`, `cpu` (C++) or `reference` (PyTorch)."""

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ._checks import check_choice

NAMES = ("cuda", "triton", "cpu", "reference")
# Numbers of classes that a backend takes; the reference takes all that are allowed at all.
MAX_CLASSES = {"cuda": 16_384, "triton": 16_384, "cpu": 65_536, "reference": 65_536}

_chosen = "auto"


@cache
def _why_not_cpu() -> str | None:
    try:
        importlib.import_module("anchorops._C")
    except ImportError as error:
        if importlib.util.find_spec("anchorops._C") is None:
            return "anchorops._C was not compiled: install a C++20 compiler and reinstall anchorops"
        return f"anchorops._C does not load: {error}"
    return None


@cache
def _why_not_triton() -> str | None:
    if importlib.util.find_spec("anchorops.kernels.class_moments") is None:
        return "this release has no Triton kernels"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (CPU builds of torch do not bring it)"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


@cache
def _why_not_cuda() -> str | None:
    library = Path(__file__).with_name("_cuda.so")
    if not library.exists():
        return "anchorops/_cuda.so was not built: it needs nvcc and a CUDA build of torch"
    if torch.version.cuda is None:
        return "this torch is a CPU build"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    torch.ops.load_library(library)
    return None


def backends() -> dict[str, str | None]:
    """Every backend, fastest first, with None where it is usable here, else the reason it is not."""
    return {
        "cuda": _why_not_cuda(),
        "triton": _why_not_triton(),
        "cpu": _why_not_cpu(),
        "reference": None,
    }


class use_backend:
    """Choose the backend of every later call; as a context manager, of the calls inside.

    "auto" (the default) takes, for the features' device and dtype, the fastest that is usable:
    on CUDA `cuda`, then `triton` (float64, and more classes than they take, go to `reference`);
    on CPU `cpu`; everywhere else `reference`. A backend asked for by name that cannot serve a call
    raises; nothing falls back in silence.

    Raises ValueError for an unknown name, RuntimeError for a backend that is not usable here.
    """

    def __init__(self, name: str) -> None:
        global _chosen
        check_choice("use_backend", "name", name, ("auto", *NAMES))
        reason = None if name == "auto" else backends()[name]
        if reason:
            raise RuntimeError(f"use_backend: {name} is not usable here: {reason}")
        self._previous, _chosen = _chosen, name

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _chosen
        _chosen = self._previous


def _why_not(name: str, features: Tensor, num_classes: int) -> str | None:
    """Why the backend cannot serve this call, or None."""
    device = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}.get(name)
    if device and features.device.type != device:
        return f"it serves {device} tensors, features are on {features.device}"
    if device == "cuda" and features.dtype == torch.float64:
        return "it does not serve float64 (the reference does)"
    if num_classes > MAX_CLASSES[name]:
        return f"it serves at most {MAX_CLASSES[name]} classes, num_classes is {num_classes}"
    return None


def select(function: str, features: Tensor, num_classes: int) -> str:
    """The backend that serves this call. Raises ValueError where the chosen one cannot."""
    if _chosen != "auto":
        reason = _why_not(_chosen, features, num_classes)
        if reason:
            raise ValueError(f"{function}: backend {_chosen} cannot serve this call: {reason}")
        return _chosen
    for name, unusable in backends().items():
        if not unusable and not _why_not(name, features, num_classes):
            return name
    return "reference"


