"""Selects the backend of a call: `cuda`, `triton`, `cpu` (C++) or `reference` (PyTorch)."""

import logging
import os
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _libraries
from ._checks import check_choice, fail
from ._libraries import no_code_for, too_old, unusable
from ._torch_state import is_traced

_logger = logging.getLogger("anchorops")
NAMES = ("cuda", "triton", "cpu", "reference")  # fastest first
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
# Those for which none is selected, with those that call them.
CALLERS = {
    "class_keys": ("class_moments", "kth_largest", "upsampled_sums"),
    "error_loss": ("probability_histograms",),
}
NOT_AUTO = "ANCHOROPS_NOT_AUTO"
GPU_MAX_CLASSES = 16_384  # of cuda and triton; the others support MAX_CLASSES of _checks
# Class moments of more keys (images × classes × groups) are for `triton`, which sorts their pixels:
# the partial sums of all keys, which `cuda` writes, would take longer than the sort.
CUDA_MAX_KEYS = 1024


class _Choice(threading.local):
    """The chosen backend of each thread. It is an attribute of the instance, not of the class,
    because torch.compile guards only instance attributes. A context variable could not be set
    inside a compiled function."""

    def __init__(self) -> None:
        self.backend = "auto"


_choice = _Choice()
_told: set[str] = set()  # what was logged once


def chosen_backend() -> str:
    """What `use_backend` has chosen in this thread."""
    return _choice.backend


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
        operators: at least one name, such as "softmax_moments"; the message about an unknown one
            lists all. "class_moments", "upsampled_sums" and "kth_largest" include their keys.

    Raises ValueError for an unknown name, and for an operator that the backend does not have.
    """
    if not operators:
        fail("exclude_from_auto", "operators", "at least one name", "none")
    _exclude("exclude_from_auto", backend, operators)


def not_auto_line(*pairs: tuple[str, str]) -> str:
    """The line of a shell that takes these pairs (backend, operator) out of "auto", besides what is
    excluded already."""
    out = {(backend, name) for backend, names in excluded.items() for name in names}
    return f"export {NOT_AUTO}={','.join(map(':'.join, sorted(out | {*pairs})))}"


def backends() -> dict[str, str | None]:
    """All backends, fastest first: None if "auto" can take the backend here, otherwise the reason
    why not, or for which operators not (`exclude_from_auto`). With several GPUs, `cuda` is usable
    if at least one GPU supports it: it needs a compute capability of 8.0, `triton` 7.5, and older
    GPUs are served by `reference` alone. Usable does not mean every call: `cuda` has class moments
    of at most 1,024 keys (images × classes × groups), and leaves everything else to `triton`; both
    leave float64 to `reference`."""
    reasons = unusable()
    for name, operators in excluded.items():
        if operators and not reasons[name]:
            reasons[name] = f'usable, but "auto" does not take {", ".join(operators)}'
    return reasons


class use_backend:
    """Choose the backend for the following calls, or as a context manager for the calls inside.

    Like torch.no_grad() this applies to the current thread only. Other threads begin with "auto";
    asyncio tasks share the choice of their thread. On a GPU, torch.utils.checkpoint recomputes in
    a thread of autograd: call use_backend inside the checkpointed function.

    "auto" (the default) selects the fastest usable backend for the device and dtype of the input.
    For CUDA tensors this is `cuda`, if it was built for that GPU and supports the call, then
    `triton` (`triton` first for class moments of points that it sums faster); on GPUs of a compute
    capability below 7.5 it is `reference`. (`backends` says which calls `cuda` leaves to `triton`.)
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

    def __exit__(self, *error: object) -> None:
        _choice.backend = self._previous.pop()


def _device_of(name: str) -> str:
    return "cpu" if name == "cpu" or _libraries.ON_HOST.get(name) else "cuda"


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
    return no_code_for(tensor.device) if name == "cuda" else too_old(tensor.device, name)


def onnx_refusal(function: str) -> RuntimeError:
    return RuntimeError(
        f"{function}: an ONNX model can contain {', '.join(ONNX_OPERATORS)}: export a module that "
        "does not compute a loss"
    )


@torch.compiler.assume_constant_result  # torch.compile calls it when it traces
def _tell_that_triton_is_missing(function: str) -> bool:
    """Logs one line in this process."""
    if "triton" not in _told:
        _told.add("triton")
        message = "%s takes the reference, in plain PyTorch, as all that needs Triton on a GPU: %s"
        _logger.warning(message, function, _libraries.MISSING["triton"])
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
        missing = _libraries.MISSING["cpu"]
        usual = tensor.is_cpu and chosen in ("auto", "cpu") and "cpu" in backends
        if usual and not (missing or excluded["cpu"] or (refusal and refusal("cpu"))):
            return "cpu"
    elif torch.onnx.is_in_onnx_export():
        if function not in ONNX_OPERATORS:
            raise onnx_refusal(function)
        if chosen in ("auto", "reference"):
            return "reference"
        raise ValueError(
            f"{function}: backend {chosen} does not support this call: ONNX has only standard "
            'operators: choose "reference" or "auto"'
        )
    call = tensor, num_classes, refusal, backends
    if chosen != "auto":
        reason = _why_not(chosen, *call)
        if reason:
            raise ValueError(f"{function}: backend {chosen} does not support this call: {reason}")
        return chosen
    for name in (*([faster] if faster else []), *NAMES[:-1]):
        # Kernels without a GPU are for tests: they are never selected automatically.
        if _libraries.MISSING[name] or _libraries.ON_HOST.get(name):
            continue
        if excluded[name] and any(operator in excluded[name] for operator in called):
            continue
        if not _why_not(name, *call):
            return name
    on_gpu = tensor.device.type == "cuda" and torch.cuda.is_available()
    if on_gpu and _libraries.MISSING["triton"] and not _why_not("triton", *call):
        _tell_that_triton_is_missing(function)
    return "reference"
