"""ONNX models of an ExportedProgram: the formulas of the operators of predictions.

A module that torch.onnx.export traces itself calls no operators: `_backend.select` chooses the
reference there.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import reference
from .._backend import onnx_refusal
from .._moments import RESULTS, is_requested, split_options
from .._torch_state import formulas_for_onnx
from .registration import defined
from .sigmoid import two_classes


def _argmax(logits: Tensor, *arguments: Any) -> Tensor:
    *size, align_corners, dtype = arguments
    logits = two_classes(logits)
    return reference.pixel_argmax(logits, size, align_corners=align_corners).to(dtype)


def _moments(logits: Tensor, labels: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    options, wanted = split_options(arguments)
    wanted = wanted._replace(with_lse=False)  # which only a backward pass reads
    moments = reference.softmax_moments(two_classes(logits), labels, options, wanted)
    absent = logits.new_empty(0)
    return tuple(
        getattr(moments, x) if is_requested(x, options, wanted) else absent for x in RESULTS
    )


def _confusion(predictions: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return reference.confusion(predictions, labels, num_classes, ignore_index=ignore_index)


_FORMULAS = {
    "pixel_argmax": _argmax,
    "volume_argmax": _argmax,
    "softmax_moments": _moments,
    "volume_moments": _moments,
    "confusion": _confusion,
}


def onnx_decompositions() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The table by which an ExportedProgram replaces anchorops' operators by standard ones:
    `torch.onnx.export(program.run_decompositions(anchorops.onnx_decompositions()), …)`.

    It replaces those of predictions. For a loss, `run_decompositions` raises RuntimeError.
    """
    return {operator: _formula(name) for operator, name in defined.items()}


def _formula(name: str) -> Callable[..., Any]:
    def formula(*arguments: Any) -> Any:
        if name not in _FORMULAS:
            raise onnx_refusal(name)
        with formulas_for_onnx():
            return _FORMULAS[name](*arguments)

    return formula
