"""anchorops-doctor --verify: does each backend compute, on this device, what the package promises?

A check calls public functions, on tensors that lie between NaN, and compares values and gradients
with torch's functions in float64. An error may be twice that of torch's functions in float32, plus
2⁻²⁰ of the largest number; a gradient in half precision may be rounded once more. A second call
must give the same bits. Only the methods have no formula here: they are compared with themselves in
float64, by the backend `reference`.

Each check names the one operator that it tests, or is of a composition. What is wrong can be taken
out of "auto": `report` prints how.
"""

import json
import multiprocessing
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anchorops as ao

from ._backend import (
    CUDA_BACKENDS,
    NAMES,
    NOT_AUTO,
    OPERATORS,
    TRITON_ON_HOST,
    excluded,
    select,
    unusable,
)
from ._ops.kth_largest import kth_largest
from ._ops.split_groups import split_groups
from ._ops.upsampled_sums import upsampled_sums
from .measure import cuda_graph, environment

FLOOR = 2.0**-20
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MOST_WORKERS = 8  # processes that compile Triton's kernels
COMPOSITION = "composition"
Inputs = tuple[Tensor, ...]


class Check(NamedTuple):
    """`ours` and `formula` are called with the inputs, and return a tensor or several."""

    operator: str  # of _backend.OPERATORS, or COMPOSITION
    name: str
    inputs: Inputs  # on the CPU; those of floating dtypes have gradients
    ours: Callable[..., Any]
    formula: Callable[..., Any]
    quick: bool = True  # also without --all, by Triton
    floor: float = FLOOR  # of the limit
    parts: tuple[str, ...] = ()  # the operators of a composition


class Row(NamedTuple):
    """What a check found. `error` and `limit` are relative to the largest number."""

    operator: str  # or COMPOSITION, or "environment"
    backend: str
    check: str
    error: float
    limit: float
    right: bool | None  # None: not checked, for the reason in `note`, or not served by the backend
    note: str
    seconds: float
    parts: tuple[str, ...] = ()

    def __str__(self) -> str:
        unchecked = "not checked" if self.note else "not served"
        found = {True: "ok", False: "WRONG", None: unchecked}[self.right]
        numbers = " " * 18 if self.right is None else f"{self.error:9.1e}{self.limit:9.1e}"
        start = f"{self.operator:<23}{self.backend:<10}{self.check:<52}"
        return f"{start}{numbers}  {self.note + ' ' if self.note else ''}{found}"


