"""Histograms of the errors of softmax probabilities, and the Lovász losses, functions of them. The
slope of a loss in the errors of each bin gives its gradient. The errors of hinges.py are hinges."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference
from .._backend import FUSED, select
from .._checks import check_axes
from .._moments import statistics_dtype
from .registration import Gradient, define, library, run
from .triton_launch import launcher


def _histograms_fake(
    logits: Tensor, labels: Tensor, bins: int, ignore_index: int, align_corners: bool
) -> Tensor:
    """Logits (B, K, h, w) of any strides, labels (B, H, W) of any integer dtype and strides."""
    return logits.new_empty((logits.shape[1], 2, bins), dtype=torch.int64)


define(
    "probability_histograms",
    "(Tensor logits, Tensor labels, int bins, SymInt ignore_index, bool align_corners) -> Tensor",
    _histograms_fake,
    triton=launcher("probability_histograms"),
    any_strides=True,
)


def results_of(counts: Tensor, edges: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """counts [K, 2, n] of pixels of the class and of others, in bins between edges [n + 1]: the
    losses, float64 [K], by the trapezoid rule; their slopes [K, 2, n] in the error of a pixel, of
    this dtype; and the number of pixels of each class, int64 [K]."""
    class_counts, others = counts.double().unbind(1)
    total = class_counts.sum(-1, keepdim=True)
    # with e ≥ the bin's edge
    f, n = (x.flip(-1).cumsum(-1).flip(-1) for x in (class_counts, others))
    jaccard = (f + n) / (total + n).clamp(min=1)
    next_jaccard = F.pad(jaccard[:, 1:], (0, 1))
    losses = ((jaccard + next_jaccard) / 2 * edges.diff()).sum(-1)
    # F, N of the higher bins; union = G + N, before and after the others of this bin
    f, n = f - class_counts, n - others
    union, next_union = (total + n).clamp(min=1), (total + n + others).clamp(min=1)
    class_slope = (1 / next_union + 1 / union) / 2
    other_slope = (2 * (total - f) - class_counts) / (2 * union * next_union)
    # without pixels of the class the loss is the largest error
    largest = torch.where((n == 0) & (others > 0), 1 / others.clamp(min=1), 0)
    other_slope = torch.where(total > 0, other_slope, largest)
    slopes = torch.stack([class_slope, other_slope], 1).to(dtype)
    return losses, slopes, counts[:, 0].sum(-1)


def _setup_context(ctx: Any, inputs: Any, results: Any) -> None:
    ctx.mark_non_differentiable(results.slopes, results.counts)
    ctx.save_for_backward(inputs.logits, inputs.labels, results.slopes)
    ctx.options = inputs.ignore_index, inputs.align_corners


def _backward(operator: Any, ctx: Any, grads: Any) -> dict[str, Tensor | None]:
    if grads.losses is None:
        return {}
    logits, labels, slopes = ctx.saved_tensors
    slopes = (slopes * grads.losses[:, None, None]).to(slopes.dtype)
    return {"logits": operator(logits, labels, slopes, *ctx.options)}


GRADIENT = Gradient(
    "(Tensor logits, Tensor labels, Tensor slopes, SymInt ignore_index, bool align_corners) "
    "-> Tensor",
    _setup_context,
    _backward,
    triton=launcher("error_loss_backward"),
    function="Lovasz",
)


def _losses(backend: str, logits: Tensor, labels: Tensor, bins: int, *options: Any) -> Any:
    if backend == "reference":
        counts = reference.probability_histograms(logits, labels, bins, *options)
    else:
        counts = run("probability_histograms", backend, logits, labels, bins, *options)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=counts.device)
    return results_of(counts, edges, statistics_dtype(logits.dtype))


def _fake(logits: Tensor, labels: Tensor, bins: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    counts = logits.new_empty((logits.shape[1], 2, bins), dtype=torch.int64)
    slopes = torch.empty_like(counts, dtype=statistics_dtype(logits.dtype))
    return counts.new_empty(len(counts), dtype=torch.float64), slopes, counts[:, 0, 0].clone()


define(
    "error_loss",
    "(Tensor logits, Tensor labels, int bins, SymInt ignore_index, bool align_corners) "
    "-> (Tensor losses, Tensor slopes, Tensor counts)",
    _fake,
    backends=(*FUSED, "reference"),
    gradient=GRADIENT,
    in_python=_losses,
    any_strides=True,
)
library.impl(
    "error_loss_backward.reference", reference.error_gradients, "CompositeExplicitAutograd"
)


def _refusal(logits: Tensor, backend: str) -> str | None:
    volume = backend != "reference" and logits.dim() == 5
    return "it supports no volumes that are upsampled" if volume else None


def error_losses(
    logits: Tensor, labels: Tensor, bins: int, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """The losses of the classes of a softmax, float64 [K], and the pixels of each, int64 [K]."""
    called, refusal = ("probability_histograms",), partial(_refusal, logits)
    backend = select("Lovasz", logits, logits.shape[1], called=called, refusal=refusal)
    check_axes("Lovasz", logits, labels.shape[1:])
    arguments = logits, labels, bins, ignore_index, align_corners
    losses, _, counts = run("error_loss", backend, *arguments)
    return losses, counts


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
