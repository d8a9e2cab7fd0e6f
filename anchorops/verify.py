"""anchorops-doctor --verify: does each backend compute, on this device, what the package promises?

A check calls public functions, on tensors that lie between NaN, and compares values and gradients
with torch's functions in float64. An error may be twice that of torch's functions in float32, plus
2⁻²⁰ of the largest number; a gradient in half precision may be rounded once more. A second call
must give the same bits. Only the methods have no formula here: they are compared with themselves in
float64, by the backend `reference`.
"""

import multiprocessing
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anchorops as ao

from ._backend import TRITON_INTERPRETED
from .losses import Regularizer
from .measure import cuda_graph

FLOOR = 2.0**-20
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MOST_WORKERS = 8  # processes that compile Triton's kernels
Inputs = dict[str, Tensor]


class Check(NamedTuple):
    """`ours` and `formula` are called with the inputs by name, and return a tensor or several."""

    operators: str  # names of operators, separated by spaces
    name: str
    inputs: Inputs  # on the CPU; those of floating dtypes have gradients
    ours: Callable[..., Any]
    formula: Callable[..., Any]
    quick: bool = True  # also without --all, by Triton
    floor: float = FLOOR  # of the limit


class Row(NamedTuple):
    """What a check found. `error` and `limit` are relative to the largest number."""

    operators: str
    backend: str
    check: str
    error: float
    limit: float
    right: bool | None  # None: the backend does not serve this call
    note: str
    seconds: float

    def __str__(self) -> str:
        verdict = {True: "ok", False: "WRONG", None: "not served"}[self.right]
        numbers = f"{self.error:9.1e}{self.limit:9.1e}" if self.right is not None else " " * 18
        start = f"{self.operators.split()[0]:<21}{self.backend:<10}{self.check:<44}"
        return f"{start}{numbers}  {self.note + ' ' if self.note else ''}{verdict}"


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


def _upsampled(z: Tensor, size: Sequence[int], align: bool) -> Tensor:
    if z.dim() < 4:
        return z
    mode = "bilinear" if z.dim() == 4 else "trilinear"
    return F.interpolate(z, tuple(size), mode=mode, align_corners=align)


def _pixels(z: Tensor, y: Tensor, align: bool) -> tuple[Tensor, Tensor, Tensor]:
    """log p [N, K], label and image of the valid pixels."""
    z = _upsampled(z, y.shape[1:], align).movedim(1, -1)
    image = torch.arange(len(y), device=y.device).view(-1, *(1,) * (y.dim() - 1)).expand_as(y)
    return z[y >= 0].log_softmax(-1), y[y >= 0], image[y >= 0]


def _cross_entropy(
    z: Tensor,
    y: Tensor,
    v: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    smoothing: float = 0.0,
    gamma: float = 0.0,
    ohem: float | None = None,
    kept: int | None = None,
    align: bool = False,
) -> Tensor:
    """The formula of ao.CrossEntropy; `ohem` and `kept` without the rest."""
    log_p, label, _ = _pixels(z, y, align)
    c = -log_p.gather(1, label[:, None])[:, 0]
    w = torch.ones_like(log_p[0]) if weight is None else weight.to(log_p)
    loss = (1 - smoothing) * w[label] * c - smoothing / len(w) * (log_p * w).sum(1)
    share = torch.ones_like(c) if v is None else v[y >= 0]
    if ohem is not None:
        share = share * (c.exp() * ohem >= 1)
    if kept is not None:
        share = share * (c >= c.topk(kept).values[-1])
    return (share * (1 - (-c).exp()) ** gamma * loss).sum() / (share * w[label]).sum()


def _dice(
    z: Tensor, y: Tensor, *, squared: bool = False, per_image: bool = False, align: bool = False
) -> Tensor:
    log_p, label, image = _pixels(z, y, align)
    p, own = log_p.exp(), F.one_hot(label, log_p.shape[1]).to(log_p)
    rows = image if per_image else torch.zeros_like(image)

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(len(y) if per_image else 1, x.shape[1]).index_add(0, rows, x)

    counts = total(own)
    scores = 2 * total(p * own) / (total(p**2 if squared else p) + counts)
    return (1 - scores)[counts > 0].mean()


