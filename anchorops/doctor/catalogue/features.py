"""Operators of features: class moments, random groups, sums of upsampled features, centroid
InfoNCE; and one step of each method whose loss is not a constant."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import anchorops as ao
from anchorops.losses import Regularizer

from ..._backend import select
from ..._ops import split_groups as groups_of_keys
from ..._ops.upsampled_sums import upsampled_sums
from . import formulas
from .entry import Entry, Inputs, Sample, of_options, small
from .inputs import F32, in_layout, labels_of, normal, uniform

BF16, F16 = torch.bfloat16, torch.float16
MOMENTS, GROUPED = ("class_moments",), ("class_moments", "split_groups")
ANCHORED = ("centroid_info_nce", *MOMENTS)
CONTRAST = (*GROUPED, "centroid_info_nce")
UPSAMPLED = ("upsampled_sums", "centroid_info_nce")


class Features(NamedTuple):
    num_classes: int
    shape: tuple[int, ...]
    layout: str = "planes"
    dtype: torch.dtype = F32
    quick: bool = False
    large_areas: bool = False  # of one class
    ratio: int = 2  # of the labels' size
    half: bool = False  # half of an image is ignored, and labels are int16
    label_dtype: torch.dtype | None = None  # without ignored ones
    anchors: bool = True
    options: Mapping[str, Any] = {}

    def __call__(self, n: int, random: Generator) -> Inputs:
        """The features of ignored pixels are NaN."""
        b, d, *pixels = self.shape
        pixels = [n * i for i in pixels]
        y = labels_of((b, *(self.ratio * i for i in pixels)), self.num_classes, random, self.half)
        if self.large_areas:
            bands = torch.arange(y.shape[1], device="cpu") // 10 % (self.num_classes - 1) - 1
            y = torch.where(uniform(*y.shape, random=random) < 0.002, y, bands[:, None])
        if self.label_dtype is not None:
            y = y.clamp(min=0).to(self.label_dtype)
        f = 1 + normal(b, d, *pixels, random=random)
        if not self.half:
            f = f.masked_fill(formulas.labels_at(y, f)[:, None] < 0, torch.nan)
        inputs = {"features": in_layout(f.to(self.dtype), self.layout), "labels": y}
        if self.anchors:
            inputs["anchors"] = normal(self.num_classes, d, random=random)
        return inputs


FEATURES = {
    "planes": Features(5, (2, 40, 16, 32), quick=True),
    "planes, bfloat16": Features(40, (2, 40, 16, 32), dtype=BF16, quick=True),
    "13 × 13, float16": Features(5, (3, 33, 13, 13), dtype=F16, quick=True),
    "cropped": Features(40, (2, 40, 13, 21), "cropped", quick=True),
    "channels last": Features(5, (2, 40, 16, 32), "channels last", quick=True),
    "channels last, bfloat16": Features(40, (2, 33, 16, 32), "channels last", BF16),
    "lines of 3": Features(5, (4, 16, 9, 3)),
    "large areas": Features(5, (2, 16, 136, 128), large_areas=True, quick=True),
    "16,000 classes": Features(16_000, (2, 24, 28, 28), quick=True),
    "16,000 classes, channels last": Features(
        16_000, (2, 32, 28, 28), "channels last", BF16, quick=True
    ),
}
IMAGES = {"each image": Features(5, (3, 40, 16, 32), options={"per_image": True})}
GROUPS = {"3 groups": Features(5, (2, 40, 16, 32), quick=True, options={"groups": 3, "seed": 7})}
SMALL = Features(4, (2, 6, 5, 7), half=True)
KERNELS = {  # in CUDA's kernels planes, shifted planes, rows, and single elements
    f"{layout}, {dtype}": Features(5, size, layout.split(" of")[0], dtype, ratio=1)
    for dtype in (F32, BF16, F16)
    for layout, size in {
        "planes": (2, 40, 4, 40),
        "planes of 169 pixels": (2, 70, 13, 13),
        "channels last": (2, 40, 4, 10),
        "channels last of 33": (2, 33, 5, 6),
        "planes of 3 pixels": (5, 67, 3),
    }.items()
}
LABELS = {
    f"labels of {dtype}": Features(5, (2, 3, 4, 5), label_dtype=dtype, anchors=False)
    for dtype in (
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    )
}


def of_features(what: str, every: dict[str, Features], *tags: str) -> tuple[Sample, ...]:
    """Of class moments. tags: instead of those of --verify."""
    return tuple(
        Sample(
            f"{what}, {name}",
            features,
            {"num_classes": features.num_classes, **features.options},
            tags or (("all", "quick") if features.quick else ("all",)),
        )
        for name, features in every.items()
    )


def without_anchors(every: dict[str, Features]) -> dict[str, Features]:
    return {name: x._replace(anchors=False, quick=False) for name, x in every.items()}


def of_distances(what: str, every: dict[str, Features], *tags: str) -> tuple[Sample, ...]:
    quick = {name: x._replace(quick=name == "planes") for name, x in every.items()}
    return tuple(sample._replace(options={}) for sample in of_features(what, quick, *tags))


def not_finite(dtype: torch.dtype, n: int, random: Generator) -> Inputs:
    """NaN and ∞ in one class."""
    f, y = 1 + normal(2, 40, 16, 32, random=random), labels_of((2, 16, 32), 5, random)
    (b, b2), (i, i2), (j, j2) = torch.nonzero(y == 0)[:2].T
    f[b, 3, i, j], f[b2, 7, i2, j2] = torch.nan, torch.inf
    return {"features": f.to(dtype), "labels": y}


def keys_of_classes(n: int, random: Generator) -> Inputs:
    keys = labels_of((2, 24 * n, 32 * n), 7, random).flatten(1)
    counts = torch.bincount(keys[keys >= 0], minlength=7)
    return {"keys": keys.to(torch.int32), "counts": counts}


def upsampled(n: int, random: Generator) -> Inputs:
    labels = labels_of((2, 24 * n, 32 * n), 7, random)
    return {"features": 1 + normal(2, 24, 12 * n, 16 * n, random=random), "labels": labels}


def of_step(n: int, random: Generator) -> Inputs:
    return upsampled(n, random) | {"weight": normal(7, 24, 1, 1, random=random)}


def centroids(size: tuple[int, ...], with_positives: bool, n: int, random: Generator) -> Inputs:
    """size: of the queries, [K, D] or [K, G, D]. The first classes are absent."""
    size = (n * size[0], *size[1:])
    present = uniform(*size[:-1], random=random) < 0.7
    present[:2], present[-1] = False, True
    sizes = {"queries": size, "keys": (size[0], size[-1])}
    sizes |= {"positives": size} if with_positives else {}
    unit = {name: F.normalize(normal(*x, random=random), dim=-1) for name, x in sizes.items()}
    return unit | {"present": present}


def all_present(n: int, random: Generator) -> Inputs:
    inputs = centroids((21, 40), False, n, random)
    return {name: inputs[name] for name in ("queries", "keys")}


def with_bias(n: int, random: Generator) -> Inputs:
    inputs = centroids((21, 3, 40), False, n, random)
    return inputs | {"bias": normal(len(inputs["keys"]), random=random)}


class_moments = partial(ao.ops.class_moments, ignore_index=-1)


def finite_sums(
    moments: Callable[..., Sequence[Any]], features: Tensor, labels: Tensor
) -> tuple[Tensor, ...]:
    """Counts, which sums are finite, and these."""
    counts, sums, *_ = moments(features, labels, num_classes=5)
    return counts, sums.isfinite(), sums.nan_to_num(0, 0, 0)


def split_groups(keys: Tensor, counts: Tensor, *, groups: int, seed: int) -> tuple[Tensor, ...]:
    backend = select("split_groups", keys, len(counts))
    return groups_of_keys.split_groups(keys, counts, groups, seed, backend=backend)


def sums(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, ...]:
    options = {"per_image": True, "upsample": True, "ignore_index": -1}
    return upsampled_sums(features, labels, num_classes, **options)


def step(
    make: Callable[..., nn.Module],
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    exact: bool = False,
) -> Tensor:
    """The loss of a method, new and always with the same random numbers."""
    backend = ao.use_backend("reference") if exact else nullcontext()
    with torch.random.fork_rng(devices=[]), backend:
        torch.manual_seed(0)
        num_classes, dim = weight.shape[:2]
        method = make(num_classes, dim, ignore_index=-1).to(features.device, features.dtype)
        classifier = nn.Conv2d(dim, num_classes, 1).to(weight)
        classifier.weight = nn.Parameter(weight.detach())
        return method(features, labels, classifier)


def ceco(num_classes: int, dim: int, **options: Any) -> ao.CeCo:
    options = {"reduced_dim": dim // 3, "center_dim": 2 * num_classes, "dropout": 0.0} | options
    return ao.CeCo(num_classes, dim, **options)


def combined(*sizes: int, **options: Any) -> ao.Combined:
    return ao.Combined(*(METHODS[name](*sizes, **options) for name in ("SAR", "OCCL", "MVSC")))


METHODS: dict[str, Callable[..., Regularizer]] = {  # of the numbers of classes and channels
    "SAR": partial(ao.SAR, gate="per_class", delta=0.0),
    "SAR, one gate": partial(ao.SAR, delta=0.1),
    "CR": partial(ao.SAR, embed=False),
    "CBP": partial(ao.CBP, update="ema"),
    "CBP, penalty": partial(ao.CBP, update="penalty"),
    "OCCL": ao.OCCL,
    "OCCL, images": partial(ao.OCCL, split="images"),
    "MVSC": ao.MVSC,
    "CeCo": ceco,
    "CeCo, features": partial(ceco, resolution="feature"),
    "CeCo, images": partial(ceco, per_image=True),
    "combined": combined,
}
STEPS = {"SAR": ANCHORED, "OCCL": CONTRAST, "MVSC": CONTRAST, "CeCo": UPSAMPLED}
EPS: dict[str, Any] = {"normalize": 1e-6}
EACH: dict[str, Any] = {"reduction": "none"}
OF_CLASSES: dict[str, Any] = {"num_classes": SMALL.num_classes}
CLASS_MOMENTS = Entry(
    "class_moments",
    MOMENTS,
    class_moments,
    formulas.class_moments,
    (
        *of_features("sums, distances", FEATURES | IMAGES),
        *of_features("sums", without_anchors(FEATURES | IMAGES)),
        *of_features("sums and distances", KERNELS, "kernels", "cuda"),
        *of_features("only sums", without_anchors(KERNELS), "kernels", "cuda"),
        *of_features("only sums", LABELS, "kernels", "cuda"),
        small("class_moments", SMALL, **OF_CLASSES),
    ),
    tables=("anchors",),
)
ENTRIES = [
    CLASS_MOMENTS,
    CLASS_MOMENTS._replace(
        name="class_moments of groups",
        operators=GROUPED,
        samples=(
            *of_features("sums, distances", GROUPS),
            *of_features("sums", without_anchors(GROUPS)),
            small("class_moments of groups", SMALL, **OF_CLASSES, groups=2, per_image=True, seed=5),
        ),
    ),
    Entry(
        "pixel_to_anchor_mse",
        MOMENTS,
        partial(ao.pixel_to_anchor_mse, ignore_index=-1),
        formulas.pixel_to_anchor_mse,
        (
            *of_distances("pixel-to-anchor MSE", FEATURES),
            small("pixel_to_anchor_mse", SMALL),
            *of_options("pixel_to_anchor_mse", SMALL, {"reduction": "sum"}, on_cpu=False),
        ),
        tables=("anchors",),
    ),
    Entry(
        "distances from fixed anchors",
        MOMENTS,
        lambda anchors, **inputs: ao.pixel_to_anchor_mse(
            anchors=anchors.detach(), ignore_index=-1, **inputs
        ),
        lambda anchors, **inputs: formulas.pixel_to_anchor_mse(anchors=anchors.detach(), **inputs),
        of_distances("only distances", KERNELS, "kernels", "cuda"),
    ),
    Entry(
        "class_centroids",
        MOMENTS,
        partial(ao.class_centroids, ignore_index=-1),
        formulas.class_centroids,
        (small("class_centroids", SMALL._replace(anchors=False), **OF_CLASSES, per_image=True),),
    ),
    Entry(
        "sums, NaN and ∞ in one class",
        MOMENTS,
        partial(finite_sums, class_moments),
        partial(finite_sums, formulas.class_moments),
        (
            Sample("sums, NaN and ∞ in one class, float32", partial(not_finite, F32)),
            Sample(
                "sums, NaN and ∞ in one class, bfloat16", partial(not_finite, BF16), {}, ("all",)
            ),
        ),
    ),
    Entry(
        "split_groups",
        ("split_groups",),
        split_groups,
        partial(groups_of_keys.split_groups, backend="reference"),
        (Sample("3 groups of each key", keys_of_classes, {"groups": 3, "seed": 7}),),
        differentiable=False,
    ),
    Entry(
        "upsampled_sums",
        ("upsampled_sums",),
        sums,
        formulas.upsampled_sums,
        (
            Sample("sums of upsampled features", upsampled, {"num_classes": 7}),
            small("upsampled_sums", SMALL._replace(anchors=False), **OF_CLASSES),
        ),
        ignores=False,
        dense=("features",),
        rtol=1e-6,  # weights are multiples of 1/SPLAT_UNITS
    ),
    Entry(
        "centroid_info_nce",
        ("centroid_info_nce",),
        ao.ops.centroid_info_nce,
        formulas.centroid_info_nce,
        (
            Sample("InfoNCE, rows", partial(centroids, (21, 40), True), {}, ("all",)),
            Sample("InfoNCE, groups", partial(centroids, (21, 3, 40), True)),
            Sample("InfoNCE, keys", partial(centroids, (21, 40), False)),
            Sample("InfoNCE, all present", all_present, {}, ("all",)),
            Sample("InfoNCE, bias", with_bias, {}, ("all",)),
            Sample("InfoNCE, normalised", partial(centroids, (21, 3, 40), True), EPS),
            Sample("InfoNCE, each loss", partial(centroids, (21, 40), False), EACH, ("all",)),
            Sample("InfoNCE, 1,000 classes", partial(centroids, (1000, 20), True), EPS, ("all",)),
            small("centroid_info_nce", partial(centroids, (6, 2, 5), True)),
        ),
        tables=("queries", "keys", "present", "positives", "bias"),
    ),
    *(
        Entry(
            name,
            operators,
            partial(step, METHODS[name]),
            partial(step, METHODS[name], exact=True),
            (Sample(f"a step of {name}", of_step, {}, ("all", "quick")[: 1 + (name != "MVSC")]),),
        )
        for name, operators in STEPS.items()
    ),
]
