"""Selects the backend of a call: `cuda`, `triton`, `cpu` (C++) or `reference` (PyTorch)."""

import contextlib
import ctypes
import importlib
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ._checks import check_choice, fail
from ._torch_state import is_traced

_logger = logging.getLogger("anchorops")
NAMES = ("cuda", "triton", "cpu", "reference")
_OF_DEVICE = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}  # fastest first
_TAKES_CPU = ("auto", "cpu")  # choices
FUSED = ("cpu", "triton")  # the backends of most operators, besides `reference`
CUDA_BACKENDS = (*FUSED, "cuda")  # of class keys, random groups and class moments
# The functions that torch.onnx.export writes as standard operators: those of predictions.
ONNX_OPERATORS = ("pixel_argmax", "confusion", "pixel_confusion")
# Those for which a backend is selected, and the backends that have them, besides `reference`. Not
# all have kernels of their own: `triton` computes the k-th largest number by class keys.
# `class_moments` includes class_keys, which precede it.
OPERATORS = {
    "class_moments": CUDA_BACKENDS,
    "split_groups": CUDA_BACKENDS,
    "upsampled_sums": FUSED,
    "softmax_moments": FUSED,
    "kth_largest": FUSED,
    "pixel_kl_divergence": FUSED,
    "pixel_argmax": FUSED,
    "confusion": FUSED,
    "probability_histograms": FUSED,
    "mask_rle": FUSED,
    "centroid_info_nce": FUSED,
}
NOT_AUTO = "ANCHOROPS_NOT_AUTO"
# The major compute capability that cuda and triton need: our CUDA sources for asynchronous copies
# and sums of a warp by one instruction, and so does Triton from 3.3 on.
OLDEST_GPU = 8
GPU_MAX_CLASSES = 16_384  # of cuda and triton; the others support MAX_CLASSES of _checks
# Class moments of more keys (images × classes × groups) are for `triton`, which sorts their pixels:
# the partial sums of all keys, which `cuda` writes, would take longer than the sort.
CUDA_MAX_KEYS = 1024

# Tests without a GPU run the kernels of a backend on CPU tensors, as compiled: tests/proofs/ptx,
# which sets the variable.
TRITON_ON_HOST = os.getenv("ANCHOROPS_TRITON_ON_HOST") == "1"
_ON_HOST = {"triton": TRITON_ON_HOST, "cuda": False}

# They use LibTorch's stable ABI (of torch 2.10) and no Python: one build is for several versions.
CPU_LIBRARY = Path(__file__).with_name("_cpu.so")
CUDA_LIBRARY = Path(__file__).with_name("_cuda.so")


class _Choice(threading.local):
    """The chosen backend of each thread. It is an attribute of the instance, not of the class,
    because torch.compile guards only instance attributes. A context variable could not be set
    inside a compiled function."""

    def __init__(self) -> None:
        self.backend = "auto"


_choice = _Choice()
_launched: set[str] = set()  # operators of triton, in this process
_told: set[str] = set()  # what was logged once


def chosen_backend() -> str:
    """What `use_backend` has chosen in this thread."""
    return _choice.backend


@contextlib.contextmanager
def compiling(operator: str, patience: float = 1.0) -> Iterator[None]:
    """Logs one line if the operator's first launch takes longer than `patience` seconds: then
    Triton compiles its kernels, and the program looks as if it hung."""
    if operator in _launched:
        yield
        return
    _launched.add(operator)
    from triton import knobs

    message = "Triton compiles the kernels of %s, which takes seconds, and stores them in %s"
    timer = threading.Timer(patience, _logger.warning, (message, operator, knobs.cache.dir))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def implement_by_triton(
    library: torch.library.Library, operator: str, call: Callable[..., Any]
) -> None:
    """Implement `operator`.triton by `call`, of the function `operator` of
    anchorops.kernels.`operator` and the arguments. The first call imports this module, and Triton
    with it."""
    kernel: Callable[..., Any] | None = None

    def launch(*args: Any) -> Any:
        nonlocal kernel
        if kernel is None:
            kernel = getattr(importlib.import_module(f"anchorops.kernels.{operator}"), operator)
        tensor = next(x for x in args if isinstance(x, Tensor))
        with torch.cuda.device_of(tensor):  # Triton launches on the current device
            if operator in _launched:
                return call(kernel, *args)
            with compiling(operator):
                return call(kernel, *args)

    library.impl(f"{operator}.triton", launch, "CUDA")
    if TRITON_ON_HOST:
        _launched.add(operator)  # tests compile all the time
        library.impl(f"{operator}.triton", launch, "CPU")


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


