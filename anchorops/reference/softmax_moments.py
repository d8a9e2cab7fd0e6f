"""Softmax moments of upsampled logits."""

import torch
from torch import Tensor

from .._moments import SMALLEST_MISS, Options, SoftmaxMoments, Wanted, statistics_dtype
from .._shared.sums import sum_by_key
from .._shared.upsampling import upsample


def softmax_moments(
    logits: Tensor, labels: Tensor, options: Options, wanted: Wanted
) -> SoftmaxMoments:
    """The statistics that `SoftmaxMoments` defines, of the losses that `Options` defines.

    logits: (B, K, h, w); labels: (B, H, W); or volumes (B, K, d, h, w) and (B, D, H, W).
    """
    pixel_weights = options.pixel_weights
    dtype = statistics_dtype(logits.dtype)
    (batch, num_classes), size = logits.shape[:2], labels.shape[1:]
    labels = labels.long()
    is_class, ignored = (labels >= 0) & (labels < num_classes), labels == options.ignore_index
    valid = is_class & ~ignored
    classes = torch.where(valid, labels, 0)
    # Ignored pixels are removed by selection, because NaN · 0 would be NaN.
    z = torch.where(valid[:, None], upsample(logits, size, options.align_corners), 0)
    all_lse = z.logsumexp(1)
    label_losses = torch.where(valid, all_lse - z.gather(1, classes[:, None])[:, 0], 0)
    losses, used = label_losses, valid
    if options.true_weights is not None and options.all_weights is not None:
        a, v = (
            x.expand(batch, num_classes).to(z.dtype)
            for x in (options.true_weights, options.all_weights)
        )
        a = a.gather(1, classes.flatten(1)).view_as(classes)
        v = v.reshape(batch, num_classes, *(1,) * len(size))
        # By selection, because 0 · ∞ would be NaN.
        others = torch.where(v == 0, 0, v * (all_lse[:, None] - z))
        losses = torch.where(a == 0, 0, a * losses) + others.sum(1)
    if options.focal_gamma is not None:
        finite = label_losses.isfinite()  # where not, the factor is 1 and has no derivative
        miss = -torch.expm1(-torch.where(finite, label_losses, 1))
        miss = miss.clamp(min=SMALLEST_MISS)
        losses = losses * torch.where(finite, miss**options.focal_gamma, 1)
    if options.selects():
        used = valid & options.is_used(label_losses)
    losses = torch.where(used, losses, 0)
    weighted, shares = losses, used.long()
    if pixel_weights is not None:
        shares = torch.where(used, pixel_weights, 0)
        # An infinite loss adds no gradient of its weight: it could be 0 · ∞.
        finite, constant = losses.isfinite(), shares.detach()
        infinite = constant * torch.where(constant == 0, 0, losses)
        weighted = torch.where(finite, shares * torch.where(finite, losses, 0), infinite)
    image = torch.arange(batch, device=labels.device).view(-1, *(1,) * len(size))
    keys = torch.where(valid, image * num_classes + classes, -1).flatten()

    def by_class(values: Tensor) -> Tensor:
        values = values.double() if values.is_floating_point() else values
        sums = sum_by_key(keys, values.flatten(), batch * num_classes).view(batch, num_classes)
        return over_images(sums)

    def over_images(sums: Tensor) -> Tensor:
        sums = sums if wanted.per_image else sums.sum(0)
        return sums.to(dtype) if sums.is_floating_point() else sums

    intersections = probability_sums = squares = None
    if wanted.probability_sums or wanted.squares:
        p = torch.where(valid[:, None], (z - all_lse[:, None]).exp(), 0)
        if wanted.probability_sums:
            intersections = by_class(p.gather(1, classes[:, None]))
            probability_sums = over_images(p.flatten(2).sum(2))
        if wanted.squares:
            squares = over_images(p.square().flatten(2).sum(2))
    return SoftmaxMoments(
        counts=by_class(valid.long()),
        correct=by_class((valid & (z.argmax(1) == classes)).long()) if wanted.correct else None,
        losses=by_class(weighted),
        intersections=intersections,
        probability_sums=probability_sums,
        squares=squares,
        pixel_losses=losses.to(dtype) if wanted.pixel_losses else None,
        used=by_class(shares) if options.counts_used() else None,
        divisor=valid.sum().clamp(min=1),
        labels_out_of_range=(~is_class & ~ignored).sum() if wanted.labels_out_of_range else None,
    )