def _binary(z: Tensor, y: Tensor, *, pos_weight: float = 1.0) -> Tensor:
    z, y = _upsampled(z, y.shape[2:], False), y.expand_as(_upsampled(z, y.shape[2:], False))
    weight = torch.full_like(z[0, 0, 0, 0], pos_weight)
    losses = F.binary_cross_entropy_with_logits(
        z, y.clamp(min=0).to(z), pos_weight=weight, reduction="none"
    )
    return losses[y >= 0].mean()


def _divergence(s: Tensor, t: Tensor, valid: Tensor, *, temperature: float) -> Tensor:
    s, t = (_upsampled(x, valid.shape[1:], False).movedim(1, -1)[valid] for x in (s, t.detach()))
    s, t = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    return temperature**2 * (t.exp() * (t - s)).sum(1).mean()


def _mix32(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


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
    if groups > 1:  # the rank of a pixel's hash in its key, modulo the number of groups
        pixel = torch.arange(y.numel(), device=y.device)
        hashes = _mix32(_mix32(pixel ^ _mix32(torch.full_like(pixel, seed))) ^ _mix32(pixel * 0))
        order = torch.argsort((torch.where(valid, key, keys).flatten() << 32) | hashes)
        sorted_keys = torch.where(valid, key, keys).flatten()[order]
        rank = pixel - torch.searchsorted(sorted_keys, sorted_keys)
        key = key * groups + torch.empty_like(rank).scatter(0, order, rank % groups).view_as(key)
    x, k = f[valid], key[valid]
    size = (len(y),) * per_image + (num_classes,) + (groups,) * (groups > 1)
    counts = torch.bincount(k, minlength=keys * groups).to(x)
    sums = x.new_zeros(keys * groups, x.shape[1]).index_add(0, k, x)
    results = [counts.view(size), sums.view(*size, -1)]
    if a is not None:
        sqdists = (x - a.to(x)[y[valid]]).square().sum(1)
        results.append(x.new_zeros(keys * groups).index_add(0, k, sqdists).view(size))
    return tuple(results)


def _info_nce(q: Tensor, k: Tensor, p: Tensor | None, present: Tensor) -> Tensor:
    rows = q if q.dim() == 3 else q[:, None]
    present = present.view(rows.shape[:2])
    logits = torch.einsum("igd,jd->igj", rows, k) / 0.07
    positives = k[:, None] if p is None else p.view_as(rows)
    own = (rows * positives).sum(-1, keepdim=True) / 0.07
    others = present.any(1) & ~torch.eye(len(k), dtype=torch.bool, device=k.device)
    logits = logits.masked_fill(~others[:, None], -torch.inf)
    return (torch.cat([own, logits], -1).logsumexp(-1) - own[..., 0])[present].mean()


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
    Images("8×, 300 classes", 300, (9, 11), (72, 88)),
    Images("33 to 129 aligned", 19, (33, 17), (129, 65), True, quick=True),
    Images("64×", 5, (2, 3), (128, 192)),
    Images("2×", 19, (24, 40), (48, 80), dtype=F16),
    Images("1.5×", 19, (22, 26), (33, 39), quick=True),
    Images("1×", 19, (33, 40), (33, 40), quick=True),
    Images("1×, channels last", 19, (33, 40), (33, 40), False, "channels last"),
    Images("half the size", 7, (40, 48), (20, 24)),
    Images("4×, 2 classes", 2, (20, 24), (80, 96), quick=True),
    Images("4×, neighbours 40 apart", 19, (20, 24), (80, 96), steep=40.0, quick=True),
    Images("4×, neighbours 100 apart", 19, (20, 24), (80, 96), steep=100.0),
)


