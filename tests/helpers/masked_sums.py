"""Class moments by the straightforward formulas, and the allowed error.

The error against float64 is at most twice that of the straightforward formula (a masked sum per
class, in the dtype of the statistics: for half precision this is stricter than the features'
dtype), plus a floor.

- On `cpu` and `reference` the floor is one rounding of the result, and the rounding of the terms,
  which grows like their norm. float64 is accumulated in float64, like the formula that it is
  compared with: 8 roundings.
- The floor of `triton` and `cuda` is FLOOR of the largest sum of the terms' sizes. On a GPU, whose
  tensor cores truncate, the error is at most ON_GPU of it, whatever the formula's error is.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from cpu_kernels import in_layout
from torch import Tensor

import anchorops as ao
from anchorops import reference
from anchorops._moments import statistics_dtype

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
FLOOR = 2**-23  # one rounding to float32
ON_GPU = 4e-6


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
    """The straightforward formula in the anchors' dtype: sums of term(…) over each key's pixels."""
    keys, shape = pixel_keys(case, features, labels)
    rows = features.movedim(1, -1).flatten(0, -2).to(anchors.dtype)
    dsums, dsqdists = dsums.to(rows.dtype).view(-1, rows.shape[1]), dsqdists.to(rows.dtype).view(-1)
    counts = torch.bincount(keys[keys >= 0], minlength=torch.Size(shape).numel())
    sums, sqdists = rows.new_zeros(len(counts), rows.shape[1]), rows.new_zeros(len(counts))
    dfeatures, danchors = torch.zeros_like(rows), torch.zeros_like(anchors)
    in_order = keys.argsort(stable=True)[(keys < 0).sum() :].split(counts.tolist())
    for key in counts.nonzero()[:, 0].tolist():
        pixels, k = in_order[key], key // case.groups % case.num_classes
        residuals = rows[pixels] - anchors[k]
        sums[key] = term(rows[pixels]).sum(0)
        sqdists[key] = term(residuals.square()).sum()
        dfeatures[pixels] = term(2 * dsqdists[key] * residuals) + term(dsums[key])
        danchors[k] += (term(-2 * dsqdists[key] * residuals)).sum(0)
    dfeatures = dfeatures.view(features.movedim(1, -1).shape).movedim(-1, 1)
    return Expected(
        counts.view(shape), sums.view(*shape, -1), sqdists.view(shape), dfeatures, danchors
    )


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
    ours = run(case, features, labels, anchors, dsums, dsqdists)
    dsqdists = dsqdists if case.anchors else dsqdists * 0

    def formula(anchors: Tensor, term=lambda t: t) -> Expected:
        return masked_sums(case, features, labels, anchors, dsums, dsqdists, term)

    exact, straightforward = formula(anchors.double()), formula(anchors)
    allowed = _cpu_budget if backend in ("cpu", "reference") else _gpu_budget
    allowed = allowed(case, backend, exact, straightforward, formula, anchors, dsqdists)
    dtype = case.statistics_dtype
    dtypes = torch.int64, dtype, dtype, case.dtype, anchors.dtype
    assert all(x is None or x.dtype == of for x, of in zip(ours, dtypes, strict=True))
    assert torch.equal(ours[0], exact.counts)
    if backend != "reference":
        assert ours[3].stride() == torch.empty_like(features, device="meta").stride()
    for actual, right, most in zip(ours[1:], exact[1:], allowed, strict=True):
        if actual is not None:
            error = (actual.double() - right).abs()
            assert (error <= most).all(), f"error {error.max():.3g}, allowed {most.max():.3g}"


def check_distances_alone(case: Case, backend: str) -> None:
    """pixel_to_anchor_mse, which needs no sums of features where the anchors are fixed: the loss
    and its gradients are those of the reference in float64."""
    features, labels, anchors, *_ = make_inputs(case)
    results = []
    for name, dtype in ((backend, case.dtype), ("reference", F64)):
        leaves = [features.detach().to(dtype).requires_grad_(), anchors.detach()]
        leaves[1] = leaves[1].to(dtype if dtype == F64 else anchors.dtype)
        leaves[1].requires_grad_(case.anchors == "learnable")
        with ao.use_backend(name):
            loss = ao.pixel_to_anchor_mse(leaves[0], labels, leaves[1], ignore_index=255)
        wanted = [x for x in leaves if x.requires_grad]
        results.append((loss.detach(), *torch.autograd.grad(loss, wanted)))
    (ours, *gradients), (exact, *right) = results
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)
    for gradient, wanted in zip(gradients, right, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=2e-2, atol=1e-7)


def _twice(straightforward: Tensor, exact: Tensor) -> Tensor:
    return 2 * (straightforward.double() - exact).abs().max()


def _cpu_budget(case, backend, exact, straightforward, formula, anchors, dsqdists):
    """The allowed errors of sums, sqdists, dfeatures, danchors."""
    dtype, info, squares = (
        case.statistics_dtype,
        torch.finfo(case.dtype),
        formula(anchors.double(), torch.square),
    )
    eps, roundings = torch.finfo(dtype).eps, 8 if dtype == F64 else 1

    def budget(right: Tensor, plain: Tensor, squares: Tensor) -> Tensor:
        return _twice(plain, right) + eps * (roundings * right.abs() + 4 * squares.sqrt())

    budgets = Expected(*map(budget, exact, straightforward, squares))
    # arithmetic in the statistics' dtype, then one rounding (of a subnormal number: absolute)
    dfeatures = info.eps / 2 * exact.dfeatures.abs() + 2 * eps * squares.dfeatures.sqrt()
    dfeatures += info.smallest_normal * info.eps
    # the fused operators compute danchors = −2·dsqdists·(sums − n·a) from the rounded sums
    rounding = (8 if dtype == F64 else 0.5) * eps * exact.sums.abs() * (backend != "reference")
    rounding = 2 * dsqdists[..., None] * rounding
    rounding = rounding.view(-1, case.num_classes, case.groups, case.size[1]).sum((0, 2))
    return budgets.sums, budgets.sqdists, dfeatures, budgets.danchors + rounding


def _gpu_budget(case, backend, exact, straightforward, formula, anchors, dsqdists):
    """The allowed errors of sums, sqdists, dfeatures, danchors of GPU kernels, on a GPU or not."""
    largest = [x.abs().max() for x in (formula(anchors.double(), torch.abs).sums, *exact[2:])]
    on_gpu = [ON_GPU * largest[0], ON_GPU * largest[1]]
    simulated = [_twice(straightforward[i], exact[i]) + FLOOR * largest[i - 1] for i in (1, 2)]
    sums, sqdists = on_gpu if anchors.is_cuda else simulated
    # float32 arithmetic, then one rounding to the features' dtype
    eps, floor = torch.finfo(case.dtype).eps, 1e-6 if anchors.is_cuda else 4 * FLOOR
    dfeatures = eps * exact.dfeatures.abs() + floor * largest[2]
    # from the sums of all keys of a class: −2·dsqdists·(s − n·a)
    danchors = 2 * dsqdists.numel() // case.num_classes * sums + FLOOR * largest[3]
    return sums, sqdists, dfeatures, sums if anchors.is_cuda else danchors