def _load_cpu() -> str | None:
    if not CPU_LIBRARY.exists():
        return "anchorops/_cpu.so was not compiled: install a C++20 compiler, then anchorops again"
    try:
        torch.ops.load_library(CPU_LIBRARY)
    except OSError as error:
        return f"anchorops/_cpu.so does not load: {error.__cause__ or error}"
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
    try:
        torch.ops.load_library(CUDA_LIBRARY)
    except OSError as error:
        return f"anchorops/_cuda.so does not load: {error.__cause__ or error}"
    return None


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
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (CPU builds of torch do not include it)"
    return None if TRITON_ON_HOST else triton_obstacle()


def triton_obstacle() -> str | None:
    """Why Triton could launch nothing, or None. At its first launch it compiles a C module for
    Python, with the compiler and the header that triton/runtime/build.py looks for."""
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
_cpu = _load_cpu()
_MISSING = {"cuda": _load_cuda(), "triton": _find_triton(), "cpu": _cpu, "reference": None}
_CUDA_TARGETS = build_info().get("cuda_arch_list", "")
_CUDA_RANGES = _built_for(_CUDA_TARGETS)


def _too_old(device: torch.device | int) -> str | None:
    """Why neither `cuda` nor `triton` runs on this GPU, or None. torch.compile traces it."""
    if not torch.cuda.is_available():  # a tensor without values
        return None
    gpu = torch.cuda.get_device_properties(device)
    if gpu.major >= OLDEST_GPU:  # true of every GPU that Triton supports on ROCm
        return None
    return (
        f"it needs a GPU of compute capability {OLDEST_GPU}.0 or later, {gpu.name} has "
        f"{gpu.major}.{gpu.minor}"
    )


def _no_code_for(device: torch.device | int) -> str | None:
    """Why the CUDA library does not run on this GPU, or None. torch.compile traces it."""
    if reason := _too_old(device):
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


# For each backend that "auto" may select, the operators for which it does not.
excluded: dict[str, tuple[str, ...]] = dict.fromkeys(NAMES[:-1], ())


def _exclude(function: str, backend: str, operators: Sequence[str]) -> None:
    check_choice(function, "backend", backend, tuple(excluded))
    known = tuple(name for name, names in OPERATORS.items() if backend in names)
    for operator in operators:
        check_choice(function, "operators", operator, known)
    excluded[backend] = tuple(dict.fromkeys((*excluded[backend], *operators)))


def _exclude_from_environment(value: str) -> None:
    for part in value.split(",") if value else ():
        backend, colon, operator = part.partition(":")
        if not colon:
            fail(NOT_AUTO, "the variable", "BACKEND:OPERATOR,BACKEND:OPERATOR,…", repr(value))
        _exclude(NOT_AUTO, backend, (operator,))


_exclude_from_environment(os.getenv(NOT_AUTO, ""))


def exclude_from_auto(backend: str, *operators: str) -> None:
    """Take operators of a backend out of "auto", in all threads, until the process ends: their
    calls take the next usable backend, at last the reference. A call of `use_backend` with the
    backend's name still uses them. `anchorops-doctor --verify` names the operators that are wrong.

    The environment variable ANCHOROPS_NOT_AUTO does the same from the import on, for example
    ANCHOROPS_NOT_AUTO=triton:softmax_moments,cuda:class_moments. torch.compile selects a backend
    when it traces.

    Args:
        backend: "cuda", "triton" or "cpu".
        operators: at least one of "class_moments" (with their keys), "split_groups" (random groups
            of pixels), "upsampled_sums" and "kth_largest" (each with its keys), "softmax_moments",
            "pixel_kl_divergence", "pixel_argmax", "confusion", "probability_histograms",
            "mask_rle" and "centroid_info_nce".

    Raises ValueError for an unknown name, and for an operator that the backend does not have.
    """
    if not operators:
        fail("exclude_from_auto", "operators", "at least one name", "none")
    _exclude("exclude_from_auto", backend, operators)


