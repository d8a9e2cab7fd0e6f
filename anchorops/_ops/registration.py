"""Registration of operators: one overload per backend, with schema, fake kernel and autograd.

torch's dispatcher takes longer than what it dispatches to, if images are small. So `run` calls an
implementation without it, except where something has to see the operator: a compiler or another
tracer, a transform of torch.func, a mode of torch, a subclass of Tensor, a profiler.
"""

from collections import namedtuple
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._backend import FUSED, OPERATORS, triton_launcher
from .._checks import in_transform, is_traced, savable


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
defined: dict[torch._ops.OpOverload, str] = {}
"""The operators of every backend, by name."""
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_is_profiling = torch._C._autograd._profiler_enabled  # pyright: ignore[reportAttributeAccessIssue]
_are_transforms_active = torch._C._are_functorch_transforms_active
_number_of_function_modes = torch._C._len_torch_function_stack
_number_of_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore
_eager: dict[tuple[str, str], Callable[..., Any]] = {}  # by name and backend
below: dict[tuple[str, str], Callable[..., Any]] = {}
"""`run` by name and backend, where the call `is_eager` and its results need no gradients."""
# What is none of these may be a subclass of Tensor, or a number that is traced.
_PLAIN = frozenset(
    (Tensor, torch.nn.Parameter, type(None), bool, int, float, tuple, torch.Size, torch.dtype)
)


def is_eager(*arguments: Any) -> bool:
    """Whether nothing but autograd sees this call. A dispatch mode or a profiler may: it sees each
    operator."""
    return not (
        is_traced()
        or _are_transforms_active()
        or _number_of_function_modes() > 0
        or forward_ad._current_level >= 0
    ) and _PLAIN.issuperset(map(type, arguments))


def run(name: str, backend: str, *arguments: Any) -> Any:
    """The results of anchorops::NAME.BACKEND."""
    if is_eager(*arguments):
        return _eager[name, backend](*arguments)
    return _overload(name, backend)(*arguments)


def run_backward(grads: Sequence[Any], name: str, backend: str, *arguments: Any) -> Any:
    """`run`, for these gradients. With is_grads_batched they are of a vmap that nothing else
    tells."""
    for grad in grads:
        if grad is not None and _is_batched(grad):
            return _overload(name, backend)(*arguments)
    return run(name, backend, *arguments)


def call(launcher: Callable[..., Any], *arguments: Any) -> Any:
    return launcher(*arguments)


def like_the_first(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


class Gradient(NamedTuple):
    """The operator NAME_backward, and the functions that call it.

    schema, fake: as in `define`; by default the result is dense and has the dtype and layout of the
        first argument.
    setup_context: (ctx, inputs, results) saves what the backward pass needs. Inputs and results
        have the names of NAME's schema; ctx.needs says by name which inputs need a gradient.
    backward: (operator, ctx, grads) → the gradients of arguments of NAME, by name; `operator` is
        NAME_backward of the backend that ran the forward pass, and ctx.forward is NAME. `grads`
        have the names of the results. Absent gradients are None; the gradient of an empty output is
        an empty tensor. Whether a gradient will be requested is not always known when NAME is
        called (torch.vmap hides it, and a traced graph is used again): `backward` computes again
        what was not saved.
    launch, in_python: as in `define`.
    function: the only one that calls NAME, if its reference has no other derivatives either.
    """

    schema: str
    setup_context: Callable[[Any, Any, Any], None]
    backward: Callable[[Any, Any, Any], dict[str, Tensor | None]]
    fake: Callable[..., Any] = like_the_first
    launch: Callable[..., Any] = call
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
    launch: Callable[..., Any] = call,
    complete: Callable[..., Any] | None = None,
    in_python: Callable[..., Any] | None = None,
    any_strides: bool = False,
) -> None:
    """Define anchorops::NAME.BACKEND for each backend.

    C++ implements the overloads `cpu` and `cuda` when its library is loaded. `triton` is
    implemented here by the function NAME of anchorops.kernels.NAME.

    Args:
        backends: by default those of OPERATORS, or FUSED for what only other operators call. The
            reference is one only where it has a gradient of its own, because a trace without
            gradients does not record an autograd.Function.
        schema: "(Tensor features, …) -> (Tensor sums, …)". Floating-point results come first
            (opcheck accumulates into the first one). A result that was not requested is an empty
            tensor (0,).
        fake: returns results without values, from the arguments.
        gradient: None if no result is differentiable.
        launch: calls Triton's function NAME, its first argument, with the operator's arguments. In
            eager mode None stands for a result that was not requested.
        complete: (results, the operator's arguments) → the results, with empty tensors for None.
        in_python: (backend, the operator's arguments) → the results; it implements the overloads of
            all backends. By default those of `reference` are left to the caller.
        any_strides: NAME and NAME_backward take tensors of any strides, except results of other
            operators (keys, lse), and the strides of their own results follow from them at run
            time. Then torch.compile, which makes convolutions channels last, does not copy their
            outputs back to the layout that they have in eager mode.
    """
    for backend in backends or OPERATORS.get(name, FUSED):
        _define(f"{name}.{backend}", schema, fake, any_strides)
        defined[_overload(name, backend)] = name
        launcher = _implement(name, backend, launch, complete, in_python)
        forward = _Below(name, backend, launcher)
        _eager[name, backend] = below[name, backend] = forward.eager
        if gradient is None:
            continue
        backward_name = f"{name}_backward"
        _define(f"{backward_name}.{backend}", gradient.schema, gradient.fake, any_strides)
        launcher = _implement(backward_name, backend, gradient.launch, None, gradient.in_python)
        _register_autograd(forward, _Below(backward_name, backend, launcher), gradient)


