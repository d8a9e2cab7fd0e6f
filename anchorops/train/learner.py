"""The network with its losses, as one module: what DDP wraps and torch.compile sees."""

import ast
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anchorops as ao

from ..losses import Regularizer
from .digits import IGNORED
from .models import Segmenter

CLASSES = {"cr": "SAR", "sar": "SAR", "cbp": "CBP", "occl": "OCCL", "ceco": "CeCo", "mvsc": "MVSC"}


def class_weights(kind: str, frequencies: Tensor) -> Tensor | None:
    """Weights [K] of mean 1 from the classes' shares f [K] of the pixels: "inverse-sqrt", 1/√f;
    "median", median(f)/f; None for "none". A class without pixels has 1."""
    if kind == "none":
        return None
    seen = frequencies[frequencies > 0]
    power = 0.5 if kind == "inverse-sqrt" else 1.0
    weights = torch.ones_like(frequencies)
    weights[frequencies > 0] = seen.pow(-power) / seen.pow(-power).mean()
    return weights.float()


class PixelCrossEntropy(nn.Module):
    """Cross-entropy of the valid pixels; logits (B, K, h, w) are upsampled bilinearly to the labels
    (B, H, W), int64.

    L = Σ w_y·ce / Σ w_y over the valid pixels, 0 where there are none. With `ohem` only over those
    whose true class has a probability below it, and in any case over the `kept` hardest.
    """

    weights: Tensor | None

    def __init__(
        self, weights: Tensor | None = None, ohem: float | None = None, kept: int = 100_000
    ) -> None:
        super().__init__()
        self.register_buffer("weights", weights, persistent=False)
        self.ohem, self.kept = ohem, kept

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = F.interpolate(
            logits.float(), labels.shape[1:], mode="bilinear", align_corners=False
        )
        valid = labels != IGNORED
        if self.ohem is not None:
            valid = self._hard(logits.detach(), labels, valid)
            labels = torch.where(valid, labels, IGNORED)
        total = F.cross_entropy(logits, labels, self.weights, ignore_index=IGNORED, reduction="sum")
        if self.weights is None:
            return total / valid.sum().clamp(min=1)
        weight = torch.where(valid, self.weights[torch.where(valid, labels, 0)], 0).sum()
        return total / weight.clamp(min=torch.finfo(weight.dtype).tiny)

    def _hard(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        assert self.ohem is not None
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        loss = torch.where(valid, loss, -1.0)
        hardest = loss.flatten().topk(min(self.kept, loss.numel())).values[-1]
        return valid & (loss >= hardest.clamp(max=-math.log(self.ohem)))


def build_regularizer(
    methods: Sequence[str],
    options: Mapping[str, str],
    num_classes: int,
    dim: int,
    prior: Tensor | None = None,
) -> Regularizer | None:
    """The methods as one regulariser, None if there are none.

    options: {"sar.momentum": "0.99"}; values as in Python, anything else is a string.
    prior: [K], share of training images that contain each class, for CeCo.
    Raises ValueError for an option that no chosen method has.
    """
    arguments: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for option, text in options.items():
        method, _, argument = option.partition(".")
        if method not in arguments:
            raise ValueError(
                f"--method-options {option}: expected METHOD.ARGUMENT with a METHOD among "
                f"--methods {' '.join(methods)}"
            )
        known = inspect.signature(getattr(ao, CLASSES[method])).parameters
        if argument not in known:
            raise ValueError(
                f"--method-options {option}: {method} has {', '.join(list(known)[2:])}"
            )
        try:
            arguments[method][argument] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            arguments[method][argument] = text
    if "cr" in arguments:
        arguments["cr"]["embed"] = False
    if "ceco" in arguments:
        arguments["ceco"].setdefault("prior", prior)
    try:
        regularizers = [
            getattr(ao, CLASSES[method])(num_classes, dim, **kwargs)
            for method, kwargs in arguments.items()
        ]
    except TypeError as error:
        raise ValueError(f"--method-options: a value of the wrong type: {error}") from error
    return ao.Combined(*regularizers) if len(regularizers) > 1 else next(iter(regularizers), None)


class Learner(nn.Module):
    """Images and labels to the loss and its parts; auxiliary_weight: of the cross-entropy of the
    model's auxiliary head, where it has one."""

    def __init__(
        self,
        model: Segmenter,
        regularizer: Regularizer | None,
        cross_entropy: PixelCrossEntropy | None = None,
        auxiliary_weight: float = 0.4,
    ) -> None:
        super().__init__()
        self.model, self.auxiliary_weight = model, auxiliary_weight
        self.cross_entropy = cross_entropy or PixelCrossEntropy()
        self.attachment = None if regularizer is None else ao.attach(model, regularizer)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.cross_entropy(self.model(images), labels)
        terms = {"ce": loss.detach()}
        if self.model.auxiliary is not None:
            auxiliary = self.cross_entropy(self.model.auxiliary.logits(), labels)
            loss = loss + self.auxiliary_weight * auxiliary
            terms["auxiliary"] = self.auxiliary_weight * auxiliary.detach()
        if self.attachment is not None:
            loss = loss + self.attachment(labels)
            terms |= self.attachment.terms
        return loss, {"loss": loss.detach(), **terms}


def parameter_groups(model: Segmenter, lr: float, weight_decay: float, head_lr_factor: float):
    """Groups for an optimizer: no weight decay on vectors (biases, normalisation), another rate
    for everything outside the backbone."""
    inside = {id(parameter) for parameter in model.backbone.parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (id(parameter) in inside, parameter.dim() > 1)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr if in_backbone else lr * head_lr_factor,
            "weight_decay": weight_decay if is_matrix else 0.0,
        }
        for (in_backbone, is_matrix), parameters in groups.items()
    ]


def build_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    return torch.optim.AdamW(groups)
