"""`low_resolution`: removes the last upsampling of a model."""

from __future__ import annotations

import copy
import copyreg
import functools
import logging
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode, resolve_name

from ._checks import check_flags, describe, fail

_logger = logging.getLogger("anchorops")


def _tensors(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a model's output (or in a function's arguments), with its place there."""
    if isinstance(value, Tensor):
        yield name or "the output", value
    elif isinstance(value, Mapping):  # Hugging Face's ModelOutput too
        for key, item in value.items():
            yield from _tensors(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{name}[{i}]")


class _Upsampling:
    """One call of F.interpolate: its result, its options, and the functions that read it."""

    def __init__(self, result: Tensor, options: dict[str, Any]) -> None:
        self.result, self.options = result, options
        self.version = result._version
        self.readers: list[str] = []

    @property
    def align_corners(self) -> bool:
        return bool(self.options.get("align_corners"))

    def objection(self) -> str | None:
        """Why the loss cannot replace this upsampling, or None if it can."""
        mode = self.options.get("mode", "nearest")
        if mode not in ("bilinear", "trilinear") or self.options.get("antialias"):
            return f"mode={mode!r}" + (", antialias=True" if self.options.get("antialias") else "")
        scale = self.options.get("scale_factor")
        if scale is not None and not self.align_corners:
            factors = scale if isinstance(scale, list | tuple) else [scale]
            exact = all(float(factor).is_integer() for factor in factors)
            if not exact and not self.options.get("recompute_scale_factor"):
                return f"scale_factor={scale}, whose grid differs from that of the sizes"
        if self.readers:
            return f"a result that {self.readers[0]} also reads"
        if self.result._version != self.version:
            return "a result that is changed in place"
        return None


class _Watch(TorchFunctionMode):
    """Records every F.interpolate of a forward, and which function made each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.upsamplings: list[_Upsampling] = []
        # id: the tensor, the function that made it, and whether that read an upsampled tensor
        self._makers: dict[int, tuple[weakref.ref[Tensor], str, bool]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read = {id(tensor) for _, tensor in _tensors([args, kwargs])}
        made = [tensor for _, tensor in _tensors(result) if id(tensor) not in read]
        sources = [up for up in self.upsamplings if id(up.result) in read]
        name = resolve_name(func) or getattr(func, "__name__", repr(func))
        for tensor in made:
            self._makers[id(tensor)] = (weakref.ref(tensor), name, bool(sources))
        if made:
            for up in sources:
                up.readers.append(name)
        if func is F.interpolate:
            self.upsamplings.append(_Upsampling(result, kwargs))
        return result

    def maker(self, tensor: Tensor) -> str:
        made, name, upsampled = self._makers.get(id(tensor), (lambda: None, "", False))
        if made() is not tensor:
            return "no function of torch"
        return f"{name} of an upsampled tensor" if upsampled else name


class _Skip(TorchFunctionMode):
    """Skips the calls of F.interpolate with these numbers. `inputs` receives the input of each
    skipped call, and None for every other call."""

    def __init__(self, numbers: frozenset[int], inputs: list[Tensor | None]) -> None:
        super().__init__()
        self.numbers, self.inputs = numbers, inputs

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.interpolate:
            source = args[0] if args else kwargs["input"]
            skipped = len(self.inputs) in self.numbers
            self.inputs.append(source if skipped else None)
            if skipped:
                return source
        return func(*args, **kwargs)


class _Plan(NamedTuple):
    """Which calls of F.interpolate, counted from 0, a forward skips."""

    calls: int  # in one forward
    returned: frozenset[int]


class _Plans(NamedTuple):
    """The plans of training mode and of evaluation mode; None: nothing is skipped."""

    training: _Plan
    evaluation: _Plan | None


@functools.cache
def _without_upsampling(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a model of class `cls` under `low_resolution`."""

    @functools.wraps(cls.forward)  # Hugging Face's Trainer reads the signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plans: _Plans | None = getattr(self, "_low_resolution", None)
        plan = None  # another instance of this class has no plans
        if plans is not None:
            plan = plans.training if self.training else plans.evaluation
        if plan is None:
            return cls.forward(self, *args, **kwargs)
        inputs: list[Tensor | None] = []
        with _Skip(plan.returned, inputs):
            output = cls.forward(self, *args, **kwargs)
        if len(inputs) != plan.calls:
            why = f"{len(inputs)} calls of F.interpolate, where the dry run had {plan.calls}"
            raise RuntimeError(f"low_resolution: {cls.__name__}: {why}: {_ADVICE}")
        tensors = [tensor for _, tensor in _tensors(output)]
        for number in plan.returned:
            if not any(tensor is inputs[number] for tensor in tensors):
                why = "the output is not the input of the last upsampling"
                raise RuntimeError(f"low_resolution: {cls.__name__}: {why}: {_ADVICE}")
        return output

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        # pickle finds classes by name, so it gets the class of the original model
        make, args, *state = cls.__reduce_ex__(self, 2)
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            make, args = _new, (cls,)
        return (make, args, *state)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    methods = {"forward": forward, "__reduce_ex__": __reduce_ex__, "_upsampling_class": cls}
    return type(cls)(cls.__name__, (cls,), names | methods)  # type: ignore[call-arg]


_ADVICE = "remove() the handle, and call low_resolution with arguments as in this forward"


def _new(cls: type[nn.Module]) -> nn.Module:
    changed: Any = _without_upsampling(cls)
    return changed.__new__(changed)


def _dry_run(
    model: nn.Module, args: Any, kwargs: Any, training: bool
) -> tuple[_Watch, dict[str, Tensor]]:
    """One forward of a copy. It does not change the model, gradients or random numbers."""
    trial = copy.deepcopy(model).train(training)
    for module in trial.modules():
        if isinstance(module, _BatchNorm):
            module.eval()  # accepts a single image, and does not synchronise with other ranks
    devices = {parameter.device for parameter in model.parameters()}
    indices = sorted({device.index for device in devices if device.type == "cuda"})
    watch = _Watch()
    with torch.no_grad(), torch.random.fork_rng(indices), watch:
        output = trial(*args, **kwargs)
    return watch, dict(_tensors(output))


class LowResolution:
    """The result of `low_resolution`. `remove()` restores the upsampling.

    Attributes:
        align_corners: of the removed upsampling; pass it to the loss.
        outputs: the places of low-resolution logits in the model's output in training mode, for
            example "['out']".
    """

    def __init__(self, model: nn.Module, align_corners: bool, outputs: list[str]) -> None:
        self.align_corners, self.outputs = align_corners, outputs
        self._model: Any = model
        self._class = getattr(model, "_upsampling_class", type(model))

    def remove(self) -> None:
        """Restore the upsampling of the model."""
        if not hasattr(self._model, "_low_resolution"):
            return
        if type(self._model) is not _without_upsampling(self._class):
            expected = "the class that low_resolution gave it: first undo what changed it later"
            fail("remove", "model", expected, type(self._model).__name__)
        self._model.__class__ = self._class
        del self._model._low_resolution

    def __repr__(self) -> str:
        places = ", ".join(self.outputs)
        options = f"align_corners={self.align_corners}"
        return f"low_resolution of {self._class.__name__}: {places} ({options})"


def _check_model(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        fail("low_resolution", "model", "an nn.Module", describe(model))
    name = type(model).__name__
    wrappers = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
    sharded = any(base.__name__ == "FSDPModule" for base in type(model).__mro__)
    if name in wrappers or sharded or hasattr(model, "_orig_mod"):
        expected = "the model itself, before torch.compile, DDP and FSDP"
        fail("low_resolution", "model", expected, f"one wrapped in {name}")
    if hasattr(model, "_low_resolution"):
        expected = "a model that low_resolution has not changed yet"
        fail("low_resolution", "model", expected, f"{name} after low_resolution")
    if "forward" in vars(model):
        expected = "a model with the forward of its class"
        fail("low_resolution", "model", expected, f"{name} whose forward was replaced")
    return model


def _find(
    model: nn.Module, args: Any, kwargs: Any, training: bool
) -> tuple[_Plan, dict[str, bool]]:
    """The plan of one mode, and align_corners of the upsampling at each place of the output."""
    watch, outputs = _dry_run(model, args, kwargs, training)
    returned: dict[int, str] = {}
    for place, tensor in outputs.items():
        for number, up in enumerate(watch.upsamplings):
            if up.result is tensor:
                returned.setdefault(number, place)
    expected = (
        "a last step F.interpolate(…, mode='bilinear' or 'trilinear') whose result is returned"
    )
    mode = "" if training else "in evaluation mode: "
    if not returned:
        found = ", ".join(
            f"{place} of shape {tuple(tensor.shape)} from {watch.maker(tensor)}"
            for place, tensor in outputs.items()
        )
        advice = "an output that was not upsampled can be passed to the loss directly"
        fail("low_resolution", "model", expected, f"{mode}{found or 'no tensor'}; {advice}")
    for number, place in returned.items():
        objection = watch.upsamplings[number].objection()
        if objection is not None:
            fail("low_resolution", "model", expected, f"{mode}{place}: {objection}")
    plan = _Plan(len(watch.upsamplings), frozenset(returned))
    corners = {place: watch.upsamplings[number].align_corners for number, place in returned.items()}
    return plan, corners


def low_resolution(
    model: nn.Module, *args: Any, always: bool = False, **kwargs: Any
) -> LowResolution:
    """Remove the last bilinear or trilinear upsampling of a model, for a loss that upsamples:

        handle = ao.low_resolution(model, images)
        loss = ao.pixel_cross_entropy(model(images), labels, align_corners=handle.align_corners)

    In training mode the model's output has the same structure as before (a tensor, tuple, dict,
    Hugging Face's ModelOutput; several heads), with low-resolution logits instead of upsampled
    ones. In evaluation mode the model is unchanged; with always=True it returns low-resolution
    logits there too, for `pixel_argmax`, `pixel_confusion` and `MeanIoU`. The labels must have the
    size to which the model upsampled.

    A dry run of a copy of the model, in training mode without gradients (with always=True another
    one in evaluation mode), finds the calls of F.interpolate whose results the model returns,
    comparing by object identity. This includes nn.Upsample, also before nn.Identity. During the dry
    run the parameters are in memory twice. Parameters, gradients, batch-norm statistics and torch's
    random numbers do not change. After that, every forward in this mode returns the inputs of these
    calls instead, and checks that it does; a forward that differs from the dry run raises a
    RuntimeError. Parameter names do not change. Copies and pickles of the model keep
    low_resolution.

    Call it before torch.compile, DDP and FSDP. An upsampling inside a reentrant checkpoint raises
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
            (with always=True: or the modes) differ in align_corners; the model is wrapped;
            low_resolution was called twice.
    """
    model = _check_model(model)
    if not args and not kwargs:
        expected = "the arguments of one training forward, as low_resolution(model, images)"
        fail("low_resolution", "args", expected, "none")
    check_flags("low_resolution", always=always)
    plan, corners = _find(model, args, kwargs, training=True)
    plans = _Plans(plan, None)
    if always:
        plan, of_evaluation = _find(model, args, kwargs, training=False)
        plans = plans._replace(evaluation=plan)
        of_evaluation = {f"{k} in evaluation mode": v for k, v in of_evaluation.items()}
        if {*of_evaluation.values()} != {*corners.values()}:
            corners |= of_evaluation
    if len({*corners.values()}) > 1:
        places = ", ".join(f"{place}: {value}" for place, value in corners.items())
        fail("low_resolution", "model", "one align_corners for all outputs", places)
    handle = LowResolution(model, next(iter(corners.values())), list(corners))
    model._low_resolution = plans  # type: ignore[assignment]
    model.__class__ = _without_upsampling(handle._class)
    _logger.info("%r", handle)
    return handle
