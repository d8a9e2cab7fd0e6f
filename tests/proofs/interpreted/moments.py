"""Cases of class moments: inputs, exact values and the error budget.

The error against float64 is at most twice that of the float32 formula (a masked sum for each
class), plus FLOOR.
"""

from typing import Any, NamedTuple

import torch

import anchorops as ao
from anchorops import reference

FLOOR = 2**-23  # of the sum of the terms' sizes: one rounding to float32
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Case(NamedTuple):
    size: tuple[int, ...]
    num_classes: int
    dtype: torch.dtype = FP32
    layout: str = "contiguous"
    labels: str = "random"
    anchors: str | None = "learnable"
    groups: int = 1
    per_image: bool = False


def make_features(case: Case) -> torch.Tensor:
    """Random features of this layout; the memory around a view is NaN."""
    values = torch.randn(case.size).to(case.dtype)
    if case.layout == "contiguous":
        return values
    if case.layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if case.layout == "expanded":
        return values[:1].expand(case.size)
    around = [n + 3 for n in case.size]
    if case.layout == "transposed":
        buffer = torch.full(around[::-1], torch.nan, dtype=case.dtype)
        buffer = buffer.permute(*reversed(range(len(around))))
    else:
        buffer = torch.full(around, torch.nan, dtype=case.dtype)
    view = buffer[tuple(slice(1, n + 1) for n in case.size)]
    if case.layout == "sliced":
        view = torch.full([2 * n for n in around], torch.nan, dtype=case.dtype)
        view = view[tuple(slice(2, 2 * n + 2, 2) for n in case.size)]
    view.copy_(values)
    return view