def _logits(images: Images, random: torch.Generator, num_classes: int | None = None) -> Tensor:
    shape = (2, num_classes or images.num_classes, *images.logits)
    z = 2 * torch.randn(shape, generator=random)
    if images.steep:
        region = _labels((2, *images.logits), shape[1], random).clamp(min=0)
        z += images.steep * F.one_hot(region, shape[1]).movedim(-1, 1)
    return _in_layout(z.to(images.dtype), images.layout)


def _of_images() -> Iterator[Check]:
    """Every statistic of softmax moments at every shape; predictions."""
    for images in IMAGES:
        random = _random(images.name)
        k, align = images.num_classes, images.align
        floor = FLOOR * max(images.steep / 8, 1)  # log Σ e^z is float32
        inputs = {"z": _logits(images, random), "y": _labels((2, *images.labels), k, random)}
        weight = torch.rand(k, generator=random) + 0.5

        def ours(z: Tensor, y: Tensor, align: bool = align) -> Tensor:
            return ao.pixel_cross_entropy(z, y, ignore_index=-1, align_corners=align)

        def formula(z: Tensor, y: Tensor, align: bool = align) -> Tensor:
            return _cross_entropy(z, y, align=align)

        of_images = f", {images.name}"
        yield Check(
            "softmax_moments",
            "cross-entropy" + of_images,
            inputs,
            ours,
            formula,
            images.quick,
            floor,
        )
        for name, squared, options in (
            ("cross-entropy + Dice", False, {}),
            ("all options", True, {"label_smoothing": 0.1, "focal_gamma": 1.5}),
        ):

            def both(
                z: Tensor, y: Tensor, weight=weight, align=align, squared=squared, options=options
            ) -> Tensor:
                common: Any = {"align_corners": align, "ignore_index": -1}
                ce = ao.CrossEntropy(weight if squared else None, **options, **common)
                dice = ao.Dice(squared=squared, per_image=squared, **common)
                return ao.CrossEntropyDice(ce, dice).to(z.device)(z, y)

            def exact(
                z: Tensor, y: Tensor, weight=weight, align=align, squared=squared, options=options
            ) -> Tensor:
                smoothing, gamma = (options.get(x, 0) for x in ("label_smoothing", "focal_gamma"))
                w = weight if squared else None
                ce = _cross_entropy(z, y, weight=w, smoothing=smoothing, gamma=gamma, align=align)
                return ce + _dice(z, y, squared=squared, per_image=squared, align=align)

            quick = images.quick and images.name in ("4×", "1×", "1.5×")
            yield Check("softmax_moments", name + of_images, inputs, both, exact, quick, floor)
        size = images.labels

        def predicted(z: Tensor, y: Tensor, size=size, align=align) -> tuple[Tensor, ...]:
            classes, confidence = ao.pixel_argmax(z, size, align_corners=align, confidence=True)
            up = _upsampled(z.detach().double(), size, align)
            return up.gather(1, classes[:, None])[:, 0], confidence

        def largest(z: Tensor, y: Tensor, size=size, align=align) -> tuple[Tensor, ...]:
            up = _upsampled(z.detach(), size, align)
            return up.amax(1), up.softmax(1).amax(1)

        yield Check(
            "pixel_argmax softmax_moments",
            "argmax, confidence" + of_images,
            inputs,
            predicted,
            largest,
            images.name in ("4×", "1×"),
            floor,
        )


def _base() -> Inputs:
    images, random = IMAGES[0], _random("base")
    return {"z": _logits(images, random), "y": _labels((2, *images.labels), 19, random)}


