"""Losses of other libraries that are computed from softmax moments, without upsampled logits.

docs/loss-map.md says which losses they equal; the tests compare them. Logits are (B, K, h, w) of
low resolution, labels (B, H, W) of any size.
"""

from typing import Any

import torch
from torch import Tensor

import anchorops as ao


def soft_confusion(
    logits: Tensor, labels: Tensor, sigmoid: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """True positives, false positives, false negatives and true negatives of each image and class,
    (B, K), counted with probabilities. The sigmoid of x is the softmax of (0, x)."""
    if not sigmoid:
        m: Any = ao.ops.softmax_moments(logits, labels, per_image=True)
        total = m.counts.sum(1, keepdim=True)
        tp, tn = m.intersections, total - m.probability_sums - m.counts + m.intersections
        return tp, m.probability_sums - tp, m.counts - tp, tn
    pairs = torch.stack([torch.zeros_like(logits), logits], 2).flatten(0, 1)
    m: Any = ao.ops.softmax_moments(pairs, labels.flatten(0, 1), per_image=True)
    counts, probability_sums, intersections = (
        x.view(*logits.shape[:2], 2) for x in (m.counts, m.probability_sums, m.intersections)
    )
    tn, tp = intersections.unbind(2)
    return tp, probability_sums[..., 1] - tp, counts[..., 1] - tp, tn


def mcc(tp: Tensor, fp: Tensor, fn: Tensor, tn: Tensor, smooth: float = 0.0) -> Tensor:
    """Matthews correlation (Abhishek & Hamarneh, doi 10.1109/ISBI48211.2021.9433782)."""
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return 1 - (tp * tn - fp * fn) / (product + smooth).sqrt()


def generalized_dice(
    logits: Tensor,
    labels: Tensor,
    sigmoid: bool = False,
    power: float = 2,
    batch: bool = False,
    smooth: float = 1e-5,
) -> Tensor:
    """Sudre et al., arXiv 1707.03237: classes are weighted by 1/count². As in MONAI, absent classes
    have the largest weight of the others."""
    tp, fp, fn, _ = soft_confusion(logits, labels, sigmoid)
    if batch:
        tp, fp, fn = (x.sum(0, keepdim=True) for x in (tp, fp, fn))
    weight = (tp + fn).detach() ** -power
    weight = weight.masked_fill(weight.isinf(), 0)
    weight = weight.where(weight > 0, weight.amax(1, keepdim=True))
    numerator, denominator = (weight * tp).sum(1), (weight * (2 * tp + fp + fn)).sum(1)
    return (1 - (2 * numerator + smooth) / (denominator + smooth)).mean()


def wasserstein_dice(
    logits: Tensor, labels: Tensor, distances: Tensor, smooth: float = 1e-5
) -> Tensor:
    """Fidon et al., arXiv 1707.00478: one call for the pixels of each class."""
    errors = right = torch.zeros((), device=logits.device)
    for k, distance in enumerate(distances):
        m: Any = ao.ops.softmax_moments(logits, labels.where(labels == k, 255), per_image=True)
        error = m.probability_sums @ distance.to(m.probability_sums)
        errors, right = errors + error, right + (m.counts[:, k] - error) * (k > 0)
    return (1 - (2 * right + smooth) / (2 * right + errors + smooth)).mean()


def unified_focal(
    logits: Tensor,
    labels: Tensor,
    weight: float = 0.5,
    gamma: float = 0.5,
    delta: float = 0.7,
    eps: float = 1e-7,
) -> Tensor:
    """Yeung et al., arXiv 2102.04525, asymmetric, of one channel."""
    losses = ao.pixel_binary_cross_entropy(logits, labels, reduction="none")
    background = (1 - delta) * (1 - (-losses).exp()) ** gamma * losses
    focal = torch.where(labels == 1, delta * losses, background).mean() / 2
    tp, fp, fn, tn = soft_confusion(logits, labels, sigmoid=True)
    inside = 1 - (tp + eps) / (tp + delta * fn + (1 - delta) * fp + eps)
    outside = 1 - (tn + eps) / (tn + delta * fp + (1 - delta) * fn + eps)
    tversky = (outside + inside ** (1 - gamma)).mean() / 2
    return weight * focal + (1 - weight) * tversky


def normalized_focal(logits: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    """Focal loss of one channel, divided by the sum of the focal factors (arXiv 1909.07829)."""
    losses = ao.pixel_binary_cross_entropy(logits, labels, reduction="none")
    factors = (1 - (-losses).exp()) ** gamma
    return (factors * losses).mean() / factors.sum()


def reduced_focal(
    logits: Tensor, labels: Tensor, gamma: float = 2.0, threshold: float = 0.5
) -> Tensor:
    """Focal loss of one channel, whose factor is 1 below the threshold (arXiv 1903.01347)."""
    losses = ao.pixel_binary_cross_entropy(logits, labels, reduction="none")
    p = (-losses).exp()
    return (torch.where(p < threshold, 1, ((1 - p) / threshold) ** gamma) * losses).mean()


def skeleton_recall(
    logits: Tensor, skeletons: Tensor, batch: bool = False, smooth: float = 1.0
) -> Tensor:
    """Kirchhoff et al., arXiv 2404.03010: the recall of each class but 0 on a map of skeletons,
    which has the class of a pixel on the (widened) skeleton of the labels, and 0 elsewhere."""
    m: Any = ao.ops.softmax_moments(logits, skeletons, per_image=not batch)
    recalls = (m.intersections + smooth) / (m.counts + smooth)
    return 1 - recalls[..., 1:].mean()


def dice_of_all_classes(logits: Tensor, labels: Tensor, eps: float = 1e-3) -> Tensor:
    """One score for all classes of an image (mmsegmentation)."""
    m: Any = ao.ops.softmax_moments(logits, labels, per_image=True, squares=True)
    intersections, squares, counts = (x.sum(1) for x in (m.intersections, m.squares, m.counts))
    return (1 - 2 * intersections / (squares + counts + 2 * eps)).mean()


def balanced_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of one channel, where each class has the share of the other one as weight
    (PIDNet's boundaries)."""
    pairs = torch.cat([torch.zeros_like(logits), logits], 1)
    m: Any = ao.ops.softmax_moments(pairs, labels.squeeze(1), probability_sums=False)
    return (m.losses * m.counts.flip(0)).sum() / m.counts.sum() ** 2
