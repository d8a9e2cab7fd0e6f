"""Confusion matrices: how many pixels of each true class are predicted as each class."""

import torch
from torch import Tensor

from .. import reference
from .._backend import select
from .._checks import (
    check_flags,
    check_ignore_index,
    check_int,
    check_integers,
    check_label_values,
    check_pixels,
    check_strided,
    describe,
    fail,
    without_channel,
)
from .._moments import Options, Wanted
from .._torch_state import shape_of
from .pixel_argmax import pixel_argmax
from .registration import define, run
from .softmax_moments import moments_of
from .triton_launch import launcher

MATRIX_CLASSES = 4096  # at most: the matrix then needs 128 MiB


def _fake(predictions: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return predictions.new_empty((num_classes, num_classes), dtype=torch.int64)


# predictions int64, labels of any integer dtype: one shape of up to three axes, any strides.
define(
    "confusion",
    "(Tensor predictions, Tensor labels, SymInt num_classes, SymInt ignore_index) -> Tensor",
    _fake,
    triton=launcher("confusion"),
)


def check_matrix_classes(function: str, argument: str, num_classes: object) -> int:
    way_out = "a binary mask has two; one sigmoid: MeanIoU(1, sigmoid=True), "
    way_out += "pixel_confusion(sigmoid=True)"
    expected = f"2 to {MATRIX_CLASSES} classes ({way_out})"
    return check_int(function, argument, num_classes, expected, 2, MATRIX_CLASSES)


def confusion(
    predictions: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    ignore_index: int | None = None,
    check_labels: bool = False,
) -> Tensor:
    """The number of pixels of true class i that were predicted as class j.

    It only needs the memory of the matrix, also under torch.use_deterministic_algorithms.

    Args:
        predictions: int64, the labels' shape.
        labels: any integer dtype, at least one axis; of images and volumes also with a channel,
            (B, 1, …), that predictions do not have. A pixel is ignored if its label is
            ignore_index or not a class, or if its prediction is not a class.
        num_classes: K, 2 to 4,096.
        ignore_index, check_labels: as in `softmax_moments`.

    Returns:
        int64 [K, K], truth × prediction.

    Raises:
        ValueError: wrong shape, dtype, device, number or label.
    """
    return confusion_for("confusion", predictions, labels, num_classes, ignore_index, check_labels)


def confusion_for(
    function: str,
    predictions: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: int | None,
    check_labels: bool = False,
) -> Tensor:
    """`confusion`, with messages that name `function`."""
    num_classes = check_matrix_classes(function, "num_classes", num_classes)
    check_strided(function, "labels", labels)
    if not isinstance(labels, Tensor) or labels.dim() == 0:
        fail(function, "labels", "a tensor of at least one axis", describe(labels))
    check_integers(function, "labels", labels)
    if isinstance(predictions, Tensor):
        labels = without_channel(labels, predictions.dim())
    check_strided(function, "predictions", predictions)
    if (
        not isinstance(predictions, Tensor)
        or predictions.dtype != torch.int64
        or predictions.shape != labels.shape
        or predictions.device != labels.device
    ):
        expected = f"an int64 tensor of shape {tuple(labels.shape)} on {labels.device}, as labels"
        fail(function, "predictions", expected, describe(predictions))
    ignore_index = check_ignore_index(function, ignore_index, num_classes)
    check_flags(function, check_labels=check_labels)
    if check_labels:
        check_label_values(function, labels, num_classes, ignore_index)
    if labels.dim() > 3:
        predictions, labels = predictions.flatten(2), labels.flatten(2)
    backend = select(function, predictions, num_classes, called=("confusion",))
    if backend == "reference":
        return reference.confusion(predictions, labels, num_classes, ignore_index=ignore_index)
    return run("confusion", backend, predictions, labels, num_classes, ignore_index)


def pixel_confusion(
    logits: Tensor,
    labels: Tensor,
    *,
    sigmoid: bool = False,
    ignore_index: int | None = None,
    align_corners: bool = False,
    check_labels: bool = False,
) -> Tensor:
    """The confusion matrix of low-resolution logits, compared with labels at their own size.

    Equal to confusion(pixel_argmax(logits, labels.shape[1:]), labels, K): it needs memory for the
    predictions, 8 bytes a pixel. Its diagonal is `correct` of `softmax_moments`.

    With sigmoid=True, each channel is a binary problem of its own, with a matrix of its own, as in
    torchmetrics' MultilabelConfusionMatrix; a prediction is positive if its logit is above 0.

    Args:
        logits: (B, K, h, w) or (B, K, d, h, w), as `pixel_argmax`; K at most 4,096. With
            sigmoid=True (B, C, h, w) or another shape of `pixel_binary_cross_entropy`; C at least
            1.
        labels: as in `softmax_moments`, of any size. With sigmoid=True (B, C, H, W), or (B, H, W)
            if C = 1, of 0, 1 and ignored labels; integer or bool.
        sigmoid: as above.
        ignore_index, check_labels: as `confusion`; with sigmoid check_labels is as in
            `pixel_binary_cross_entropy`. align_corners: as in F.interpolate.

    Returns:
        int64 [K, K], truth × prediction; with sigmoid=True [C, 2, 2].

    Raises:
        ValueError: wrong shape, dtype, device, number or label.
    """
    return pixel_confusion_for(
        "pixel_confusion", logits, labels, sigmoid, ignore_index, align_corners, check_labels
    )


def pixel_confusion_for(
    function: str,
    logits: Tensor,
    labels: Tensor,
    sigmoid: bool,
    ignore_index: int | None,
    align_corners: bool,
    check_labels: bool,
) -> Tensor:
    """`pixel_confusion`, with messages that name `function`."""
    check_flags(function, sigmoid=sigmoid)
    flags = {"sigmoid": sigmoid, "points": sigmoid, "align_corners": align_corners}
    labels, ignore_index = check_pixels(
        function, logits, labels, ignore_index, check_labels, **flags
    )
    if sigmoid:
        options = Options(ignore_index=ignore_index, align_corners=align_corners)
        arguments = logits.detach(), labels, options, Wanted(correct=True)
        counts, correct, *_ = moments_of(function, *arguments, sigmoid=True)
        assert correct is not None
        misses = counts - correct
        negative = torch.stack([correct[:, 0], misses[:, 0]], -1)
        positive = torch.stack([misses[:, 1], correct[:, 1]], -1)
        return torch.stack([negative, positive], -2)
    num_classes = shape_of(logits)[1]
    check_matrix_classes(function, "logits", num_classes)
    predictions = pixel_argmax(logits, shape_of(labels)[1:], align_corners=align_corners)
    return confusion(predictions, labels, num_classes, ignore_index=ignore_index)
