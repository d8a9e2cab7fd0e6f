"""Class moments by the straightforward formulas, and the allowed error.

The error against float64 is at most twice that of the straightforward formula (a masked sum per
class, in the dtype of the statistics: for half precision this is stricter than the features'
dtype), plus a floor: one rounding of the result, and the rounding of the terms, which grows like
their norm. float64 is accumulated in float64, like the formula that it is compared with: 8
roundings.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from cpu_kernels import in_layout
from torch import Tensor

import anchorops as ao
from anchorops import reference

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


class Case(NamedTuple):
    size: tuple[int, ...]
    num_classes: int
    dtype: torch.dtype = F32
    layout: str = "contiguous"
    labels: str = "random"
    anchors: bool = True
    groups: int = 1
    per_image: bool = False
    labels_size: tuple[int, int] | None = None


def make_features(case: Case) -> tuple[Tensor, Tensor]:
    """Random features of this layout, and their buffer, which is NaN around them."""
    return in_layout(torch.randn(case.size, dtype=F64).to(case.dtype), case.layout)


def make_labels(case: Case) -> Tensor:
    """Random, or runs of 37 pixels, or one class; some ignored and some out of range."""
    batch, *pixels = case.size[:1] + case.size[2:]
    shape = torch.Size((batch, *(case.labels_size or pixels)))
    labels = torch.randint(0, case.num_classes, shape)
    if case.labels == "coherent":
        labels = labels.view(-1).repeat_interleave(37)[: shape.numel()].view(shape)
    elif case.labels == "one class":
        labels.fill_(case.num_classes - 1)
    if shape.numel() > 1:
        labels.view(-1)[::13] = torch.tensor([255, -1, case.num_classes])[labels.view(-1)[::13] % 3]
    return labels


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


class Expected(NamedTuple):
    counts: Tensor
    sums: Tensor
    sqdists: Tensor
    dfeatures: Tensor
    danchors: Tensor


def masked_sums(
    case: Case,
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    dsums: Tensor,
    dsqdists: Tensor,
    term=lambda t: t,
) -> Expected:
    """The straightforward formula in the anchors' dtype: the sum of term(…) over each key's pixels,
    by masks."""
    keys, shape = pixel_keys(case, features, labels)
    rows = features.movedim(1, -1).flatten(0, -2).to(anchors.dtype)
    dsums, dsqdists = dsums.to(rows.dtype).view(-1, rows.shape[1]), dsqdists.to(rows.dtype).view(-1)
    counts = torch.zeros(torch.Size(shape).numel(), dtype=torch.int64)
    sums, sqdists = rows.new_zeros(len(counts), rows.shape[1]), rows.new_zeros(len(counts))
    dfeatures, danchors = torch.zeros_like(rows), torch.zeros_like(anchors)
    for key in keys[keys >= 0].unique().tolist():
        mask, k = keys == key, key // case.groups % case.num_classes
        residuals = rows[mask] - anchors[k]
        counts[key] = mask.sum()
        sums[key] = term(rows[mask]).sum(0)
        sqdists[key] = term(residuals.square()).sum()
        dfeatures[mask] = term(2 * dsqdists[key] * residuals) + term(dsums[key])
        danchors[k] += (term(-2 * dsqdists[key] * residuals)).sum(0)
    dfeatures = dfeatures.view(features.movedim(1, -1).shape).movedim(-1, 1)
    return Expected(
        counts.view(shape), sums.view(*shape, -1), sqdists.view(shape), dfeatures, danchors
    )


def within_budget(
    ours: Tensor, exact: Tensor, straightforward: Tensor, squares: Tensor, of_inputs: Tensor | float
) -> None:
    """squares: the sum of the terms' squares; of_inputs: the error that the result has because its
    inputs were rounded."""
    eps = torch.finfo(ours.dtype).eps
    floor = eps * ((8 if ours.dtype == F64 else 1) * exact.abs() + 4 * squares.sqrt())
    error = (ours.double() - exact).abs()
    allowed = 2 * (straightforward.double() - exact).abs().max() + floor + of_inputs
    assert (error <= allowed).all(), f"error {error.max():.3g}, allowed {allowed.max():.3g}"


def run(case: Case, features: Tensor, labels: Tensor, anchors: Tensor, dsums, dsqdists):
    """counts, sums, sqdists, dfeatures, danchors; without the last if there are no anchors."""
    features, anchors = features.detach().requires_grad_(), anchors.detach().requires_grad_()
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
    if sqdists is None:
        return counts, sums.detach(), None, torch.autograd.grad(loss, features)[0], None
    loss = loss + (sqdists * dsqdists).sum()
    return counts, sums.detach(), sqdists.detach(), *torch.autograd.grad(loss, (features, anchors))


def check(
    case: Case, features: Tensor, labels: Tensor, anchors: Tensor, backend: str = "cpu"
) -> None:
    dtype = reference.statistics_dtype(case.dtype)
    _, shape = pixel_keys(case, features, labels)
    dsums, dsqdists = torch.randn(*shape, case.size[1], dtype=dtype), torch.rand(shape, dtype=dtype)
    with ao.use_backend(backend):
        ours = run(case, features, labels, anchors, dsums, dsqdists)
    if not case.anchors:
        dsqdists = dsqdists * 0
    arguments = labels, anchors, dsums, dsqdists
    exact = masked_sums(case, features, labels, anchors.double(), dsums, dsqdists)
    straightforward = masked_sums(case, features, *arguments)
    squares = masked_sums(
        case, features, labels, anchors.double(), dsums, dsqdists, term=torch.square
    )

    counts, sums, sqdists, dfeatures, danchors = ours
    assert counts.dtype == torch.int64 and torch.equal(counts, exact.counts)
    assert sums.dtype == dtype
    within_budget(sums, exact.sums, straightforward.sums, squares.sums, 0)
    assert dfeatures.dtype == case.dtype
    if backend != "reference":
        assert dfeatures.stride() == torch.empty_like(features).stride()
    # arithmetic in the statistics' dtype, then one rounding (of a subnormal number: absolute)
    eps, info = torch.finfo(dtype).eps, torch.finfo(case.dtype)
    allowed = info.eps / 2 * exact.dfeatures.abs() + 2 * eps * squares.dfeatures.sqrt()
    allowed += info.smallest_normal * info.eps
    assert ((dfeatures.double() - exact.dfeatures).abs() <= allowed).all()
    if sqdists is None:
        return
    assert sqdists.dtype == dtype and danchors.dtype == anchors.dtype
    within_budget(sqdists, exact.sqdists, straightforward.sqdists, squares.sqdists, 0)
    # the fused operators compute danchors = −2·dsqdists·(sums − n·a) from the rounded sums
    rounding = (8 if dtype == F64 else 0.5) * eps * exact.sums.abs() * (backend != "reference")
    rounding = (2 * dsqdists[..., None] * rounding).view(
        -1, case.num_classes, case.groups, case.size[1]
    )
    within_budget(
        danchors,
        exact.danchors,
        straightforward.danchors,
        squares.danchors,
        rounding.sum((0, 2)),
    )
