"""The checks: of each operator, in the shapes, layouts and dtypes that its kernels tell apart."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao

from .._ops.kth_largest import kth_largest
from . import formulas
from .formulas import Inputs

FLOOR = 2.0**-20
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
COMPOSITION = "composition"


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


def random_of(name: str) -> torch.Generator:
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
        random, k = random_of(images.name), images.num_classes
        inputs = _logits(images, random), _labels((2, *images.labels), k, random)
        options: Any = {"ignore_index": -1, "align_corners": images.align}
        floor = FLOOR * max(images.steep / 8, 1)  # log Σ e^z is float32
        weight = torch.rand(k, generator=random) + 0.5

        plain = partial(ao.pixel_cross_entropy, **options)
        pair = ao.CrossEntropy(**options), ao.Dice(**options)
        ce = ao.CrossEntropy(weight, label_smoothing=0.1, focal_gamma=1.5, **options)
        dice = ao.Dice(squared=True, per_image=True, **options)
        shaped = {"label_smoothing": 0.1, "focal_gamma": 1.5, "weight": weight}
        exact = partial(formulas.with_dice, squared=True, per_image=True, **shaped)
        of_pixels = partial(ao.pixel_cross_entropy, reduction="none", **options)
        largest = partial(formulas.argmax, align=images.align)
        often, moments = images.name in ("4×", "1×", "1.5×"), "softmax_moments"
        for operator, name, ours, formula, quick in (
            (moments, "cross-entropy", plain, formulas.cross_entropy, images.quick),
            (
                moments,
                "cross-entropy + Dice",
                ao.CrossEntropyDice(*pair),
                formulas.with_dice,
                often,
            ),
            (moments, "all options", ao.CrossEntropyDice(ce, dice), exact, often),
            (moments, "a loss for each pixel", of_pixels, formulas.loss_of_pixels, often),
            ("pixel_argmax", "argmax", largest, formulas.amax, often),
        ):
            name, formula = f"{name}, {images.name}", partial(formula, align=images.align)
            yield Check(operator, name, inputs, ours, formula, quick, floor)
        if images.quick:
            lovasz = ao.Lovasz(bins=2**16, **options)
            formula = partial(formulas.lovasz, align=images.align)
            name, floor = f"Lovász, {images.name}", 2.0**-8  # errors are rounded to bins
            yield Check("probability_histograms", name, inputs, lovasz, formula, often, floor)


def base() -> Inputs:
    """Logits and labels; a pixel with two almost equal logits is ignored (formulas.confusion)."""
    images, random = IMAGES[0], random_of("base")
    z, y = _logits(images, random), _labels((2, *images.labels), images.num_classes, random)
    first, second = formulas.upsampled(z.double(), y, False).topk(2, 1).values.unbind(1)
    return z, torch.where(first - second < 1e-3, -1, y)


def _loss_checks() -> Iterator[Check]:
    """The options of pixel losses, sigmoids, points, volumes, divergence, confusion."""
    random, moments, (z, y) = random_of("losses"), "softmax_moments", base()
    plain, ce = partial(ao.pixel_cross_entropy, ignore_index=-1), formulas.cross_entropy
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
    formula = partial(formulas.with_dice, squared=True, label_smoothing=0.1)
    yield Check(moments, "label smoothing + Dice", (z, y), both, formula)
    hidden, ignored = z.clone(), y.clone()
    hidden[:, :, :1], ignored[:, :8] = torch.nan, -1
    yield Check(moments, "NaN where ignored", (hidden, ignored), plain, ce)
    infinite = z.clone()
    infinite[:, -1] = -torch.inf  # the absent class
    yield Check(moments, "a class of −∞", (infinite, y), plain, lambda z, y: ce(z[:, :-1], y))
    yield Check(moments, "all statistics", (z, y), formulas.our_statistics, formulas.statistics)
    points = torch.randn(700, 19, generator=random), _labels((700,), 19, random)
    yield Check(moments, "points", points, plain, ce)
    volume = torch.randn(2, 5, 4, 5, 6, generator=random), _labels((2, 9, 12, 12), 5, random)
    both = ao.CrossEntropyDice(ignore_index=-1)
    yield Check(moments, "volume, cross-entropy + Dice", volume, both, formulas.with_dice)
    as_bytes = torch.where(y < 0, 255, y).to(torch.uint8)
    signed = lambda z, y: ce(z, torch.where(y == 255, -1, y.long()))  # noqa: E731
    yield Check(moments, "labels of uint8", (z, as_bytes), ao.pixel_cross_entropy, signed)
    for channels, weight in ((1, 1.0), (3, 2.5)):
        labels = _labels((2 * channels, *y.shape[1:]), 3, random).unflatten(0, (2, channels))
        binary = partial(ao.pixel_binary_cross_entropy, pos_weight=weight, ignore_index=-1)
        name = f"binary cross-entropy, {channels} channels"
        formula = partial(formulas.binary, pos_weight=weight)
        yield Check(moments, name, (z[:, :channels], labels), binary, formula)
    teacher = torch.randn(*z.shape[:2], 7, 9, generator=random)
    for name, inputs, temperature, reduction in (
        ("divergence, temperature 3", (z, z.flip(1), y >= 0), 3.0, "mean"),
        ("divergence, small teacher", (z, teacher, y >= 0), 1.0, "mean"),
        ("a divergence for each pixel", (z, z.flip(1), y >= 0), 1.0, "none"),
        ("volume, divergence", (volume[0], volume[0].flip(1), volume[1] >= 0), 1.0, "mean"),
    ):
        options = {"temperature": temperature, "reduction": reduction}
        ours, formula = (
            partial(x, **options) for x in (formulas.our_divergence, formulas.divergence)
        )
        yield Check("pixel_kl_divergence", name, inputs, ours, formula)
    predict, formula = (partial(x, align=False) for x in (formulas.predictions, formulas.largest))
    # e^−loss: the error of a loss, which is relative to log Σ e^z
    parts, floor = ("pixel_argmax", moments), 8 * FLOOR
    name = "argmax, confidence"
    yield Check(COMPOSITION, name, (z, y), predict, formula, floor=floor, parts=parts)
    counts, parts = partial(ao.pixel_confusion, ignore_index=-1), ("pixel_argmax", "confusion")
    yield Check(COMPOSITION, "confusion of logits", (z, y), counts, formulas.confusion, parts=parts)
    classes = y.flip(0).clamp(min=0), y
    counts = partial(ao.confusion, num_classes=z.shape[1], ignore_index=-1)
    formula = partial(formulas.pairs, num_classes=z.shape[1])
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
        random, k, size = random_of(features.name), features.num_classes, features.shape
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
        ours, formula = (
            partial(formulas.our_moments, **options),
            partial(formulas.moments, **options),
        )
        name, quick = features.name, features.quick
        yield check(f"sums, distances, {name}", inputs, ours, formula, quick)
        yield check(f"sums, {name}", inputs[:2], ours, formula, False)
        if groups == 1 and not per_image:
            mse, often = partial(ao.pixel_to_anchor_mse, ignore_index=-1), name == "planes"
            yield check(f"pixel-to-anchor MSE, {name}", inputs, mse, formulas.mse, often)
    for dtype in (F32, BF16):
        random = random_of("not finite")
        f, y = 1 + torch.randn(2, 40, 16, 32, generator=random), _labels((2, 16, 32), 5, random)
        (b, b2), (i, i2), (j, j2) = torch.nonzero(y == 0)[:2].T
        f[b, 3, i, j], f[b2, 7, i2, j2] = torch.nan, torch.inf
        ours, formula = (
            partial(formulas.finite_sums, x, num_classes=5)
            for x in (formulas.our_moments, formulas.moments)
        )
        name = f"sums, NaN and ∞ in one class, {str(dtype).removeprefix('torch.')}"
        yield Check("class_moments", name, (f.to(dtype), y), ours, formula, dtype == F32)


def _method_checks() -> Iterator[Check]:
    """Random groups, sums of upsampled features, centroid InfoNCE, and one step of each method
    whose loss is not a constant."""
    random = random_of("methods")
    keys = _labels((2, 24, 32), 7, random).flatten(1)
    inputs = keys.to(torch.int32), torch.bincount(keys[keys >= 0], minlength=7)
    ours, formula = (partial(x, groups=3, seed=7) for x in (formulas.our_groups, formulas.groups))
    yield Check("split_groups", "3 groups of each key", inputs, ours, formula)
    inputs = 1 + torch.randn(2, 24, 12, 16, generator=random), _labels((2, 24, 32), 7, random)
    ours, formula = (partial(x, num_classes=7) for x in (formulas.our_sums, formulas.sums))
    yield Check("upsampled_sums", "sums of upsampled features", inputs, ours, formula)
    for name, groups, positives in (("rows", 0, True), ("groups", 3, True), ("keys", 0, False)):
        random, shape = random_of(name), (21, groups, 40) if groups else (21, 40)
        present = torch.rand(shape[:-1], generator=random) < 0.7
        present[:2], present[-1] = False, True
        q, p = (F.normalize(torch.randn(shape, generator=random), dim=-1) for _ in range(2))
        k = F.normalize(torch.randn(21, 40, generator=random), dim=-1)
        inputs = (q, k, present, p) if positives else (q, k, present)
        name, quick = f"InfoNCE, {name}", name != "rows"
        yield Check(
            "centroid_info_nce", name, inputs, formulas.our_info_nce, formulas.info_nce, quick
        )
    of_centroids = ("class_moments", "split_groups", "centroid_info_nce")
    for name, make, parts in (
        ("SAR", partial(ao.SAR, gate="per_class", delta=0.0), ("class_moments",)),
        ("OCCL", ao.OCCL, of_centroids),
        ("MVSC", ao.MVSC, of_centroids),
        ("CeCo", partial(ao.CeCo, reduced_dim=8, center_dim=14, dropout=0.0), ("upsampled_sums",)),
    ):
        random = random_of(name)
        f = 1 + torch.randn(2, 24, 12, 16, generator=random)
        w, y = torch.randn(7, 24, 1, 1, generator=random), _labels((2, 24, 32), 7, random)
        ours, exact = partial(formulas.step, make), partial(formulas.step, make, exact=True)
        quick = name != "MVSC"
        inputs = f, w, y
        yield Check(COMPOSITION, f"a step of {name}", inputs, ours, exact, quick, parts=parts)


def checks() -> list[Check]:
    """All checks; their inputs are the same numbers on every machine."""
    return [*_loss_checks(), *_feature_checks(), *_method_checks(), *_image_checks()]
