"""What the checks compare: calls of public functions (`our_…` where they need more than one), and
the same by torch's functions, in any floating dtype.

z: logits, y: labels, −1 is ignored; f: features, a: anchors.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anchorops as ao

from .._backend import CUDA_BACKENDS, select
from .._ops.split_groups import split_groups
from .._ops.upsampled_sums import upsampled_sums

Inputs = tuple[Tensor, ...]


def upsampled(z: Tensor, y: Tensor, align: bool) -> Tensor:
    """Logits at the size of the labels."""
    if z.dim() < 4:
        return z
    mode = "bilinear" if z.dim() == 4 else "trilinear"
    return F.interpolate(z, y.shape[1:], mode=mode, align_corners=align)


def pixels(z: Tensor, y: Tensor, align: bool) -> tuple[Tensor, Tensor, Tensor]:
    """log p [N, K], label and image of the valid pixels."""
    z = upsampled(z, y, align).movedim(1, -1)
    image = torch.arange(len(y), device=y.device).view(-1, *(1,) * (y.dim() - 1)).expand_as(y)
    return z[y >= 0].log_softmax(-1), y[y >= 0], image[y >= 0]


def cross_entropy(
    z: Tensor,
    y: Tensor,
    v: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    ohem_threshold: float | None = None,
    ohem_min_kept: int | None = None,
    align: bool = False,
) -> Tensor:
    """The formula of ao.CrossEntropy; `ohem_threshold` and `ohem_min_kept` without the rest."""
    log_p, label, _ = pixels(z, y, align)
    c = -log_p.gather(1, label[:, None])[:, 0]
    w = torch.ones_like(log_p[0]) if weight is None else weight.to(log_p)
    loss = (1 - label_smoothing) * w[label] * c - label_smoothing / len(w) * (log_p * w).sum(1)
    share = torch.ones_like(c) if v is None else v[y >= 0]
    if ohem_threshold is not None:
        share = share * (c.exp() * ohem_threshold >= 1)
    if ohem_min_kept is not None:
        share = share * (c >= c.topk(ohem_min_kept).values[-1])
    return (share * (1 - (-c).exp()) ** focal_gamma * loss).sum() / (share * w[label]).sum()


def dice(
    z: Tensor, y: Tensor, *, squared: bool = False, per_image: bool = False, align: bool = False
) -> Tensor:
    log_p, label, image = pixels(z, y, align)
    p, one_hot = log_p.exp(), F.one_hot(label, log_p.shape[1]).to(log_p)
    rows = image if per_image else torch.zeros_like(image)

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(len(y) if per_image else 1, x.shape[1]).index_add(0, rows, x)

    counts = total(one_hot)
    scores = 2 * total(p * one_hot) / (total(p**2 if squared else p) + counts)
    return (1 - scores)[counts > 0].mean()


def lovasz(z: Tensor, y: Tensor, *, align: bool = False) -> Tensor:
    """The mean of the classes that are present, from sorted errors."""
    log_p, label, _ = pixels(z, y, align)
    losses = []
    for k in label.unique():
        p, is_class = log_p[:, k].exp(), label == k
        errors, order = torch.where(is_class, 1 - p, p).sort(descending=True)
        in_class = is_class[order].to(p).cumsum(0)
        others = (~is_class[order]).to(p).cumsum(0)
        jaccard = 1 - (in_class[-1] - in_class) / (in_class[-1] + others)
        losses.append((errors * jaccard.diff(prepend=jaccard.new_zeros(1))).sum())
    return torch.stack(losses).mean()


def with_dice(
    z: Tensor, y: Tensor, *, squared: bool = False, per_image: bool = False, **options: Any
) -> Tensor:
    align = options.get("align", False)
    of_regions = dice(z, y, squared=squared, per_image=per_image, align=align)
    return cross_entropy(z, y, **options) + of_regions


def loss_of_pixels(z: Tensor, y: Tensor, *, align: bool = False) -> Tensor:
    return F.cross_entropy(upsampled(z, y, align), y, ignore_index=-1, reduction="none")


def binary(z: Tensor, y: Tensor, *, pos_weight: float) -> Tensor:
    z = upsampled(z, y[:, 0], False)
    loss = partial(F.binary_cross_entropy_with_logits, reduction="none")
    weight = torch.as_tensor(pos_weight, dtype=z.dtype, device=z.device)
    return loss(z, y.clamp(min=0).to(z), pos_weight=weight)[y >= 0].mean()


def our_divergence(s: Tensor, t: Tensor, valid: Tensor, **options: Any) -> Tensor:
    return ao.pixel_kl_divergence(s, t, valid.shape[1:], valid=valid, **options)


def divergence(
    s: Tensor, t: Tensor, valid: Tensor, *, temperature: float, reduction: str = "mean"
) -> Tensor:
    s, t = (upsampled(x, valid, False).movedim(1, -1) for x in (s, t.detach()))
    s, t = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    divergences = temperature**2 * (t.exp() * (t - s)).sum(-1)
    return divergences[valid].mean() if reduction == "mean" else divergences * valid


def logits_at(classes: Tensor, z: Tensor, y: Tensor, align: bool) -> Tensor:
    """Predicted classes may differ where two logits are almost equal: the logits then do not."""
    return upsampled(z.double(), y, align).gather(1, classes[:, None])[:, 0]


def argmax(z: Tensor, y: Tensor, *, align: bool) -> Tensor:
    z = z.detach()
    return logits_at(ao.pixel_argmax(z, y.shape[1:], align_corners=align), z, y, align)


def predictions(z: Tensor, y: Tensor, *, align: bool) -> tuple[Tensor, Tensor]:
    size, z = y.shape[1:], z.detach()
    classes, confidence = ao.pixel_argmax(z, size, align_corners=align, confidence=True)
    return logits_at(classes, z, y, align), confidence


def amax(z: Tensor, y: Tensor, *, align: bool) -> Tensor:
    return upsampled(z.detach(), y, align).amax(1)


def largest(z: Tensor, y: Tensor, *, align: bool) -> tuple[Tensor, Tensor]:
    return amax(z, y, align=align), upsampled(z.detach(), y, align).softmax(1).amax(1)


def our_statistics(z: Tensor, y: Tensor) -> Inputs:
    options = {"squares": True, "pixel_losses": True, "ignore_index": -1}
    m = ao.ops.softmax_moments(z, y, **options)
    results = (m.correct, m.losses, m.intersections, m.probability_sums, m.squares, m.pixel_losses)
    return tuple(x for x in results if x is not None)


def statistics(z: Tensor, y: Tensor) -> Inputs:
    log_p, label, _ = pixels(z, y, False)
    p, one_hot = log_p.exp(), F.one_hot(label, log_p.shape[1]).to(log_p)
    sums = -(log_p * one_hot).sum(0), (p * one_hot).sum(0), p.sum(0), (p**2).sum(0)
    return confusion(z, y).diagonal(), *sums, loss_of_pixels(z, y)


def confusion(z: Tensor, y: Tensor) -> Tensor:
    return pairs(upsampled(z.detach(), y, False).argmax(1), y, num_classes=z.shape[1])


def pairs(classes: Tensor, y: Tensor, *, num_classes: int) -> Tensor:
    k = num_classes
    return torch.bincount((y * k + classes)[y >= 0], minlength=k * k).view(k, k)


def mix32(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


def split_keys(key: Tensor, groups: int, seed: int) -> Tensor:
    """key·groups + group: the rank of a pixel's hash in its key, modulo the number of groups."""
    pixel = torch.arange(key.numel(), device=key.device)
    hashes = mix32(mix32(pixel ^ mix32(torch.full_like(pixel, seed))) ^ mix32(pixel * 0))
    order = torch.argsort((key.flatten() << 32) | hashes)
    sorted_keys = key.flatten()[order]
    rank = pixel - torch.searchsorted(sorted_keys, sorted_keys)
    return key * groups + torch.empty_like(rank).scatter(0, order, rank % groups).view_as(key)