def _implement(
    name: str,
    backend: str,
    launch: Callable[..., Any],
    complete: Callable[..., Any] | None,
    in_python: Callable[..., Any] | None,
) -> Callable[..., Any] | None:
    """Returns Triton's launcher, if there is one."""
    if in_python is not None:
        implementation = partial(in_python, backend)
        library.impl(f"{name}.{backend}", implementation, "CompositeExplicitAutograd")
    elif backend == "triton":
        return triton_launcher(library, name, launch, complete)
    return None


def _overload(name: str, backend: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops.anchorops, name), backend)


def _define(overload: str, schema: str, fake: Callable[..., Any], any_strides: bool) -> None:
    library.add(overload, schema, fake, *[torch.Tag.flexible_layout] * any_strides)


class _Below:
    """anchorops::NAME.BACKEND without gradients."""

    def __init__(self, name: str, backend: str, launcher: Callable[..., Any] | None) -> None:
        self.name, self.backend, self.launcher = name, backend, launcher
        self.overload = _overload(name, backend)
        self.redispatch = self.overload._handle.redispatch_boxed  # as overload.redispatch
        types = [str(x.type) for x in self.overload._schema.arguments]
        self.tensors = [i for i, name in enumerate(types) if "Tensor" in name]

    def dispatched(self, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*inputs)

    def eager(self, *inputs: Any) -> Any:
        """Past torch's dispatcher, unless a dispatch mode or a profiler sees the call, or the
        dispatcher first has to write a tensor's values into memory: those of a negated view (as
        complex.conj().imag), and zeros (as the gradient of sgn)."""
        if _number_of_dispatch_modes() > 0 or _is_profiling():
            return self.dispatched(*inputs)
        for place in self.tensors:
            x = inputs[place]
            if x is not None and (x.is_neg() or x._is_zerotensor()):
                return self.dispatched(*inputs)
        if self.launcher is not None:
            return self.launcher(*inputs)
        return self.redispatch(_CPU, *inputs) if self.backend == "cpu" else self.dispatched(*inputs)


def _register_autograd(forward: _Below, backward: _Below, gradient: Gradient) -> None:
    name, backend = forward.name, forward.backend
    Inputs = namedtuple("Inputs", [x.name for x in forward.overload._schema.arguments])
    Results = namedtuple("Results", [x.name for x in forward.overload._schema.returns])

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.needs = Inputs(*ctx.needs_input_grad)
        results = output if isinstance(output, tuple) else (output,)
        if any(inputs[i] is not None and inputs[i].is_inference() for i in forward.tensors):
            inputs = tuple(map(savable, inputs))
        gradient.setup_context(ctx, Inputs(*inputs), Results(*results))

    def gradients_of(ctx: Any, *grads: Any) -> tuple:
        ctx.forward, ctx.backend = partial(run, name, backend), backend
        operator = partial(run_backward, grads, backward.name, backend)
        gradients = gradient.backward(operator, ctx, Results(*grads))
        return tuple(map(gradients.get, Inputs._fields))

    # If NAME_backward had no autograd, a second derivative would be None, with only a warning.
    def second_derivative(ctx: Any, *grads: Any) -> NoReturn:
        raise_second_derivative(name, gradient.function)

    _differentiate(forward, gradients_of, setup_context, gradient.function)
    _differentiate(backward, second_derivative, lambda *_: None, gradient.function)


def _differentiate(
    below: _Below,
    backward: Callable[..., Any],
    setup_context: Callable[[Any, tuple, Any], None],
    function: str | None,
) -> None:
    """As torch.library.register_autograd, which silently drops the tangents of forward mode if no
    input requires a gradient, and has an unclear message for torch.func's derivatives."""

    def differentiable(implementation: Callable[..., Any]) -> Callable[..., Any]:
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = implementation(*inputs)
            setup_context(ctx, inputs, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        node = type(below.name, (torch.autograd.Function,), methods)

        def call(*inputs: Any) -> Any:
            if torch.is_grad_enabled():
                for x in inputs:
                    if isinstance(x, Tensor) and x.requires_grad:
                        return node.apply(*inputs)
            return implementation(*inputs)

        return call

    dispatched = differentiable(below.dispatched)

    def checked(*inputs: Any) -> Any:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            _raise_not_implemented(below.name, "forward-mode derivatives", function)
        if any(in_transform(x, only_derivatives=True) for x in tensors):
            _raise_not_implemented(below.name, "torch.func's derivatives", function)
        return dispatched(*inputs)

    library.impl(f"{below.name}.{below.backend}", checked, "Autograd")
    _eager[below.name, below.backend] = differentiable(below.eager)
