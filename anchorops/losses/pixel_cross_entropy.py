"""Cross-entropy at the labels' resolution, computed from softmax moments."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_choice, check_pixels, check_share, check_strided, describe, fail
from .._moments import Options, SoftmaxMoments, Wanted, statistics_dtype
from .._ops.softmax_moments import moments_of, valid_pixels, weighted
from .._shared.sums import fixed_order_sum
from .._torch_state import shape_of


def pixel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    align_corners: bool = False,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    check_labels: bool = False,
) -> Tensor:
    """Cross-entropy of low-resolution logits, compared with labels at their own size.

    Equal to F.cross_entropy(F.interpolate(logits.float(), labels.shape[1:], mode="bilinear",
    align_corners=align_corners), labels, weight, …), but it never stores the upsampled logits:

        L_q = (1 − ε)·w_y·(−log p_y) + ε/K·Σ_k w_k·(−log p_k),   L = Σ_q L_q / Σ_q w_y for "mean"

    with ε = label_smoothing and w = weight (1 if not given), over the valid pixels q.

    Args:
        logits, labels, ignore_index, align_corners, check_labels: as in `softmax_moments`; K is at
            least 2, because the loss of a single class would always be 0.
        weight: [K], floating, on the logits' device; with label smoothing without a gradient.
        label_smoothing: ε in [0, 1].
        reduction: "mean" as above; "sum"; or "none", one value for each label, 0 if ignored.

    Returns:
        A scalar, or the labels' shape; float32 (float64 for float64 logits). If no pixel is valid,
        or all their classes have weight 0, it is 0 (F.cross_entropy returns NaN).

    Raises:
        ValueError: wrong shape, dtype, device, value or label.
    """
    function = "pixel_cross_entropy"
    original_labels = labels
    labels, ignore_index = check_pixels(
        function, logits, labels, ignore_index, check_labels, align_corners=align_corners
    )
    check_choice(function, "reduction", reduction, ("mean", "sum", "none"))
    label_smoothing = check_share(function, "label_smoothing", label_smoothing)
    if weight is not None:
        check_weight(function, weight, logits)
        if weight.requires_grad and label_smoothing > 0:
            expected = "no gradient with label smoothing (its detach())"
            fail(function, "weight", expected, "requires_grad = True")
        # a copy, because the weight may be changed before the backward pass
        weight = weight.to(statistics_dtype(logits.dtype), copy=True)
    class_weights = smoothed(weight, label_smoothing, logits.shape[1], logits)
    options = Options(*class_weights, ignore_index=ignore_index, align_corners=align_corners)
    if reduction == "none":
        wanted = Wanted(pixel_losses=True)
        losses = moments_of(function, logits, labels, options, wanted).pixel_losses
        assert losses is not None
        if weight is not None and label_smoothing == 0:
            valid = valid_pixels(labels, logits.shape[1], ignore_index)
            losses = weighted(losses, label_weights(labels, weight, valid))
        return losses.view(shape_of(original_labels))
    moments = moments_of(function, logits, labels, options, Wanted())
    divisor = number_of_pixels(moments, weight) if reduction == "mean" else None
    return weighted_loss(moments, weight if label_smoothing == 0 else None, divisor)


def check_weight(function: str, weight: Tensor, logits: Tensor) -> None:
    """weight: [K], floating, on the logits' device."""
    check_strided(function, "weight", weight)
    if not isinstance(weight, Tensor) or weight.shape != logits.shape[1:2]:
        fail(function, "weight", f"a tensor [{logits.shape[1]}]", describe(weight))
    if not weight.is_floating_point() or weight.device != logits.device:
        fail(function, "weight", f"a floating dtype on {logits.device}", describe(weight))


def weighted_loss(
    moments: SoftmaxMoments, weight: Tensor | None, divisor: Divisor | None
) -> Tensor:
    """Σ weight·losses / divisor."""
    losses = moments.losses
    if weight is not None:
        losses = weighted(losses, weight.expand_as(losses))
    return divide(fixed_order_sum(losses), divisor)


Divisor = tuple[Tensor, Tensor | None]
"""A number that is not 0, and whether it is there instead of a 0; None if it cannot be."""


def divisor_or_0(number: Tensor) -> Divisor:
    unused = number == 0
    return torch.where(unused, 1, number), unused


def divide(total: Tensor, divisor: Divisor | None) -> Tensor:
    """total / divisor, 0 where the divisor is 0, also if the total is not; the total if there is no
    divisor."""
    if divisor is None:
        return total
    number, unused = divisor
    return (total if unused is None else torch.where(unused, 0, total)) / number


def number_of_pixels(moments: SoftmaxMoments, weight: Tensor | None = None) -> Divisor:
    """The divisor of the mean: Σ weight·used, or the number of valid pixels but at least 1."""
    counts = moments.counts if moments.used is None else moments.used
    if weight is None and moments.used is None:
        assert moments.divisor is not None
        return moments.divisor, None
    counts = counts.to(moments.losses.dtype)
    return divisor_or_0(fixed_order_sum(counts if weight is None else weight * counts))


def smoothed(
    weight: Tensor | None, label_smoothing: float, num_classes: int, logits: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The options true_weights and all_weights: (1 − ε)·w and ε/K·w, for w = weight, [..., K] or 1.
    None without label smoothing, because then weights apply to the statistics of classes."""
    if label_smoothing == 0:
        return None, None
    if weight is None:
        weight = logits.new_ones(num_classes, dtype=statistics_dtype(logits.dtype))
    return (1 - label_smoothing) * weight, label_smoothing / num_classes * weight


def label_weights(labels: Tensor, weight: Tensor, valid: Tensor) -> Tensor:
    """w_y of each pixel, 0 where it is not valid. weight: [K], or [C, 2] of C sigmoids, whose
    channels are the labels' second axis."""
    if weight.dim() == 1:
        return torch.where(valid, weight[torch.where(valid, labels.long(), 0)], 0)
    channel_weights = weight.view(-1, *(1,) * (labels.dim() - 2), 2).unbind(-1)
    return torch.where(
        valid, torch.where(labels.long() == 1, channel_weights[1], channel_weights[0]), 0
    )
