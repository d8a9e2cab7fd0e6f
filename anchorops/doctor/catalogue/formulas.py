"""What our calls are compared with: the same by torch's functions, in any floating dtype, with the
names of our arguments. Labels of −1 are ignored. Random groups alone are those of the reference: a
hash has no second formula."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import reference
from ..._moments import SoftmaxMoments

STATISTICS = SoftmaxMoments._fields[:7]  # those of the classes, and the losses of the pixels


def upsampled(x: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Images or volumes at this size; points."""
    if x.dim() < 4 or x.shape[2:] == size:
        return x
    mode = "bilinear" if x.dim() == 4 else "trilinear"
    return F.interpolate(x, size, mode=mode, align_corners=align_corners)


def statistics(
    logits: Tensor,
    labels: Tensor,
    names: Sequence[str] = STATISTICS,
    *,
    true_weights: Tensor | None = None,
    all_weights: Tensor | None = None,
    pixel_weights: Tensor | None = None,
    min_loss: float = -math.inf,
    focal_gamma: float = 0.0,
    per_image: bool = False,
    align_corners: bool = False,
) -> tuple[Tensor, ...]:
    """The statistics of these names, by masks [B, K, N] of the classes."""
    shape, num_classes = labels.shape, logits.shape[1]
    if logits.dim() == 2:
        logits, labels = logits.t()[None], labels[None]
    labels = labels.flatten(1).long()
    valid = (labels >= 0) & (labels < num_classes)
    true = torch.where(valid, labels, 0)[:, None]
    z = upsampled(logits, shape[1:], align_corners).flatten(2)
    z = torch.where(valid[:, None], z, 0)
    classes = torch.arange(num_classes, device=z.device)[:, None]
    one_hot = (true == classes) & valid[:, None]
    log_p = z.log_softmax(1)
    p = torch.where(valid[:, None], log_p.exp(), 0)
    c = -log_p.gather(1, true)[:, 0]
    used = valid & ~(c < min_loss)
    losses = c
    if true_weights is not None:
        losses = true_weights.to(c).expand(len(c), -1).gather(1, true[:, 0]) * c
    if all_weights is not None:
        losses = losses - (all_weights.to(c).expand(len(c), -1)[..., None] * log_p).sum(1)
    if focal_gamma > 0:
        losses = losses * (-torch.expm1(-c)).clamp(min=2.0**-24) ** focal_gamma
    losses, shares = torch.where(used, losses, 0), used
    weighted = losses
    if pixel_weights is not None:
        shares = torch.where(used, pixel_weights.reshape(used.shape).to(c), 0)
        weighted = shares * torch.where((shares == 0) & ~losses.isfinite(), 0, losses)
    axes = (2,) if per_image else (0, 2)
    moments: dict[str, Callable[[], Tensor]] = {
        "counts": lambda: one_hot.sum(axes),
        "correct": lambda: (one_hot & (z.argmax(1, keepdim=True) == classes)).sum(axes),
        "losses": lambda: torch.where(one_hot, weighted[:, None], 0).sum(axes),
        "intersections": lambda: torch.where(one_hot, p, 0).sum(axes),
        "probability_sums": lambda: p.sum(axes),
        "squares": lambda: p.square().sum(axes),
        "pixel_losses": lambda: losses.view(shape),
        "used": lambda: (one_hot * shares[:, None]).sum(axes),
        "divisor": lambda: valid.sum().clamp(min=1),
    }
    return tuple(moments[name]() for name in names)


