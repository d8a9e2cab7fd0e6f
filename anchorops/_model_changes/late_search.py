"""A dry run finds what late upsampling can move, and what is worth it."""

from __future__ import annotations

import itertools
import math
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from . import late_plan
from .changed import (
    GENERATED,
    METADATA_READS,
    copied,
    dry_run,
    forward_is_replaced,
    made_by_call,
    tensors,
    version,
)

# A value that is upsampled and added takes as long as this number of multiplications and additions
# of a convolution (measured: bench/NOTES.md). Tensor cores multiply faster than memory is written.
UPSAMPLING_ON_CPU, UPSAMPLING_ON_GPU = 64, 2000
# The share of a convolution's multiplications that must be saved
LEAST_SAVED = 0.25


@dataclass(eq=False)
class _Run:
    """One run of a module's forward in the dry run, and how many calls of each kind it had."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    graph_state: late_plan.GraphState = field(default_factory=late_plan.graph_state)


class _Call:
    """One call of the dry run.

    Attributes:
        kind: of late_plan.KINDS, "view" or "".
        place: the runs of modules around it, the outermost first, each with the call's number.
        sources: the calls that made its inputs, None where no call did; shapes: of its inputs.
        read: its inputs, until the dry run ends, and their versions.
        readers: the calls that read its result.
        layers: the modules that had its result as an input or output.
        changed: whether the result was changed in place before it was read, or got a graph that the
            call did not make (requires_grad_(), or a reentrant checkpoint around the call).
    """

    def __init__(self, kind: str, name: str, result: Tensor, place: list[tuple[_Run, int]]) -> None:
        self.kind, self.name, self.place = kind, name, place
        self.result = weakref.ref(result)
        self.shape, self.version = result.shape, version(result)
        self.sources: list[_Call | None] = []
        self.shapes: list[torch.Size] = []
        self.read: list[tuple[Tensor, int]] = []
        self.readers: list[_Call] = []
        self.layers: set[str] = set()
        self.changed = False
        self.graph_state = late_plan.graph_state()
        self.weight: Tensor | None = None  # of a convolution or a linear layer
        self.objection: str | None = None  # why it commutes with no upsampling
        self.tokens: list[_Call] = []  # of an upsampling: the views after a linear layer, and it
        # of a convolution: for each map that it reads, the upsampling and the linear layer that
        # run later
        self.parts: list[tuple[_Call | None, _Call | None]] = []

    @property
    def alone(self) -> bool:
        """Whether only one call read the result, and nothing else keeps it."""
        return len(self.readers) == 1 and not self.changed and self.result() is None


class _Watch(TorchFunctionMode):
    """Records the calls of a forward that make tensors, and the modules that see their results."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.runs: list[_Run] = []
        self._stack: list[_Run] = []
        self._makers: dict[int, _Call] = {}
        for name, module in model.named_modules():
            # after the module's own hooks before its forward, and before those after it
            begin, end = partial(self._begin, name), partial(self._end, name)
            module.register_forward_pre_hook(begin, with_kwargs=True)
            module.register_forward_hook(end, with_kwargs=True, prepend=True)

    def _begin(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._see(name, [args, kwargs])
        self._stack.append(_Run(name))
        self.runs.append(self._stack[-1])

    def _end(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._stack.pop()
        self._see(name, output)

    def _see(self, name: str, values: object) -> None:
        for _, tensor in tensors(values):
            if call := self._maker(tensor):
                call.layers.add(name)

    def _maker(self, tensor: Tensor) -> _Call | None:
        call = self._makers.get(id(tensor))
        return call if call is not None and call.result() is tensor else None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in METADATA_READS or func in late_plan.SIZES:
            return result
        read = [tensor for _, tensor in tensors([args, kwargs])]
        made = made_by_call(result, read)
        if not made and isinstance(result, Tensor):  # given back as it was
            return result
        kind = late_plan.KINDS.get(func) or ("view" if func in late_plan.VIEWS else "")
        place = [(run, run.counts[kind]) for run in self._stack]
        for run in self._stack:
            run.counts[kind] += 1
        name = resolve_name(func) or getattr(func, "__name__", repr(func))
        call = _Call(kind, name, made[0] if made else torch.empty(0), place)
        for x in read:
            if maker := self._maker(x):
                maker.readers.append(call)
                joins_graph = x.requires_grad and not maker.graph_state.grad
                maker.changed |= version(x) != maker.version or joins_graph
        if kind:
            input = late_plan.input_of(kind, args, kwargs) if kind != "view" else read[0]
            inputs = list(input) if kind == "cat" else [input]
            call.sources = [self._maker(x) for x in inputs]
            call.shapes = [x.shape for x in inputs]
            call.read = [(x, version(x)) for x in inputs]
            self._describe(call, args, kwargs)
        for x in made:
            self._makers[id(x)] = call if x is made[0] else _Call("", name, x, place)
        self.calls.append(call)
        return result

    def _describe(self, call: _Call, args: Any, kwargs: Any) -> None:
        if call.kind == "conv":
            _, call.weight, _, call.objection = late_plan.convolution_arguments(*args, **kwargs)
            if not _is_plain(call.weight):
                call.objection = f"a convolution with a weight of type {type(call.weight).__name__}"
            late = [call.sources[0], *(call.sources[0].sources if call.sources[0] else [])]
            late += [linear for up in late if up is not None for linear in up.tokens]
            if any(version(x) != v for made in late if made is not None for x, v in made.read):
                call.objection = "a convolution after a change of the maps in place"
        elif call.kind == "cat":
            dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
            if dim % len(call.shape) != 1:
                call.objection = f"torch.cat along dimension {dim}"
        elif call.kind == "linear":
            call.weight, _ = late_plan.linear_weights(*args, **kwargs)
        elif call.kind == "up":
            call.tokens = self._tokens(call)

    def _tokens(self, up: _Call) -> list[_Call]:
        """The views between a linear layer with the result (B, L, C) and this upsampling of it as
        (B, C, h, w), and the layer; [] if there is none."""
        ((x, v),) = up.read
        chain, call = [], up.sources[0]
        while call is not None and call.kind == "view":
            chain.append(call)
            call = call.sources[0]
        if call is None or call.kind != "linear" or len(call.shape) != 3:
            return []
        tokens = call.result()
        if tokens is None or v != call.version or not tokens.is_contiguous():
            return []
        size = x.shape[2:]
        if size.numel() != tokens.shape[1] or not _is_plain(call.weight):
            return []
        same, of_tokens = (
            (map_.shape, map_.stride(), map_.data_ptr())  # no is_set_to for the device "meta"
            for map_ in (x, tokens.mT.unflatten(2, size))
        )
        return [*chain, call] if same == of_tokens else []


def _is_plain(weight: Tensor | None) -> bool:
    """Whether a weight is no more than its numbers, as those of torchao are."""
    plain = type(weight) in (Tensor, nn.Parameter)
    return plain and weight is not None and weight.is_floating_point()


def _choose_parts(conv: _Call, modules: dict[str, nn.Module]) -> None:
    """Choose what runs later.

    Counted in multiplications for each pixel of the result, with O outputs, H channels of the map,
    C of the tokens, r low-resolution pixels for each pixel, and u to upsample a value, a map costs
    r·C·H + u·H + H·O now; with a later upsampling r·C·H + r·H·O + u·O, and with one product
    r·C·O + u·O, and C·H·O once for the weights. The cheapest of the three is taken.
    """
    source = conv.sources[0]
    if conv.objection or source is None or conv.weight is None or not source.alone:
        return
    joined = source if source.kind == "cat" and source.objection is None else conv
    parts: list[tuple[_Call | None, _Call | None]] = []
    outputs, saved, total = conv.weight.shape[0], 0.0, 0.0
    upsampling = UPSAMPLING_ON_CPU if conv.weight.is_cpu else UPSAMPLING_ON_GPU
    for up, shape in zip(joined.sources, joined.shapes, strict=True):
        channels = shape[1]
        parts.append((None, None))
        total += channels * outputs
        if up is None or up.kind != "up" or not up.alone:
            continue
        linear, tokens = None, 0
        if up.tokens and all(_plain(call, modules) for call in up.tokens):
            linear = up.tokens[-1]
            tokens = linear.shapes[0][2]
        r = up.shapes[0][2:].numel() / shape[2:].numel()
        now = r * tokens * channels + channels * outputs
        later = r * tokens * channels + r * channels * outputs
        product = math.inf if linear is None else r * tokens * outputs
        weight_product = tokens * channels * outputs / max(shape[0] * shape[2:].numel(), 1)
        if product > later or product + weight_product >= now:  # a small image
            linear, product = None, math.inf
        cheapest = min(later, product)
        if cheapest + upsampling * outputs < now + upsampling * channels:
            parts[-1] = (up, linear)
            saved += now - cheapest
    if saved > LEAST_SAVED * total:
        conv.parts = parts


def _plain(call: _Call, modules: dict[str, nn.Module]) -> bool:
    """Whether nothing else sees the result: no other reader, and no hooks."""
    return call.alone and not any(late_plan.has_hooks(modules[name]) for name in call.layers)


def _read_by(call: _Call) -> str:
    """What reads the result of an upsampling, for a message."""
    if not call.readers:
        return "which is returned or kept"
    if call.changed:
        return "which is changed in place, or by a reentrant checkpoint"
    reader = call.readers[0]
    more = ""
    if len(call.readers) > 1:
        more = f" and {len(call.readers) - 1} more"
    elif call.result() is not None:
        more = ", and kept"
    elif reader.kind == "cat" and reader.objection is None:
        more = f", {_read_by(reader)}"
    elif reader.kind == "conv" and reader.objection is None:
        more = ", where it would save little time"
    return f"read by {reader.objection or reader.name}{more}"


def _later(conv: _Call) -> Iterator[_Call]:
    """The calls that give stand-ins."""
    source = conv.sources[0]
    if source is not None and source.kind == "cat":
        yield source
    for up, linear in conv.parts:
        if up is not None:
            yield up
            yield from up.tokens if linear is not None else ()


class LatePlans(NamedTuple):
    """plans: by the name of the module. moved: a line for each convolution. left: a line for each
    upsampling that is left as it is."""

    plans: dict[str, late_plan.Plan]
    moved: list[str]
    left: list[str]


def find(model: nn.Module, args: Any, kwargs: Any, training: bool) -> LatePlans:
    """The plans of one mode."""
    # With gradients, so that torch.no_grad and checkpoints in the model are seen; without saved
    # tensors, which would keep the maps.
    nothing_saved = torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: x)
    with torch.inference_mode(False), torch.enable_grad(), nothing_saved:
        trial = copied("late_upsampling", model)
        watch = _Watch(trial)
        _output = dry_run(trial, args, kwargs, training, watch)  # what is returned stays alive
    for call in watch.calls:
        call.read.clear()
    modules = dict(model.named_modules())
    convs = [call for call in watch.calls if call.kind == "conv"]
    for conv in convs:
        _choose_parts(conv, modules)
    depths = {conv: _depth([conv, *_later(conv)]) for conv in convs if conv.parts}
    # modes of two modules, one inside the other, would count each other's calls
    names = {conv.place[depth][0].name for conv, depth in depths.items()}
    moves: dict[_Run, list[_Call]] = {}
    objections: dict[_Call, str] = {}
    for conv, innermost in depths.items():
        run = next(run for run, _ in conv.place[: innermost + 1] if run.name in names)
        objection = _objection(conv, modules, run)
        if objection is None:
            moves.setdefault(run, []).append(conv)
        else:
            objections.update(dict.fromkeys(_later(conv), objection))
    plans: dict[str, late_plan.Plan] = {}
    moved: dict[_Call, str] = {}
    for name in dict.fromkeys(run.name for run in moves):
        runs = [run for run in watch.runs if run.name == name]
        candidates = [_plan(run, moves.get(run, []), modules) for run in runs]
        convs = [conv for run in runs for conv in moves.get(run, [])]
        if any(plan != candidates[0] for plan in candidates):
            objection = f"in {name or 'the model'}, which runs several times, not always the same"
            for conv in convs:
                objections.update(dict.fromkeys(_later(conv), objection))
            continue
        plans[name] = candidates[0]
        for conv in convs:
            moved.update(dict.fromkeys(_later(conv), _line(conv)))
    left = [
        f"F.interpolate to {tuple(call.shape)}, {objections.get(call) or _read_by(call)}"
        for call in watch.calls
        if call.kind == "up" and call not in moved
    ]
    return LatePlans(plans, list(dict.fromkeys(moved.values())), list(dict.fromkeys(left)))


def _depth(calls: list[_Call]) -> int:
    """The place of the innermost module whose forward contains all of these calls."""
    runs = [[run for run, _ in call.place] for call in calls]
    together = itertools.takewhile(lambda level: len({*level}) == 1, zip(*runs, strict=False))
    return len(list(together)) - 1


def _objection(conv: _Call, modules: dict[str, nn.Module], run: _Run) -> str | None:
    """Why the calls of its parts cannot run later, although they commute."""
    calls = list(_later(conv))
    waits = all(call.graph_state.lets_wait(call.readers[0].graph_state) for call in calls)
    if not waits or conv.graph_state.hooks != run.graph_state.hooks:
        where = run.name or "the model"
        return f"where a checkpoint begins or ends, or torch.no_grad begins, in {where}"
    if isinstance(modules[run.name], GENERATED):
        return f"in {run.name}, whose forward is not written in Python"
    if forward_is_replaced(modules[run.name]):
        return f"in {run.name}, whose forward was replaced"
    inside = {*modules[run.name].modules()}
    for name in sorted(name for call in calls for name in call.layers):
        if late_plan.has_hooks(modules[name]):
            return f"which the hooks of {name} would see"
        if modules[name] not in inside:
            return f"which {name} sees, outside of {run.name}"
    return None


def _plan(run: _Run, convs: list[_Call], modules: dict[str, nn.Module]) -> late_plan.Plan:
    moves, postponed, layers = {}, set(), set()

    def number(call: _Call | None) -> int | None:
        return None if call is None else next(n for of, n in call.place if of is run)

    for conv in convs:
        source = conv.sources[0]
        cat = number(source) if source is not None and source.kind == "cat" else None
        parts = tuple(late_plan.Part(number(up), number(linear)) for up, linear in conv.parts)
        moves[number(conv)] = late_plan.Move(cat, parts)
        for call in _later(conv):
            layers |= {modules[name] for name in call.layers}
            if call.kind != "view":
                postponed.add((call.kind, number(call)))
    classes = {
        name: type(layer)
        for name, layer in modules[run.name].named_modules()
        if name and layer in layers
    }
    counts = {kind: run.counts[kind] for kind in sorted({*late_plan.KINDS.values()})}
    return late_plan.Plan(moves, frozenset(postponed), counts, classes)


def _line(conv: _Call) -> str:
    ups, linears = (sum(x is not None for x in calls) for calls in zip(*conv.parts, strict=True))
    maps = f"{ups} map" + "s" * (ups > 1)
    products = f", {linears} multiplied with a linear layer" if linears else ""
    return f"{conv.place[-1][0].name or 'the model'} before the upsampling of {maps}{products}"
