"""Cross-entropy at the labels' resolution, computed from softmax moments."""

import torch
from torch import Tensor

from .._checks import (
    check_choice,
    check_ignore_index,
    check_logits,
    check_share,
    check_strided,
    describe,
    fail,
)
from ..reference import SoftmaxMoments, fixed_order_sum, statistics_dtype
from .softmax_moments import moments_for, unchecked_moments


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
        weight: [K], floating, on the logits' device.
        label_smoothing: ε in [0, 1].
        reduction: "mean" as above; "sum"; or "none", one value for each label, 0 if ignored.

    Returns:
        A scalar, or the labels' shape; float32 (float64 for float64 logits). If no pixel is valid,
        or all their classes have weight 0, it is 0 (F.cross_entropy returns NaN).

    Raises:
        ValueError: wrong shape, dtype, device, value or label.
    """
    function = "pixel_cross_entropy"
    check_logits(function, logits)
    check_choice(function, "reduction", reduction, ("mean", "sum", "none"))
    check_share(function, "label_smoothing", label_smoothing)
    if weight is not None:
        check_weight(function, weight, logits)
        weight = weight.to(statistics_dtype(logits.dtype))
    ignore_index = check_ignore_index(function, ignore_index, logits.shape[1])
    logits = smoothing_dtype(logits, label_smoothing)
    moments = moments_for(
        function,
        logits,
        labels,
        ignore_index=ignore_index,
        align_corners=align_corners,
        pixel_losses=reduction == "none",
        lse=bool(label_smoothing > 0),  # np.float64 gives np.bool_
        check_labels=check_labels,
    )
    uniform = None
    if label_smoothing > 0:
        uniform = uniform_losses(logits, labels, moments, weight, ignore_index, align_corners)
    if reduction == "none":
        weights = pixel_weights(labels, weight, logits, ignore_index)
        assert moments.pixel_losses is not None
        return smoothed(weighted(moments.pixel_losses, weights), uniform, label_smoothing, logits)
    losses, weights = class_losses(moments, weight)
    if uniform is not None:
        uniform = fixed_order_sum(uniform)
    loss = smoothed(fixed_order_sum(losses), uniform, label_smoothing, logits)
    return loss if reduction == "sum" else divide(loss, fixed_order_sum(weights))


def check_weight(function: str, weight: Tensor, logits: Tensor) -> None:
    """weight: [K], floating, on the logits' device."""
    check_strided(function, "weight", weight)
    if not isinstance(weight, Tensor) or weight.shape != logits.shape[1:2]:
        fail(function, "weight", f"a tensor [{logits.shape[1]}]", describe(weight))
    if not weight.is_floating_point() or weight.device != logits.device:
        fail(function, "weight", f"a floating dtype on {logits.device}", describe(weight))


def divide(total: Tensor, weights: Tensor) -> Tensor:
    """total / weights, 0 where weights is 0."""
    return total / torch.where(weights == 0, 1, weights)


def finite_where_unused(values: Tensor, weights: Tensor) -> Tensor:
    """The values, but 0 where one of weight 0 is not finite, because 0 · ∞ would be NaN."""
    return torch.where((weights == 0) & ~values.isfinite(), 0, values)


def weighted(losses: Tensor, weights: Tensor) -> Tensor:
    return weights * finite_where_unused(losses, weights)


def class_losses(moments: SoftmaxMoments, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """w_k·losses[k] and w_k·counts[k]."""
    counts = moments.counts.to(moments.losses.dtype)
    if weight is None:
        return moments.losses, counts
    return weighted(moments.losses, weight.expand_as(counts)), weight * counts


def valid_pixels(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    if labels.dtype in (torch.uint16, torch.uint32, torch.uint64):  # without comparisons in torch
        labels = labels.long()
    return (labels >= 0) & (labels < num_classes) & (labels != ignore_index)


def pixel_weights(
    labels: Tensor, weight: Tensor | None, logits: Tensor, ignore_index: int
) -> Tensor:
    """w_y of each pixel, 0 where ignored; float32 (float64 for float64 logits), labels' shape."""
    valid = valid_pixels(labels, logits.shape[1], ignore_index)
    if weight is None:
        return valid.to(statistics_dtype(logits.dtype))
    return torch.where(valid, weight[torch.where(valid, labels.long(), 0)], 0)


def smoothing_dtype(logits: Tensor, label_smoothing: float) -> Tensor:
    """The logits, converted to float32 if label smoothing is used with half precision: then the
    logits receive two gradients, which are added in float32."""
    return logits.to(statistics_dtype(logits.dtype)) if label_smoothing > 0 else logits


def uniform_losses(
    logits: Tensor,
    labels: Tensor,
    moments: SoftmaxMoments,
    weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
) -> Tensor:
    """Σ_k w_k·(−log p_k) = lse·Σ_k w_k − Σ_k w_k z_k of each pixel, 0 where ignored.

    Upsampling is linear, so Σ_k w_k z_k is one upsampled channel: the lse of a single class.
    """
    assert moments.lse is not None
    mixed = logits
    if weight is not None:  # classes of weight 0 may be masked by −∞
        mixed = weighted(logits, weight.view(-1, *(1,) * (logits.dim() - 2)))
    valid = valid_pixels(labels, logits.shape[1], ignore_index)
    z = unchecked_moments(
        "label smoothing",
        mixed.sum(1, keepdim=True),
        valid.to(torch.int8) - 1,  # class 0, or −1: ignored
        ignore_index=-1,
        align_corners=align_corners,
        lse=True,
    ).lse
    assert z is not None
    return moments.lse * (logits.shape[1] if weight is None else fixed_order_sum(weight)) - z


def smoothed(losses: Tensor, uniform: Tensor | None, share: float, logits: Tensor) -> Tensor:
    if uniform is None:
        return losses
    return (1 - share) * losses + share / logits.shape[1] * uniform