def our_groups(keys: Tensor, counts: Tensor, *, groups: int, seed: int) -> Inputs:
    backend = select("split_groups", keys, len(counts), backends=CUDA_BACKENDS)
    return split_groups(keys, counts, groups, seed, backend=backend)


def groups(keys: Tensor, counts: Tensor, *, groups: int, seed: int) -> Inputs:
    k, valid = len(counts), keys >= 0
    split = split_keys(torch.where(valid, keys.long(), k), groups, seed)
    new_counts = torch.bincount(split[valid], minlength=k * groups).view(k, groups)
    return torch.where(valid, split, -1), new_counts


def our_sums(f: Tensor, y: Tensor, *, num_classes: int) -> Inputs:
    options = {"per_image": True, "upsample": True, "ignore_index": -1}
    return upsampled_sums(f, y, num_classes, **options)


def sums(f: Tensor, y: Tensor, *, num_classes: int) -> Inputs:
    """Counts and sums of the classes of each image, mean and variance of the channels."""
    x = F.interpolate(f, y.shape[1:], mode="bilinear", align_corners=True)
    one_hot = F.one_hot(y + 1, num_classes + 1)[..., 1:].to(f)
    counts, sums = one_hot.sum((1, 2)), torch.einsum("bchw,bhwk->bkc", x, one_hot)
    return counts, sums, f.mean((0, 2, 3)), f.var((0, 2, 3), correction=0)


