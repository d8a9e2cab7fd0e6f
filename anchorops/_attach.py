"""`attach`: connects a regulariser to the features before a model's last classifier."""

from __future__ import annotations

import itertools
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from ._checks import check_flags, describe, fail
from ._ops.recomputation import recomputation_refused
from ._torch_state import recomputing
from .losses.base import Regularizer

_logger = logging.getLogger("anchorops")
# what works instead of a layer that `attach` does not support
_OTHERWISE = (
    "make it a 1×1 convolution, or call the method with features (B, D, N), labels (B, N) and "
    "weight (K, D)"
)


class _Run:
    """A run of the classifier in training, whose features are kept for a call.

    waits: until a backward pass has gone through its features. several: an earlier run waited when
    it began, so which of them the labels will be for is not known.
    """

    def __init__(self, several: bool) -> None:
        self.waits, self.several = True, several

    def end(self, _: Tensor) -> None:
        self.waits = False


class Attachment:
    """A regulariser attached to a model. `attach` returns it, and the training loop calls it.

    Call it with the labels, once after each forward pass in training mode. A copy of the model has
    its own attachment, `copy.regularizer.attachment`.

    If the classifier has run several times since the last call, which of these the labels are for
    is not known, and the call raises an error. Runs without gradients, in eval mode, or repeated by
    torch.utils.checkpoint do not count, nor do runs through which a backward pass has gone
    (these count in a compiled model, and where the features need no gradient).

    Call it inside of what `torch.func.functional_call` runs: afterwards the classifier has its own
    parameters again.
    """

    def __init__(
        self,
        regularizer: Regularizer,
        model: nn.Module,
        classifier_name: str,
        classifier: nn.Module,
        use_last: bool,
    ) -> None:
        self.regularizer, self.classifier_name = regularizer, classifier_name
        self._use_last, self._checkpoint_hook = use_last, None
        self._set_classifier(classifier)
        self._channels_last = isinstance(classifier, nn.Linear)
        # The last run and its features, None after the call: a compiled forward reads whether there
        # is one, and would be compiled again for anything else.
        self._run: _Run | None = None
        self._features: Tensor | None = None
        self._taken = False  # by a call since the last run; only for the message
        self._frozen_told = False
        # input and output of the last dropout that may have run immediately before the classifier
        self._dropped: tuple[Tensor, Tensor] | None = None
        see = self._see_classifier
        hooks = self._hooks = [classifier.register_forward_pre_hook(see, with_kwargs=True)]
        for dropout in _dropouts_before(model, classifier_name):
            hooks.append(dropout.register_forward_hook(self._see_dropout, with_kwargs=True))
        # The dictionaries of hooks: without those of a layer that was replaced, its handle could
        # not be copied.
        self._places = [hook.__getstate__() for hook in hooks]
        # the regulariser is parent.child; an nn.Sequential would call it
        self._parent = classifier if isinstance(model, nn.Sequential) else model
        self._child = "regularizer"
        while hasattr(self._parent, self._child):
            self._child += "_"
        self._parent.add_module(self._child, regularizer)
        regularizer.attachment = self
        for layer in regularizer.modules():
            vars(layer)["qconfig"] = None  # torch.ao.quantization leaves it as it is

    def __call__(self, labels: Tensor) -> Tensor:
        """The loss on the features of the last training forward, a scalar.

        labels: integer, (B, H', W') of any size, (B, N) or (N,), matching the features.

        Raises:
            RuntimeError: there was no forward pass in training mode since the last call, or there
                were several.
            ValueError: the labels do not match the features.
        """
        features = self._take_features()
        self._warn_if_frozen(features)
        if self._channels_last:
            features = features.movedim(-1, 1)
        if features.dim() == 3 and isinstance(labels, Tensor) and labels.dim() > 2:
            expected = (
                f"(B, N), as the features (B, D, N) of layer {self.classifier_name} (labels of any "
                "size need a 1×1 convolution of features (B, D, H, W) as the classifier)"
            )
            fail(self._names(), "labels", expected, describe(labels))
        return self._submodule(features, labels, self.classifier)

    @property
    def terms(self) -> dict[str, Tensor]:
        """The weighted terms of the last loss, detached, still on their device."""
        return self._submodule.terms

    @property
    def features(self) -> Tensor | None:
        """The features of the last training forward, with their graph, as the classifier takes
        them: (…, D) for an `nn.Linear`. None after the attachment was called.
        `anchorops.diagnostics.gradient_ratio` needs them."""
        return self._features

    @property
    def _is_attached(self) -> bool:
        return self.regularizer.attachment is self

    @property
    def _submodule(self) -> Any:
        """The regulariser, or what a library put in its place: a trainable copy of peft."""
        # after detach() the name may be another method's
        return getattr(self._parent, self._child) if self._is_attached else self.regularizer

    def detach(self) -> None:
        """Restore the model: remove the hooks and the submodule, restore the old classifier."""
        if not self._is_attached:
            return
        self.regularizer.uninstall(self.classifier)
        for hook in (*self._hooks, self._checkpoint_hook):
            if hook is not None:
                hook.remove()
        self._hooks = self._places = []
        delattr(self._parent, self._child)
        self.regularizer.attachment = None
        self.forget()

    def forget(self) -> None:
        """Drop the features of the last forward (`model.eval()` does). Call it after a forward
        whose features are not used, if the next one follows without a backward pass."""
        self._run = self._features = self._dropped = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has had no forward pass. (Features are not leaves: they cannot be
        # copied.)
        empty = dict.fromkeys(("_run", "_features", "_dropped"))
        return self.__dict__ | empty | {"_taken": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._hooks:
            vars(self.regularizer).setdefault("attachment", self)

    def __repr__(self) -> str:
        return f"{self._names()} attached to {self.classifier_name}: {self.classifier!r}"

    def _names(self) -> str:
        return " + ".join(method.__name__ for method in _methods(self.regularizer))

    def _warn_if_frozen(self, features: Tensor) -> None:
        if features.requires_grad or self._frozen_told or torch.compiler.is_compiling():
            return
        self._frozen_told = True
        warnings.warn(
            f"{self._names()}: the features that reach layer {self.classifier_name} require no "
            "gradient: a method moves features, and it cannot move those of a frozen network",
            stacklevel=3,
        )

    def _set_classifier(self, classifier: nn.Module) -> None:
        self.classifier = classifier
        if self.regularizer.replaces_classifier:
            if self._checkpoint_hook is not None:
                self._checkpoint_hook.remove()
            see = self._see_checkpoint
            self._checkpoint_hook = classifier.register_load_state_dict_pre_hook(see)

    # torch.ao.quantization registers the hooks of a layer that it replaces again, without
    # with_kwargs.

    def _see_dropout(self, module: nn.Module, args: tuple[Tensor, ...], *more: Any) -> None:
        *kwargs, output = more
        if self._watches(module):
            self._dropped = _first(args, *kwargs), output

    def _see_classifier(
        self, module: nn.Module, args: tuple[Tensor, ...], *kwargs: dict[str, Tensor]
    ) -> None:
        if not self._watches(module):
            if not (recomputing() or torch.compiler.is_compiling()):
                self._taken = False  # the classifier ran again, and no features were kept
            return
        if module is not self.classifier:  # it was replaced
            if self._parent is self.classifier:
                raise RuntimeError(
                    f"{type(self.regularizer).__name__}: layer {self.classifier_name}, of which it "
                    "is a submodule, was replaced: first replace the layer, then attach"
                )
            self._set_classifier(module)
        self.regularizer.before_classifier(module)
        features = given = _first(args, *kwargs)
        if self._dropped is not None and self._dropped[1] is features:
            features = self._dropped[0]
        self._dropped = None
        waits = self._run is not None and self._run.waits
        self._run = _Run(several=waits and not self._use_last)
        self._features, self._taken = features, False
        # Hooks of tensors inside a compiled forward need compiled autograd.
        if given.requires_grad and not torch.compiler.is_compiling():
            given.register_hook(self._run.end)

    def _see_checkpoint(
        self, _: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        if f"{prefix}bias" in state_dict:  # with strict=False its weight would be loaded
            expected = f"a checkpoint of a model with {self._names()} (load others before attach)"
            fail(type(self.regularizer).__name__, "state_dict", expected, f"one with {prefix}bias")
        if isinstance(weight := state_dict.get(f"{prefix}weight"), Tensor):
            self.regularizer.check_checkpoint(weight)

    def _watches(self, module: nn.Module) -> bool:
        """Whether this is a training forward, and no recomputation of one."""
        # in what torch.compile traces, torch 2.11's torch.compiler.is_exporting() is always true
        exporting = getattr(torch.compiler, "_is_exporting_flag", False)
        if not module.training or not torch.is_grad_enabled() or exporting:
            return False
        return self._is_attached and not recomputing()

    def _take_features(self) -> Tensor:
        if recomputing():
            raise recomputation_refused(type(self.regularizer).__name__)
        if self._run is None or self._features is None:
            raise RuntimeError(f"{type(self.regularizer).__name__}: no features: {self._reason()}")
        if self._run.several:
            raise RuntimeError(
                f"{type(self.regularizer).__name__}: features of several forwards: layer "
                f"{self.classifier_name} has run more than once since the last call: call it after "
                "each forward, or join their inputs in one batch. If the labels are for the last "
                "run: attach with use_last=True, or call forget() on the attachment before it"
            )
        features, self._features, self._run, self._taken = self._features, None, None, True
        return features

    def _reason(self) -> str:
        """Why there are no features."""
        if not self._is_attached:
            return "it was detached from the model: call what the latest attach returned"
        if self._taken:
            return (
                "it was already called after this forward: run the model again (to use several "
                "methods, join them by Combined)"
            )
        if not self.regularizer.training:
            return "in eval mode no features are kept: omit the term, or call model.train()"
        return (
            f"layer {self.classifier_name} has not run in training mode, with gradients, since "
            "the last call or attach: run the model first. torch.utils.checkpoint over its "
            "classifier needs use_reentrant=False. If a compiled model was called before "
            "attach, it never runs the hook: attach first, or call torch.compiler.reset() "
            "after attach"
        )


def _first(args: tuple[Tensor, ...], kwargs: dict[str, Tensor] | None = None) -> Tensor:
    """A layer's input."""
    return (*args, *(kwargs or {}).values())[0]


def _methods(regularizer: nn.Module) -> list[type]:
    """The methods of a regulariser: several of a `Combined`."""
    return [type(method) for method in getattr(regularizer, "methods", [regularizer])]


def _unwrap(model: Any, regularizer: Regularizer) -> nn.Module:
    """The user's module inside torch.compile, DDP and other wrappers."""
    if hasattr(model, "_orig_mod"):
        return _unwrap(model._orig_mod, regularizer)
    wrapper = type(model).__name__
    if isinstance(model, nn.DataParallel):
        fail("attach", "model", "a model or one under DDP: threads share no features", wrapper)
    if "FSDPModule" in (base.__name__ for base in type(model).__mro__):
        wrapper = "fully_shard"
    elif wrapper not in ("DistributedDataParallel", "FullyShardedDataParallel"):
        return model
    name = type(regularizer).__name__
    if regularizer.replaces_classifier:
        expected = f"a model not yet wrapped: {name} replaces the classifier"
        fail("attach", "model", f"{expected}, which {wrapper} already holds", wrapper)
    state = itertools.chain(regularizer.parameters(), regularizer.buffers())
    if any(tensor.is_floating_point() for tensor in state):  # each rank has other values
        expected = f"a model not yet wrapped: {name} adds parameters or anchors"
        fail("attach", "model", f"{expected}, which {wrapper} would not see", wrapper)
    return model if wrapper == "fully_shard" else _unwrap(model.module, regularizer)


def _outputs(module: nn.Module) -> tuple[int, int] | None:
    """(outputs, inputs) of a linear layer or an ordinary convolution, else None."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Conv2d | nn.Conv1d) and module.groups == 1:
        return module.out_channels, module.in_channels
    return None


def _find_classifier(model: nn.Module, num_classes: int, dim: int) -> tuple[str, nn.Module]:
    skipped = {m for r in model.modules() if isinstance(r, Regularizer) for m in r.modules()}
    layers = {
        name: (module, shape)
        for name, module in model.named_modules()
        if module not in skipped and (shape := _outputs(module)) is not None
    }
    fits = [(name, m) for name, (m, shape) in layers.items() if shape == (num_classes, dim)]
    main = [(name, m) for name, m in fits if "aux" not in name]
    if main:  # the last pointwise one, if there is one
        return sorted(main, key=lambda x: all(k == 1 for k in getattr(x[1], "kernel_size", ())))[-1]
    near = [
        f"{name} ({inputs} → {outputs})"
        for name, (_, (outputs, inputs)) in layers.items()
        if outputs == num_classes
    ]
    expected = (
        f"a model with a linear layer or convolution {dim} → {num_classes} (dim → num_classes)"
    )
    if fits:
        expected += ' whose name has no "aux", or module, the layer'
    got = "none like it"
    if near:
        got += f"; layers with {num_classes} outputs: {', '.join(near)}"
    unsupported = [
        f"{name} ({type(module).__name__} {module.in_channels} → {module.out_channels})"
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd) and name not in layers and module not in skipped
        if module.out_channels == num_classes
    ]
    if unsupported:
        got += f"; of another kind: {', '.join(unsupported)}: {_OTHERWISE}"
    fail("attach", "model", expected, got)


def _dropouts_before(model: nn.Module, name: str) -> list[nn.Module]:
    """Dropouts that may produce the classifier's input: its sibling modules, and the last dropout
    that was registered before it."""
    before = itertools.takewhile(lambda item: item[0] != name, model.named_modules())
    last = [module for _, module in before if isinstance(module, _DropoutNd)][-1:]
    siblings = model.get_submodule(name.rpartition(".")[0]).children()
    return [*{*last, *(module for module in siblings if isinstance(module, _DropoutNd))}]


def _named(model: nn.Module, module: nn.Module | str) -> tuple[str, nn.Module]:
    for name, candidate in model.named_modules():
        if candidate is module or name == module:
            return name, candidate
    fail("attach", "module", "a module of the model or its name", describe(module))


def _check_classifier(
    model: nn.Module, name: str, classifier: nn.Module, regularizer: Regularizer
) -> None:
    """The classifier has no such method yet. The weight that a method shares or replaces is the
    whole weight, and no other module's."""
    for other in model.modules():
        attachment = other.attachment if isinstance(other, Regularizer) else None
        if attachment is not None and attachment.classifier is classifier:
            for again in set(_methods(regularizer)) & set(_methods(other)):
                expected = f"a method that {name} does not have: first detach() the other one"
                fail("attach", "regularizer", expected, f"a second {again.__name__}")
    if not (regularizer.uses_classifier or regularizer.replaces_classifier):
        return
    method = type(regularizer).__name__
    adapted = any("lora_" in parameter for parameter, _ in classifier.named_parameters())
    if adapted or name.rpartition(".")[2] == "base_layer":  # PEFT's name of an adapted layer
        expected = (
            f"a classifier without an adapter (LoRA), which the weight that {method} reads does "
            "not contain: train the classifier itself (modules_to_save in PEFT), or merge it"
        )
        fail("attach", "module", expected, f"{name}: {classifier!r}")
    weight = dict(classifier.named_parameters(recurse=False)).get("weight")
    if regularizer.replaces_classifier:
        for other, module in model.named_modules():
            tied = any(parameter is weight for parameter in module.parameters(recurse=False))
            if tied and module is not classifier:
                expected = f"a classifier whose weight is its own: {method} replaces it"
                fail("attach", "module", expected, f"{name}, whose weight {other} shares")


def attach(
    model: nn.Module,
    regularizer: Regularizer,
    module: nn.Module | str | None = None,
    *,
    use_last: bool = False,
) -> Attachment:
    """Connect a regulariser to the input of the model's last classifier:

        sar = attach(model, SAR(19, 256))
        loss = ce + sar(labels)

    The classifier is the last linear layer or 1×1 convolution (otherwise k×k) with `dim` inputs and
    `num_classes` outputs whose name does not contain "aux". The returned attachment and a record of
    the logger "anchorops" name it. If a dropout module (not in place) directly produces its input,
    the features before the dropout are used. They are never copied, and can be used once. In eval
    mode, without gradients and under export, the model runs exactly the operators that it runs
    without the regulariser. (The state_dict of a torch.export program includes it; call `detach()`
    before to remove it, but not with CBP, whose classifier it would replace by the old one.)

    The regulariser becomes a submodule of the model, so optimizers, `.to()`, DDP and checkpoints
    see its parameters. (If the model is an nn.Sequential, which would call it, it becomes a
    submodule of the classifier.) Attach before you create these, and before the first compiled
    call. The parameters are used in every backward pass, but not in the model's forward: DDP needs
    its default, find_unused_parameters=False. Parameters and anchors are drawn from torch's default
    generator. DDP copies those of rank 0 to all ranks; with broadcast_buffers=False, or without
    DDP, use the same seed on all ranks.

    Args:
        model: any module that ends in a classifier.
        regularizer: a method, or several as `Combined`.
        module: the classifier, or its name in the model. If it is given, there is no search.
        use_last: True if the classifier may run several times before a call (at several scales,
            for an auxiliary output): the features of its last run are used. Otherwise such a call
            raises RuntimeError.

    Returns:
        Attachment, to be called with the labels.

    Raises:
        ValueError: no such classifier (the message lists similar layers); a regulariser that is
            already attached, or a second one of a method that the classifier has; a model already
            wrapped in DDP or FSDP, if the regulariser has parameters or anchors or replaces the
            classifier; nn.DataParallel; a classifier with a LoRA adapter, or (for CBP) one whose
            weight is computed, shared, quantised, sharded or without memory.
    """
    if not isinstance(model, nn.Module):
        fail("attach", "model", "an nn.Module", describe(model))
    if not isinstance(regularizer, Regularizer):
        fail("attach", "regularizer", "an anchorops regulariser", describe(regularizer))
    if regularizer.attachment is not None:
        where = regularizer.attachment.classifier_name
        fail("attach", "regularizer", "one that is not attached", f"one on {where}")
    model = _unwrap(model, regularizer)
    if module is None:
        name, classifier = _find_classifier(model, regularizer.num_classes, regularizer.dim)
    else:
        name, classifier = _named(model, module)
        expected = (regularizer.num_classes, regularizer.dim)
        if _outputs(classifier) != expected:
            wanted = f"a linear layer or convolution {expected[1]} → {expected[0]}"
            if isinstance(classifier, _ConvNd) and _outputs(classifier) is None:
                wanted += f" (for a layer of another kind {_OTHERWISE})"
            fail("attach", "module", wanted, f"{name}: {classifier!r}")
    check_flags("attach", use_last=use_last)
    _check_classifier(model, name, classifier, regularizer)
    regularizer.install(classifier)
    attachment = Attachment(regularizer, model, name, classifier, use_last)
    _logger.info("%r", attachment)
    return attachment
