"""How the forward of a module runs with late upsampling: a plan, and the mode that executes it.

In the formula of `late_upsampling`, conv_i are the columns of the convolution's weight for the
channels of x_i. The weights of every mode of F.interpolate add up to 1, so the bias can be added
before it. Where x_i = M_i·f_i + b_i, conv_i(x_i) is the linear layer (W_i·M_i)·f_i + W_i·b_i.

The calls that a plan postpones return *stand-ins*: tensors with the shape and dtype of a result
that is not computed. Nothing may read their values.
"""

from __future__ import annotations

import contextlib
import weakref
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import resolve_name
from torch.utils._pytree import tree_map_only

from .changed import ForwardMode, reads, tensors, version

KINDS: dict[Any, str] = {
    F.interpolate: "up",
    torch.cat: "cat",
    torch.concat: "cat",
    torch.concatenate: "cat",
    torch.conv1d: "conv",
    torch.conv2d: "conv",
    torch.conv3d: "conv",
    F.linear: "linear",
}
VIEWS = {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in ("transpose", "permute", "reshape", "flatten", "unflatten", "movedim", "swapaxes")
} | {Tensor.view, Tensor.contiguous}
_SHAPE, _REQUIRES_GRAD = (getattr(Tensor, name).__get__ for name in ("shape", "requires_grad"))
# reads of a stand-in that tell the truth
SIZES = {Tensor.size, Tensor.numel, Tensor.__len__, _SHAPE}
# torch's FlopCounterMode, in hooks of all modules, asks whether a stand-in requires a gradient
_UNREAD = SIZES | {_REQUIRES_GRAD}


class Part(NamedTuple):
    """A map that the convolution reads. up: the number of the call of F.interpolate that runs after
    the convolution, None if it runs before or there is none. linear: the number of the call of
    F.linear whose weight is multiplied by the convolution's."""

    up: int | None
    linear: int | None


