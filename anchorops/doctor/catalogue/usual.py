"""The formulas that people write, for labels of which none is ignored: what `--benchmark` and the
benchmarks time beside our calls. They upsample in float32, as under autocast, or in float64."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import formulas


def upsampled(x: Tensor, labels: Tensor) -> Tensor:
    """labels: of the pixels, or of each channel."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return formulas.upsampled(x.to(wide), labels.shape[2 - x.dim() :])


def cross_entropy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(upsampled(logits, labels), labels, **options)


def dice(logits: Tensor, labels: Tensor) -> Tensor:
    """An absent class counts as one that was missed."""
    z = upsampled(logits, labels)
    p, one_hot = z.softmax(1), F.one_hot(labels, z.shape[1]).movedim(-1, 1)
    axes = (0, *range(2, z.dim()))
    intersections = (p * one_hot).sum(axes)
    return 1 - (2 * intersections / (p.sum(axes) + one_hot.sum(axes)).clamp(min=1e-7)).mean()


def cross_entropy_dice(logits: Tensor, labels: Tensor) -> Tensor:
    z = upsampled(logits, labels)
    return cross_entropy(z, labels) + dice(z, labels)


def binary_cross_entropy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """labels: of each channel, (B, C, H, W)."""
    z = upsampled(logits, labels)
    return F.binary_cross_entropy_with_logits(z, labels.to(z.dtype), **options)


def mean_kl_divergence(logits: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
    s, t = (upsampled(x, labels).log_softmax(1) for x in (logits, teacher))
    return F.kl_div(s, t, log_target=True, reduction="sum") / labels.numel()


def lovasz(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the classes that are present."""
    z = upsampled(logits, labels)
    p, labels = z.softmax(1).movedim(1, -1).flatten(0, -2), labels.flatten()
    losses = []
    for k in labels.unique():
        is_class = labels == k
        errors = (is_class.to(p.dtype) - p[:, k]).abs()
        losses.append(formulas.sorted_loss(errors, is_class))
    return torch.stack(losses).mean()


def class_centroids(features: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
    """The mean product of the centroids and the anchors."""
    pixels, labels = features.movedim(1, -1).flatten(0, -2).float(), labels.flatten()
    sums = pixels.new_zeros(anchors.shape).index_add(0, labels, pixels)
    centroids = sums / labels.bincount(minlength=len(anchors)).clamp(min=1)[:, None]
    return (centroids * anchors).mean()


def pixel_to_anchor_mse(features: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
    return F.mse_loss(features.movedim(1, -1).float(), anchors[labels].float())


def centroid_info_nce(queries: Tensor, keys: Tensor) -> Tensor:
    own_keys = torch.arange(len(keys), device=keys.device)
    return F.cross_entropy(queries.float() @ keys.float().T / 0.07, own_keys)
