"""The network with its losses, as one module, which DDP wraps and torch.compile compiles."""

from typing import Any

import torch
from torch import Tensor, nn

import anchorops as ao

from ...losses import METHODS, MomentsLoss, Regularizer
from .. import IGNORED
from ..options import Model, expect
from .models import Segmenter, build_model

CLASSES = {"cr": "SAR"} | {name.lower(): name for name in METHODS}


def build_loss(options: Model) -> MomentsLoss:
    """The loss of the logits; its `terms` contain the accuracy."""
    common: dict[str, Any] = {"ignore_index": IGNORED, "accuracy": True}
    dice = ao.Dice(**common)
    if options.loss == "dice":
        return dice
    cross_entropy = ao.CrossEntropy(
        focal_gamma=options.focal_gamma if options.loss == "focal" else 0.0,
        ohem_threshold=options.ohem_threshold,
        ohem_min_kept=options.ohem_min_kept,
        **common,
    )
    return ao.CrossEntropyDice(cross_entropy, dice) if options.loss == "ce+dice" else cross_entropy


def build_regularizer(
    options: Model, num_classes: int, dim: int, prior: Tensor | None = None
) -> Regularizer | None:
    """The methods as one regulariser, or None if there are none. Their arguments are those of the
    preset and the options, which override them.

    prior: [K], the share of the training images that contain each class, for CeCo.
    Raises ValueError for an option that no chosen method has.
    """
    paper, given = options.paper_options or {}, options.method_options or {}
    for name in given:
        among = f"METHOD.ARGUMENT with a METHOD among --model.methods {options.methods}"
        expect(name.partition(".")[0] in options.methods, "model.method_options", among, name)
    chosen = {"cr.embed": False, "ceco.prior": prior, **paper, **given}
    regularizers = []
    for method in options.methods:
        arguments: dict[str, Any] = {"ignore_index": IGNORED}
        for name, value in chosen.items():
            owner, _, argument = name.partition(".")
            if owner == method:
                arguments[argument] = value
        try:
            regularizers.append(getattr(ao, CLASSES[method])(num_classes, dim, **arguments))
        except (ValueError, TypeError) as error:
            raise ValueError(f"--model.method_options {method}: {error}") from error
    return ao.Combined(*regularizers) if len(regularizers) > 1 else next(iter(regularizers), None)


class Learner(nn.Module):
    """The network with its methods. Computes the loss and its parts from images and labels. If the
    network has an auxiliary head, the same loss of its logits is added, times auxiliary_weight."""

    def __init__(
        self, options: Model, num_classes: int, channels: int = 3, prior: Tensor | None = None
    ) -> None:
        super().__init__()
        self.model = build_model(options, num_classes, channels)
        self.pixel_loss = build_loss(options)
        self.auxiliary_weight = options.auxiliary_weight
        dim = self.model.classifier.in_channels
        regularizer = build_regularizer(options, num_classes, dim, prior)
        self.attachment = None if regularizer is None else ao.attach(self.model, regularizer)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.pixel_loss(self.model(images), labels)
        terms = dict(self.pixel_loss.terms)
        if (logits := self.model.auxiliary_logits()) is not None:
            auxiliary = self.auxiliary_weight * self.pixel_loss(logits, labels)
            loss = loss + auxiliary
            terms["auxiliary"] = auxiliary.detach()
        if self.attachment is not None:
            loss = loss + self.attachment(labels)
            terms |= self.attachment.terms
        return loss, {"loss": loss.detach(), **terms}


def build_optimizer(options: Model, model: Segmenter) -> torch.optim.Optimizer:
    """No weight decay on vectors (biases, normalisation), and another learning rate for everything
    outside the backbone and the methods."""
    methods = [module for module in model.modules() if isinstance(module, Regularizer)]
    others = {x for module in (model.backbone, *methods) for x in module.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            rate = options.lr * (1.0 if parameter in others else options.head_lr_factor)
            # a plain float, because the state is loaded with weights_only
            decay = float(options.weight_decay) if parameter.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    listed = [
        {"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
    if options.optimizer == "sgd":
        return torch.optim.SGD(listed, momentum=0.9, fused=True)
    return torch.optim.AdamW(listed, fused=True)


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