def losses_and_used(
    logits: Tensor,
    labels: Tensor,
    w: Tensor,
    pixel_weights: Tensor | None,
    *,
    label_smoothing: float = 0.0,
    ohem_threshold: float | None = None,
    ohem_min_kept: int | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Sums of the losses, and of the weights of the pixels that are used. w: weights of the classes
    [K], or of each image [B, K]."""
    options["true_weights"] = (1 - label_smoothing) * w
    if label_smoothing:
        options["all_weights"] = label_smoothing / logits.shape[1] * w
    if ohem_threshold is not None:
        options["min_loss"] = -math.log(ohem_threshold)
    if ohem_min_kept is not None:  # pixels of weight 0 are removed first
        labels = labels if pixel_weights is None else torch.where(pixel_weights == 0, -1, labels)
        align = options.get("align_corners", False)
        (losses,) = statistics(logits, labels, names=("pixel_losses",), align_corners=align)
        kept = losses.flatten().topk(min(ohem_min_kept, losses.numel())).values[-1].item()
        options["min_loss"] = min(options.get("min_loss", math.inf), kept)
    options["pixel_weights"] = pixel_weights
    return statistics(logits, labels, names=("losses", "used"), **options)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    pixel_weights: Tensor | None = None,
    *,
    weight: Tensor | Sequence[float] | None = None,
    **options: Any,
) -> Tensor:
    """The formula of ao.CrossEntropy."""
    w = torch.ones(logits.shape[1]) if weight is None else torch.as_tensor(weight)
    w = w.to(logits)
    losses, used = losses_and_used(logits, labels, w, pixel_weights, **options)
    return losses.sum() / (used * w).sum()


def loss_of_pixels(
    logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    align_corners: bool = False,
    **options: Any,
) -> Tensor:
    z = upsampled(logits, labels.shape[1:], align_corners)
    weight = None if weight is None else weight.to(z)
    options = {"reduction": "none"} | options
    return F.cross_entropy(z, labels.long(), weight, ignore_index=-1, **options)


def two_classes(logits: Tensor, *maps: Tensor | None) -> tuple[Any, ...]:
    """Each channel as an image whose logits are 0 and its own, and maps of the labels' size."""
    both = torch.stack([torch.zeros_like(logits), logits], 2).flatten(0, 1)
    return both, *(None if x is None else x.flatten(0, 1) for x in maps)


def binary_cross_entropy_of(
    logits: Tensor,
    labels: Tensor,
    pixel_weights: Tensor | None = None,
    *,
    pos_weight: Sequence[float] | float = 1.0,
    **options: Any,
) -> Tensor:
    """The formula of ao.BinaryCrossEntropy."""
    of_ones = torch.as_tensor(pos_weight).to(logits).expand(logits.shape[1])
    w = torch.stack([torch.ones_like(of_ones), of_ones], 1).repeat(len(logits), 1)
    z, y, v = two_classes(logits, labels, pixel_weights)
    losses, used = losses_and_used(z, y, w, v, **options)
    return losses.sum() / used.sum()


def dice(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    smooth: float = 0.0,
    squared: bool = False,
    per_image: bool = False,
    absent: str = "skip",
    weight: Sequence[float] | None = None,
    log: bool = False,
    gamma: float = 1.0,
    sigmoid: bool = False,
    align_corners: bool = False,
) -> Tensor:
    """The formula of ao.Dice."""
    names = ("counts", "intersections", "squares" if squared else "probability_sums")
    z, y = two_classes(logits, labels) if sigmoid else (logits, labels)
    options: dict[str, Any] = {"per_image": per_image or sigmoid, "align_corners": align_corners}
    c, o, m = statistics(z, y, names=names, **options)
    if sigmoid:
        c, o, m = (x[:, 1].view(logits.shape[:2]) for x in (c, o, m))
        c, o, m = (x if per_image else x.sum(0) for x in (c, o, m))
    divisor = o + alpha * (m - o) + beta * (c - o) + smooth
    if absent == "keep":
        scores = (o + smooth) / divisor
    else:  # an absent class has no loss, and no gradient of 0 / 0
        scores = torch.where(c > 0, (o + smooth) / torch.where(c > 0, divisor, 1), 1)
    losses = -scores.log() if log else 1 - scores
    w = torch.ones_like(losses) if weight is None else torch.as_tensor(weight).to(losses)
    w = w * (c > 0) if absent == "skip" else w.expand_as(losses)
    return ((w * losses).sum() / w.sum()) ** gamma


def cross_entropy_dice(
    logits: Tensor,
    labels: Tensor,
    *,
    squared: bool = False,
    per_image: bool = False,
    align_corners: bool = False,
    **options: Any,
) -> Tensor:
    align: dict[str, Any] = {"align_corners": align_corners}
    of_dice: dict[str, Any] = {"squared": squared, "per_image": per_image} | align
    regions = dice(logits, labels, **of_dice)
    return cross_entropy(logits, labels, **align, **options) + regions


def sorted_loss(errors: Tensor, is_class: Tensor) -> Tensor:
    """Σ error·ΔJ of the sorted errors, as in the released code of Berman et al."""
    errors, order = errors.sort(descending=True)
    truth = is_class[order].to(errors.dtype)
    jaccard = 1 - (truth.sum() - truth.cumsum(0)) / (truth.sum() + (1 - truth).cumsum(0))
    return (errors.clamp(min=0) * torch.cat([jaccard[:1], jaccard.diff()])).sum()


def lovasz_of_classes(z: Tensor, labels: Tensor) -> Tensor:
    """The loss of each class [K], of logits at the labels' size. Labels that are no class are
    ignored."""
    valid = (labels >= 0) & (labels < z.shape[1])
    p, labels = z.softmax(1).movedim(1, -1)[valid], labels[valid]
    is_class = [labels == k for k in range(z.shape[1])]
    return torch.stack([sorted_loss((x.to(p) - p[:, k]).abs(), x) for k, x in enumerate(is_class)])


def lovasz(
    logits: Tensor, labels: Tensor, *, per_image: bool = False, align_corners: bool = False
) -> Tensor:
    """The mean of the classes that are present."""
    if per_image:
        images = zip(logits.split(1), labels.split(1), strict=True)
        return torch.stack([lovasz(*image, align_corners=align_corners) for image in images]).mean()
    losses = lovasz_of_classes(upsampled(logits, labels.shape[1:], align_corners), labels)
    return losses[labels[labels >= 0].unique().long()].mean()


def lovasz_of_sigmoids(logits: Tensor, labels: Tensor) -> Tensor:
    """The Lovász hinge, the mean of the channels."""
    z, losses = upsampled(logits, labels.shape[2:]), []
    for k in range(z.shape[1]):
        valid = (labels[:, k] >= 0) & (labels[:, k] < 2)
        x, ones = z[:, k][valid], labels[:, k][valid] == 1
        losses.append(sorted_loss(1 - torch.where(ones, x, -x), ones))
    return torch.stack(losses).mean()


def binary_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    pos_weight: Sequence[float] | float,
    reduction: str = "mean",
) -> Tensor:
    z = upsampled(logits, labels.shape[2:])
    weight = torch.as_tensor(pos_weight).to(z).expand(z.shape[1]).view(-1, 1, 1)
    options: dict[str, Any] = {"pos_weight": weight, "reduction": "none"}
    losses = F.binary_cross_entropy_with_logits(z, labels.clamp(min=0).to(z), **options)
    losses = torch.where(labels >= 0, losses, 0)
    if reduction == "none":
        return losses
    return losses.sum() / ((labels >= 0).sum() if reduction == "mean" else 1)


