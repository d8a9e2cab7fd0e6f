"""`low_resolution`: removes the last upsampling of a model."""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from .._checks import check_flags, fail
from .changed import (
    ForwardMode,
    Handle,
    Plans,
    check_model,
    copied,
    dry_run,
    made_by_call,
    reads,
    tensors,
    version,
)

# the same for logits at low resolution
_OF_GRAPH = {getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf")}

# Functions that may commute with upsampling: conversions, and views that may only add or remove
# axes of length 1.
_CONVERSIONS = {torch.clone, Tensor.clone, Tensor.contiguous, Tensor.cpu, Tensor.cuda} | {
    getattr(Tensor, name)
    for name in ("float", "double", "half", "bfloat16", "to", "type", "type_as")
}
_VIEWS = {torch.squeeze, torch.unsqueeze, torch.flatten, torch.unflatten, torch.reshape} | {
    *(Tensor.squeeze, Tensor.unsqueeze, Tensor.flatten, Tensor.unflatten, Tensor.__getitem__),
    *(Tensor.reshape, Tensor.reshape_as, Tensor.view, Tensor.view_as),
    *(torch.select, Tensor.select),
    operator.getitem,  # torch.export of a strict program calls it for Tensor.__getitem__
}
_SIZES = {"torch.Tensor.shape.__get__", "torch.Tensor.size"}


def _long_axes(shape: Sequence[int]) -> list[int]:
    """The lengths of the axes, without those of length 1."""
    return [length for length in shape if length != 1]


def _commutes(func: Any, args: Any, kwargs: Any, upsampled: Tensor, result: object) -> bool:
    """Whether this call of an upsampled tensor could precede the upsampling: it converts the
    tensor, or only adds or removes axes of length 1."""
    if not isinstance(result, Tensor) or not result.is_floating_point():
        return False
    if (args[0] if args else kwargs.get("input")) is not upsampled:
        return False
    if func in (Tensor.__getitem__, operator.getitem):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if not all(x is None or x is ... or type(x) in (int, slice) for x in index):
            return False
    same_elements = _long_axes(result.shape) == _long_axes(upsampled.shape)
    return same_elements and (func in _CONVERSIONS or func in _VIEWS)


def _full_shape(args: Any, kwargs: Any, source: Tensor) -> list[int]:
    """The shape of the result of this call of F.interpolate."""
    options = dict(zip(("input", "size", "scale_factor"), args, strict=False)) | kwargs
    sizes = source.shape[2:]
    if (size := options.get("size")) is not None:
        full = size if isinstance(size, list | tuple) else [size] * len(sizes)
    else:
        scale = options["scale_factor"]
        scales = scale if isinstance(scale, list | tuple) else [scale] * len(sizes)
        full = [math.floor(n * factor) for n, factor in zip(sizes, scales, strict=True)]
    return [*source.shape[:2], *full]


class _Upsampling:
    """One call of F.interpolate: its input and result, its options, and the functions that read the
    result. `results` are the result and what was made of it by functions that commute with
    upsampling, each with the version of its memory."""

    def __init__(self, source: Tensor, result: Tensor, options: dict[str, Any]) -> None:
        self.source, self.options = source, options
        self.source_version = version(source)
        self.results = [(result, version(result))]
        self.readers: list[str] = []

    def objection(self) -> str | None:
        """Why the loss cannot replace this upsampling, or None if it can."""
        if objection := _objection(self.options):
            return objection
        if self.readers:
            advice = " (take the size from the model's input)" if self.readers[0] in _SIZES else ""
            return f"a result that {self.readers[0]} also reads{advice}"
        if any(version(result) != before for result, before in self.results):
            return "a result that is changed in place"
        if version(self.source) != self.source_version:
            return "low-resolution logits that are changed in place after the upsampling"
        return None


def _objection(options: dict[str, Any]) -> str | None:
    """Why the loss cannot replace an upsampling with these options of F.interpolate."""
    mode, scale = options.get("mode", "nearest"), options.get("scale_factor")
    if mode not in ("bilinear", "trilinear") or options.get("antialias"):
        return f"mode={mode!r}" + (", antialias=True" if options.get("antialias") else "")
    if scale is not None and not options.get("align_corners"):
        factors = scale if isinstance(scale, list | tuple) else [scale]
        exact = all(float(factor).is_integer() for factor in factors)
        if not exact and not options.get("recompute_scale_factor"):
            return f"scale_factor={scale}, whose grid differs from that of the sizes"
    return None


def _reads(func: Any, args: Any, kwargs: Any, result: object, watched: list[Tensor]) -> bool:
    return func not in _OF_GRAPH and reads(func, args, kwargs, result, watched)


def _name(func: Any) -> str:
    return resolve_name(func) or getattr(func, "__name__", repr(func))


class _Made(NamedTuple):
    """A tensor, and the function that made it. upsampled: whether that read an upsampled tensor;
    alone: and no other. descends: whether any function before made it from one."""

    tensor: Callable[[], Tensor | None]
    function: str
    upsampled: bool = False
    alone: bool = False
    descends: bool = False

    def __str__(self) -> str:
        return self.function + " of an upsampled tensor" * self.upsampled


_BY_NO_FUNCTION = _Made(lambda: None, "no function of torch")


class _Watch(TorchFunctionMode):
    """Records every F.interpolate of a forward, and which function made each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.upsamplings: list[_Upsampling] = []
        self._made: dict[int, _Made] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read = [tensor for _, tensor in tensors([args, kwargs])]
        made = made_by_call(result, read)
        sources = [
            (up, upsampled)
            for up in self.upsamplings
            for upsampled, _ in up.results
            if _reads(func, args, kwargs, result, [upsampled])
        ]
        alone = len(sources) == len(read) == 1
        descends = func is F.interpolate or any(self.made(x).descends for x in read)
        how = _name(func), bool(sources), alone, descends
        for tensor in made:
            self._made[id(tensor)] = _Made(weakref.ref(tensor), *how)
        for up, upsampled in sources:
            if _commutes(func, args, kwargs, upsampled, result):
                up.results.append((result, version(result)))
            else:
                up.readers.append(_name(func))
        if func is F.interpolate:
            self.upsamplings.append(_Upsampling(read[0], result, kwargs))
        return result

    def made(self, tensor: Tensor) -> _Made:
        made = self._made.get(id(tensor), _BY_NO_FUNCTION)
        return made if made.tensor() is tensor else _BY_NO_FUNCTION


@dataclass(frozen=True)
class _Plan:
    """Which calls of F.interpolate, counted from 0, a forward skips."""

    calls: int  # in one forward
    returned: frozenset[int]
    align_corners: bool

    def __call__(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        calls: list[list[_Low]] = []
        skip = _Skip(self, calls, module)
        with skip:
            output = forward(*args, **kwargs)
        if (got := len(calls)) != self.calls:
            skip.fail(f"{got} calls of F.interpolate, where the dry run had {self.calls}")
        outputs = [tensor for _, tensor in tensors(output)]
        for number in self.returned:
            if not any(tensor is low.tensor for tensor in outputs for low in calls[number]):
                skip.fail("the output is not the input of the last upsampling")
            if any(version(low.tensor) != low.version for low in calls[number]):
                skip.fail("the logits are changed in place after the upsampling")
        return output


class _Low(NamedTuple):
    """A tensor of low resolution, the version of its memory when it was made, and the shape that it
    would have at full resolution."""

    tensor: Tensor
    version: int
    full_shape: list[int]

    def view(self, func: Any, args: Any, kwargs: Any) -> _Low | None:
        """The result of a function of _VIEWS, or None if it does not commute with upsampling. It is
        called with a tensor of full resolution without memory."""
        full = torch.empty(self.full_shape, device="meta")
        args = tuple(full if x is self.tensor else x for x in args)
        kwargs = {name: full if x is self.tensor else x for name, x in kwargs.items()}
        result = func(*args, **kwargs)
        if not _commutes(func, args, kwargs, full, result):
            return None
        lengths = [low for low, n in zip(self.tensor.shape, self.full_shape, strict=True) if n != 1]
        shape = [1 if n == 1 else lengths.pop(0) for n in result.shape]
        low = self.tensor.reshape(shape)
        return _Low(low, version(low), [*result.shape])


class _Skip(ForwardMode):
    """Skips the calls of F.interpolate that a plan names. `calls` receives a list for each call: if
    it is skipped, what it returned, a view of its input, and what was made of it by functions that
    commute with upsampling."""

    function = "low_resolution"

    def __init__(self, plan: _Plan, calls: list[list[_Low]], module: nn.Module) -> None:
        super().__init__(module)
        self.plan, self.calls = plan, calls

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.interpolate:
            if len(self.calls) not in self.plan.returned:
                self.calls.append([])
                return func(*args, **kwargs)
            if not torch.compiler.is_compiling():  # which gives options by position
                if bool(kwargs.get("align_corners")) != self.plan.align_corners:
                    self.fail("the upsampling has another align_corners")
                if objection := _objection(kwargs):
                    self.fail(f"the upsampling has {objection}")
            source = args[0] if args else kwargs["input"]
            result = source.view_as(source)
            self.calls.append([_Low(result, version(source), _full_shape(args, kwargs, source))])
            return result
        if func in _VIEWS:
            first = args[0] if args else kwargs.get("input")
            for call in self.calls:
                for low in call:
                    if low.tensor is first:
                        return self._add(call, low.view(func, args, kwargs), func).tensor
        result = func(*args, **kwargs)
        for call in self.calls:
            for low in call:
                if _reads(func, args, kwargs, result, [low.tensor]):
                    commutes = _commutes(func, args, kwargs, low.tensor, result)
                    made = _Low(result, version(result), low.full_shape) if commutes else None
                    self._add(call, made, func)
                    break
        return result

    def _add(self, call: list[_Low], made: _Low | None, func: Any) -> _Low:
        if made is None:
            self.fail(f"{_name(func)} reads the upsampled tensor")
        call.append(made)
        return made


class LowResolution(Handle):
    """The result of `low_resolution`. `remove()` restores the upsampling.

    Attributes:
        align_corners: of the removed upsampling; pass it to the loss.
    """

    def __init__(self, model: nn.Module, plans: Plans, corners: dict[str, bool]) -> None:
        self.align_corners = next(iter(corners.values()))
        super().__init__("low_resolution", model, {model: plans}, corners)

    @property
    def outputs(self) -> list[str]:
        """The places of low-resolution logits in the model's output in training mode, for example
        "['out']"."""
        return [*self._found]

    def __repr__(self) -> str:
        places = ", ".join(self.outputs)
        options = f"align_corners={self.align_corners}"
        return f"low_resolution of {type(self._model).__name__}: {places} ({options})"


def _find(
    model: nn.Module, args: Any, kwargs: Any, training: bool
) -> tuple[_Plan, dict[str, bool]]:
    """The plan of one mode, and align_corners of the upsampling at each place of the output."""
    watch = _Watch()
    with torch.inference_mode(False), torch.no_grad():
        trial = copied("low_resolution", model)
        forward_output, output = dry_run(trial, args, kwargs, training, watch)
    outputs = dict(tensors(output))
    returned: dict[int, str] = {}
    for place, tensor in outputs.items():
        for number, up in enumerate(watch.upsamplings):
            if any(tensor is result for result, _ in up.results):
                returned.setdefault(number, place)
    expected = (
        "a last step F.interpolate(…, mode='bilinear' or 'trilinear') whose result is returned"
    )

    def refuse(got: str) -> NoReturn:
        mode = "" if training else "in evaluation mode: "
        fail("low_resolution", "model", expected, f"{mode}{got}")

    before_hooks = [tensor for _, tensor in tensors(forward_output)]
    if not all(any(tensor is x for x in before_hooks) for tensor in outputs.values()):
        refuse("a forward hook of the model that changes its output: remove the hook")
    if not outputs:
        found = f"a {type(output).__name__}, in which no tensor was found"
        refuse(f"{found} (dicts, lists and tuples are searched)")
    if not returned:
        got = ", ".join(
            f"{place} of shape {tuple(tensor.shape)} from {watch.made(tensor)}"
            for place, tensor in outputs.items()
        )
        refuse(f"{got}; {_advice([watch.made(tensor) for tensor in outputs.values()])}")
    for number, place in returned.items():
        objection = watch.upsamplings[number].objection()
        if objection is not None:
            refuse(f"{place}: {objection}")
    corners = {
        place: bool(watch.upsamplings[number].options.get("align_corners"))
        for number, place in returned.items()
    }
    # all alike, or low_resolution refuses the model
    align_corners = next(iter(corners.values()))
    return _Plan(len(watch.upsamplings), frozenset(returned), align_corners), corners


def _advice(outputs: list[_Made]) -> str:
    """What to do with a model that returns no upsampled tensor."""
    for made in outputs:
        if made.alone:
            return (
                f"return the upsampled logits, and call {made.function} outside of the model, or "
                "pass the logits before the upsampling to the loss"
            )
    if any(made.descends for made in outputs):
        return (
            "logits made of upsampled tensors can be passed to the loss at the size that they "
            "have; it gains more if logits are added at one low size, and the sum is upsampled"
        )
    return "an output that was not upsampled can be passed to the loss directly"


def low_resolution(
    model: nn.Module, *args: Any, always: bool = False, **kwargs: Any
) -> LowResolution:
    """Remove the last bilinear or trilinear upsampling of a model, for a loss that upsamples:

        handle = ao.low_resolution(model, images)
        loss = ao.pixel_cross_entropy(model(images), labels, align_corners=handle.align_corners)

    In training mode the model's output has the same structure as before (a tensor, tuple, dict,
    Hugging Face's ModelOutput; several heads), with low-resolution logits instead of upsampled
    ones. With always=True so it has in evaluation mode, for `pixel_argmax`, `pixel_confusion` and
    `MeanIoU`. The labels must have the size to which the model upsampled.

    A dry run of a copy of the model, in training mode without gradients (with always=True another
    one in evaluation mode), finds the calls of F.interpolate, also by nn.Upsample, whose results
    the model returns. In between there may be conversions of dtype, device or layout, and views
    that only add or remove axes of length 1: they are applied to the low-resolution logits. During
    the dry run the parameters are in memory twice. Parameters, gradients, batch-norm statistics and
    torch's random numbers do not change. After that, every forward in this mode returns the inputs
    of these calls instead. A forward that differs from the dry run raises a RuntimeError: one that
    calls F.interpolate more often or less (some models do for another image size), or that also
    reads the upsampled tensor or its size. Copies and pickles of the model keep low_resolution.

    Call it before torch.compile, DDP, FSDP and accelerator.prepare. Of a PEFT model it changes the
    model inside, which merge_and_unload returns. An upsampling inside a reentrant checkpoint raises
    an error in backward (with use_reentrant=False it does not). If only an extension reads an
    upsampled tensor, without torch's functions, this is not detected.

    Args:
        model: any segmentation model.
        args, kwargs: the arguments of one training forward, such as `images`; any batch and image
            size.
        always: also remove the upsampling in evaluation mode.

    Returns:
        LowResolution, with `align_corners`, `outputs` and `remove()`.

    Raises:
        ValueError: the model returns no upsampled tensor. The message says what made its outputs: a
            softmax, crop or sum after the upsampling; or a last convolution, and then the output
            already has low resolution and can be passed to the loss. Also: the upsampling is not
            linear or has a fractional scale_factor; another function reads its result; the heads
            (with always=True: or the modes) differ in align_corners; the model is wrapped, or its
            forward was replaced; low_resolution was called twice.
    """
    model = check_model("low_resolution", model, args, kwargs)
    check_flags("low_resolution", always=always)
    training, corners = _find(model, args, kwargs, training=True)
    evaluation = None
    if always:
        evaluation, others = _find(model, args, kwargs, training=False)
        if {*others.values()} != {*corners.values()}:
            corners |= {f"{place} in evaluation mode": value for place, value in others.items()}
    if len({*corners.values()}) > 1:
        places = ", ".join(f"{place}: {value}" for place, value in corners.items())
        fail("low_resolution", "model", "one align_corners for all outputs", places)
    return LowResolution(model, Plans(training, evaluation), corners)