def _of_losses() -> Iterator[Check]:
    """The options of pixel losses, sigmoids, points, volumes, divergence, confusion."""
    images, random = IMAGES[0], _random("losses")
    base, moments = _base(), "softmax_moments"
    z, y = base["z"], base["y"]

    def losses(**options: Any) -> Callable[..., Tensor]:
        return lambda z, y, v=None: ao.CrossEntropy(ignore_index=-1, **options)(z, y, v)

    ohem = losses(ohem=0.3)
    yield Check(moments, "OHEM", base, ohem, lambda z, y: _cross_entropy(z, y, ohem=0.3))
    yield Check(
        "kth_largest softmax_moments",
        "OHEM of a number",
        base,
        losses(ohem_kept=2000),
        lambda z, y: _cross_entropy(z, y, kept=2000),
    )
    v = torch.rand(y.shape, generator=random)
    weights = {**base, "v": v.masked_fill(v < 0.1, 0)}
    yield Check(moments, "pixel weights", weights, losses(), _cross_entropy)
    yield Check(
        moments,
        "a loss for each pixel",
        base,
        lambda z, y: ao.pixel_cross_entropy(z, y, ignore_index=-1, reduction="none"),
        lambda z, y: F.cross_entropy(
            _upsampled(z, y.shape[1:], False), y, ignore_index=-1, reduction="none"
        ),
    )
    hidden, ignored = z.clone(), y.clone()
    hidden[:, :, :3], ignored[:, :20] = torch.nan, -1
    yield Check(moments, "NaN where ignored", {"z": hidden, "y": ignored}, losses(), _cross_entropy)
    infinite = z.clone()
    infinite[:, -1] = -torch.inf  # the absent class
    yield Check(
        moments,
        "a class of −∞",
        {"z": infinite, "y": y},
        losses(),
        lambda z, y: _cross_entropy(z[:, :-1], y),
    )
    points = {
        "z": torch.randn(3000, 19, generator=random),
        "y": _labels((3000,), 19, random),
    }
    yield Check(moments, "points", points, losses(), _cross_entropy)
    bytes_ = {"z": z, "y": torch.where(y < 0, 255, y).to(torch.uint8)}
    yield Check(
        moments,
        "labels of uint8",
        bytes_,
        lambda z, y: ao.pixel_cross_entropy(z, y),
        lambda z, y: F.cross_entropy(_upsampled(z, y.shape[1:], False), y.long(), ignore_index=255),
    )
    for channels, pos_weight in ((1, 1.0), (3, 2.5)):
        binary = {
            "z": _logits(images, random, channels),
            "y": _labels((2 * channels, *images.labels), 3, random).view(
                2, channels, *images.labels
            ),
        }
        yield Check(
            moments,
            f"binary cross-entropy, {channels} channels",
            binary,
            lambda z, y, w=pos_weight: ao.pixel_binary_cross_entropy(
                z, y, pos_weight=w, ignore_index=-1
            ),
            lambda z, y, w=pos_weight: _binary(z, y, pos_weight=w),
        )
    for name, teacher, temperature in (("same size", (20, 24), 3.0), ("other size", (10, 12), 1.0)):
        divergence = {
            "s": z,
            "t": 2 * torch.randn(2, 19, *teacher, generator=random),
            "valid": y >= 0,
        }
        yield Check(
            "pixel_kl_divergence",
            f"divergence, teacher of the {name}",
            divergence,
            lambda s, t, valid, c=temperature: ao.pixel_kl_divergence(
                s, t, valid.shape[1:], valid=valid, temperature=c
            ),
            lambda s, t, valid, c=temperature: _divergence(s, t, valid, temperature=c),
        )
    volume = {
        "z": torch.randn(2, 5, 6, 9, 10, generator=random),
        "y": _labels((2, 17, 18, 20), 5, random),
    }
    yield Check(
        moments,
        "volume, cross-entropy + Dice",
        volume,
        lambda z, y: ao.CrossEntropyDice(ignore_index=-1)(z, y),
        lambda z, y: _cross_entropy(z, y) + _dice(z, y),
    )
    yield Check(
        "pixel_kl_divergence",
        "volume, divergence",
        {"s": volume["z"], "t": volume["z"].flip(1), "valid": volume["y"] >= 0},
        lambda s, t, valid: ao.pixel_kl_divergence(s, t, valid.shape[1:], valid=valid),
        lambda s, t, valid: _divergence(s, t, valid, temperature=1.0),
        False,
    )

    def matrix(z: Tensor, y: Tensor) -> Tensor:
        predicted = _upsampled(z.detach(), y.shape[1:], False).argmax(1)
        return torch.bincount((y * 19 + predicted)[y >= 0], minlength=361).view(19, 19)

    yield Check(
        "confusion pixel_argmax",
        "confusion",
        base,
        lambda z, y: ao.pixel_confusion(z, y, ignore_index=-1),
        matrix,
    )