def kl_divergence(
    logits: Tensor,
    teacher: Tensor,
    valid: Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
    align_corners: bool = False,
) -> Tensor:
    size, both = valid.shape[1:], (logits, teacher.detach())
    pixels = (upsampled(x, size, align_corners) / temperature for x in both)
    s, t = (z.log_softmax(1) for z in pixels)
    divergences = temperature**2 * (t.exp() * (t - s)).sum(1)
    if reduction == "none":
        return torch.where(valid, divergences, 0)
    return divergences[valid].mean() if reduction == "mean" else divergences[valid].sum()


def largest(
    logits: Tensor, labels: Tensor, *, confidence: bool = False, align_corners: bool = False
) -> tuple[Tensor, ...]:
    """The largest logit of each pixel, and the probability of its class."""
    z = upsampled(logits.detach(), labels.shape[1:], align_corners)
    return (z.amax(1), z.softmax(1).amax(1)) if confidence else (z.amax(1),)


def confusion_of_logits(logits: Tensor, labels: Tensor) -> Tensor:
    classes = upsampled(logits.detach(), labels.shape[1:]).argmax(1)
    return confusion(classes, labels, num_classes=logits.shape[1])


def confusion(predictions: Tensor, labels: Tensor, *, num_classes: int) -> Tensor:
    pairs = (labels.long() * num_classes + predictions)[labels >= 0]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def labels_at(labels: Tensor, features: Tensor) -> Tensor:
    """Labels of the features' size, of the nearest ones."""
    if features.dim() < 4:
        return labels.long()
    return F.interpolate(labels[:, None].double(), features.shape[2:])[:, 0].long()


