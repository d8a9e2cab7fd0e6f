"""Histograms of the errors of softmax probabilities, and losses that are functions of them.

A loss is computed from the histograms, with its slope in the errors of each bin. `error_loss`
connects it with the logits: its value is the loss, its gradient that of the slopes. `hinge_loss`
does it for the errors of hinges.py. Both are operators for the sake of torch.export: of an
autograd.Function it keeps the forward pass alone, and the program's loss would have no gradient.
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._backend import FUSED, select
from .._checks import check_axes
from .._moments import statistics_dtype
from .hinges import hinge_gradients
from .registration import Gradient, define, library, like_the_first, run


def _histograms_fake(
    logits: Tensor, labels: Tensor, bins: int, ignore_index: int, align_corners: bool
) -> Tensor:
    """Logits (B, K, h, w) of any strides, labels (B, H, W) of any integer dtype and strides."""
    return logits.new_empty((logits.shape[1], 2, bins), dtype=torch.int64)


def _setup_context(ctx: Any, inputs: Any, results: Any) -> None:
    _, *tensors, ctx.ignore_index, ctx.align_corners = inputs
    ctx.save_for_backward(*tensors)


def _backward(operator: Any, ctx: Any, grads: Any) -> dict[str, Tensor | None]:
    if grads.value is None:
        return {}
    logits, labels, slopes = ctx.saved_tensors
    slopes = slopes * grads.value
    dlogits = operator(logits, labels, slopes, ctx.ignore_index, ctx.align_corners)
    return {"loss": grads.value, "logits": dlogits}


define(
    "probability_histograms",
    "(Tensor logits, Tensor labels, int bins, SymInt ignore_index, bool align_corners) -> Tensor",
    _histograms_fake,
    any_strides=True,
)


def _loss(_: str, loss: Tensor, *__: Any) -> Tensor:
    return loss.clone()


for name, backends, gradients in (
    ("error_loss", (*FUSED, "reference"), reference.error_gradients),
    ("hinge_loss", ("reference",), hinge_gradients),
):
    define(
        name,
        "(Tensor loss, Tensor logits, Tensor labels, Tensor slopes, SymInt ignore_index, "
        "bool align_corners) -> Tensor value",
        like_the_first,
        backends=backends,
        gradient=Gradient(
            "(Tensor logits, Tensor labels, Tensor slopes, SymInt ignore_index, "
            "bool align_corners) -> Tensor",
            _setup_context,
            _backward,
            function="Lovasz",
        ),
        in_python=_loss,
        any_strides=True,
    )
    library.impl(f"{name}_backward.reference", gradients, "CompositeExplicitAutograd")


def probability_histograms(
    function: str,
    logits: Tensor,
    labels: Tensor,
    bins: int,
    *,
    ignore_index: int,
    align_corners: bool,
) -> Tensor:
    """`reference.probability_histograms`, by the selected backend."""
    logits = logits.detach()
    backend = _backend(function, logits)
    if backend == "reference":
        return reference.probability_histograms(logits, labels, bins, ignore_index, align_corners)
    check_axes(function, logits, labels.shape[1:])
    arguments = logits, labels, bins, ignore_index, align_corners
    return run("probability_histograms", backend, *arguments)


def error_loss(
    function: str,
    loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    slopes: Tensor,
    *,
    ignore_index: int,
    align_corners: bool,
) -> Tensor:
    """The loss, a scalar, whose gradient for the logits is that of the slopes [K, 2, bins]."""
    slopes = slopes.to(statistics_dtype(logits.dtype))
    arguments = loss, logits, labels, slopes, ignore_index, align_corners
    return run("error_loss", _backend(function, logits), *arguments)


def hinge_loss(
    loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    slopes: Tensor,
    *,
    ignore_index: int,
    align_corners: bool,
) -> Tensor:
    """`loss` of a channel (B, 1, h, w), with the gradient that `slopes` [2, BINS] of its hinge
    errors give."""
    arguments = loss, logits, labels, slopes.to(loss.dtype), ignore_index, align_corners
    return run("hinge_loss", "reference", *arguments)


def count_labels_out_of_range(labels: Tensor, counts: Tensor, ignore_index: int) -> Tensor:
    """How many labels are neither a class nor ignored, from the number of labels of each class."""
    return labels.numel() - counts.sum() - _number_of(ignore_index, labels)


_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def _number_of(value: int, labels: Tensor) -> Tensor | int:
    """How many labels have this value. Neither they nor the mask are copied in int64."""
    limits = torch.iinfo(labels.dtype)
    if not limits.min <= value <= limits.max:  # it would be converted to another label
        return 0
    if labels.dtype in _SIGNED:  # not every torch compares them: the same bits with a sign
        labels = labels.view(_SIGNED[labels.dtype])
        value -= limits.max + 1 if value > limits.max // 2 else 0
    # row by row, because torch first copies a mask in the dtype of its sum
    return (labels == value).sum(-1, dtype=torch.int32).sum()


def _backend(function: str, logits: Tensor) -> str:
    def refused(backend: str) -> str | None:
        volume = backend != "reference" and logits.dim() == 5
        return "it supports no volumes that are upsampled" if volume else None

    called = ("probability_histograms",)
    return select(function, logits, logits.shape[1], called=called, refusal=refused)
