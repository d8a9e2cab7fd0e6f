"""Cases of class moments. Values and gradients are within the catalogue's error budget, but more
strict: without the error of torch's formula in float32, and with a smaller floor."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from cpu_kernels import in_layout
from torch import Tensor

import anchorops as ao
from anchorops import reference
from anchorops._moments import statistics_dtype
from anchorops.catalogue import formulas
from anchorops.catalogue.budget import error_and_limit

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# of the largest number; in float64 the formula itself has as many as the backend
ROUNDINGS = {torch.float32: 2, torch.float64: 8}
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
    labels_size: tuple[int, int] | None = None

    @property
    def statistics_dtype(self) -> torch.dtype:
        return statistics_dtype(self.dtype)


def make_features(case: Case) -> tuple[Tensor, Tensor]:
    """Random features of this layout, and their buffer, which is NaN around them."""
    return in_layout(torch.randn(case.size, dtype=F64).to(case.dtype), case.layout)


def make_labels(case: Case) -> Tensor:
    """Random, or runs of 37 pixels, or one class: some ignored and some out of range. All other
    labels are those of a class, but for the first five."""
    batch, *pixels = case.size[:1] + case.size[2:]
    shape, classes = torch.Size((batch, *(case.labels_size or pixels))), case.num_classes
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


def pixel_keys(case: Case, features: Tensor, labels: Tensor) -> tuple[Tensor, list[int]]:
    """The key of each pixel (flat), −1 if ignored, and the shape of the statistics."""
    if features.dim() == 4:
        labels = F.interpolate(labels[:, None].double(), features.shape[2:], mode="nearest")[:, 0]
    keys = labels.long() if labels.dim() > 1 else labels.long()[None]
    shape = [case.num_classes]
    valid = (keys >= 0) & (keys < case.num_classes) & (keys != 255)
    if case.per_image:
        image = torch.arange(len(keys)).view(-1, *[1] * (keys.dim() - 1))
        keys, shape = keys + case.num_classes * image, [len(keys), *shape]
    keys = torch.where(valid, keys, -1).flatten()
    if case.groups > 1:  # tested in test_class_keys.py
        counts = torch.bincount(keys[keys >= 0], minlength=torch.Size(shape).numel())
        keys, shape = reference.split_groups(keys, counts, case.groups, 7), [*shape, case.groups]
    return keys, shape


def formula(case: Case, features: Tensor, labels: Tensor, anchors: Tensor, dsums, dsqdists):
    """The results of `run` by torch's functions, in float64."""
    x, a = (t.detach().double().requires_grad_() for t in (features, anchors))
    valid = (labels >= 0) & (labels < case.num_classes) & (labels != 255)
    pixels, labels = x, torch.where(valid, labels, -1)
    if x.dim() == 2:
        pixels, labels = x.t()[None], labels[None]
    options = {"num_classes": case.num_classes, "groups": case.groups, "seed": 7}
    counts, sums, sqdists = formulas.class_moments(
        pixels, labels, a, per_image=case.per_image, **options
    )
    loss = (sums * dsums).sum() + (sqdists * dsqdists).sum() * bool(case.anchors)
    gradients = torch.autograd.grad(loss, (x, a), materialize_grads=True)
    return counts, sums.detach(), sqdists.detach(), *gradients


def run(case: Case, features: Tensor, labels: Tensor, anchors: Tensor, dsums, dsqdists):
    """counts, sums, sqdists, dfeatures, danchors of the chosen backend; None for those that there
    are not."""
    features = features.detach().requires_grad_()
    anchors = anchors.detach().requires_grad_(case.anchors == "learnable")
    counts, sums, sqdists = ao.ops.class_moments(
        features,
        labels,
        case.num_classes,
        anchors=anchors if case.anchors else None,
        groups=case.groups,
        per_image=case.per_image,
        seed=7,
        ignore_index=255,
    )
    loss = (sums * dsums).sum()
    inputs = [features, anchors] if case.anchors == "learnable" else [features]
    if sqdists is not None:
        loss, sqdists = loss + (sqdists * dsqdists).sum(), sqdists.detach()
    dfeatures, *danchors = torch.autograd.grad(loss, inputs)
    return counts, sums.detach(), sqdists, dfeatures, danchors[0] if danchors else None


def make_inputs(case: Case):
    """features, labels, anchors, dsums, dsqdists."""
    features, labels, dtype = make_features(case)[0], make_labels(case), case.statistics_dtype
    shape = pixel_keys(case, features, labels)[1]
    anchors, dsums = (
        torch.randn(*n, case.size[1], dtype=dtype) for n in ([case.num_classes], shape)
    )
    return features, labels, anchors, dsums, torch.rand(shape, dtype=dtype)


def check(
    case: Case,
    backend: str,
    features: Tensor | None = None,
    labels: Tensor | None = None,
    anchors: Tensor | None = None,
) -> None:
    """Values and gradients of the backend, which is chosen, are within the error budget."""
    default_features, default_labels, default_anchors, dsums, dsqdists = make_inputs(case)
    features = default_features if features is None else features
    labels = default_labels if labels is None else labels
    anchors = default_anchors if anchors is None else anchors
    arguments = features, labels, anchors, dsums, dsqdists
    ours, exact = run(case, *arguments), formula(case, *arguments)
    dtype = case.statistics_dtype
    dtypes = torch.int64, dtype, dtype, case.dtype, anchors.dtype
    assert all(x is None or x.dtype == of for x, of in zip(ours, dtypes, strict=True))
    assert torch.equal(ours[0], exact[0].long())
    if backend != "reference":
        assert ours[3].stride() == torch.empty_like(features, device="meta").stride()
    largest = [max(float(x.abs().max()), 1e-30) for x in exact]
    floor, terms = ROUNDINGS[dtype] * torch.finfo(dtype).eps, 1.0
    if backend not in ("cpu", "reference"):  # where tensor cores truncate, the terms matter
        floor = ON_GPU if features.is_cuda else torch.finfo(dtype).eps
        terms = float(formula(case, features.abs(), *arguments[1:])[1].max()) / largest[1]
    # danchors = −2·dsqdists·(sums − n·a), from the rounded sums
    factors = terms, 1.0, 1.0, 1 + terms * 2 * case.groups * largest[1] / largest[4]
    for i, factor in enumerate(factors, 1):
        if ours[i] is not None:
            rounding = torch.finfo(ours[i].dtype).eps / (2 if i == 3 else 1)
            error, limit = error_and_limit(ours[i], exact[i], exact[i], factor * floor, rounding)
            assert error <= limit, i


def check_distances_alone(case: Case, backend: str) -> None:
    """pixel_to_anchor_mse, which needs no sums of features where the anchors are fixed: the loss
    and its gradients."""
    features, labels, anchors, *_ = make_inputs(case)
    leaves = [features.detach().requires_grad_(), anchors.detach()]
    leaves[1].requires_grad_(case.anchors == "learnable")
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
    ours = ao.pixel_to_anchor_mse(leaves[0], labels, leaves[1], ignore_index=255)
    labels = torch.where((labels >= 0) & (labels < case.num_classes), labels, -1)
    exact = formulas.pixel_to_anchor_mse(wide[0], labels, wide[1])
    gradients = [
        torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])
        for loss, inputs in ((ours, leaves), (exact, wide))
    ]
    for actual, right in zip((ours, *gradients[0]), (exact, *gradients[1]), strict=True):
        error, limit = error_and_limit(actual.detach(), right.detach(), right.detach(), 1e-5)
        assert error <= limit