def _random(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _labels(size: Sequence[int], num_classes: int, random: torch.Generator) -> Tensor:
    """Squares of one class and single pixels; a tenth is ignored, −1. The last class is absent."""
    present = max(num_classes - 1, 2)
    coarse = [-(-n // 6) for n in size[1:]]
    labels = torch.randint(present, (size[0], *coarse), generator=random)
    for axis, n in enumerate(size[1:], 1):
        labels = labels.repeat_interleave(6, axis).narrow(axis, 0, n)
    draw = torch.rand(tuple(size), generator=random)
    single = torch.randint(present, tuple(size), generator=random)
    return torch.where(draw < 0.1, -1, torch.where(draw < 0.3, single, labels))


def _in_layout(x: Tensor, layout: str) -> Tensor:
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "cropped":
        return F.pad(x.float(), (3, 2, 1, 1)).to(x.dtype)[..., 1:-1, 3:-2]
    return x


def _between_nan(x: Tensor, device: torch.device) -> Tensor:
    """x, with its strides, on the device; before, after and between its numbers are NaN or 0."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    fill = torch.nan if x.is_floating_point() else 0
    buffer = torch.full((extent + 128,), fill, dtype=x.dtype, device=device)
    return buffer.as_strided(x.shape, x.stride(), 64).copy_(x)


def _upsampled(z: Tensor, y: Tensor, align: bool) -> Tensor:
    """Logits at the size of the labels."""
    if z.dim() < 4:
        return z
    mode = "bilinear" if z.dim() == 4 else "trilinear"
    return F.interpolate(z, y.shape[1:], mode=mode, align_corners=align)


def _pixels(z: Tensor, y: Tensor, align: bool) -> tuple[Tensor, Tensor, Tensor]:
    """log p [N, K], label and image of the valid pixels."""
    z = _upsampled(z, y, align).movedim(1, -1)
    image = torch.arange(len(y), device=y.device).view(-1, *(1,) * (y.dim() - 1)).expand_as(y)
    return z[y >= 0].log_softmax(-1), y[y >= 0], image[y >= 0]


def _cross_entropy(
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
    log_p, label, _ = _pixels(z, y, align)
    c = -log_p.gather(1, label[:, None])[:, 0]
    w = torch.ones_like(log_p[0]) if weight is None else weight.to(log_p)
    loss = (1 - label_smoothing) * w[label] * c - label_smoothing / len(w) * (log_p * w).sum(1)
    share = torch.ones_like(c) if v is None else v[y >= 0]
    if ohem_threshold is not None:
        share = share * (c.exp() * ohem_threshold >= 1)
    if ohem_min_kept is not None:
        share = share * (c >= c.topk(ohem_min_kept).values[-1])
    return (share * (1 - (-c).exp()) ** focal_gamma * loss).sum() / (share * w[label]).sum()


def _dice(
    z: Tensor, y: Tensor, *, squared: bool = False, per_image: bool = False, align: bool = False
) -> Tensor:
    log_p, label, image = _pixels(z, y, align)
    p, one_hot = log_p.exp(), F.one_hot(label, log_p.shape[1]).to(log_p)
    rows = image if per_image else torch.zeros_like(image)

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(len(y) if per_image else 1, x.shape[1]).index_add(0, rows, x)

    counts = total(one_hot)
    scores = 2 * total(p * one_hot) / (total(p**2 if squared else p) + counts)
    return (1 - scores)[counts > 0].mean()


def _lovasz(z: Tensor, y: Tensor, *, align: bool = False) -> Tensor:
    """The mean of the classes that are present, from sorted errors."""
    log_p, label, _ = _pixels(z, y, align)
    losses = []
    for k in label.unique():
        p, is_class = log_p[:, k].exp(), label == k
        errors, order = torch.where(is_class, 1 - p, p).sort(descending=True)
        in_class = is_class[order].to(p).cumsum(0)
        others = (~is_class[order]).to(p).cumsum(0)
        jaccard = 1 - (in_class[-1] - in_class) / (in_class[-1] + others)
        losses.append((errors * jaccard.diff(prepend=jaccard.new_zeros(1))).sum())
    return torch.stack(losses).mean()


def _with_dice(
    z: Tensor, y: Tensor, *, squared: bool = False, per_image: bool = False, **options: Any
) -> Tensor:
    align = options.get("align", False)
    dice = _dice(z, y, squared=squared, per_image=per_image, align=align)
    return _cross_entropy(z, y, **options) + dice


def _loss_of_pixels(z: Tensor, y: Tensor, *, align: bool = False) -> Tensor:
    return F.cross_entropy(_upsampled(z, y, align), y, ignore_index=-1, reduction="none")


def _binary(z: Tensor, y: Tensor, *, pos_weight: float) -> Tensor:
    z = _upsampled(z, y[:, 0], False)
    loss = partial(F.binary_cross_entropy_with_logits, reduction="none")
    weight = torch.as_tensor(pos_weight, dtype=z.dtype, device=z.device)
    return loss(z, y.clamp(min=0).to(z), pos_weight=weight)[y >= 0].mean()


def _our_divergence(s: Tensor, t: Tensor, valid: Tensor, **options: Any) -> Tensor:
    return ao.pixel_kl_divergence(s, t, valid.shape[1:], valid=valid, **options)


def _divergence(
    s: Tensor, t: Tensor, valid: Tensor, *, temperature: float, reduction: str = "mean"
) -> Tensor:
    s, t = (_upsampled(x, valid, False).movedim(1, -1) for x in (s, t.detach()))
    s, t = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    divergences = temperature**2 * (t.exp() * (t - s)).sum(-1)
    return divergences[valid].mean() if reduction == "mean" else divergences * valid


def _logits_at(classes: Tensor, z: Tensor, y: Tensor, align: bool) -> Tensor:
    """Predicted classes may differ where two logits are almost equal: the logits then do not."""
    return _upsampled(z.double(), y, align).gather(1, classes[:, None])[:, 0]


def _argmax(z: Tensor, y: Tensor, *, align: bool) -> Tensor:
    z = z.detach()
    return _logits_at(ao.pixel_argmax(z, y.shape[1:], align_corners=align), z, y, align)


def _predictions(z: Tensor, y: Tensor, *, align: bool) -> tuple[Tensor, Tensor]:
    size, z = y.shape[1:], z.detach()
    classes, confidence = ao.pixel_argmax(z, size, align_corners=align, confidence=True)
    return _logits_at(classes, z, y, align), confidence


def _amax(z: Tensor, y: Tensor, *, align: bool) -> Tensor:
    return _upsampled(z.detach(), y, align).amax(1)


def _largest(z: Tensor, y: Tensor, *, align: bool) -> tuple[Tensor, Tensor]:
    return _amax(z, y, align=align), _upsampled(z.detach(), y, align).softmax(1).amax(1)


def _our_statistics(z: Tensor, y: Tensor) -> Inputs:
    options = {"squares": True, "pixel_losses": True, "ignore_index": -1}
    m = ao.ops.softmax_moments(z, y, **options)
    results = (m.correct, m.losses, m.intersections, m.probability_sums, m.squares, m.pixel_losses)
    return tuple(x for x in results if x is not None)


def _statistics(z: Tensor, y: Tensor) -> Inputs:
    log_p, label, _ = _pixels(z, y, False)
    p, one_hot = log_p.exp(), F.one_hot(label, log_p.shape[1]).to(log_p)
    sums = -(log_p * one_hot).sum(0), (p * one_hot).sum(0), p.sum(0), (p**2).sum(0)
    return _confusion(z, y).diagonal(), *sums, _loss_of_pixels(z, y)


def _confusion(z: Tensor, y: Tensor) -> Tensor:
    return _pairs(_upsampled(z.detach(), y, False).argmax(1), y, num_classes=z.shape[1])


def _pairs(classes: Tensor, y: Tensor, *, num_classes: int) -> Tensor:
    k = num_classes
    return torch.bincount((y * k + classes)[y >= 0], minlength=k * k).view(k, k)


def _mix32(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


def _split(key: Tensor, groups: int, seed: int) -> Tensor:
    """key·groups + group: the rank of a pixel's hash in its key, modulo the number of groups."""
    pixel = torch.arange(key.numel(), device=key.device)
    hashes = _mix32(_mix32(pixel ^ _mix32(torch.full_like(pixel, seed))) ^ _mix32(pixel * 0))
    order = torch.argsort((key.flatten() << 32) | hashes)
    sorted_keys = key.flatten()[order]
    rank = pixel - torch.searchsorted(sorted_keys, sorted_keys)
    return key * groups + torch.empty_like(rank).scatter(0, order, rank % groups).view_as(key)


def _our_groups(keys: Tensor, counts: Tensor, *, groups: int, seed: int) -> Inputs:
    backend = select("split_groups", keys, len(counts), operators=CUDA_BACKENDS)
    return split_groups(keys, counts, groups, seed, backend=backend)


def _groups(keys: Tensor, counts: Tensor, *, groups: int, seed: int) -> Inputs:
    k, valid = len(counts), keys >= 0
    split = _split(torch.where(valid, keys.long(), k), groups, seed)
    new_counts = torch.bincount(split[valid], minlength=k * groups).view(k, groups)
    return torch.where(valid, split, -1), new_counts


def _our_sums(f: Tensor, y: Tensor, *, num_classes: int) -> Inputs:
    options = {"per_image": True, "upsample": True, "ignore_index": -1}
    return upsampled_sums(f, y, num_classes, **options)


def _sums(f: Tensor, y: Tensor, *, num_classes: int) -> Inputs:
    """Counts and sums of the classes of each image, mean and variance of the channels."""
    x = F.interpolate(f, y.shape[1:], mode="bilinear", align_corners=True)
    one_hot = F.one_hot(y + 1, num_classes + 1)[..., 1:].to(f)
    counts, sums = one_hot.sum((1, 2)), torch.einsum("bchw,bhwk->bkc", x, one_hot)
    return counts, sums, f.mean((0, 2, 3)), f.var((0, 2, 3), correction=0)


def _moments(
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
        key = _split(torch.where(valid, key, keys), groups, seed)
    x, k = f[valid], key[valid]
    size = (len(y),) * per_image + (num_classes,) + (groups,) * (groups > 1)
    counts = torch.bincount(k, minlength=keys * groups).to(x)
    sums = x.new_zeros(keys * groups, x.shape[1]).index_add(0, k, x)
    results = [counts.view(size), sums.view(*size, -1)]
    if a is not None:
        sqdists = (x - a.to(x)[y[valid]]).square().sum(1)
        results.append(x.new_zeros(keys * groups).index_add(0, k, sqdists).view(size))
    return tuple(results)


def _our_moments(f: Tensor, y: Tensor, a: Tensor | None = None, **options: Any) -> Inputs:
    moments = ao.ops.class_moments(f, y, anchors=a, ignore_index=-1, **options)
    return moments[:2] if moments.sqdists is None else (*moments[:2], moments.sqdists)


def _finite_sums(moments: Callable[..., Inputs], f: Tensor, y: Tensor, **options: Any) -> Inputs:
    """Counts, which sums are finite, and these."""
    counts, sums = moments(f, y, **options)
    return counts, sums.isfinite(), sums.nan_to_num(0, 0, 0)


def _mse(f: Tensor, y: Tensor, a: Tensor) -> Tensor:
    counts, _, sqdists = _moments(f, y, a, num_classes=len(a))
    return sqdists.sum() / (f.shape[1] * counts.sum())


def _our_info_nce(q: Tensor, k: Tensor, present: Tensor, p: Tensor | None = None) -> Tensor:
    return ao.ops.centroid_info_nce(q, k, positives=p, present=present)


def _info_nce(q: Tensor, k: Tensor, present: Tensor, p: Tensor | None = None) -> Tensor:
    rows = q if q.dim() == 3 else q[:, None]
    present = present.view(rows.shape[:2])
    logits = torch.einsum("igd,jd->igj", rows, k) / 0.07
    positive = (rows * (k[:, None] if p is None else p.view_as(rows))).sum(-1, keepdim=True) / 0.07
    others = present.any(1) & ~torch.eye(len(k), dtype=torch.bool, device=k.device)
    logits = logits.masked_fill(~others[:, None], -torch.inf)
    return (torch.cat([positive, logits], -1).logsumexp(-1) - positive[..., 0])[present].mean()


def _step(make: Any, f: Tensor, w: Tensor, y: Tensor, exact: bool = False) -> Tensor:
    """The loss of a method, new and always with the same random numbers."""
    with torch.random.fork_rng(devices=[]), ao.use_backend("reference") if exact else nullcontext():
        torch.manual_seed(0)
        method = make(len(w), w.shape[1], ignore_index=-1).to(f.device, f.dtype)
        classifier = nn.Conv2d(w.shape[1], len(w), 1).to(w)
        classifier.weight = nn.Parameter(w.detach())
        return method(f, y, classifier)


class Images(NamedTuple):
    name: str
    num_classes: int
    logits: tuple[int, int]
    labels: tuple[int, int]
    align: bool = False
    layout: str = "planes"
    dtype: torch.dtype = F32
    steep: float = 0.0  # the logit of a region's class, above the others
    quick: bool = False


IMAGES = (
    Images("4×", 19, (20, 24), (80, 96), quick=True),
    Images("4×, bfloat16, channels last", 19, (20, 24), (80, 96), False, "channels last", BF16),
    Images("4×, cropped, 150 classes", 150, (12, 17), (48, 68), False, "cropped", F16, quick=True),
    Images("4×, 150 columns", 19, (3, 150), (12, 600)),
    Images("4×, 150 rows", 19, (150, 3), (600, 12)),
    Images("8×, 300 classes", 300, (5, 6), (40, 48)),
    Images("33 to 129 aligned", 19, (33, 17), (129, 65), True, quick=True),
    Images("64×", 5, (2, 3), (128, 192)),
    Images("2×", 19, (24, 40), (48, 80), dtype=F16),
    Images("1.5×", 19, (22, 26), (33, 39), quick=True),
    Images("1×", 19, (33, 40), (33, 40), quick=True),
    Images("1×, channels last", 19, (33, 40), (33, 40), False, "channels last"),
    Images("half the size", 7, (40, 48), (20, 24)),
    Images("4×, 2 classes", 2, (20, 24), (80, 96), quick=True),
    Images("4×, neighbours 40 apart", 19, (20, 24), (80, 96), steep=40.0),
    Images("4×, neighbours 300 apart", 19, (20, 24), (80, 96), steep=300.0, quick=True),
)


def _logits(images: Images, random: torch.Generator) -> Tensor:
    shape = (2, images.num_classes, *images.logits)
    z = 2 * torch.randn(shape, generator=random)
    if images.steep:
        region = _labels((2, *images.logits), shape[1], random).clamp(min=0)
        z += images.steep * F.one_hot(region, shape[1]).movedim(-1, 1)
    return _in_layout(z.to(images.dtype), images.layout)


def _image_checks() -> Iterator[Check]:
    """Every statistic of softmax moments at every shape; predictions."""
    for images in IMAGES:
        random, k = _random(images.name), images.num_classes
        inputs = _logits(images, random), _labels((2, *images.labels), k, random)
        options: Any = {"ignore_index": -1, "align_corners": images.align}
        floor = FLOOR * max(images.steep / 8, 1)  # log Σ e^z is float32
        weight = torch.rand(k, generator=random) + 0.5

        plain = partial(ao.pixel_cross_entropy, **options)
        pair = ao.CrossEntropy(**options), ao.Dice(**options)
        ce = ao.CrossEntropy(weight, label_smoothing=0.1, focal_gamma=1.5, **options)
        dice = ao.Dice(squared=True, per_image=True, **options)
        shaped = {"label_smoothing": 0.1, "focal_gamma": 1.5, "weight": weight}
        exact = partial(_with_dice, squared=True, per_image=True, **shaped)
        of_pixels = partial(ao.pixel_cross_entropy, reduction="none", **options)
        largest = partial(_argmax, align=images.align)
        often, moments = images.name in ("4×", "1×", "1.5×"), "softmax_moments"
        for operator, name, ours, formula, quick in (
            (moments, "cross-entropy", plain, _cross_entropy, images.quick),
            (moments, "cross-entropy + Dice", ao.CrossEntropyDice(*pair), _with_dice, often),
            (moments, "all options", ao.CrossEntropyDice(ce, dice), exact, often),
            (moments, "a loss for each pixel", of_pixels, _loss_of_pixels, often),
            ("pixel_argmax", "argmax", largest, _amax, often),
        ):
            name, formula = f"{name}, {images.name}", partial(formula, align=images.align)
            yield Check(operator, name, inputs, ours, formula, quick, floor)
        if images.quick:
            lovasz = ao.Lovasz(bins=2**16, **options)
            formula = partial(_lovasz, align=images.align)
            name, floor = f"Lovász, {images.name}", 2.0**-8  # errors are rounded to bins
            yield Check("probability_histograms", name, inputs, lovasz, formula, often, floor)


def _base() -> Inputs:
    """Logits and labels; pixels with two almost equal logits are ignored: see `_confusion`."""
    images, random = IMAGES[0], _random("base")
    z, y = _logits(images, random), _labels((2, *images.labels), images.num_classes, random)
    first, second = _upsampled(z.double(), y, False).topk(2, 1).values.unbind(1)
    return z, torch.where(first - second < 1e-3, -1, y)


def _loss_checks() -> Iterator[Check]:
    """The options of pixel losses, sigmoids, points, volumes, divergence, confusion."""
    random, moments, (z, y) = _random("losses"), "softmax_moments", _base()
    plain, ce = partial(ao.pixel_cross_entropy, ignore_index=-1), _cross_entropy
    hard = ao.CrossEntropy(ohem_threshold=0.3, ignore_index=-1)
    yield Check(moments, "OHEM", (z, y), hard, partial(ce, ohem_threshold=0.3))
    hard = ao.CrossEntropy(ohem_min_kept=len(y[0]) ** 2, ignore_index=-1)
    formula, parts = partial(ce, ohem_min_kept=len(y[0]) ** 2), ("kth_largest", moments)
    yield Check(COMPOSITION, "OHEM of a number", (z, y), hard, formula, parts=parts)
    values, k = (torch.rand(3000, generator=random),), 700
    formula = lambda x: x.detach().topk(k).values[-1]  # noqa: E731
    yield Check(
        "kth_largest", "k-th largest", values, lambda x: kth_largest(x.detach(), k), formula
    )
    v = torch.rand(y.shape, generator=random)
    weighted = z, y, v.masked_fill(v < 0.1, 0)
    yield Check(moments, "pixel weights", weighted, ao.CrossEntropy(ignore_index=-1), ce)
    hard = ao.CrossEntropy(label_smoothing=0.1, ohem_threshold=0.3, ignore_index=-1)
    formula = partial(ce, label_smoothing=0.1, ohem_threshold=0.3)
    yield Check(moments, "OHEM, pixel weights, smoothing", weighted, hard, formula)
    hard = ao.CrossEntropy(
        label_smoothing=0.1, ohem_threshold=0.3, focal_gamma=1.5, ignore_index=-1
    )
    formula = partial(ce, label_smoothing=0.1, ohem_threshold=0.3, focal_gamma=1.5)
    yield Check(moments, "OHEM, smoothing, focal", (z, y), hard, formula)
    smooth = ao.CrossEntropy(label_smoothing=0.1, ignore_index=-1)
    both = ao.CrossEntropyDice(smooth, ao.Dice(squared=True, ignore_index=-1))
    formula = partial(_with_dice, squared=True, label_smoothing=0.1)
    yield Check(moments, "label smoothing + Dice", (z, y), both, formula)
    hidden, ignored = z.clone(), y.clone()
    hidden[:, :, :1], ignored[:, :8] = torch.nan, -1
    yield Check(moments, "NaN where ignored", (hidden, ignored), plain, ce)
    infinite = z.clone()
    infinite[:, -1] = -torch.inf  # the absent class
    yield Check(moments, "a class of −∞", (infinite, y), plain, lambda z, y: ce(z[:, :-1], y))
    yield Check(moments, "all statistics", (z, y), _our_statistics, _statistics)
    points = torch.randn(700, 19, generator=random), _labels((700,), 19, random)
    yield Check(moments, "points", points, plain, ce)
    volume = torch.randn(2, 5, 4, 5, 6, generator=random), _labels((2, 9, 12, 12), 5, random)
    both = ao.CrossEntropyDice(ignore_index=-1)
    yield Check(moments, "volume, cross-entropy + Dice", volume, both, _with_dice)
    as_bytes = torch.where(y < 0, 255, y).to(torch.uint8)
    signed = lambda z, y: ce(z, torch.where(y == 255, -1, y.long()))  # noqa: E731
    yield Check(moments, "labels of uint8", (z, as_bytes), ao.pixel_cross_entropy, signed)
    for channels, weight in ((1, 1.0), (3, 2.5)):
        labels = _labels((2 * channels, *y.shape[1:]), 3, random).unflatten(0, (2, channels))
        binary = partial(ao.pixel_binary_cross_entropy, pos_weight=weight, ignore_index=-1)
        name = f"binary cross-entropy, {channels} channels"
        formula = partial(_binary, pos_weight=weight)
        yield Check(moments, name, (z[:, :channels], labels), binary, formula)
    teacher = torch.randn(*z.shape[:2], 7, 9, generator=random)
    for name, inputs, temperature, reduction in (
        ("divergence, temperature 3", (z, z.flip(1), y >= 0), 3.0, "mean"),
        ("divergence, small teacher", (z, teacher, y >= 0), 1.0, "mean"),
        ("a divergence for each pixel", (z, z.flip(1), y >= 0), 1.0, "none"),
        ("volume, divergence", (volume[0], volume[0].flip(1), volume[1] >= 0), 1.0, "mean"),
    ):
        options = {"temperature": temperature, "reduction": reduction}
        ours, formula = (partial(x, **options) for x in (_our_divergence, _divergence))
        yield Check("pixel_kl_divergence", name, inputs, ours, formula)
    predict, formula = (partial(x, align=False) for x in (_predictions, _largest))
    # e^−loss: the error of a loss, which is relative to log Σ e^z
    parts, floor = ("pixel_argmax", moments), 8 * FLOOR
    name = "argmax, confidence"
    yield Check(COMPOSITION, name, (z, y), predict, formula, floor=floor, parts=parts)
    counts, parts = partial(ao.pixel_confusion, ignore_index=-1), ("pixel_argmax", "confusion")
    yield Check(COMPOSITION, "confusion of logits", (z, y), counts, _confusion, parts=parts)
    classes = y.flip(0).clamp(min=0), y
    counts = partial(ao.confusion, num_classes=z.shape[1], ignore_index=-1)
    formula = partial(_pairs, num_classes=z.shape[1])
    yield Check("confusion", "confusion", classes, counts, formula)


class Features(NamedTuple):
    name: str
    num_classes: int
    shape: tuple[int, int, int, int]
    layout: str = "planes"
    dtype: torch.dtype = F32
    groups: int = 1
    per_image: bool = False
    large_areas: bool = False  # of one class
    quick: bool = False


FEATURES = (
    Features("planes", 5, (2, 40, 16, 32), quick=True),
    Features("planes, bfloat16", 40, (2, 40, 16, 32), dtype=BF16, quick=True),
    Features("13 × 13, float16", 5, (3, 33, 13, 13), dtype=F16, quick=True),
    Features("cropped", 40, (2, 40, 13, 21), "cropped", quick=True),
    Features("channels last", 5, (2, 40, 16, 32), "channels last", quick=True),
    Features("channels last, bfloat16", 40, (2, 33, 16, 32), "channels last", BF16),
    Features("lines of 3", 5, (4, 16, 9, 3)),
    Features("large areas", 5, (2, 16, 136, 128), large_areas=True, quick=True),
    Features("16,000 classes", 16_000, (2, 24, 28, 28), quick=True),
    Features(
        "16,000 classes, channels last", 16_000, (2, 32, 28, 28), "channels last", BF16, quick=True
    ),
    Features("each image", 5, (3, 40, 16, 32), per_image=True),
    Features("3 groups", 5, (2, 40, 16, 32), groups=3, quick=True),
)


def _feature_checks() -> Iterator[Check]:
    """Class moments by every kernel, squared distances."""
    for features in FEATURES:
        random, k, size = _random(features.name), features.num_classes, features.shape
        y = _labels((size[0], 2 * size[2], 2 * size[3]), k, random)
        if features.large_areas:
            bands = (torch.arange(y.shape[1]) // 10 % (k - 1) - 1)[:, None]
            y = torch.where(torch.rand(y.shape, generator=random) < 0.002, y, bands)
        f = 1 + torch.randn(size, generator=random)
        f = f.masked_fill(F.interpolate(y[:, None].double(), size[2:]) < 0, torch.nan)
        f = _in_layout(f.to(features.dtype), features.layout)
        inputs = f, y, torch.randn(k, size[1], generator=random)
        groups, per_image = features.groups, features.per_image
        parts = ("class_moments", "split_groups") if groups > 1 else ()
        check = partial(Check, COMPOSITION if parts else "class_moments", parts=parts)
        options = {"num_classes": k, "groups": groups, "per_image": per_image, "seed": 7}
        ours, formula = partial(_our_moments, **options), partial(_moments, **options)
        name, quick = features.name, features.quick
        yield check(f"sums, distances, {name}", inputs, ours, formula, quick)
        yield check(f"sums, {name}", inputs[:2], ours, formula, False)
        if groups == 1 and not per_image:
            mse, often = partial(ao.pixel_to_anchor_mse, ignore_index=-1), name == "planes"
            yield check(f"pixel-to-anchor MSE, {name}", inputs, mse, _mse, often)
    for dtype in (F32, BF16):
        random = _random("not finite")
        f, y = 1 + torch.randn(2, 40, 16, 32, generator=random), _labels((2, 16, 32), 5, random)
        (b, b2), (i, i2), (j, j2) = torch.nonzero(y == 0)[:2].T
        f[b, 3, i, j], f[b2, 7, i2, j2] = torch.nan, torch.inf
        ours, formula = (partial(_finite_sums, x, num_classes=5) for x in (_our_moments, _moments))
        name = f"sums, NaN and ∞ in one class, {str(dtype).removeprefix('torch.')}"
        yield Check("class_moments", name, (f.to(dtype), y), ours, formula, dtype == F32)


def _method_checks() -> Iterator[Check]:
    """Random groups, sums of upsampled features, centroid InfoNCE, and one step of each method
    whose loss is not a constant."""
    random = _random("methods")
    keys = _labels((2, 24, 32), 7, random).flatten(1)
    inputs = keys.to(torch.int32), torch.bincount(keys[keys >= 0], minlength=7)
    ours, formula = (partial(x, groups=3, seed=7) for x in (_our_groups, _groups))
    yield Check("split_groups", "3 groups of each key", inputs, ours, formula)
    inputs = 1 + torch.randn(2, 24, 12, 16, generator=random), _labels((2, 24, 32), 7, random)
    ours, formula = (partial(x, num_classes=7) for x in (_our_sums, _sums))
    yield Check("upsampled_sums", "sums of upsampled features", inputs, ours, formula)
    for name, groups, positives in (("rows", 0, True), ("groups", 3, True), ("keys", 0, False)):
        random, shape = _random(name), (21, groups, 40) if groups else (21, 40)
        present = torch.rand(shape[:-1], generator=random) < 0.7
        present[:2], present[-1] = False, True
        q, p = (F.normalize(torch.randn(shape, generator=random), dim=-1) for _ in range(2))
        k = F.normalize(torch.randn(21, 40, generator=random), dim=-1)
        inputs = (q, k, present, p) if positives else (q, k, present)
        name, quick = f"InfoNCE, {name}", name != "rows"
        yield Check("centroid_info_nce", name, inputs, _our_info_nce, _info_nce, quick)
    of_centroids = ("class_moments", "split_groups", "centroid_info_nce")
    for name, make, parts in (
        ("SAR", partial(ao.SAR, gate="per_class", delta=0.0), ("class_moments",)),
        ("OCCL", ao.OCCL, of_centroids),
        ("MVSC", ao.MVSC, of_centroids),
        ("CeCo", partial(ao.CeCo, reduced_dim=8, center_dim=14, dropout=0.0), ("upsampled_sums",)),
    ):
        random = _random(name)
        f = 1 + torch.randn(2, 24, 12, 16, generator=random)
        w, y = torch.randn(7, 24, 1, 1, generator=random), _labels((2, 24, 32), 7, random)
        ours, exact = partial(_step, make), partial(_step, make, exact=True)
        quick = name != "MVSC"
        inputs = f, w, y
        yield Check(COMPOSITION, f"a step of {name}", inputs, ours, exact, quick, parts=parts)


def checks() -> list[Check]:
    """All checks; their inputs are the same numbers on every machine."""
    return [*_loss_checks(), *_feature_checks(), *_method_checks(), *_image_checks()]


def _evaluate(function: Callable[..., Any], inputs: Inputs, seed: str) -> list[Tensor | None]:
    """The outputs, and the gradients of all floating inputs, of a random sum of the outputs."""
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    random, total = _random(seed), None
    for output in outputs:
        weights = 0.5 + torch.rand(output.shape, generator=random)
        if output.requires_grad:
            part = (output * weights.to(output)).sum()
            total = part if total is None else total + part
    floating = [x for x in leaves if x.is_floating_point()]
    gradients = [None for _ in floating]
    if total is not None:
        gradients = torch.autograd.grad(total, floating, allow_unused=True)
    return [*(x.detach() for x in outputs), *gradients]


def _error(ours: Tensor, exact: Tensor, narrow: Tensor, floor: float) -> tuple[float, float]:
    """The largest error and its limit, relative to the largest number."""
    if ours.shape != exact.shape:
        return torch.inf, floor
    exact = exact.double()
    difference = (ours.double() - exact).abs()
    if ours.dtype in (BF16, F16):
        half = torch.finfo(ours.dtype)
        rounding = half.eps / 2 * exact.abs().clamp(min=half.smallest_normal)
        difference = (difference - rounding).clamp(min=0)
    largest = max(float(exact.abs().max()), torch.finfo(F32).tiny)
    if not difference.isfinite().all():
        return torch.inf, floor
    limit = 2 * float((narrow.double() - exact).abs().max()) / largest + floor
    return float(difference.max()) / largest, limit


def _compare(check: Check, backend: str, device: torch.device) -> tuple[float, float, str]:
    """Error, limit, and what else is wrong."""
    inputs = tuple(_between_nan(x, device) for x in check.inputs)
    wide, narrow = (
        tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs) for dtype in (F64, F32)
    )
    exact, rounded = (_evaluate(check.formula, x, check.name) for x in (wide, narrow))
    with ao.use_backend(backend):
        function = check.ours.to(device) if isinstance(check.ours, nn.Module) else check.ours
        ours, again = (_evaluate(function, inputs, check.name) for _ in range(2))
    error, limit = 0.0, check.floor
    for one, two, right, other in zip(ours, again, exact, rounded, strict=True):
        if one is None or right is None or two is None or other is None:
            if (one is None) != (right is None):
                return torch.inf, 0.0, "a gradient is missing"
            continue
        if not torch.equal(*(x.flatten().contiguous().view(torch.uint8) for x in (one, two))):
            return torch.inf, 0.0, "a second call gives other bits"
        error_and_limit = _error(one, right, other, check.floor)
        if error_and_limit[0] / error_and_limit[1] > error / limit:
            error, limit = error_and_limit
    return error, limit, ""


def _alive(device: torch.device) -> bool:
    """After an illegal access, every call on a GPU fails until the process ends."""
    try:
        return bool(torch.ones(1, device=device).sum() == 1)
    except RuntimeError:
        return False


def _row(
    operator: str,
    backend: str,
    name: str,
    device: torch.device,
    compare: Callable[[], tuple[float, float, str]],
    parts: tuple[str, ...] = (),
) -> Row:
    """What `compare` finds. Everything that it raises is a result, which the user must see."""
    start, error, limit = time.monotonic(), torch.inf, 0.0
    right, note = None, "the GPU failed in an earlier check:"
    if _alive(device):
        try:
            error, limit, note = compare()
            right = error <= limit
        except Exception as raised:
            note = f"{type(raised).__name__}: {' '.join(str(raised).split())[:200]}"
            if "does not support this call" in note:
                note = ""
            elif not isinstance(raised, torch.OutOfMemoryError) and "unavailable" not in note:
                right = False
    return Row(operator, backend, name, error, limit, right, note, time.monotonic() - start, parts)


def run(check: Check, backend: str, device: torch.device) -> Row:
    """One check on the device, whose default is the backend that is verified."""
    compare = partial(_compare, check, backend, device)
    return _row(check.operator, backend, check.name, device, compare, check.parts)


def _environments(
    backend: str, device: torch.device
) -> dict[str, Callable[[Inputs], list[Tensor]]]:
    """Ways to call a loss, which give the same bits as a plain call."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        if backend == "cuda":  # it has no pixel losses
            _, sums, _ = ao.ops.class_moments(z, y, z.shape[1], ignore_index=-1)
            return sums.square().sum()
        return ao.pixel_cross_entropy(z, y, ignore_index=-1)

    def call(inputs: Inputs, function: Callable[..., Tensor] = loss) -> list[Tensor]:
        z = inputs[0].detach().requires_grad_()
        value = function(z, inputs[1])
        return [value.detach(), *torch.autograd.grad(value, z)]

    def compiled(inputs: Inputs) -> list[Tensor]:
        return call(inputs, torch.compile(loss, fullgraph=True, backend="aot_eager"))

    def autocast(inputs: Inputs) -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            return call(inputs)

    def other_stream(inputs: Inputs) -> list[Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results = call(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return results

    def graph(inputs: Inputs) -> list[Tensor]:
        results = cuda_graph(lambda: call(inputs))()
        assert isinstance(results, list)
        return results

    def without_synchronising(inputs: Inputs) -> list[Tensor]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return call(inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def other_gpu(inputs: Inputs) -> list[Tensor]:
        results = call(tuple(x.to("cuda:1") for x in inputs))
        return [x.to(device) for x in results]

    ways = {"a plain call": call, "torch.compile, fullgraph": compiled, "autocast": autocast}
    if device.type == "cuda":
        ways |= {"another stream": other_stream, "a CUDA graph": graph}
        ways["no synchronisation"] = without_synchronising
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if len(names) > 1 and names[0] == names[1]:  # other GPUs may add in another order
            ways["GPU 1 while 0 is current"] = other_gpu
    return ways


def device_of(backend: str) -> torch.device:
    """Where a backend runs: kernels without a GPU read tensors of the CPU."""
    simulated = backend == "triton" and TRITON_ON_HOST
    on_gpu = backend != "cpu" and torch.cuda.is_available() and not simulated
    return torch.device("cuda" if on_gpu else "cpu")


def environment_rows(backend: str, device: torch.device) -> Iterator[Row]:
    """The ways to call a loss, of which the first gives what the others must give. They say nothing
    about an operator."""
    expected: list[Tensor] = []

    def same(way: Callable[[Inputs], list[Tensor]]) -> tuple[float, float, str]:
        inputs = tuple(_between_nan(x, device) for x in _base())
        with ao.use_backend(backend):
            results = way(inputs)
        expected.extend(results if not expected else ())
        equal = all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))
        return (0.0, 0.0, "") if equal else (torch.inf, 0.0, "other bits than a plain call")

    for name, way in _environments(backend, device).items():
        yield _row("environment", backend, name, device, partial(same, way))


def _run_number(number: int, backend: str) -> Row:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # of the formulas
    return run(checks()[number], backend, device_of(backend))


def verify(backend: str, everything: bool) -> Iterator[Row]:
    """All checks of a backend, `quick` ones alone of Triton's unless `everything`."""
    device = device_of(backend)
    torch.set_float32_matmul_precision("highest")
    if backend == "triton":
        yield from _in_processes(backend, everything)
    else:
        for check in checks():
            yield run(check, backend, device)
    yield from environment_rows(backend, device)


def _in_processes(backend: str, everything: bool) -> Iterator[Row]:
    """Side by side, because Triton compiles each kernel at its first launch."""
    chosen = [(i, check) for i, check in enumerate(checks()) if everything or check.quick]
    spawn = multiprocessing.get_context("spawn")
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        futures = [pool.submit(_run_number, number, backend) for number, _ in chosen]
        for future, (_, check) in zip(futures, chosen, strict=True):
            try:
                yield future.result()
            except BrokenProcessPool:
                note = "a process that ran checks ended:"
                yield Row(check.operator, backend, check.name, 0.0, 0.0, None, note, 0.0)


def not_auto(rows: Sequence[Row]) -> list[str]:
    """The lines of a shell that take what is wrong out of "auto", besides what is excluded already.
    The first is for operators whose own check failed. For a composition without such an operator,
    one line follows for each of its parts."""
    out = {(backend, name) for backend, names in excluded.items() for name in names}
    faults = [row for row in rows if row.right is False and row.backend in excluded]
    wrong = {(row.backend, row.operator) for row in faults if row.operator in OPERATORS}

    def line(pairs: set[tuple[str, str]]) -> str:
        parts = [
            f"{backend}:{name}"
            for backend in NAMES
            for name in OPERATORS
            if (backend, name) in pairs
        ]
        return f"export {NOT_AUTO}={','.join(parts)}"

    lines = [line(out | wrong)] if wrong else []
    for row in faults:
        pairs = [(row.backend, part) for part in row.parts if row.backend in OPERATORS[part]]
        if wrong.isdisjoint(pairs):
            lines += [f"{line(out | wrong | {pair})}  # one of: {row.check}" for pair in pairs]
    return lines


def _driver() -> str:
    """The version of the GPUs' driver."""
    for file in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with suppress(OSError):
            if match := re.search(r"\d+\.[\d.]+", Path(file).read_text()):
                return match[0]
    return "unknown"


def report(backend: str | None, everything: bool, path: Path | None) -> bool:
    """Verify a backend, or all that are usable here; print a line for each check, and a summary.
    True if everything that the backends serve was checked and is right."""
    reasons = unusable()
    if backend is not None and reasons[backend]:
        print(f"\n{backend} is not usable here: {reasons[backend]}")
        return False
    if path is not None:
        path.touch()  # an error before the checks, not after them
    print(f"\n{'operator':<23}{'backend':<10}{'check':<54}{'error':>7}{'limit':>9}")
    names = [name for name, reason in reasons.items() if not reason]
    summary, rows = [], []
    for name in names if backend is None else [backend]:
        start, backend_rows = time.monotonic(), []
        for row in verify(name, everything):
            print(row, flush=True)
            backend_rows.append(row)
        faults = [
            row for row in backend_rows if row.right is False or (row.right is None and row.note)
        ]
        right = sum(row.right is True for row in backend_rows)
        wrong = sum(row.right is False for row in backend_rows)
        refused = len(backend_rows) - right - len(faults)
        summary.append(
            f"{name}: {right} right, {wrong} WRONG, {len(faults) - wrong} not checked, "
            f"{refused} not served, {time.monotonic() - start:.0f} s"
        )
        summary += map(str, faults)
        rows += backend_rows
    versions = {**environment(device_of(rows[0].backend)), "driver": _driver()}
    print("\nPlease report this, for a GPU also if everything is right:\n")
    print(", ".join(f"{name} {value}" for name, value in versions.items()))
    print("\n".join(summary))
    if lines := not_auto(rows):
        print('\nWhat takes it out of "auto" (docs/install.md; in Python exclude_from_auto):\n')
        print("\n".join(lines))
    if path is not None:
        record = [row._replace(error=min(row.error, 1e300))._asdict() for row in rows]  # no ∞
        path.write_text(json.dumps({**versions, "rows": record}, indent=1))
    return not any(row.right is False or (row.right is None and row.note) for row in rows)
