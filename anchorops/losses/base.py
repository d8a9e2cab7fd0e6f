"""What the methods share: arguments, attachment, global statistics, logging."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .._checks import (
    check_features,
    check_ignore_index,
    check_labels,
    check_num_classes,
    describe,
    fail,
    in_transform,
)
from ..distributed import group_name, reduce_moments
from ..reference import ClassMoments
from .recomputation import KnowAgain, check_reentrant, checkpointed, recomputing
from .statistics import Request, class_statistics

if TYPE_CHECKING:
    from ..attach import Attachment

Classifier = nn.Module | Tensor


class Losses(NamedTuple):
    """terms: weighted parts, summed into the loss; logs: what else `terms` shows."""

    terms: dict[str, Tensor]
    logs: dict[str, Tensor]


class Plan(NamedTuple):
    """A method's step: the statistics it needs, and its losses once it has them."""

    request: Request | None
    losses: Callable[[ClassMoments | None], Losses]


def linear_weight(function: str, classifier: object, num_classes: int, dim: int) -> tuple[Any, Any]:
    """Weight [K, D] and bias [K] or None of a 1×1 convolution, a linear layer or a weight tensor.

    A k×k kernel is summed over its positions: its logits for a feature that is constant around.
    """
    weight, bias = classifier, None
    if isinstance(classifier, nn.Module):
        weight, bias = getattr(classifier, "weight", None), getattr(classifier, "bias", None)
    expected = f"a module or weight [{num_classes}, {dim}] or [{num_classes}, {dim}, 1, 1]"
    if not isinstance(weight, Tensor):
        fail(function, "classifier", expected, describe(classifier))
    if weight.dim() not in (2, 3, 4) or weight.shape[:2] != (num_classes, dim):
        fail(function, "classifier", expected, describe(weight))
    if hasattr(weight, "placements"):
        expected += (
            " that is not sharded (shard it with the root, or with reshard_after_forward=False)"
        )
        fail(function, "classifier", expected, "a DTensor")
    weight = weight if weight.dim() == 2 else weight.flatten(2).sum(2)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