def backends() -> dict[str, str | None]:
    """All backends, fastest first: None if "auto" can take the backend here, otherwise the reason
    why not, or for which operators not (`exclude_from_auto`). With several GPUs, `cuda` is usable
    if at least one GPU supports it. GPUs of a compute capability below 8.0 are served by
    `reference` alone. Usable does not mean every call: `cuda` has class moments of at
    most 1,024 keys (images × classes × groups), and leaves everything else to `triton`; both leave
    float64 to `reference`."""
    reasons = unusable()
    for name, operators in excluded.items():
        if operators and not reasons[name]:
            reasons[name] = f'usable, but "auto" does not take {", ".join(operators)}'
    return reasons


def unusable() -> dict[str, str | None]:
    """For each backend, the reason why it is not usable here, or None."""
    reasons = dict(_MISSING)
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    too_old = [_too_old(gpu) for gpu in gpus]
    for name, obstacle in (("cuda", _no_code_for), ("triton", _too_old)):
        if _ON_HOST[name]:
            continue
        if not gpus:
            reasons[name] = reasons[name] or "torch sees no GPU"
        elif None not in too_old:  # then another installation would not help
            reasons[name] = too_old[0]
        elif name == "triton" and reasons[name]:
            reasons[name] = f"{reasons[name]}; until then, pixel losses on a GPU take the reference"
        elif not reasons[name]:
            obstacles = [obstacle(gpu) for gpu in gpus]
            reasons[name] = None if None in obstacles else obstacles[0]
    return reasons


class use_backend:
    """Choose the backend for the following calls, or as a context manager for the calls inside.

    Like torch.no_grad() this applies to the current thread only. Other threads begin with "auto";
    asyncio tasks share the choice of their thread. On a GPU, torch.utils.checkpoint recomputes in
    a thread of autograd: call use_backend inside the checkpointed function.

    "auto" (the default) selects the fastest usable backend for the device and dtype of the input.
    For CUDA tensors this is `cuda`, if it was built for that GPU and supports the call, then
    `triton` (`triton` first for class moments of points that it sums faster); on GPUs of a compute
    capability below 8.0 it is `reference`. (`backends` says which calls `cuda` leaves to `triton`.)
    Float64, and more classes than they support, use `reference`. For CPU tensors it is `cpu`, for
    all others `reference`. An operator that `exclude_from_auto` names is not selected. A backend
    chosen by name raises an error if it does not support a call; it is never silently replaced by
    another one. `Lovasz(sigmoid=True)` has no kernel: it is a function of torch under each backend.

    Raises ValueError for an unknown name, RuntimeError for a backend that is not usable here.
    """

    def __init__(self, name: str) -> None:
        check_choice("use_backend", "name", name, ("auto", *NAMES))
        reason = None if name == "auto" else unusable()[name]
        if reason:
            raise RuntimeError(f"use_backend: {name} is not usable here: {reason}")
        self._name, self._entered = name, False
        self._previous = [_choice.backend]  # one for each block that has been entered
        _choice.backend = name

    def __enter__(self) -> "use_backend":
        if self._entered or _choice.backend != self._name:  # again, or after another choice
            self._previous.append(_choice.backend)
            _choice.backend = self._name
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _choice.backend = self._previous.pop()


def _device_of(name: str) -> str:
    return "cpu" if name == "cpu" or _ON_HOST.get(name) else "cuda"


