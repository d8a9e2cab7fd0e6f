"""The base class of the methods: arguments, attachment, global statistics, logging."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .._checks import (
    FLOATING,
    check_count,
    check_features,
    check_flags,
    check_ignore_index,
    check_int,
    check_label_values,
    check_labels,
    check_num_classes,
    describe,
    fail,
)
from .._moments import ClassMoments
from .._ops.centroid_info_nce import centroid_info_nce
from .._ops.recomputation import check_first_pass
from .._torch_state import in_transform, savable
from ..distributed import group_name, reduce_moments
from .initialized_module import InitializedModule
from .statistics import Request, class_statistics

Classifier = nn.Module | Tensor


Term = tuple[float | Tensor, Tensor]
"""A weight, and what is multiplied by it."""


class Losses(NamedTuple):
    """terms: parts, whose weighted sum is the loss; logs: other values shown in the method's
    `terms`, and masks, of which the number of true values is shown."""

    terms: dict[str, Term]
    logs: dict[str, Tensor]


class Plan(NamedTuple):
    """One step of a method: the statistics that it needs, and the function that computes its losses
    from them."""

    request: Request | None
    losses: Callable[[ClassMoments | None], Losses]


def linear_weight(function: str, classifier: object, num_classes: int, dim: int) -> tuple[Any, Any]:
    """Weight [K, D] and bias [K] or None of a 1×1 convolution, a linear layer or a weight tensor.

    A k×k kernel is summed over its positions. This gives its logits for constant features.
    """
    weight, bias = classifier, None
    if isinstance(classifier, nn.Module):
        weight, bias = getattr(classifier, "weight", None), getattr(classifier, "bias", None)
    expected = f"a module or weight [{num_classes}, {dim}] or [{num_classes}, {dim}, 1, 1]"
    if not isinstance(weight, Tensor):
        quantised = " that is not quantised: call detach() before quantisation" * callable(weight)
        fail(function, "classifier", expected + quantised, describe(classifier))
    if weight.dim() not in (2, 3, 4) or weight.shape[:2] != (num_classes, dim):
        fail(function, "classifier", expected, describe(weight))
    if hasattr(weight, "placements"):
        expected += (
            " that is not sharded (by fully_shard: with the root, or with "
            "reshard_after_forward=False; not by tensor parallelism)"
        )
        fail(function, "classifier", expected, "a DTensor")
    if weight.dtype not in FLOATING:
        fail(function, "classifier", "a weight that is not quantised", describe(weight))
    if bias is not None and bias.shape != (num_classes,):
        fail(function, "classifier", f"a bias [{num_classes}]", describe(bias))
    weight = savable(weight)
    if weight.dim() > 2:
        one_position = weight.shape[2:].numel() == 1
        weight = weight.flatten(1) if one_position else weight.flatten(2).sum(2)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def classification_loss(
    queries: Tensor, weight: Tensor, bias: Tensor | None, **options: Any
) -> Tensor:
    """The cross-entropy of a linear classifier for the queries [K, D] or [K, G, D] of its classes:
    InfoNCE of its rows. options: of `centroid_info_nce`."""
    if bias is None:
        options["present_keys"] = queries.new_ones(len(weight), dtype=torch.bool)
    return centroid_info_nce(queries, weight, bias=bias, **options)


class Regularizer(InitializedModule):
    """A loss on the features before a model's last classifier.

    Call it with (features, labels, classifier). Or use `anchorops.attach`, which gets the features
    from a model, and call the returned object with (labels).

    Args:
        num_classes: K.
        dim: D, channels of the features.
        ignore_index: the label to ignore, 255 by default; with K > 255 it must be given. Labels
            outside [0, K) are also ignored.
        process_group: None for the statistics of this rank only (as published); "world" or a
            ProcessGroup for those of all its R ranks. The gradient of a rank is then that of the
            sum of the ranks' (equal) losses, R times that of one rank. DDP's mean over the ranks
            gives exactly the gradients of one process on the concatenated batch.
        check_labels: as in `CrossEntropy`.

    Shapes:
        features: (B, D, H, W), (B, D, N) or (N, D), any strides, float32, bfloat16, float16 or
            float64; labels: integer, (B, H', W') at any size, (B, N) or (N,).
        classifier: a 1×1 convolution or linear layer, or its weight [K, D] or [K, D, 1, 1]; only
            needed if the method shares it.
        Returns a scalar, float32 (float64 for float64 features), also under autocast.

    Raises ValueError for a wrong argument or input; the message names it.

    The state (step counters, moving averages, running statistics) is updated once in each training
    forward, with or without gradients, and never in evaluation. If it has a state, it cannot be
    called inside of a function that torch.utils.checkpoint recomputes: this raises RuntimeError.

    `terms` contains the weighted terms of the last loss, and other values to log, as floating-point
    scalars, detached, still on their device.
    """

    uses_classifier = False
    replaces_classifier = False
    has_state = False  # whether it has buffers that a training forward updates
    attachment: Any = None  # what connects it to a model; `attach` sets it
    _frozen_told = False  # whether the warning of frozen parameters was given
    if TYPE_CHECKING:  # torch.jit.script reads annotations
        step: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        ignore_index: int | None = None,
        process_group: ProcessGroup | str | None = None,
        check_labels: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if torch.empty(0).is_meta:
            expected = 'a device with memory: build it outside of torch.device("meta")'
            fail(name, "torch.device", expected, "meta")
        self.num_classes = num_classes = check_num_classes(name, num_classes)
        self.dim = check_count(name, "dim", dim)
        self.ignore_index = check_ignore_index(name, ignore_index, num_classes)
        check_flags(name, check_labels=check_labels)
        self.check_labels = check_labels
        self.process_group = group_name(name, process_group)
        self._terms: dict[str, Term] = {}

    def plan(self, features: Tensor, labels: Tensor, classifier: Classifier | None) -> Plan:
        """The statistics and the losses of this step; updates the state in training mode."""
        raise NotImplementedError

    @property
    def terms(self) -> dict[str, Tensor]:
        """The terms of the last loss: copies."""
        # counts too are floating-point, because loggers average over steps and ranks
        dtypes = [x.dtype for _, x in self._terms.values() if x.is_floating_point()]
        return {
            key: (weight * x).detach() if x.is_floating_point() else x.sum().to(dtypes[0])
            for key, (weight, x) in self._terms.items()
        }

    def train(self, mode: bool = True) -> Regularizer:
        if not mode and self.attachment is not None:
            self.attachment.forget()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the method alone is not attached, and does not copy the model. That of a model
        # has an attachment, which tells its method.
        state = {name: x for name, x in super().__getstate__().items() if name != "attachment"}
        if any(in_transform(x) for _, x in self._terms.values()):
            state["_terms"] = {}  # tensors of torch.func's transforms cannot be copied
        return state

    def install(self, classifier: nn.Module) -> None:
        """Change the classifier; called by `attach`. CBP replaces the weight."""

    def uninstall(self, classifier: nn.Module) -> None:
        """Restore the classifier; called by `detach`."""

    def check_checkpoint(self, weight: Tensor) -> None:
        """Called before a classifier that the method has replaced loads this weight."""

    def before_classifier(self, classifier: nn.Module) -> None:
        """Called before the attached classifier runs in training."""

    def _count_steps(self, seed: int) -> None:
        expected = "an int in [0, 2^31)"
        self.seed = check_int(type(self).__name__, "seed", seed, expected, 0, 2**31 - 1)
        self.has_state = True
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def _next_seed(self) -> Tensor:
        """The seed of this step's random splits, on the device. In training mode this increments
        the step counter."""
        seed = self.step + (self.seed << 32)
        if self.training:
            self.step.add_(1)
        return seed

    @torch.jit.unused
    def forward(
        self, features: Tensor, labels: Tensor, classifier: Classifier | None = None
    ) -> Tensor:
        self.check_initialized()
        self._check_inputs(features, labels, classifier)
        self._warn_if_frozen()
        if self.training and self.has_state:
            *_, state = self.buffers()
            check_first_pass(state, type(self).__name__)
        features = savable(features)
        # There is no autocast for the device "meta".
        with torch.autocast("cpu" if features.is_meta else features.device.type, enabled=False):
            losses = self._losses(features, labels, classifier)
            # a caller's weight may be a tensor, which learns
            terms = [
                (1.0, w * x) if isinstance(w, Tensor) else (w, x) for w, x in losses.terms.values()
            ]
            dtype = torch.promote_types(features.dtype, torch.float32)
            # in new memory: if the caller changes the loss in place, the terms keep their values
            weight, loss = terms[0] if terms else (1.0, features.new_zeros((), dtype=dtype))
            if len(terms) == 1 or weight != 1:
                loss = weight * loss
            for weight, term in terms[1:]:
                loss = torch.add(loss, term, alpha=weight)
            loss = loss.to(dtype)
        parts = losses.terms | {key: (1.0, value) for key, value in losses.logs.items()}
        self._terms = {key: (weight, value.detach()) for key, (weight, value) in parts.items()}
        return loss

    def _losses(self, features: Tensor, labels: Tensor, classifier: Classifier | None) -> Losses:
        request, losses = self.plan(features, labels, classifier)
        if request is None:
            return losses(None)
        (moments,) = class_statistics(
            features, labels, self.num_classes, [request], self.ignore_index
        )
        return losses(self.reduce(moments, request))

    def _warn_if_frozen(self) -> None:
        if not self.training or self._frozen_told or torch.compiler.is_compiling():
            return
        parameters = [*self.parameters()]
        if not parameters or any(parameter.requires_grad for parameter in parameters):
            return
        self._frozen_told = True
        warnings.warn(
            f"{type(self).__name__}: its parameters are frozen and do not learn. peft freezes all "
            "parameters of a model: attach the method after get_peft_model, or name it in "
            'modules_to_save=["regularizer"]',
            stacklevel=3,
        )

    def __prepare_scriptable__(self) -> Regularizer:
        if self.attachment is None:
            return self
        raise RuntimeError(
            f"torch.jit.script: {type(self).__name__} is no TorchScript: detach() it from the "
            "model, or use torch.export or torch.jit.trace"
        )

    def reduce(self, moments: ClassMoments, request: Request) -> ClassMoments:
        """Reduce over the ranks. Statistics per image stay local: batches may differ in size."""
        return moments if request.per_image else reduce_moments(moments, self.process_group)

    def _check_inputs(
        self, features: Tensor, labels: Tensor, classifier: Classifier | None
    ) -> None:
        name = type(self).__name__
        check_features(name, features)
        if features.shape[1] != self.dim:
            fail(name, "features", f"{self.dim} channels, as dim", f"shape {tuple(features.shape)}")
        check_labels(name, labels, features)
        if self.check_labels:
            check_label_values(name, labels, self.num_classes, self.ignore_index)
        if any(hasattr(parameter, "placements") for parameter in self.parameters()):
            expected = (
                "parameters that are not sharded after the model's forward: call fully_shard on "
                "the model without reshard_after_forward=True"
            )
            fail(name, "state", expected, "DTensors")
        state_tensor = next(itertools.chain(self.buffers(), self.parameters()), None)
        if state_tensor is not None and state_tensor.device != features.device:
            fail(name, "features", f"device {state_tensor.device}, as the module", features.device)
        if self.training and self.has_state and in_transform(features):
            raise RuntimeError(
                f"{name}: torch.func's transforms cannot update its state: first call eval() on "
                'it, and use anchorops.use_backend("reference")'
            )
        if self.uses_classifier and classifier is None:
            fail(name, "classifier", "the model's classifier or its weight", None)
