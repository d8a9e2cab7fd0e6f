"""Registration of operators: one overload per backend, with schema, fake kernel and autograd."""

from collections import namedtuple
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._backend import FUSED, OPERATORS
from .._torch_state import in_transform, savable
from .triton_launch import implement_by_triton


class _Library(torch.library.Library):
    """Where a program removes anchorops from sys.modules and imports it again, the operators remain
    those of the first import: torch has no public way to remove them, and compiled functions hold
    them."""

    def __init__(self, namespace: str) -> None:
        super().__init__(namespace, "FRAGMENT")
        self._kept: set[str] = set()  # of the first import

    def add(self, name: str, schema: str, fake: Callable[..., Any], *tags: torch.Tag) -> None:
        """Define the operator NAME or NAME.OVERLOAD, with its fake kernel."""
        operator, _, overload = name.partition(".")
        if hasattr(getattr(torch.ops.anchorops, operator, None), overload or "default"):
            self._kept.add(name)
            return
        self.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        torch.library.register_fake(f"anchorops::{name}", fake, lib=self)

    def impl(self, op_name: Any, *args: Any, **kwargs: Any) -> None:
        if op_name not in self._kept:
            super().impl(op_name, *args, **kwargs)


library = _Library("anchorops")
defined: dict[Callable[..., Any], str] = {}
"""The operators of every backend, by name."""


def overload_of(name: str, backend: str) -> Any:
    """anchorops::NAME.BACKEND."""
    return getattr(getattr(torch.ops.anchorops, name), backend)


def run(name: str, backend: str, *arguments: Any) -> Any:
    """The results of anchorops::NAME.BACKEND."""
    return overload_of(name, backend)(*arguments)


def like_the_first(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


class Gradient(NamedTuple):
    """The operator NAME_backward, and the functions that call it.

    schema, fake, triton, in_python: as in `define`; by default the result is dense and has the
        dtype and layout of the first argument.
    setup_context: (ctx, inputs, results) saves what the backward pass needs. Inputs and results
        have the names of NAME's schema; ctx.needs says by name which inputs need a gradient.
    backward: (operator, ctx, grads) → the gradients of arguments of NAME, by name; `operator` is
        NAME_backward of the backend that ran the forward pass, and ctx.forward is NAME. `grads`
        have the names of the results. Absent gradients are None; that of an empty output is an
        empty tensor. torch.vmap and a graph that is used again hide that a gradient will be
        requested: `backward` computes again what was not saved.
    function: the only one that calls NAME, if its reference has no other derivatives either.
    """

    schema: str
    setup_context: Callable[[Any, Any, Any], None]
    backward: Callable[[Any, Any, Any], dict[str, Tensor | None]]
    fake: Callable[..., Any] = like_the_first
    triton: Callable[..., Any] | None = None
    in_python: Callable[..., Any] | None = None
    function: str | None = None


def raise_second_derivative(name: str, function: str | None = None) -> NoReturn:
    _raise_not_implemented(name, "second derivatives", function)


def _raise_not_implemented(name: str, derivatives: str, function: str | None) -> NoReturn:
    if function is not None:
        raise RuntimeError(f"{function}: {derivatives} are not implemented")
    raise RuntimeError(
        f"{name}: {derivatives} are not implemented in the fused operators; "
        'use anchorops.use_backend("reference") for them'
    )


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    *,
    backends: Sequence[str] | None = None,
    gradient: Gradient | None = None,
    triton: Callable[..., Any] | None = None,
    in_python: Callable[..., Any] | None = None,
    any_strides: bool = False,
) -> None:
    """Define anchorops::NAME.BACKEND for each backend.

    C++ implements the overloads `cpu` and `cuda` when its library is loaded, and `triton` the
    overload of this name.

    Args:
        backends: by default those of OPERATORS, or FUSED for what only other operators call. The
            reference is one only where it has a gradient of its own, because a trace without
            gradients does not record an autograd.Function.
        schema: "(Tensor features, …) -> (Tensor sums, …)". Floating-point results come first, for
            opcheck. A result that was not requested is an empty tensor (0,).
        fake: returns results without values, from the arguments.
        gradient: None if no result is differentiable.
        triton: the operator's arguments → the results, by Triton: `launcher(NAME)`, or a function
            that calls it.
        in_python: (backend, the operator's arguments) → the results; it implements the overloads of
            all backends. By default those of `reference` are left to the caller.
        any_strides: NAME and NAME_backward take tensors of any strides, except results of other
            operators (keys, lse), and the strides of their own results follow from them at run
            time. Then torch.compile, which makes convolutions channels last, does not copy their
            outputs back to the layout that they have in eager mode.
    """
    tags = [torch.Tag.flexible_layout] if any_strides else []

    def add(name: str, backend: str, schema: str, fake: Any, triton: Any, in_python: Any) -> Any:
        library.add(f"{name}.{backend}", schema, fake, *tags)
        if in_python is not None:
            implementation = partial(in_python, backend)
            library.impl(f"{name}.{backend}", implementation, "CompositeExplicitAutograd")
        elif backend == "triton":
            assert triton is not None, f"{name}: triton is missing"
            implement_by_triton(library, name, triton)
        return overload_of(name, backend)

    for backend in backends or OPERATORS.get(name, FUSED):
        overload = add(name, backend, schema, fake, triton, in_python)
        defined[overload] = name
        if gradient is not None:
            of_gradient = gradient.schema, gradient.fake, gradient.triton, gradient.in_python
            backward = add(f"{name}_backward", backend, *of_gradient)
            _register_gradient(name, backend, overload, backward, gradient)


