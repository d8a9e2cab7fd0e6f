"""Registration of operators: one overload per backend, with schema, fake kernel and autograd."""

from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._backend import FUSED, register_triton
from .._checks import in_transform, savable

library = torch.library.Library("anchorops", "FRAGMENT")
defined: dict[torch._ops.OpOverload, str] = {}
"""The operators of every backend, by name."""


def call(launcher: Callable[..., Any], *arguments: Any) -> Any:
    return launcher(*arguments)


class Gradient(NamedTuple):
    """The operator NAME_backward, and the functions that call it.

    schema, fake: as in `define`.
    setup_context: (ctx, inputs, results) saves what the backward pass needs. Inputs and results
        have the names of NAME's schema; ctx.needs says by name which inputs need a gradient.
    backward: (operator, ctx, grads) → the gradients of arguments of NAME, by name; `operator` is
        NAME_backward of the backend that ran the forward pass, and ctx.forward is NAME. `grads`
        have the names of the results. Absent gradients are None; the gradient of an empty output is
        an empty tensor. Whether a gradient will be requested is not always known when NAME is
        called (torch.vmap hides it, and a traced graph is used again): `backward` computes again
        what was not saved.
    launch: as in `define`.
    function: the only one that calls NAME, if its reference has no other derivatives either.
    """

    schema: str
    fake: Callable[..., Any]
    setup_context: Callable[[Any, Any, Any], None]
    backward: Callable[[Any, Any, Any], dict[str, Tensor | None]]
    launch: Callable[..., Any] = call
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
    backends: Sequence[str] = FUSED,
    gradient: Gradient | None = None,
    launch: Callable[..., Any] = call,
    in_python: bool = False,
    any_strides: bool = False,
) -> None:
    """Define anchorops::NAME.BACKEND for each backend.

    C++ implements the overloads `cpu` and `cuda` when its library is loaded. `triton` is
    implemented here by the function NAME of anchorops.kernels.NAME.

    Args:
        backends: the reference is one only where it has a gradient of its own, because a trace
            without gradients does not record an autograd.Function.
        schema: "(Tensor features, …) -> (Tensor sums, …)". Floating-point results come first
            (opcheck accumulates into the first one). A result that was not requested is an empty
            tensor (0,).
        fake: returns results without values, from the arguments.
        gradient: None if no result is differentiable.
        launch: calls Triton's function NAME, its first argument, with the operator's arguments.
        in_python: the caller implements every overload. It always implements `reference`.
        any_strides: NAME and NAME_backward take tensors of any strides, except results of other
            operators (keys, lse), and the strides of their own results follow from them at run
            time. Then torch.compile, which makes convolutions channels last, does not copy their
            outputs back to the layout that they have in eager mode.
    """
    for backend in backends:
        _define(f"{name}.{backend}", schema, fake, any_strides)
        if gradient is not None:
            _define(f"{name}_backward.{backend}", gradient.schema, gradient.fake, any_strides)
            _register_autograd(name, backend, gradient)
        defined[getattr(getattr(torch.ops.anchorops, name), backend)] = name
    if "triton" in backends and not in_python:
        register_triton(library, name, launch)
        if gradient is not None:
            register_triton(library, f"{name}_backward", gradient.launch)


def _define(overload: str, schema: str, fake: Callable[..., Any], any_strides: bool) -> None:
    tags = [torch.Tag.pt2_compliant_tag]
    if any_strides:
        tags.append(torch.Tag.flexible_layout)
    library.define(overload + schema, tags=tags)
    torch.library.register_fake(f"anchorops::{overload}", fake, lib=library)


def _register_autograd(name: str, backend: str, gradient: Gradient) -> None:
    forward = getattr(getattr(torch.ops.anchorops, name), backend)
    operator = getattr(getattr(torch.ops.anchorops, f"{name}_backward"), backend)
    Inputs = namedtuple("Inputs", [x.name for x in forward._schema.arguments])
    Results = namedtuple("Results", [x.name for x in forward._schema.returns])

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.needs = Inputs(*ctx.needs_input_grad)
        results = output if isinstance(output, tuple) else (output,)
        gradient.setup_context(ctx, Inputs(*inputs), Results(*results))

    def backward(ctx: Any, *grads: Any) -> tuple:
        ctx.forward = forward
        gradients = gradient.backward(operator, ctx, Results(*grads))
        return tuple(map(gradients.get, Inputs._fields))

    # If NAME_backward had no autograd, a second derivative would be None, with only a warning.
    def second_derivative(ctx: Any, *grads: Any) -> NoReturn:
        raise_second_derivative(name, gradient.function)

    function = gradient.function
    _differentiate(name, backend, backward, setup_context, function=function)
    _differentiate(f"{name}_backward", backend, second_derivative, function=function)


def _differentiate(
    name: str,
    backend: str,
    backward: Callable[..., tuple],
    setup_context: Callable[[Any, tuple, Any], None] | None = None,
    function: str | None = None,
) -> None:
    """As torch.library.register_autograd, which silently drops the tangents of forward mode if no
    input requires a gradient, and has an unclear message for torch.func's derivatives."""
    operator = getattr(getattr(torch.ops.anchorops, name), backend)

    def without_gradient(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = without_gradient(*inputs)
        if setup_context is not None:
            setup_context(ctx, tuple(map(savable, inputs)), output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    node = type(name, (torch.autograd.Function,), methods)

    def differentiable(*inputs: Any) -> Any:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            _raise_not_implemented(name, "forward-mode derivatives", function)
        if any(in_transform(x, only_derivatives=True) for x in tensors):
            _raise_not_implemented(name, "torch.func's derivatives", function)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return node.apply(*inputs)
        return without_gradient(*inputs)

    library.impl(f"{name}.{backend}", differentiable, "Autograd")