def moments(
    f: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    *,
    num_classes: int,
    groups: int = 1,
    per_image: bool = False,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """counts, sums and, with anchors a, squared distances."""
    y = F.interpolate(y[:, None].double(), f.shape[2:])[:, 0].long()
    valid, f = y >= 0, f.movedim(1, -1)
    key = y + num_classes * torch.arange(len(y), device=y.device)[:, None, None] * per_image
    keys = num_classes * (len(y) if per_image else 1)
    if groups > 1:
        key = split_keys(torch.where(valid, key, keys), groups, seed)
    x, k = f[valid], key[valid]
    size = (len(y),) * per_image + (num_classes,) + (groups,) * (groups > 1)
    counts = torch.bincount(k, minlength=keys * groups).to(x)
    sums = x.new_zeros(keys * groups, x.shape[1]).index_add(0, k, x)
    results = [counts.view(size), sums.view(*size, -1)]
    if a is not None:
        sqdists = (x - a.to(x)[y[valid]]).square().sum(1)
        results.append(x.new_zeros(keys * groups).index_add(0, k, sqdists).view(size))
    return tuple(results)


def our_moments(f: Tensor, y: Tensor, a: Tensor | None = None, **options: Any) -> Inputs:
    moments = ao.ops.class_moments(f, y, anchors=a, ignore_index=-1, **options)
    return moments[:2] if moments.sqdists is None else (*moments[:2], moments.sqdists)


def finite_sums(moments: Callable[..., Inputs], f: Tensor, y: Tensor, **options: Any) -> Inputs:
    """Counts, which sums are finite, and these."""
    counts, sums = moments(f, y, **options)
    return counts, sums.isfinite(), sums.nan_to_num(0, 0, 0)


def mse(f: Tensor, y: Tensor, a: Tensor) -> Tensor:
    counts, _, sqdists = moments(f, y, a, num_classes=len(a))
    return sqdists.sum() / (f.shape[1] * counts.sum())


def our_info_nce(q: Tensor, k: Tensor, present: Tensor, p: Tensor | None = None) -> Tensor:
    return ao.ops.centroid_info_nce(q, k, positives=p, present=present)


def info_nce(q: Tensor, k: Tensor, present: Tensor, p: Tensor | None = None) -> Tensor:
    rows = q if q.dim() == 3 else q[:, None]
    present = present.view(rows.shape[:2])
    logits = torch.einsum("igd,jd->igj", rows, k) / 0.07
    positive = (rows * (k[:, None] if p is None else p.view_as(rows))).sum(-1, keepdim=True) / 0.07
    others = present.any(1) & ~torch.eye(len(k), dtype=torch.bool, device=k.device)
    logits = logits.masked_fill(~others[:, None], -torch.inf)
    return (torch.cat([positive, logits], -1).logsumexp(-1) - positive[..., 0])[present].mean()


def step(make: Any, f: Tensor, w: Tensor, y: Tensor, exact: bool = False) -> Tensor:
    """The loss of a method, new and always with the same random numbers."""
    with torch.random.fork_rng(devices=[]), ao.use_backend("reference") if exact else nullcontext():
        torch.manual_seed(0)
        method = make(len(w), w.shape[1], ignore_index=-1).to(f.device, f.dtype)
        classifier = nn.Conv2d(w.shape[1], len(w), 1).to(w)
        classifier.weight = nn.Parameter(w.detach())
        return method(f, y, classifier)