def make_labels(case: Case) -> torch.Tensor:
    pixels = case.size[:1] if len(case.size) == 2 else (case.size[0], *case.size[2:])
    if case.labels == "coherent":
        count = torch.Size(pixels).numel()
        runs = torch.randint(0, case.num_classes, (count // 150 + 1,))
        labels = runs.repeat_interleave(150)[:count].view(pixels)
    elif case.labels == "mixed":  # runs of 200 pixels, then 50 random pixels
        pixel = torch.arange(torch.Size(pixels).numel())
        runs = torch.randint(0, case.num_classes, (len(pixel) // 250 + 1,))[pixel // 250]
        random = torch.randint(0, case.num_classes, pixel.shape)
        labels = torch.where(pixel % 250 < 200, runs, random).view(pixels)
    elif case.labels == "runs":  # of 1 to 12 pixels
        lengths = torch.randint(1, 13, (torch.Size(pixels).numel(),))
        runs = torch.randint(0, case.num_classes, lengths.shape)
        labels = runs.repeat_interleave(lengths)[: len(runs)].view(pixels)
    elif case.labels == "alternating":  # pixels of two to four keys
        first = torch.arange(torch.Size(pixels).numel()) // 45 * 3 % case.num_classes
        labels = (first + torch.randint(0, 2, first.shape)).view(pixels)
    elif case.labels == "halves":  # 64 pixels of 20 keys; then of two: of the first 16 that CUDA's
        # kernels meet, of the last four, of both. They look at even pixels first.
        pixel = torch.arange(torch.Size(pixels).numel())
        pairs = torch.tensor([[0, 2], [17, 19], [2, 19]])[pixel // 64 % 4 - 1, pixel % 2]
        labels = torch.where(pixel // 64 % 4 == 0, pixel % 64 % 20, pairs)
        labels = labels.view(pixels)
    elif case.labels == "one":
        labels = torch.full(pixels, case.num_classes - 1)
    elif case.labels == "distinct":
        labels = torch.randperm(case.num_classes).view(pixels)
    else:
        labels = torch.randint(0, case.num_classes, pixels)
    labels.view(-1)[:5] = 255
    return labels


def moments_and_gradients(case, features, labels, anchors, weights) -> tuple[Any, ...]:
    """counts, sums, sqdists, dfeatures, danchors of a weighted sum of the statistics."""
    features = features.detach().requires_grad_()
    if anchors is not None:
        anchors = anchors.detach().requires_grad_(case.anchors == "learnable")
    counts, sums, sqdists = ao.ops.class_moments(
        features,
        labels,
        case.num_classes,
        anchors=anchors,
        groups=case.groups,
        per_image=case.per_image,
        seed=7,
        ignore_index=255,
    )
    loss = (sums * weights[0].to(sums.dtype)).sum()
    if sqdists is not None:
        loss = loss + (sqdists * weights[1].to(sums.dtype)).sum()
    inputs = [features] if anchors is None or not anchors.requires_grad else [features, anchors]
    dfeatures, *danchors = torch.autograd.grad(loss, inputs)
    if sqdists is not None:
        sqdists = sqdists.detach()
    return counts, sums.detach(), sqdists, dfeatures, danchors[0] if danchors else None


def by_class(case, features, labels, anchors):
    """The straightforward float32 formula: sums and sqdists as a masked sum for each key."""
    keys, counts = reference.class_keys(features, labels, case.num_classes, case.per_image, 255)
    if case.groups > 1:
        keys = reference.split_groups(keys, counts, case.groups, 7)
        counts = reference.group_counts(counts, case.groups)
    rows, keys = reference.feature_rows(features).float(), keys.flatten()
    sums = torch.zeros(counts.numel(), rows.shape[1])
    sqdists = torch.zeros(counts.numel())
    for key in keys.unique():
        if key >= 0:
            own = rows[keys == key]
            sums[key] = own.sum(0)
            if anchors is not None:
                nearest = anchors[int(key) // case.groups % case.num_classes]
                sqdists[key] = (own - nearest).square().sum()
    return sums.view(*counts.shape, -1), sqdists.view(counts.shape)


def allowed_error(exact, straightforward, size):
    return 2 * (straightforward.double() - exact).abs().max() + FLOOR * size.double().max()


def check(case: Case):
    """Values and gradients of random features are within the error budget."""
    features, labels = make_features(case), make_labels(case)
    anchors = torch.randn(case.num_classes, case.size[1]) if case.anchors else None
    shape = (case.num_classes,) if case.groups == 1 else (case.num_classes, case.groups)
    shape = (case.size[0], *shape) if case.per_image else shape
    weights = torch.randn(*shape, case.size[1]), torch.rand(shape)

    ours = moments_and_gradients(case, features, labels, anchors, weights)
    with ao.use_backend("reference"):
        double = None if anchors is None else anchors.double()
        exact = moments_and_gradients(case, features.double(), labels, double, weights)
        size = moments_and_gradients(case, features.double().abs(), labels, double, weights)
    sums, sqdists = by_class(case, features, labels, anchors)

    assert torch.equal(ours[0], exact[0])
    assert ours[1].dtype == torch.float32
    of_sums = allowed_error(exact[1], sums, size[1])
    assert (ours[1].double() - exact[1]).abs().max() <= of_sums
    if anchors is not None:
        of_sqdists = allowed_error(exact[2], sqdists, exact[2])
        assert (ours[2].double() - exact[2]).abs().max() <= of_sqdists
    layout = torch.empty_like(features, device="meta").stride()
    assert ours[3].dtype == case.dtype and ours[3].stride() == layout
    # float32 arithmetic, then one rounding to the features' dtype
    error = (ours[3].double() - exact[3]).abs()
    eps = torch.finfo(case.dtype).eps
    assert (error <= eps * exact[3].abs() + 4 * FLOOR * exact[3].abs().max()).all()
    if case.anchors == "learnable":  # from the sums of all keys of a class: −2·dsqdists·(s − n·a)
        keys_of_class = weights[1].numel() // case.num_classes
        allowed = 2 * keys_of_class * of_sums + FLOOR * exact[4].abs().max()
        assert (ours[4].double() - exact[4]).abs().max() <= allowed