def _register_gradient(
    name: str,
    backend: str,
    operator: Callable[..., Any],
    operator_backward: Callable[..., Any],
    gradient: Gradient,
) -> None:
    schema = operator._schema  # no public name gives that of an operator
    Inputs = namedtuple("Inputs", [x.name for x in schema.arguments])
    Results = namedtuple("Results", [x.name for x in schema.returns])

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.needs = Inputs(*ctx.needs_input_grad)
        results = output if isinstance(output, tuple) else (output,)
        gradient.setup_context(ctx, Inputs(*map(savable, inputs)), Results(*results))

    def backward(ctx: Any, *grads: Any) -> tuple:
        ctx.forward, ctx.backend = operator, backend
        gradients = gradient.backward(operator_backward, ctx, Results(*grads))
        return tuple(map(gradients.get, Inputs._fields))

    # If NAME_backward had no autograd, a second derivative would be None, with only a warning.
    def second_derivative(ctx: Any, *grads: Any) -> NoReturn:
        raise_second_derivative(name, gradient.function)

    nodes = (
        (f"{name}.{backend}", operator, setup_context, backward),
        (f"{name}_backward.{backend}", operator_backward, lambda *_: None, second_derivative),
    )
    for node in nodes:
        _register_autograd(*node, gradient.function)


def _register_autograd(
    overload: str,
    operator: Callable[..., Any],
    setup_context: Callable[[Any, tuple, Any], None],
    backward: Callable[..., Any],
    function: str | None,
) -> None:
    """As torch.library.register_autograd, which silently drops the tangents of forward mode if no
    input requires a gradient, and has an unclear message for torch.func's derivatives."""
    name = overload.partition(".")[0]

    def implementation(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():  # torch.library has no name for it
            return operator(*inputs)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = implementation(*inputs)
        setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    node = type(name, (torch.autograd.Function,), methods)

    def refuse_transforms(tensors: Sequence[Tensor]) -> None:
        for x in tensors:
            if forward_ad.unpack_dual(x).tangent is not None:
                _raise_not_implemented(name, "forward-mode derivatives", function)
        for x in tensors:
            if in_transform(x, only_derivatives=True):
                _raise_not_implemented(name, "torch.func's derivatives", function)

    def differentiable(*inputs: Any) -> Any:
        # Only where one is active: to look at all tensors takes as long as an operator of torch.
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            refuse_transforms([x for x in inputs if isinstance(x, Tensor)])
        if torch.is_grad_enabled():
            for x in inputs:
                if isinstance(x, Tensor) and x.requires_grad:
                    return node.apply(*inputs)
        return implementation(*inputs)

    library.impl(overload, differentiable, "Autograd")
