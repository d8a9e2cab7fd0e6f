"""Every function, loss, method and metric that takes labels, called with them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import anchorops as ao
from anchorops import diagnostics, plots
from anchorops.losses import METHODS
from anchorops.losses.pixel import PixelLoss

D = 256  # CBP needs as many channels as classes
LOGITS, FEATURES = torch.zeros(2, 300, 4, 6), torch.zeros(2, D, 4, 6)
Call = Callable[..., Any]
LOSSES: dict[str, Callable[..., PixelLoss]] = {
    "CrossEntropy": ao.CrossEntropy,
    "CrossEntropy with focal factors": partial(ao.CrossEntropy, focal_gamma=2.0),
    "CrossEntropy of hard pixels": partial(ao.CrossEntropy, ohem_threshold=0.2),
    "CrossEntropy of the hardest": partial(ao.CrossEntropy, ohem_min_kept=10),
    "Dice": ao.Dice,
    "Dice per image": partial(ao.Dice, per_image=True),
    "CrossEntropyDice": ao.CrossEntropyDice,
    "Lovasz": ao.Lovasz,
}
SIGMOIDS: dict[str, Callable[..., PixelLoss]] = {
    "BinaryCrossEntropy": ao.BinaryCrossEntropy,
    "Dice of sigmoids": partial(ao.Dice, sigmoid=True),
    "Lovasz of sigmoids": partial(ao.Lovasz, sigmoid=True),
    "CrossEntropyDice of sigmoids": lambda **options: ao.CrossEntropyDice(
        dice=ao.Dice(sigmoid=True), **options
    ),
}


def of_logits(call: Call) -> Call:
    return lambda k, y, **options: call(LOGITS[:, :k], y, **options)


def of_features(call: Call) -> Call:
    return lambda k, y, **options: call(FEATURES, y, k, **options)


def of_loss(make: Callable[..., PixelLoss]) -> Call:
    return of_logits(lambda x, y, **options: make(**options)(x, y))


def of_method(make: Callable[..., Any]) -> Call:
    return lambda k, y, **options: make(k, D, **options)(FEATURES, y, torch.eye(k, D))


# Calls of a number of classes, labels (2, H, W) and options; the first word is that of messages.
OF_LABELS: dict[str, Call] = {
    "class_moments": of_features(ao.ops.class_moments),
    "class_centroids": of_features(ao.class_centroids),
    "pixel_to_anchor_mse": lambda k, y, **options: ao.pixel_to_anchor_mse(
        FEATURES, y, torch.eye(k, D), **options
    ),
    "pixel_cross_entropy": of_logits(ao.pixel_cross_entropy),
    "softmax_moments": of_logits(ao.ops.softmax_moments),
    "pixel_confusion": of_logits(ao.pixel_confusion),
    "confusion": lambda k, y, **options: ao.confusion(0 * y.long(), y, k, **options),
    "MeanIoU": lambda k, y, **options: ao.MeanIoU(k, **options).update(LOGITS[:, :k], y),
    "MeanIoU of maps": lambda k, y, **options: ao.MeanIoU(k, **options).update(0 * y.long(), y),
    "CalibrationError": lambda k, y, **options: diagnostics.CalibrationError(k, **options).update(
        LOGITS[:, :k], y
    ),
    **{name: of_loss(make) for name, make in LOSSES.items()},
    **{name: of_method(method) for name, method in METHODS.items()},
    "CeCo": of_method(partial(ao.CeCo, reduced_dim=2)),
    "Combined": of_method(
        lambda *sizes, **options: ao.Combined(
            ao.OCCL(*sizes, **options), ao.MVSC(*sizes, **options)
        )
    ),
}
# These have no argument check_labels.
UNCHECKED: dict[str, Call] = {
    "CentroidGeometry": lambda k, y, **options: diagnostics.CentroidGeometry(
        k, D, **options
    ).update(FEATURES, y),
    "LabelImbalance": lambda k, y, **options: diagnostics.LabelImbalance(k, **options).update(y),
    "features_with_anchors": lambda k, y, **options: plots.features_with_anchors(
        FEATURES, y, torch.eye(k, D), **options
    ),
}


def of_a_sigmoid(call: Call) -> Call:
    return lambda k, y, **options: call(LOGITS[:, :1], y[:, None], **options)


# Of one channel, whose classes are two.
OF_SIGMOIDS: dict[str, Call] = {
    "pixel_binary_cross_entropy": of_a_sigmoid(ao.pixel_binary_cross_entropy),
    "pixel_confusion of sigmoids": of_a_sigmoid(partial(ao.pixel_confusion, sigmoid=True)),
    "MeanIoU of sigmoids": of_a_sigmoid(
        lambda x, y, **options: ao.MeanIoU(1, sigmoid=True, **options).update(x, y)
    ),
    "MeanIoU of masks": of_a_sigmoid(
        lambda x, y, **options: ao.MeanIoU(1, sigmoid=True, **options).update(0 * y.long(), y)
    ),
    "CalibrationError of a sigmoid": of_a_sigmoid(
        lambda x, y, **options: diagnostics.CalibrationError(1, sigmoid=True, **options).update(
            x, y
        )
    ),
    **{
        name: of_a_sigmoid(lambda x, y, make=make, **options: make(**options)(x, y))
        for name, make in SIGMOIDS.items()
    },
}