class Regularizer(nn.Module):
    """A loss on the features before a model's last classifier.

    Call it with (features, labels, classifier), or let `anchorops.attach` give it the features of
    a model and call what that returns with (labels).

    Args:
        num_classes: K.
        dim: D, channels of the features.
        ignore_index: label that is left out, as is every label outside [0, K): 255 by default; with
            K > 255 it must be given.
        process_group: None for the statistics of this rank alone (as published); "world" or a
            ProcessGroup for those of all its R ranks. A rank's gradient is then that of the sum of
            the ranks' (equal) losses, R times that of one: DDP's mean over the ranks gives exactly
            the gradients of one process on the concatenated batch.

    Shapes:
        features: (B, D, H, W), (B, D, N) or (N, D), any strides, float32, bfloat16, float16 or
            float64; labels: integer, (B, H', W') at any size, (B, N) or (N,).
        classifier: a 1×1 convolution or linear layer, or its weight [K, D] or [K, D, 1, 1]; only
            where the method shares it.
        Returns a scalar, float32 (float64 for float64 features), also under autocast.

    State (step counters, moving averages, running statistics) moves once in each training forward,
    with gradients or without, never in evaluation. Where activation checkpointing recomputes a
    forward, the state does not move, and the recomputation reads what the first pass read; where
    that is not possible it raises RuntimeError.

    `terms` holds the weighted parts of the last loss, detached, still on their device.
    """

    settings: tuple[str, ...] = ()
    uses_classifier = False
    replaces_classifier = False
    has_state = False  # buffers that a training forward moves
    step: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        ignore_index: int | None = None,
        process_group: ProcessGroup | str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_num_classes(name, num_classes)
        if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
            fail(name, "dim", "an int of at least 1", describe(dim))
        self.num_classes, self.dim = num_classes, dim
        self.ignore_index = check_ignore_index(name, ignore_index, num_classes)
        self.process_group = group_name(name, process_group)
        self.terms: dict[str, Tensor] = {}
        self.attachment: Attachment | None = None
        # For recomputations (recomputation.py): what the last forward read of the state, its
        # number, and how many forwards without gradients may yet be recomputed.
        self._read: Tensor | None = None
        self._forwards, self._without_grad, self._last_without_grad = 0, 0, False

    def plan(self, features: Tensor, labels: Tensor, classifier: Classifier | None) -> Plan:
        """What this step needs, and how its losses follow; updates the state when training."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Regularizer:
        if not mode and self.attachment is not None:
            self.attachment.forget()
        return super().train(mode)

    def install(self, classifier: nn.Module) -> None:
        """What `attach` does to the classifier: CBP replaces its weight."""

    def uninstall(self, classifier: nn.Module) -> None:
        """What `detach` does to the classifier: the opposite of `install`."""

    def before_classifier(self, classifier: nn.Module) -> None:
        """Called before the attached classifier runs in training."""

    def _count_steps(self, seed: int) -> None:
        if not isinstance(seed, int) or not 0 <= seed < 2**31:
            fail(type(self).__name__, "seed", "an int in [0, 2^31)", describe(seed))
        self.seed, self.has_state = seed, True
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def _next_seed(self) -> Tensor:
        """Of this step's random splits, on the device; the step counter moves when training."""
        return self._read_and_move(self.step + (self.seed << 32), self.step, self.step + 1)

    def _read_and_move(self, read: Tensor, state: Tensor, moved: Tensor) -> Tensor:
        """read: what this forward needs of the state; moved: the state after a training forward.
        A recomputation moves nothing, and has returned what its first pass read."""
        if recomputing():
            return read if self._read is None else self._read
        if not torch.compiler.is_compiling():
            self._read = read
        elif self.training:
            torch.ops.anchorops.first_pass(state, type(self).__name__)
        if self.training:
            state.copy_(moved)
        return read

    def seen(self) -> tuple[int, list[Tensor | None]]:
        """The number of the last forward, and what each method read of its state."""
        methods = [module for module in self.modules() if isinstance(module, Regularizer)]
        return self._forwards, [method._read for method in methods]

    def see(self, number: int, reads: list[Tensor | None]) -> None:
        """What a recomputation is to read: that of the forward of this number."""
        methods = [module for module in self.modules() if isinstance(module, Regularizer)]
        self._forwards = number
        for method, read in zip(methods, reads, strict=True):
            method._read = read

    def _count_forward(self) -> None:
        if not self.training:  # an evaluation moves no state
            return
        if not recomputing():
            self._forwards += 1
            self._last_without_grad = not torch.is_grad_enabled()
            self._without_grad += self._last_without_grad
        elif not checkpointed():
            if any(read is not None for read in self.seen()[1]):
                check_reentrant(self, self._without_grad, self._last_without_grad)
            self._without_grad = 0

    def forward(
        self, features: Tensor, labels: Tensor, classifier: Classifier | None = None
    ) -> Tensor:
        self._check_inputs(features, labels, classifier)
        if not torch.compiler.is_compiling():
            self._count_forward()
        with torch.autocast(features.device.type, enabled=False):
            terms, logs = self._losses(features, labels, classifier)
            loss = torch.stack(tuple(terms.values())).sum()
            loss = loss.to(torch.promote_types(features.dtype, torch.float32))
        self.terms = {key: value.detach() for key, value in (terms | logs).items()}
        if not torch.compiler.is_compiling() and loss.requires_grad and checkpointed():
            loss = KnowAgain.apply(loss, self)
        return loss

    def _losses(self, features: Tensor, labels: Tensor, classifier: Classifier | None) -> Losses:
        request, losses = self.plan(features, labels, classifier)
        if request is None:
            return losses(None)
        (moments,) = class_statistics(
            features, labels, self.num_classes, [request], self.ignore_index
        )
        return losses(self.reduce(moments, request))

    def reduce(self, moments: ClassMoments, request: Request) -> ClassMoments:
        """Over the ranks; statistics per image stay local, as batches may differ in size."""
        return moments if request.per_image else reduce_moments(moments, self.process_group)

    def _check_inputs(
        self, features: Tensor, labels: Tensor, classifier: Classifier | None
    ) -> None:
        name = type(self).__name__
        check_features(name, features)
        if features.shape[1] != self.dim:
            fail(name, "features", f"{self.dim} channels, as dim", f"shape {tuple(features.shape)}")
        check_labels(name, labels, features)
        own = next(itertools.chain(self.buffers(), self.parameters()), None)
        if own is not None and own.device != features.device:
            fail(name, "features", f"device {own.device}, as the module", features.device)
        if self.training and self.has_state and in_transform(features):
            raise RuntimeError(
                f"{name}: torch.func's transforms cannot move its state: call eval() on it before, "
                'and use anchorops.use_backend("reference")'
            )
        if self.uses_classifier and classifier is None:
            fail(name, "classifier", "the model's classifier or its weight", None)

    def extra_repr(self) -> str:
        names = [*self.settings, "ignore_index", "process_group"]
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{self.num_classes}, {self.dim}, {settings}"
