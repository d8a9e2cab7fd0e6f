"""Cases of class moments. Values and gradients are within the catalogue's error budget, but more
strict: without the error of torch's formula in float32, and with a smaller floor."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import anchorops as ao
from anchorops import reference
from anchorops._moments import statistics_dtype
from anchorops.doctor.catalogue import Inputs, formulas
from anchorops.doctor.catalogue.budget import error_and_limit
from anchorops.doctor.catalogue.entry import as_dtype, evaluate
from tests.helpers.cpu_kernels import in_layout

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# of the largest number; in float64, where the formula has as many, those of other operators
ROUNDINGS = {torch.float32: 2, torch.float64: 32}
ON_GPU = 4e-6  # of it: tensor cores truncate


class Case(NamedTuple):
    size: tuple[int, ...]
    num_classes: int
    dtype: torch.dtype = F32
    layout: str = "contiguous"
    labels: str = "random"
    anchors: str | None = "learnable"  # or "fixed"
    groups: int = 1
    per_image: bool = False


def make_features(case: Case) -> Tensor:
    """Random features of this layout, between NaN."""
    return in_layout(torch.randn(case.size, dtype=F64).to(case.dtype), case.layout)[0]


def make_labels(case: Case) -> Tensor:
    """Random, or runs of 37 pixels, or one class: some ignored and some out of range. All other
    labels are those of a class, but for the first five."""
    batch, *pixels = case.size[:1] + case.size[2:]
    shape, classes = torch.Size((batch, *pixels)), case.num_classes
    pixel = torch.arange(shape.numel())
    if case.labels in ("coherent", "long runs", "mixed"):  # mixed: 200 in a run, then 50 random
        length = {"coherent": 37, "long runs": 150, "mixed": 250}[case.labels]
        labels = torch.randint(0, classes, (len(pixel) // length + 1,))[pixel // length]
        if case.labels == "mixed":
            labels = torch.where(pixel % 250 < 200, labels, torch.randint(0, classes, pixel.shape))
    elif case.labels == "short runs":  # of 1 to 12 pixels
        lengths = torch.randint(1, 13, pixel.shape)
        labels = torch.randint(0, classes, pixel.shape).repeat_interleave(lengths)[: len(pixel)]
    elif case.labels == "alternating":  # pixels of two to four keys
        labels = pixel // 45 * 3 % classes + torch.randint(0, 2, pixel.shape)
    elif case.labels == "halves":  # 64 pixels of 20 keys; then of two: of the first 16 that CUDA's
        # kernels meet, of the last four, of both. They look at even pixels first.
        pairs = torch.tensor([[0, 2], [17, 19], [2, 19]])[pixel // 64 % 4 - 1, pixel % 2]
        labels = torch.where(pixel // 64 % 4 == 0, pixel % 64 % 20, pairs)
    elif case.labels in ("one class", "one key"):
        labels = torch.full_like(pixel, classes - 1)
    elif case.labels == "distinct":
        labels = torch.randperm(classes)
    else:
        labels = torch.randint(0, classes, pixel.shape)
    if case.labels not in ("random", "coherent", "one class"):
        labels[:5] = 255
    elif len(pixel) > 1:
        labels[::13] = torch.tensor([255, -1, classes])[labels[::13] % 3]
    return labels.view(shape)


def make_inputs(case: Case) -> Inputs:
    inputs = {"features": make_features(case), "labels": make_labels(case)}
    if case.anchors:
        dtype = statistics_dtype(case.dtype)
        inputs["anchors"] = torch.randn(case.num_classes, case.size[1], dtype=dtype)
    return inputs


def pixel_keys(case: Case, features: Tensor, labels: Tensor) -> Tensor:
    """The key of each pixel (flat), −1 if ignored."""
    arguments = features, labels, case.num_classes, case.per_image, 255
    keys, counts = reference.class_keys(*arguments)
    if case.groups > 1:
        keys = reference.split_groups(keys, counts, case.groups, 7)
    return keys.flatten()


def moments(
    case: Case, features: Tensor, labels: Tensor, anchors: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    anchors = anchors.detach() if anchors is not None and case.anchors == "fixed" else anchors
    options = {"groups": case.groups, "per_image": case.per_image, "seed": 7, "ignore_index": 255}
    return ao.ops.class_moments(features, labels, case.num_classes, anchors=anchors, **options)


def formula(
    case: Case, features: Tensor, labels: Tensor, anchors: Tensor | None = None
) -> tuple[Tensor, ...]:
    anchors = anchors.detach() if anchors is not None and case.anchors == "fixed" else anchors
    valid = (labels >= 0) & (labels < case.num_classes) & (labels != 255)
    pixels, labels = features, torch.where(valid, labels, -1)
    if pixels.dim() == 2:
        pixels, labels = pixels.t()[None], labels[None]
    options = {"num_classes": case.num_classes, "groups": case.groups, "seed": 7}
    return formulas.class_moments(pixels, labels, anchors, per_image=case.per_image, **options)


def run(case: Case, inputs: Inputs) -> list[Tensor | None]:
    """counts, sums, sqdists if there are anchors, dfeatures, danchors; of the chosen backend."""
    return evaluate(partial(moments, case), inputs)


def check(case: Case, backend: str, **changed: Tensor) -> None:
    """Values and gradients of the backend, which is chosen, are within the error budget."""
    inputs = make_inputs(case) | changed
    features = inputs["features"]
    buffer = features if features._base is None else features._base
    before = buffer.clone()
    ours, exact = run(case, inputs), evaluate(partial(formula, case), as_dtype(inputs, F64))
    torch.testing.assert_close(buffer, before, rtol=0, atol=0, equal_nan=True)
    counts, sums, *sqdists, dfeatures = ours[: 4 if case.anchors else 3]
    dtype = statistics_dtype(case.dtype)
    assert all(x.dtype == dtype for x in (sums, *sqdists)) and counts.dtype == torch.int64
    assert torch.equal(counts, exact[0].long())
    if backend != "reference":
        assert dfeatures.stride() == torch.empty_like(features, device="meta").stride()
    floor, terms = ROUNDINGS[dtype] * torch.finfo(dtype).eps, 1.0
    if backend not in ("cpu", "reference"):  # where tensor cores truncate, the terms matter
        floor = ON_GPU if features.is_cuda else torch.finfo(dtype).eps
        absolute = formula(case, **inputs | {"features": features.abs().double()})[1]
        terms = float(absolute.max()) / max(float(exact[1].abs().max()), 1e-30)
    factors = [1.0] * len(ours)
    factors[1] = terms
    if case.anchors == "learnable":  # danchors = −2·dsqdists·(sums − n·a), from the rounded sums
        factors[4] = 1 + terms * 2 * case.groups * float(
            exact[1].abs().max() / exact[4].abs().max().clamp(min=1e-30)
        )
    for actual, right, factor in [*zip(ours, exact, factors, strict=True)][1:]:
        if actual is None:
            assert right is None
            continue
        rounding = torch.finfo(actual.dtype).eps / (2 if actual is dfeatures else 1)
        error, limit = error_and_limit(actual, right, right, factor * floor, rounding)
        assert error <= limit