def _why_not(
    name: str,
    tensor: Tensor,
    num_classes: int,
    refusal: Callable[[str], str | None] | None,
    backends: Sequence[str],
) -> str | None:
    """Why the backend does not support a call with this input, or None."""
    if name not in ("reference", *backends):
        others = [x for x in backends if _device_of(x) == tensor.device.type]
        choices = " or ".join(f'"{x}"' for x in (*others, "auto"))
        return f"it does not have this operator: choose {choices}"
    device = _device_of(name)
    if name != "reference" and tensor.device.type != device:
        return f"it supports {device} tensors, the input is on {tensor.device}"
    if name in ("cuda", "triton") and tensor.dtype == torch.float64:
        return "it does not support float64 (the reference does)"
    if name in ("cuda", "triton") and num_classes > GPU_MAX_CLASSES:
        return f"it supports at most {GPU_MAX_CLASSES} classes, num_classes is {num_classes}"
    if refusal is not None and (reason := refusal(name)):
        other = "triton" if name == "cuda" else "reference"
        return f'{reason}: choose "{other}" or "auto"'
    if name == "reference" or device == "cpu":
        return None
    return _no_code_for(tensor.device) if name == "cuda" else _too_old(tensor.device)


def onnx_refusal(function: str) -> RuntimeError:
    return RuntimeError(
        f"{function}: an ONNX model can contain {', '.join(ONNX_OPERATORS)}: export a module that "
        "does not compute a loss"
    )


def _check_onnx_export(function: str, chosen: str) -> None:
    if function not in ONNX_OPERATORS:
        raise onnx_refusal(function)
    if chosen not in ("auto", "reference"):
        raise ValueError(
            f"{function}: backend {chosen} does not support this call: ONNX has only standard "
            'operators: choose "reference" or "auto"'
        )


@torch.compiler.assume_constant_result  # torch.compile calls it when it traces
def _tell_that_triton_is_missing(function: str) -> bool:
    """Logs one line in this process."""
    if "triton" not in _told:
        _told.add("triton")
        message = "%s takes the reference, in plain PyTorch, as all that needs Triton on a GPU: %s"
        _logger.warning(message, function, _MISSING["triton"])
    return True


def select(
    function: str,
    tensor: Tensor,
    num_classes: int,
    *,
    called: Sequence[str] = (),
    refusal: Callable[[str], str | None] | None = None,
    faster: str | None = None,
) -> str:
    """The backend of a call with this input (features, logits or predictions). Raises ValueError if
    the chosen backend does not support it.

    Args:
        called: the operators that the function calls, if not the one of its name. The first one
            says which backends have them (OPERATORS).
        refusal: of a backend that has the operator and the device, why it leaves this call to the
            next one, or None.
        faster: a backend that "auto" tries first.
    """
    chosen, called = _choice.backend, called or (function,)
    backends = OPERATORS[called[0]]
    # torch.onnx.export always traces; is_in_onnx_export takes longer than the rest of this function
    if not is_traced():
        # what follows finds the same, but takes as long as a small operator of torch; is_cpu is
        # quicker than device.type
        usual = tensor.is_cpu and chosen in _TAKES_CPU and "cpu" in backends
        if usual and not (_MISSING["cpu"] or excluded["cpu"] or (refusal and refusal("cpu"))):
            return "cpu"
    elif torch.onnx.is_in_onnx_export():
        _check_onnx_export(function, chosen)
        return "reference"
    call = tensor, num_classes, refusal, backends
    if chosen != "auto":
        reason = _why_not(chosen, *call)
        if reason:
            raise ValueError(f"{function}: backend {chosen} does not support this call: {reason}")
        return chosen
    device = tensor.device.type
    for name in (*([faster] if faster else []), *_OF_DEVICE.get(device, ())):
        # Kernels without a GPU are for tests: they are never selected automatically.
        if _MISSING[name] or _ON_HOST.get(name):
            continue
        if excluded[name] and any(operator in excluded[name] for operator in called):
            continue
        if not _why_not(name, *call):
            return name
    on_gpu = device == "cuda" and torch.cuda.is_available()
    if on_gpu and _MISSING["triton"] and not _why_not("triton", *call):
        _tell_that_triton_is_missing(function)
    return "reference"
