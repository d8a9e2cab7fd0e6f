"""The state of torch in which a call is made: traced, for ONNX, in a transform, recomputed."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def is_jit_traced() -> bool:
    """Whether torch.jit.trace, or torch.onnx.export by means of it, makes tensors of sizes."""
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def is_traced() -> bool:
    """Whether torch.compile or torch.jit.trace records this call."""
    return torch.compiler.is_compiling() or is_jit_traced()


class _Formulas(threading.local):
    """An attribute of the instance, which torch.compile guards."""

    def __init__(self) -> None:
        self.for_onnx = False


_formulas = _Formulas()


@contextlib.contextmanager
def formulas_for_onnx() -> Iterator[None]:
    """The formulas of the reference are those for ONNX inside this context."""
    before, _formulas.for_onnx = _formulas.for_onnx, True
    try:
        yield
    finally:
        _formulas.for_onnx = before


def is_for_onnx() -> bool:
    """Whether formulas are recorded for an ONNX model, which has not all operators of torch."""
    return torch.onnx.is_in_onnx_export() or _formulas.for_onnx


def traces_sizes() -> bool:
    """Whether such tensors become sizes of an ONNX model, not constants."""
    return is_jit_traced() and torch.onnx.is_in_onnx_export()


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape in ints: torch.jit.trace makes tensors of them."""
    constant = is_jit_traced() and not traces_sizes()
    return tuple(map(int, tensor.shape)) if constant else tensor.shape


def has_values(tensor: Tensor) -> bool:
    """Whether a check can read its values: not in what torch.compile traces, and not of a
    FakeTensor, whose memory is on the device meta."""
    return not torch.compiler.is_compiling() and tensor.untyped_storage().device.type != "meta"


def savable(x: T) -> T:
    """A copy of a tensor that was made under torch.inference_mode, which autograd cannot save for
    the backward pass. It has no version counter, so nothing would notice if it were changed before.
    Anything else, and everything under inference mode, as it is."""
    if not isinstance(x, Tensor) or torch.compiler.is_compiling() or not x.is_inference():
        return x
    copied: Any = x if torch.is_inference_mode_enabled() else x.clone()
    return copied


def in_transform(tensor: Tensor, *, only_derivatives: bool = False) -> bool:
    """Whether a torch.func transform is applied to this tensor: any transform, or a derivative. For
    this, and for `recomputing`, torch has no public function."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    while functorch.is_functorch_wrapped_tensor(tensor):
        if not only_derivatives or functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def recomputing() -> bool:
    """Whether the current forward is a recomputation, that is, runs during a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
