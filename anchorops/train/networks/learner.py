"""The network with its losses, as one module, which DDP wraps and torch.compile compiles.

Vectors for the methods come from files: `--model.method_options '{sar.anchors: "@clip.npy"}'`. They
are in the state of a run too, so one that goes on does not need the file.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import anchorops as ao

from ...losses import METHODS, MomentsLoss, Regularizer
from .. import IGNORED
from ..options import PUBLISHED, Model
from .models import Segmenter, build_model

CLASSES = {"cr": "SAR"} | {name.lower(): name for name in METHODS}

# The published weights of OCCL and CeCo are for a backbone from ImageNet. With random weights their
# gradient on the features is several times that of the cross-entropy (docs/methods.md).
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    PUBLISHED: {},
    "from-scratch": {
        "occl.centroid_weight": 0.1,
        "occl.category_weight": 0.03,
        "ceco.loss_weight": 0.2,
    },
}


def arguments_of(
    methods: Sequence[str],
    setting: str,
    paper: Mapping[str, Any],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """METHOD.ARGUMENT and its value: those of the paper for this network, which the setting
    overrides, for the chosen methods; and the options, which override both."""
    known = {**paper, **SETTINGS[setting]}
    chosen = {name: value for name, value in known.items() if name.partition(".")[0] in methods}
    return {**chosen, **options}


def class_weights(kind: str, frequencies: Tensor) -> Tensor | None:
    """Weights [K] with mean 1, from the classes' shares f [K] of the pixels: "inverse-sqrt", 1/√f;
    "inverse", 1/f; None for "none". A class without pixels has weight 1."""
    if kind == "none":
        return None
    seen = frequencies[frequencies > 0]
    power = 0.5 if kind == "inverse-sqrt" else 1.0
    weights = torch.ones_like(frequencies)
    weights[frequencies > 0] = seen.pow(-power) / seen.pow(-power).mean()
    return weights.float()


def build_loss(options: Model, weights: Tensor | None = None) -> MomentsLoss:
    """The loss of the logits; its `terms` contain the accuracy. weights: [K], of the classes."""
    common: dict[str, Any] = {"ignore_index": IGNORED, "accuracy": True}
    if options.loss == "dice":
        return ao.Dice(weight=weights, **common)
    cross_entropy = ao.CrossEntropy(
        weights,
        focal_gamma=options.focal_gamma if options.loss == "focal" else 0.0,
        ohem_threshold=options.ohem_threshold,
        ohem_min_kept=options.ohem_min_kept,
        **common,
    )
    if options.loss == "ce+dice":
        return ao.CrossEntropyDice(cross_entropy, ao.Dice(weight=weights, **common))
    return cross_entropy


def build_regularizer(
    methods: Sequence[str],
    options: Mapping[str, Any],
    num_classes: int,
    dim: int,
    prior: Tensor | None = None,
) -> Regularizer | None:
    """The methods as one regulariser, or None if there are none.

    options: {"sar.momentum": 0.99}. The arguments that are vectors [K, D] (SAR's and CR's anchors,
        CBP's init) accept "@FILE.npy".
    prior: [K], the share of the training images that contain each class, for CeCo.
    Raises ValueError for an option that no chosen method has, and for a file that does not fit.
    """
    arguments: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for option, value in options.items():
        method, _, argument = option.partition(".")
        if method not in arguments:
            raise ValueError(
                f"--model.method_options {option}: expected METHOD.ARGUMENT with a METHOD among "
                f"--model.methods {list(methods)}"
            )
        # without num_classes and dim, which are those of the data and of the network
        known = list(inspect.signature(getattr(ao, CLASSES[method])).parameters)[2:]
        if argument not in known:
            raise ValueError(f"--model.method_options {option}: {method} has {', '.join(known)}")
        if isinstance(value, str) and value.startswith("@"):
            value = _read_vectors(option, Path(value[1:]))
        arguments[method][argument] = value
    if "cr" in arguments:
        arguments["cr"]["embed"] = False
    if "ceco" in arguments:
        arguments["ceco"].setdefault("prior", prior)
    for method_arguments in arguments.values():
        method_arguments.setdefault("ignore_index", IGNORED)
    regularizers = [
        getattr(ao, CLASSES[method])(num_classes, dim, **kwargs)
        for method, kwargs in arguments.items()
    ]
    return ao.Combined(*regularizers) if len(regularizers) > 1 else next(iter(regularizers), None)


def _read_vectors(option: str, path: Path) -> Tensor:
    """float32 from a file of numpy.save. No code in the file is run."""
    try:
        rows = torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise ValueError(
            f"--model.method_options {option}: {path} cannot be read: {error}"
        ) from error
    if not rows.is_floating_point() or not rows.float().isfinite().all():
        raise ValueError(
            f"--model.method_options {option}: {path}: expected finite floating-point numbers"
        )
    return rows.float()


class Learner(nn.Module):
    """Computes the loss and its parts from images and labels.

    pixel_loss: the loss of the logits; cross-entropy if not given. If the model has an auxiliary
    head, the same loss of its logits is added, times auxiliary_weight.
    """

    def __init__(
        self,
        model: Segmenter,
        regularizer: Regularizer | None,
        pixel_loss: MomentsLoss | None = None,
        auxiliary_weight: float = 0.4,
    ) -> None:
        super().__init__()
        self.model, self.auxiliary_weight = model, auxiliary_weight
        self.pixel_loss = pixel_loss or build_loss(Model())
        self.auxiliary_loss = copy.deepcopy(self.pixel_loss)
        self.auxiliary_loss.accuracy = False
        self.attachment = None if regularizer is None else ao.attach(model, regularizer)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.pixel_loss(self.model(images), labels)
        terms = dict(self.pixel_loss.terms)
        if (head := self.model.auxiliary) is not None:
            auxiliary = self.auxiliary_loss(head.logits(), labels)
            loss = loss + self.auxiliary_weight * auxiliary
            terms["auxiliary"] = self.auxiliary_weight * auxiliary.detach()
        if self.attachment is not None:
            loss = loss + self.attachment(labels)
            terms |= self.attachment.terms
        return loss, {"loss": loss.detach(), **terms}


def parameter_groups(
    model: Segmenter,
    lr: float,
    weight_decay: float,
    head_lr_factor: float,
):
    """Parameter groups for an optimizer: no weight decay on vectors (biases, normalisation), and
    another learning rate for everything outside the backbone and the methods."""
    methods = [module for module in model.modules() if isinstance(module, Regularizer)]
    others = {x for module in (model.backbone, *methods) for x in module.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            rate = lr * (1.0 if parameter in others else head_lr_factor)
            decay = weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def build_optimizer(options: Model, model: Segmenter) -> torch.optim.Optimizer:
    groups = parameter_groups(model, options.lr, options.weight_decay, options.head_lr_factor)
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, fused=True)


def set_learning_rates(
    optimizer: torch.optim.Optimizer, options: Model, step: int, steps: int
) -> float:
    """Linear warm-up, then polynomial decay to zero; step: the number of steps before. Returns the
    rate of the first group."""
    warmup = min(1.0, (step + 1) / options.warmup) if options.warmup else 1.0
    factor = warmup * max(0.0, 1 - step / steps) ** options.power
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return optimizer.param_groups[0]["lr"]


def build_learner(
    options: Model, num_classes: int, channels: int, frequencies: Tensor, prior: Tensor
) -> Learner:
    """The network with its methods and losses."""
    model = build_model(options, num_classes, channels)
    arguments = arguments_of(
        options.methods, options.setting, options.paper_options or {}, options.method_options or {}
    )
    dim = model.classifier.in_channels
    regularizer = build_regularizer(options.methods, arguments, num_classes, dim, prior)
    loss = build_loss(options, class_weights(options.class_weights, frequencies))
    return Learner(model, regularizer, loss, options.auxiliary_weight)
