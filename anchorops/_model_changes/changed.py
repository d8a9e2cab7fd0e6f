"""Models whose forward runs differently: what `low_resolution` and `late_upsampling` share.

After a dry run, the class of a module is replaced by a subclass of the same name, whose forward
runs in a TorchFunctionMode, which counts the calls of torch's functions that run differently.
Parameter names, copies, pickles and the signature of forward stay the same. In eager mode this
takes about a microsecond for each call in this forward; in compiled code it takes none.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_any, tree_map_only

from .._checks import describe, fail

_logger = logging.getLogger("anchorops")
# The mode that is entered last sees every call first. late_upsampling passes a call to the other
# modes for each call that it postpones, so the numbers of low_resolution's calls do not change.
_INNERMOST_FIRST = ("late_upsampling", "low_resolution")
# reads that tell nothing of a tensor's values or size
METADATA_READS = {Tensor.dim, Tensor.is_floating_point, Tensor.is_complex} | {
    getattr(Tensor, name).__get__ for name in ("ndim", "dtype", "device", "is_cuda", "is_meta")
}
# their forward is generated for each instance, or compiled
GENERATED = (torch.fx.GraphModule, torch.jit.ScriptModule)
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


# How the forward of a module runs in one mode; it can be copied and pickled. A call with (module,
# forward, args, kwargs) gives what forward(*args, **kwargs) returns, if it runs as planned.
Plan = Callable[[nn.Module, Callable[..., Any], Any, Any], Any]


@dataclass(frozen=True)
class Plans:
    """The plans of training mode and of evaluation mode; None: nothing runs differently."""

    training: Plan | None
    evaluation: Plan | None

    def run(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        plan = self.training if module.training else self.evaluation
        return forward(*args, **kwargs) if plan is None else plan(module, forward, args, kwargs)


class ForwardMode(TorchFunctionMode):
    """The mode in which a module's forward runs differently, in the name of `function`."""

    function: str

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def fail(self, why: str) -> NoReturn:
        raise RuntimeError(
            f"{self.function}: {type(self.module).__name__}: {why}: remove() the handle, and call "
            f"{self.function} again, with arguments as in this forward"
        )


def _is_running(module: nn.Module) -> bool:
    """Whether the module's forward runs in a mode, and calls itself: the mode sees all calls."""
    modes = _get_current_function_mode_stack()
    return any(isinstance(mode, ForwardMode) and mode.module is module for mode in modes)


def tensors(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a model's output (or in a function's arguments), with its place there."""
    if isinstance(value, Tensor):
        yield name or "the output", value
    elif isinstance(value, Mapping):  # Hugging Face's ModelOutput too
        for key, item in value.items():
            yield from tensors(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from tensors(item, f"{name}[{i}]")


def made_by_call(result: object, read: list[Tensor]) -> list[Tensor]:
    """The tensors of a call's result, without those that it returns as they were given."""
    return [x for _, x in tensors(result) if not any(x is y for y in read)]


def reads(func: Any, args: Any, kwargs: Any, result: object, watched: list[Tensor]) -> bool:
    """Whether this call uses one of the watched tensors. One that only gives it back does not."""
    arguments = [tensor for _, tensor in tensors([args, kwargs])]
    if func in METADATA_READS or not any(x is y for x in watched for y in arguments):
        return False
    # len: Dynamo of torch 2.10 does not trace bool of a list
    return not isinstance(result, Tensor) or len(made_by_call(result, arguments)) > 0