def _of_features() -> Iterator[Check]:
    """Class moments by every kernel, squared distances, InfoNCE, the methods."""
    for name, layout, dtype, dim, size, k, options, quick in (
        ("planes", "planes", F32, 40, (2, 16, 32), 5, {}, True),
        ("planes, bfloat16", "planes", BF16, 40, (2, 16, 32), 40, {}, True),
        ("13 × 13, float16", "planes", F16, 33, (3, 13, 13), 5, {}, False),
        ("cropped", "cropped", F32, 40, (2, 13, 21), 40, {}, True),
        ("channels last", "channels last", F32, 40, (2, 16, 32), 5, {}, True),
        ("channels last, 33 channels", "channels last", BF16, 33, (2, 16, 32), 40, {}, False),
        ("lines of 3", "planes", F32, 16, (4, 9, 3), 5, {}, False),
        ("1,100 classes", "planes", F32, 24, (2, 40, 40), 1100, {}, True),
        ("each image", "planes", F32, 40, (3, 16, 32), 5, {"per_image": True}, False),
        ("3 groups", "planes", F32, 40, (2, 16, 32), 5, {"groups": 3, "seed": 7}, True),
    ):
        random = _random(name)
        y = _labels((size[0], 2 * size[1], 2 * size[2]), k, random)
        f = 1 + torch.randn(size[0], dim, *size[1:], generator=random)
        ignored = F.interpolate(y[:, None].double(), f.shape[2:]) < 0
        f = _in_layout(f.masked_fill(ignored, torch.nan).to(dtype), layout)
        a = torch.randn(k, dim, generator=random)
        operators = "class_moments split_groups" if "groups" in options else "class_moments"

        def ours(f: Tensor, y: Tensor, a=None, k=k, options=options) -> tuple[Tensor, ...]:
            found = ao.ops.class_moments(f, y, k, anchors=a, ignore_index=-1, **options)
            return found[: 2 + (a is not None)]

        def formula(f: Tensor, y: Tensor, a=None, k=k, options=options) -> tuple[Tensor, ...]:
            return _moments(f, y, a, num_classes=k, **options)

        yield Check(
            operators, f"sums, distances, {name}", {"f": f, "y": y, "a": a}, ours, formula, quick
        )
        yield Check(operators, f"sums, {name}", {"f": f, "y": y}, ours, formula, False)
        if not options:
            yield Check(
                "class_moments",
                f"pixel-to-anchor MSE, {name}",
                {"f": f, "y": y, "a": a},
                lambda f, y, a: ao.pixel_to_anchor_mse(f, y, a, ignore_index=-1),
                lambda f, y, a, k=k: (
                    _moments(f, y, a, num_classes=k)[2].sum()
                    / (f.shape[1] * _moments(f, y, num_classes=k)[0].sum())
                ),
                name == "planes",
            )
    for name, groups, positives in (("rows", 0, True), ("groups", 3, True), ("keys", 0, False)):
        random = _random(name)
        shape = (21, groups, 40) if groups else (21, 40)
        q = {"q": F.normalize(torch.randn(shape, generator=random), dim=-1)}
        q["k"] = F.normalize(torch.randn(21, 40, generator=random), dim=-1)
        if positives:
            q["p"] = F.normalize(torch.randn(shape, generator=random), dim=-1)
        q["present"] = torch.rand(shape[:-1], generator=random) < 0.7
        q["present"][:2], q["present"][-1] = False, True
        yield Check(
            "centroid_info_nce",
            f"InfoNCE, {name}",
            q,
            lambda q, k, present, p=None: ao.ops.centroid_info_nce(
                q, k, positives=p, present=present
            ),
            lambda q, k, present, p=None: _info_nce(q, k, p, present),
            name != "rows",
        )
    for name, make, operators in (
        ("SAR", lambda: ao.SAR(7, 24, gate="per_class", delta=0.0), "class_moments"),
        ("CBP", lambda: ao.CBP(7, 24), "class_moments"),
        ("OCCL", lambda: ao.OCCL(7, 24), "centroid_info_nce split_groups class_moments"),
        ("MVSC", lambda: ao.MVSC(7, 24), "centroid_info_nce split_groups class_moments"),
        (
            "CeCo",
            lambda: ao.CeCo(7, 24, reduced_dim=8, center_dim=14, dropout=0.0),
            "upsampled_sums",
        ),
    ):
        random = _random(name)
        inputs = {
            "f": 1 + torch.randn(2, 24, 12, 16, generator=random),
            "w": torch.randn(7, 24, 1, 1, generator=random),
            "y": _labels((2, 24, 32), 7, random),
        }

        def step(f: Tensor, w: Tensor, y: Tensor, make=make, exact: bool = False) -> Tensor:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                method: Regularizer = make().to(f.device, f.dtype)
                method.ignore_index = -1
                classifier = nn.Conv2d(24, 7, 1).to(w)
                classifier.weight = nn.Parameter(w.detach())
                with ao.use_backend("reference") if exact else nullcontext():
                    return method(f, y, classifier)

        yield Check(
            operators,
            f"a step of {name}",
            inputs,
            step,
            lambda f, w, y, step=step: step(f, w, y, exact=True),
            name in ("CeCo", "OCCL"),
        )