def class_moments(
    features: Tensor,
    labels: Tensor,
    anchors: Tensor | None = None,
    *,
    num_classes: int,
    groups: int = 1,
    per_image: bool = False,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """counts, sums and, with anchors, squared distances."""
    labels = labels_at(labels, features).flatten(1)
    rows = features.flatten(2).transpose(1, 2)
    valid, key = labels >= 0, labels
    if per_image:
        key = labels + num_classes * torch.arange(len(labels), device=labels.device)[:, None]
    keys = num_classes * (len(labels) if per_image else 1)
    if groups > 1:
        counts = torch.bincount(key[valid], minlength=keys)
        key = reference.split_groups(torch.where(valid, key, -1), counts, groups, seed)
    x, k = rows[valid], key[valid]
    size = (len(labels),) * per_image + (num_classes,) + (groups,) * (groups > 1)
    counts = torch.bincount(k, minlength=keys * groups).to(x)
    sums = x.new_zeros(keys * groups, x.shape[1]).index_add(0, k, x)
    results = [counts.view(size), sums.view(*size, -1)]
    if anchors is not None:
        sqdists = (x - anchors.to(x)[labels[valid]]).square().sum(1)
        results.append(x.new_zeros(keys * groups).index_add(0, k, sqdists).view(size))
    return tuple(results)


def class_centroids(
    features: Tensor, labels: Tensor, *, num_classes: int, per_image: bool = False
) -> tuple[Tensor, Tensor]:
    counts, sums = class_moments(features, labels, num_classes=num_classes, per_image=per_image)
    return sums / counts.clamp(min=1)[..., None], counts


def pixel_to_anchor_mse(
    features: Tensor, labels: Tensor, anchors: Tensor, *, reduction: str = "mean"
) -> Tensor:
    counts, _, sqdists = class_moments(features, labels, anchors, num_classes=len(anchors))
    return sqdists.sum() / (features.shape[1] * counts.sum() if reduction == "mean" else 1)


def upsampled_sums(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    per_image: bool = True,
    upsample: bool = True,
) -> tuple[Tensor, ...]:
    """Counts and sums of each class, mean and variance of the channels."""
    pixels = features
    if upsample:
        pixels = upsampled(features, labels.shape[1:], align_corners=True)
    else:
        labels = labels_at(labels, features)
    masks = [labels == k for k in range(num_classes)]
    counts = torch.stack([mask.sum((1, 2)) for mask in masks], 1)
    sums = torch.stack([(pixels * mask[:, None]).sum((2, 3)) for mask in masks], 1)
    if not per_image:
        counts, sums = counts.sum(0), sums.sum(0)
    return counts, sums, features.mean((0, 2, 3)), features.var((0, 2, 3), correction=0)


def centroid_info_nce(
    queries: Tensor,
    keys: Tensor,
    present: Tensor | None = None,
    positives: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    present_keys: Tensor | None = None,
    temperature: float = 0.07,
    reduction: str = "mean",
    normalize: float | None = None,
) -> Tensor:
    """A logit for each query and key; the key of the query's class is replaced by its positive."""
    if normalize is not None:
        queries, keys = (F.normalize(x, dim=-1, eps=normalize) for x in (queries, keys))
        if positives is not None:
            positives = F.normalize(positives, dim=-1, eps=normalize)
    rows = queries if queries.dim() == 3 else queries[:, None]
    here = rows.new_ones(rows.shape[:2]) > 0 if present is None else present.view(rows.shape[:2])
    targets = keys[:, None] if positives is None else positives.view_as(rows)
    positive = (rows * targets).sum(-1, keepdim=True) / temperature
    used = here.any(1) if present_keys is None else present_keys
    others = torch.einsum("igd,jd->igj", rows, keys) / temperature
    if bias is not None:
        positive, others, used = positive + bias[:, None, None], others + bias, bias == bias
    used = used & ~torch.eye(len(keys), dtype=torch.bool, device=keys.device)
    others = others.masked_fill(~used[:, None], -torch.inf)
    losses = torch.cat([positive, others], -1).logsumexp(-1) - positive[..., 0]
    if reduction == "none":
        return torch.where(here, losses, 0).view(queries.shape[:-1])
    total = torch.where(here, losses, 0).sum()
    return total / here.sum().clamp(min=1) if reduction == "mean" else total