def version(tensor: Tensor) -> int:
    """How often the tensor's memory was changed in place; always 0 where this is not counted."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return 0
    return tensor._version


def forward_is_replaced(module: nn.Module) -> bool:
    """Whether the module has another forward than its class. Accelerate's unwrap_model leaves that
    of the class in the module."""
    return "forward" in vars(module) and module.forward != MethodType(type(module).forward, module)


def check_model(function: str, model: Any, args: Any, kwargs: Any) -> nn.Module:
    """The model that `function` changes. Raises ValueError unless it can, by a dry run."""
    if not isinstance(model, nn.Module):
        fail(function, "model", "an nn.Module", describe(model))
    if hasattr(model, "get_base_model"):  # PEFT's; its merge_and_unload returns the model inside
        model = model.get_base_model()  # type: ignore[operator]
    name = type(model).__name__
    sharded = any(base.__name__ == "FSDPModule" for base in type(model).__mro__)
    if name in _WRAPPERS or sharded or hasattr(model, "_orig_mod"):
        expected = "the model itself, before torch.compile, DDP and FSDP"
        fail(function, "model", expected, f"one wrapped in {name}")
    if any(function in vars(module).get("_forward_changes", ()) for module in model.modules()):
        expected = f"a model that {function} has not changed yet"
        fail(function, "model", expected, f"{name} after {function}")
    if isinstance(model, GENERATED):
        fail(function, "model", "a model whose forward is written in Python", name)
    if forward_is_replaced(model):
        expected = (
            "a model with the forward of its class (call it before accelerator.prepare, and "
            "before anything else that replaces forward)"
        )
        fail(function, "model", expected, f"{name} whose forward was replaced")
    if not args and not kwargs:
        expected = f"the arguments of one training forward, as {function}(model, images)"
        fail(function, "args", expected, "none")
    return model


def copied(function: str, model: nn.Module) -> nn.Module:
    """A copy of the model for a dry run, with the forwards of its classes.

    copy.deepcopy refuses tensors with a graph, which a model may keep of an earlier forward
    (torch.nn.utils.weight_norm does): the copy gets them without the graph. Raises ValueError if
    it cannot be copied."""
    memo: dict[int, Any] = {
        id(x): x.detach()
        for module in model.modules()
        for _, x in tensors(vars(module))
        if not x.is_leaf
    }
    try:
        trial = copy.deepcopy(model, memo)
    except Exception as error:
        expected = (
            f"one that copy.deepcopy can copy, for a dry run (call {function} on a new model)"
        )
        reason = f"{type(model).__name__}: {type(error).__name__}: {error}"
        fail(function, "model", expected, reason)
    for module in trial.modules():
        for name in (*vars(module).get("_forward_changes", ()),):
            _restore(name, module)
    return trial


def dry_run(
    trial: nn.Module, args: Any, kwargs: Any, training: bool, watch: AbstractContextManager[Any]
) -> tuple[Any, Any]:
    """One forward of a copy, which `watch` surrounds: what forward returned, and what the model
    returned after its forward hooks. Random numbers do not change."""
    trial.train(training)
    for module in trial.modules():
        if isinstance(module, _BatchNorm):
            module.eval()  # accepts a single image, and does not synchronise with other ranks
    devices = {parameter.device for parameter in trial.parameters()}
    indices = sorted({device.index for device in devices if device.type == "cuda"})
    forward, returned = trial.forward, None

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal returned
        trial.forward = forward  # a model may call itself
        with watch:
            returned = forward(*args, **kwargs)
        return returned

    trial.forward = watched
    with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(indices):
        # copies, which forward may change in place, and which are no tensors of inference mode
        args, kwargs = tree_map_only(Tensor, lambda x: x.detach().clone(), (args, kwargs))
        output = trial(*args, **kwargs)
    return returned, output


@functools.cache
def _changed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a module of class `cls` whose forward runs differently."""

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        changes: Any = getattr(self, "_forward_changes", {})  # another instance has none
        run = functools.partial(cls.forward, self)
        if not changes or _is_running(self):
            return run(*args, **kwargs)
        if not torch.compiler.is_compiling() and tree_any(
            lambda x: isinstance(x, torch.fx.Proxy), (args, kwargs)
        ):
            refuse("torch.fx.symbolic_trace", self, "cannot be traced")
        for function in _INNERMOST_FIRST:
            if function in changes:
                run = functools.partial(changes[function].run, self, run)
        return run(*args, **kwargs)

    # Hugging Face's Trainer reads the signature, and Accelerate takes out what has __wrapped__.
    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    del forward.__wrapped__

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        # pickle finds classes by name, so it gets the class of the original module
        make, args, *state = cls.__reduce_ex__(self, 2)
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            make, args = _new, (cls,)
        return (make, args, *state)

    def __prepare_scriptable__(self: nn.Module) -> NoReturn:  # torch.jit.script calls it
        refuse("torch.jit.script", self, "is no TorchScript")

    def refuse(function: str, module: nn.Module, why: str) -> NoReturn:
        changes = ", ".join(getattr(module, "_forward_changes", ()))
        raise RuntimeError(
            f"{function}: {cls.__name__} after {changes} {why}: remove() the handle first, or use "
            "torch.export or torch.jit.trace"
        )

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    methods = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__prepare_scriptable__": __prepare_scriptable__,
        "_original_class": cls,
    }
    return type(cls)(cls.__name__, (cls,), names | methods)  # type: ignore[call-arg]


def _new(cls: type[nn.Module]) -> nn.Module:
    changed: Any = _changed_class(cls)
    return changed.__new__(changed)


def _restore(function: str, module: nn.Module) -> None:
    """Undo what a handle changed."""
    changes: Any = vars(module).pop("_forward_changes")
    if others := {name: plans for name, plans in changes.items() if name != function}:
        vars(module)["_forward_changes"] = others
        return
    if not forward_is_replaced(module):
        vars(module).pop("forward", None)  # that of the class, which is no longer the module's
    module.__class__ = type(module)._original_class  # type: ignore[assignment]


class Handle:
    """Changes modules of a model, in the name of a function, until `remove()`. found: what a record
    of the logger names."""

    def __init__(
        self, function: str, model: nn.Module, plans: dict[nn.Module, Plans], found: Iterable[str]
    ) -> None:
        self._function, self._model, self._plans = function, model, [*plans.items()]
        self._found = tuple(found)
        for module, how in self._plans:
            changes: Any = vars(module).get("_forward_changes", {})
            if "_original_class" not in vars(type(module)):
                module.__class__ = _changed_class(type(module))
            vars(module).pop("forward", None)  # that of its class
            vars(module)["_forward_changes"] = {**changes, function: how}
        _logger.info("%r", self)

    def remove(self) -> None:
        """Restore the forward of the model. Called again, it does nothing, also if the model was
        changed again meanwhile. Raises ValueError if the class of a module was changed again."""
        changed = [
            module
            for module, plans in self._plans
            if vars(module).get("_forward_changes", {}).get(self._function) is plans
        ]
        for module in changed:
            if "_original_class" not in vars(type(module)):
                expected = (
                    "the class that anchorops gave it: first undo what changed it later (before "
                    "fully_shard, which cannot be undone, call remove())"
                )
                fail("remove", "model", expected, type(module).__name__)
        for module in changed:
            _restore(self._function, module)