def checks() -> list[Check]:
    """All checks; their inputs are the same numbers on every machine."""
    return [*_of_losses(), *_of_features(), *_of_images()]


def _evaluate(function: Callable[..., Any], inputs: Inputs, seed: str) -> list[Tensor | None]:
    """The outputs, and the gradients of all floating inputs, of a random sum of the outputs."""
    leaves = {
        name: x.detach().requires_grad_() if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    outputs = function(**leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    random, total = _random(seed), None
    for output in outputs:
        weights = 0.5 + torch.rand(output.shape, generator=random)
        if output.requires_grad:
            part = (output * weights.to(output)).sum()
            total = part if total is None else total + part
    floating = [x for x in leaves.values() if x.is_floating_point()]
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


def run(check: Check, backend: str, device: torch.device) -> Row:
    """One check on the device, whose default is the backend that is verified."""
    start = time.monotonic()

    def row(error: float, limit: float, right: bool | None, note: str = "") -> Row:
        seconds = time.monotonic() - start
        return Row(check.operators, backend, check.name, error, limit, right, note, seconds)

    inputs = {name: _between_nan(x, device) for name, x in check.inputs.items()}
    wide, narrow = (
        {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
        for dtype in (F64, F32)
    )
    exact, rounded = (_evaluate(check.formula, x, check.name) for x in (wide, narrow))
    try:
        with ao.use_backend(backend):
            ours = _evaluate(check.ours, inputs, check.name)
            again = _evaluate(check.ours, inputs, check.name)
    except Exception as error:  # whatever a compiler or a driver raises is what the user must see
        if "does not support this call" in str(error):
            return row(0.0, 0.0, None)
        return row(torch.inf, 0.0, False, f"{type(error).__name__}: {str(error)[:200]}")
    worst = (0.0, check.floor)
    for one, two, right, other in zip(ours, again, exact, rounded, strict=True):
        if one is None or right is None or two is None or other is None:
            if (one is None) != (right is None):
                return row(torch.inf, 0.0, False, "a gradient is missing")
            continue
        if not torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (one, two))):
            return row(torch.inf, 0.0, False, "a second call gives other bits")
        worst = max(
            worst, _error(one, right, other, check.floor), key=lambda found: found[0] / found[1]
        )
    return row(*worst, worst[0] <= worst[1])


def _environments(device: torch.device) -> dict[str, Callable[[Inputs], list[Tensor]]]:
    """Ways to call a loss, which give the same bits as a plain call."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return ao.pixel_cross_entropy(z, y, ignore_index=-1)

    def call(inputs: Inputs, function: Callable[..., Tensor] = loss) -> list[Tensor]:
        z = inputs["z"].detach().requires_grad_()
        value = function(z, inputs["y"])
        return [value.detach(), *torch.autograd.grad(value, z)]

    def compiled(inputs: Inputs) -> list[Tensor]:
        return call(inputs, torch.compile(loss, fullgraph=True, backend="aot_eager"))

    def autocast(inputs: Inputs) -> list[Tensor]:
        with torch.autocast(device.type, BF16):
            return call(inputs)

    def other_stream(inputs: Inputs) -> list[Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = call(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return found

    def graph(inputs: Inputs) -> list[Tensor]:
        return cuda_graph(lambda: call(inputs))()

    def without_synchronising(inputs: Inputs) -> list[Tensor]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return call(inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def other_gpu(inputs: Inputs) -> list[Tensor]:
        found = call({name: x.to("cuda:1") for name, x in inputs.items()})
        return [x.to(device) for x in found]

    ways = {"a plain call": call, "torch.compile, fullgraph": compiled, "autocast": autocast}
    if device.type == "cuda":
        ways |= {"another stream": other_stream, "a CUDA graph": graph}
        ways["no synchronisation"] = without_synchronising
        if torch.cuda.device_count() > 1:
            ways["GPU 1 while 0 is current"] = other_gpu
    return ways


def device_of(backend: str) -> torch.device:
    """Where a backend runs: interpreted and emulated kernels read tensors of the CPU."""
    emulated = backend == "triton" and TRITON_INTERPRETED
    on_gpu = backend != "cpu" and torch.cuda.is_available() and not emulated
    return torch.device("cuda" if on_gpu else "cpu")


def environment_rows(backend: str, device: torch.device) -> Iterator[Row]:
    """The ways to call a loss, of which the first gives what the others must give."""
    inputs = {name: _between_nan(x, device) for name, x in _base().items()}
    expected: list[Tensor] = []
    for name, way in _environments(device).items():
        start, error, note = time.monotonic(), torch.inf, ""
        try:
            with ao.use_backend(backend):
                found = way(inputs)
            expected = expected or found
            same = all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
            error = 0.0 if same else torch.inf
        except Exception as raised:
            note = f"{type(raised).__name__}: {str(raised)[:200]}"
        seconds = time.monotonic() - start
        yield Row("softmax_moments", backend, name, error, 0.0, error == 0, note, seconds)


def _run_number(number: int, backend: str) -> Row:
    torch.set_num_threads(1)
    return run(checks()[number], backend, device_of(backend))


def verify(backend: str, everything: bool) -> Iterator[Row]:
    """All checks of a backend, `quick` ones alone of Triton's unless `everything`. Processes run
    them side by side, because Triton compiles each kernel at its first launch."""
    device = device_of(backend)
    of_triton = backend == "triton"
    chosen = [(i, x) for i, x in enumerate(checks()) if everything or x.quick or not of_triton]
    if not of_triton:
        for _, check in chosen:
            yield run(check, backend, device)
        yield from environment_rows(backend, device)
        return
    canary = next(check for check in checks() if check.name == "confusion")
    first = run(canary, backend, device)
    yield first
    if not first.right:  # Triton does not work here: the others would say the same
        return
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    numbers = [i for i, check in chosen if check.name != canary.name]
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        yield from pool.map(_run_number, numbers, [backend] * len(numbers))
    yield from environment_rows(backend, device)
