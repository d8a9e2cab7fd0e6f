"""ONNX models of an ExportedProgram: the formulas by which torch.onnx.export replaces the operators
of predictions.

A module that torch.onnx.export traces itself calls no operators: `_backend.select` chooses the
reference there.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import reference
from .._backend import onnx_refusal
from .._moments import RESULTS, Options


def _two_classes(logits: Tensor) -> Tensor:
    """Logits of one channel are those of class 1 of two, where those of class 0 are 0."""
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def _argmax(logits: Tensor, *arguments: Any) -> Tensor:
    *size, align_corners, dtype = arguments
    logits = _two_classes(logits)
    return reference.pixel_argmax(logits, size, align_corners=align_corners).to(dtype)


def _moments(logits: Tensor, labels: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    options = Options(*arguments)
    moments = reference.softmax_moments(_two_classes(logits), labels, options)
    absent = logits.new_empty(0)  # also lse, which only a backward pass reads
    requested = {name for name in RESULTS if options.requests(name)} - {"lse"}
    return tuple(getattr(moments, x) if x in requested else absent for x in RESULTS)


def _confusion(predictions: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return reference.confusion(predictions, labels, num_classes, ignore_index=ignore_index)


def _refused(name: str) -> Callable[..., NoReturn]:
    def refuse(*arguments: Any) -> NoReturn:
        raise onnx_refusal(name)

    return refuse


_FORMULAS = {
    "pixel_argmax": _argmax,
    "volume_argmax": _argmax,
    "softmax_moments": _moments,
    "volume_moments": _moments,
    "confusion": _confusion,
}


def formula(name: str) -> Callable[..., Any]:
    """What computes the results of an operator; it raises an error for those of losses."""
    return _FORMULAS.get(name) or _refused(name)
