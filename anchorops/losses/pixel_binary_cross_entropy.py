"""Binary cross-entropy at the labels' resolution, computed from softmax moments."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_choice, check_pixels, check_pos_weight
from .._moments import Options, Wanted, as_scalar, statistics_dtype
from .._ops.softmax_moments import moments_of, valid_pixels, weighted
from .pixel_cross_entropy import label_weights, number_of_pixels, smoothed, weighted_loss


def pixel_binary_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    pos_weight: Tensor | Sequence[float] | float | None = None,
    ignore_index: int | None = None,
    align_corners: bool = False,
    reduction: str = "mean",
    check_labels: bool = False,
) -> Tensor:
    """Binary cross-entropy of low-resolution logits, compared with labels at their own size.

    Equal to F.binary_cross_entropy_with_logits(F.interpolate(logits.float(), labels.shape[-2:],
    mode="bilinear", align_corners=align_corners), labels.float(), pos_weight=…), but it never
    stores the upsampled logits, and labels can be ignored:

        L_q = −w·y·log σ(z) − (1 − y)·log(1 − σ(z)),   L = Σ_q L_q / #{q} for "mean"

    with w = pos_weight (1 if not given), over the valid labels q of all channels.

    Args:
        logits: (B, C, h, w), any strides, for C independent channels, at least 1; (N, C), (B, C, N)
            or (B, C, d, h, w). float32, bfloat16, float16 or float64.
        labels: (B, C, H, W) of any size, or (B, H, W) if C = 1; of other logits their shape. 0, 1
            or ignored; any integer dtype, or bool.
        pos_weight: a number of at least 0, or one for each channel: a tensor [C], (C, 1, 1) or
            (1, C, 1, 1), on the logits' device, without a gradient; or an array or a sequence,
            which is copied to the device in each call.
        ignore_index, align_corners: as in `softmax_moments`; labels other than 0 and 1 are ignored.
        reduction: "mean" as above; "sum"; or "none", one value for each label, 0 if ignored.
        check_labels: raise an error if a label is not 0, 1 or ignore_index, or if there are labels
            0 and 255 alone and 255 is ignored, as in masks of 0 and 255 that need `mask > 0`; this
            synchronises with the device.

    Returns:
        A scalar, or the labels' shape; float32 (float64 for float64 logits). If no label is valid,
        it is 0.

    Raises:
        ValueError: wrong shape, dtype, device, value or label.
    """
    function = "pixel_binary_cross_entropy"
    original_labels = labels
    flags = {"sigmoid": True, "align_corners": align_corners}
    labels, ignore_index = check_pixels(
        function, logits, labels, ignore_index, check_labels, **flags
    )
    check_choice(function, "reduction", reduction, ("mean", "sum", "none"))
    weight = None
    if pos_weight is not None:
        weight = class_weights(check_pos_weight(function, pos_weight, logits), logits)
    options = Options(ignore_index=ignore_index, align_corners=align_corners)
    wanted = Wanted(pixel_losses=reduction == "none")
    moments = moments_of(function, logits, labels, options, wanted, sigmoid=True)
    if moments.pixel_losses is not None:
        losses = moments.pixel_losses
        if weight is not None:
            valid = valid_pixels(labels, 2, ignore_index)
            losses = weighted(losses, label_weights(labels, weight, valid))
        return losses.view(original_labels.shape)
    divisor = number_of_pixels(moments) if reduction == "mean" else None
    return weighted_loss(moments, weight, divisor)


def class_weights(pos_weight: Tensor | float, logits: Tensor) -> Tensor:
    """(1, pos_weight): [2], or [C, 2] if it has a number for each channel; in the statistics'
    dtype."""
    dtype = statistics_dtype(logits.dtype)
    if not isinstance(pos_weight, Tensor):
        pos_weight = as_scalar(pos_weight, logits)
    pos_weight = pos_weight.to(dtype)
    pos_weight = pos_weight if pos_weight.numel() > 1 else pos_weight.view(())
    return torch.stack([torch.ones_like(pos_weight), pos_weight], -1)


def binary_smoothed(
    weight: Tensor | None, label_smoothing: float, logits: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """`smoothed`, of the images of sigmoids."""
    weights = smoothed(weight, label_smoothing, 2, logits)
    if weights[0] is None or weights[0].dim() == 1:
        return weights
    batch = 1 if logits.dim() == 2 else logits.shape[0]
    return weights[0].repeat(batch, 1), weights[1].repeat(batch, 1)