class Move(NamedTuple):
    """A convolution and the maps that it reads. cat: the number of the call of torch.cat."""

    cat: int | None
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Plan:
    """What runs differently in the forward of one module, in one mode. Calls are numbered from 0
    for each kind.

    moves: by the number of the convolution. postponed: kind and number of the calls that give
    stand-ins. counts: of the calls of each kind. layers: the modules that see a stand-in, with
    their classes.
    """

    moves: dict[int, Move]
    postponed: frozenset[tuple[str, int]]
    counts: dict[str, int]
    layers: dict[str, type]

    def __call__(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if not all(_as_planned(module, *layer) for layer in self.layers.items()):
            return forward(*args, **kwargs)
        counts = dict.fromkeys(self.counts, 0)
        stand_ins: list[tuple[Tensor, int | None]] = []
        late = _Late(self, module, graph_state().hooks, counts, {}, stand_ins)
        with late:
            output = forward(*args, **kwargs)
        if counts != self.counts:
            late.fail(f"calls {counts}, where the dry run had {self.counts}")
        returned = [tensor for _, tensor in tensors(output)]
        if late.postponed or any(late._is_stand_in(x) for x in returned):
            late.fail("an upsampled map is returned, or no convolution reads it")
        if not torch.compiler.is_compiling():
            left = [weakref.ref(x) for x, _ in stand_ins]
            stand_ins.clear()
            if any(x() is not None for x in left):
                late.fail("something keeps a map that only the convolution reads")
        return output


class GraphState(NamedTuple):
    """Whether a graph is made, and how it keeps its tensors: where this changes between two calls,
    torch.no_grad or a checkpoint begins or ends."""

    grad: bool
    hooks: Any

    def lets_wait(self, reader: GraphState) -> bool:
        """Whether a call can run together with the one that reads its result: a call without a
        graph, as of a frozen network, can run later on detached inputs."""
        return self.hooks == reader.hooks and (reader.grad or not self.grad)


def graph_state() -> GraphState:
    if torch.compiler.is_compiling():
        return GraphState(torch.is_grad_enabled(), None)
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore
    return GraphState(torch.is_grad_enabled(), hooks)


class _Postponed(NamedTuple):
    """A call that gave a stand-in."""

    stand_in: Tensor
    read: list[Tensor]  # its input, or the inputs of torch.cat
    versions: list[int]
    rest: tuple[Any, ...]  # its other arguments
    options: dict[str, Any]
    graph_state: GraphState


def input_of(kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs["tensors" if kind == "cat" else "input"]


def convolution_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, str | None]:
    """Input, weight and bias of a convolution, and why upsampling does not commute with it."""

    def each(value: Any) -> set[Any]:
        return {*value} if isinstance(value, list | tuple) else {value}

    objection = None
    if weight.shape[2:].numel() != 1:
        objection = f"a {'×'.join(map(str, weight.shape[2:]))} convolution"
    elif each(stride) != {1} or not each(padding) <= {0, "same", "valid"} or groups != 1:
        objection = "a convolution with stride, padding or groups"
    return input, weight, bias, objection


def linear_weights(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    return weight, bias


def _with_size(x: Tensor, channels: int, batch: int) -> Tensor:
    return x[:, :1].expand(batch, channels, *x.shape[2:])


class _Late(ForwardMode):
    """Runs a plan. hooks: of the GraphState in which the module's forward began. counts, postponed
    and stand_ins are changed: they are made outside of the mode, because torch.compile requires
    it. stand_ins: each with the number of the call of F.linear that it is a view of, or None."""

    function = "late_upsampling"

    def __init__(
        self,
        plan: Plan,
        module: nn.Module,
        hooks: Any,
        counts: dict[str, int],
        postponed: dict[tuple[str, int], _Postponed],
        stand_ins: list[tuple[Tensor, int | None]],
    ) -> None:
        super().__init__(module)
        self.plan, self.hooks = plan, hooks
        self.counts, self.postponed, self.stand_ins = counts, postponed, stand_ins

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = KINDS.get(func)
        if kind is not None:
            number = self.counts[kind]
            self.counts[kind] += 1
            if kind == "conv" and number in self.plan.moves:
                return self._mixed(self.plan.moves[number], func, args, kwargs)
            if (kind, number) in self.plan.postponed:
                return self._stand_in(kind, number, func, args, kwargs)
        result = func(*args, **kwargs)
        if not self.stand_ins or func in _UNREAD:
            return result
        watched = [x for x, _ in self.stand_ins]
        if reads(func, args, kwargs, result, watched):
            linear = self._linear(args[0]) if func in VIEWS and args else None
            if linear is None:
                name = resolve_name(func) or func
                self.fail(f"{name} reads a map that the convolution reads")
            self.stand_ins.append((result, linear))
        return result

    def _linear(self, x: Any) -> int | None:
        """The number of the call of F.linear that this stand-in is a view of."""
        return next((number for y, number in self.stand_ins if x is y), None)

    def _is_stand_in(self, x: Tensor) -> bool:
        return any(x is y for y, _ in self.stand_ins)

    def _stand_in(
        self, kind: str, number: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """The result of the call for one channel, one token or one image only."""
        input = input_of(kind, args, kwargs)
        rest = args[1:]
        options = {key: x for key, x in kwargs.items() if key not in ("input", "tensors")}
        with torch.no_grad():
            if kind == "cat":
                small = func([x[:1, :1] for x in input], *rest, **options)
                channels = sum(x.shape[1] for x in input)
                stand_in = _with_size(small, channels, input[0].shape[0])
            else:
                small = func(input[:1, :1], *rest, **options)
                if kind == "linear":
                    stand_in = small.expand(*input.shape[:2], small.shape[2])
                else:
                    stand_in = _with_size(small, input.shape[1], input.shape[0])
        self.stand_ins.append((stand_in, number if kind == "linear" else None))
        read = list(input) if kind == "cat" else [input]
        versions = [version(x) for x in read]
        call = _Postponed(stand_in, read, versions, rest, options, graph_state())
        self.postponed[kind, number] = call
        return stand_in

    def _take(
        self, kind: str, number: int, reader: GraphState, stand_in: Tensor | None = None
    ) -> _Postponed:
        """The postponed call, whose stand-in must be the given one and whose inputs must be those
        that it had; detached, if it would have made no graph. reader: the state of the call that
        reads its result."""
        call = self.postponed.pop((kind, number), None)
        if call is None or (stand_in is not None and call.stand_in is not stand_in):
            self.fail("the convolution reads another map than in the dry run")
        if [version(x) for x in call.read] != call.versions:
            self.fail("a map is changed in place between its upsampling and the convolution")
        waits = call.graph_state.lets_wait(reader) and reader.hooks == self.hooks
        if not waits or call.stand_in.requires_grad:  # as a checkpoint's output does
            why = "torch.utils.checkpoint begins or ends, or torch.no_grad begins, between the "
            self.fail(f"{why}upsampling and the convolution")
        if call.graph_state.grad or not torch.is_grad_enabled():
            return call
        read, rest, options = tree_map_only(
            Tensor,
            lambda x: x if self._is_stand_in(x) else x.detach(),
            (call.read, call.rest, call.options),
        )
        return call._replace(read=read, rest=rest, options=options)

    def _mixed(self, move: Move, conv: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Σ_i up(conv_i(x_i))."""
        input, weight, bias, objection = convolution_arguments(*args, **kwargs)
        if objection is not None:
            self.fail(f"{objection}, unlike in the dry run")
        # what runs here, the modes around this one have seen already
        with torch._C.DisableTorchFunction():
            state, maps = graph_state(), [input]
            if move.cat is not None:
                cat = self._take("cat", move.cat, state, input)
                state, maps = cat.graph_state, cat.read
            if len(maps) != len(move.parts):
                self.fail(f"torch.cat of {len(maps)} maps, in the dry run {len(move.parts)}")
            columns = weight.split([x.shape[1] for x in maps], dim=1)
            early = [i for i, part in enumerate(move.parts) if part.up is None]
            if any(self._is_stand_in(maps[i]) for i in early):
                self.fail("the convolution reads another map than in the dry run")
            total = None
            if early:
                x, w = (torch.cat([y[i] for i in early], 1) for y in (maps, columns))
                total, bias = conv(_as_joined(x, input), w, bias), None
            for x, w, part in zip(maps, columns, move.parts, strict=True):
                if part.up is None:
                    continue
                up = self._take("up", part.up, state, x)
                (source,) = up.read
                if self._linear(source) != part.linear or (
                    part.linear is None and self._is_stand_in(source)
                ):
                    self.fail("the upsampling reads another map than in the dry run")
                if part.linear is None:
                    y = conv(_as_joined(source, input), w, bias)
                else:
                    linear = self._take("linear", part.linear, up.graph_state)
                    tokens = _as_joined(linear.read[0], input)
                    if tokens.shape[0] != source.shape[0]:
                        self.fail("the tokens of several images are in one sequence")
                    y = _composed(linear, tokens, w.flatten(1), bias)
                    y = y.transpose(1, 2).reshape(*y.shape[::2], *source.shape[2:])
                y = _upsampled(y, x.shape[2:], up)
                total, bias = y if total is None else total.add_(y), None
            assert total is not None
            return total


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    # not where it is disabled, because torch.export would record the context
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _as_joined(x: Tensor, joined: Tensor) -> Tensor:
    """In the dtype to which torch.cat converts it, unless autocast converts it anyway."""
    device = x.device.type
    if x.dtype == joined.dtype or (device != "meta" and torch.is_autocast_enabled(device)):
        return x
    return x.to(joined.dtype)


def _composed(linear: _Postponed, tokens: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """(B, L, O): w·(M·f + b) + bias of the tokens f (B, L, C), with one product for each token."""
    m, b = linear_weights(tokens, *linear.rest, **linear.options)
    dtype = torch.promote_types(w.dtype, torch.float32)
    with _without_autocast(w.device.type):
        weight = (w.to(dtype) @ m.to(dtype)).to(w.dtype)
        if b is not None:
            product = (w.to(dtype) @ b.to(dtype)).to(w.dtype)
            bias = product if bias is None else product + bias
    return F.linear(tokens, weight, bias)


def _upsampled(y: Tensor, size: torch.Size, up: _Postponed) -> Tensor:
    """(B, O, *size), in the dtype of y: under CUDA's autocast F.interpolate would return float32,
    although it computes in float32 anyway."""
    given = up.rest[0] if up.rest else up.options.get("size")
    if given is not None and all(a == b for a, b in zip(y.shape[2:], size, strict=True)):
        return y
    with _without_autocast(y.device.type):
        return F.interpolate(y, *up.rest, **up.options)


def has_hooks(layer: nn.Module) -> bool:
    """Whether something else than the layer's forward may read what it reads: hooks, or a forward
    that is replaced or compiled on its own."""
    return (
        layer._compiled_call_impl is not None
        or "_orig_mod" in layer._modules
        or "forward" in vars(layer)
        or bool(layer._forward_hooks or layer._forward_pre_hooks)
        or bool(layer._backward_hooks or layer._backward_pre_hooks)
    )


def _as_planned(module: nn.Module, name: str, cls: type) -> bool:
    """Whether a layer that sees stand-ins still has its class, the module's mode and no hooks.
    Adapters, parametrisations, quantisation and FSDP change its class or add hooks."""
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        return False
    return type(layer) is cls and layer.training == module.training and not has_hooks(layer)
