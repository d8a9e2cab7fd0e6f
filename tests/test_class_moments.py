"""Values and all gradients of class moments on the CPU, within the error budget.

The error against float64 is at most twice that of the straightforward formula (a masked sum per
class, in the dtype of the statistics: for half precision a stricter measure than the features'
own), plus a floor: one rounding of the result, and that of the terms, which grows like their norm.
float64 is accumulated in float64 itself, as the formula is that it is compared with: 8 roundings.
"""

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
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


CASES = [
    Case((1, 1, 1, 1), 1),
    Case((1, 3, 4, 5), 2, F64),
    Case((2, 17, 5, 15), 4),
    Case((2, 33, 3, 17), 5, BF16, labels="coherent"),
    Case((2, 33, 3, 17), 5, F16, anchors=False),
    Case((3, 16, 4, 32), 3, F32, labels="one class"),
    Case((2, 40, 24, 64), 7, F32, labels="coherent"),
    Case((1, 36, 24, 64), 7, BF16, labels="coherent"),
    Case((1, 36, 24, 64), 150, F16),
    Case((2, 20, 9, 16), 5, F64, "channels_last", "coherent"),
    Case((2, 33, 7, 15), 5, F32, "channels_last"),
    Case((2, 64, 9, 20), 40, BF16, "channels_last", "coherent"),
    Case((2, 17, 6, 10), 5, F16, "channels_last", anchors=False),
    Case((2, 1, 6, 10), 5, F32, "channels_last"),
    Case((2, 19, 7, 20), 5, F32, "cropped", "coherent"),
    Case((2, 18, 5, 33), 9, BF16, "cropped", groups=3, per_image=True),
    Case((2, 18, 5, 33), 9, F32, "channels_last cropped", "coherent"),
    Case((2, 18, 5, 17), 3, F32, "every other"),
    Case((2, 18, 5, 17), 3, F16, "every other", "coherent"),
    Case((2, 17, 12, 18), 4, F16, "transposed"),
    Case((2, 5, 12, 10), 4, F64, "transposed", "coherent", per_image=True),
    Case((3, 17, 6, 20), 4, F32, "expanded batch"),
    Case((2, 17, 6, 20), 4, BF16, "expanded channels"),
    Case((2, 17, 6, 20), 4, F32, "expanded pixels", "coherent"),
    Case((130, 24), 10, F32),
    Case((130, 24), 10, F16, "every other"),
    Case((70, 17), 3, BF16, "transposed", "coherent"),
    Case((50, 1), 4, F32, "expanded batch", groups=4),
    Case((3, 7, 50), 4, F32, "cropped", groups=2),
    Case((3, 70, 40), 6, BF16, per_image=True),
    Case((3, 17, 40), 6, F64, "transposed", anchors=False),
    Case((2, 4, 1, 30), 3, F32),
    Case((2, 20, 30, 1), 3, F32, "channels_last"),
    Case((2, 9, 8, 12), 5, F32, labels_size=(32, 48)),
    Case((2, 9, 8, 12), 5, BF16, "channels_last", labels_size=(21, 5), per_image=True, groups=2),
    Case((2, 3, 100, 100), 3, F32),  # work is split: 20,000 pixels of few keys
    Case((2, 3, 100, 100), 2, F16, "channels_last", "coherent"),
    Case((60, 3), 65_536, F32),
    Case((20_000, 5), 4, F32, "transposed"),
]


def make_features(case: Case) -> tuple[Tensor, Tensor]:
    """Random features of that layout, and the buffer they lie in: all NaN around them."""
    size, dims = case.size, range(len(case.size))
    values = torch.randn(size, dtype=F64).to(case.dtype)
    order = list(dims)
    if case.layout.startswith("channels_last"):
        order = [0, *dims[2:], 1]
    elif case.layout == "transposed":
        order.reverse()
    if case.layout.startswith("expanded"):
        axis = ("batch", "channels", "pixels").index(case.layout.split()[1])
        buffer = values.narrow(axis, 0, 1)
        return buffer.expand(size), buffer
    step, margin = (2, 2) if case.layout == "every other" else (1, 1)
    if case.layout in ("contiguous", "channels_last"):
        margin = 0
    buffer = torch.full([step * size[i] + 2 * margin for i in order], torch.nan, dtype=case.dtype)
    view = buffer.permute([order.index(i) for i in dims])
    view = view[tuple(slice(margin, margin + step * n, step) for n in size)]
    return view.copy_(values), buffer


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
    """Key of each pixel (flat), −1 where ignored, and the shape of the statistics."""
    if features.dim() == 4:
        labels = F.interpolate(labels[:, None].double(), features.shape[2:], mode="nearest")[:, 0]
    keys = labels.long() if labels.dim() > 1 else labels.long()[None]
    shape = [case.num_classes]
    valid = (keys >= 0) & (keys < case.num_classes) & (keys != 255)
    if case.per_image:
        image = torch.arange(len(keys)).view(-1, *[1] * (keys.dim() - 1))
        keys, shape = keys + case.num_classes * image, [len(keys), *shape]
    keys = torch.where(valid, keys, -1).flatten()
    if case.groups > 1:  # proven in test_class_keys.py
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
    """The naive formulas, a masked sum per key, in the anchors' dtype; sums are of term(…)."""
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


def within_budget(ours: Tensor, exact: Tensor, straightforward: Tensor, squares: Tensor) -> None:
    """squares: the sum of the terms' squares."""
    eps = torch.finfo(ours.dtype).eps
    floor = eps * ((8 if ours.dtype == F64 else 1) * exact.abs() + 4 * squares.sqrt())
    error = (ours.double() - exact).abs()
    allowed = 2 * (straightforward.double() - exact).abs().max() + floor
    assert (error <= allowed).all(), f"error {error.max():.3g}, allowed {allowed.max():.3g}"


def run(case: Case, features: Tensor, labels: Tensor, anchors: Tensor, dsums, dsqdists):
    """counts, sums, sqdists, dfeatures, danchors; without the anchors' where there are none."""
    features, anchors = features.detach().requires_grad_(), anchors.detach().requires_grad_()
    counts, sums, sqdists = ao.class_moments(
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
    within_budget(sums, exact.sums, straightforward.sums, squares.sums)
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
    within_budget(sqdists, exact.sqdists, straightforward.sqdists, squares.sqdists)
    within_budget(danchors, exact.danchors, straightforward.danchors, squares.danchors)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, backend: str, poisoned: None):
    (features, buffer), labels = make_features(case), make_labels(case)
    before = buffer.clone()
    anchors = torch.randn(case.num_classes, case.size[1])
    check(case, features, labels, anchors.to(reference.statistics_dtype(case.dtype)), backend)
    torch.testing.assert_close(buffer, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("instructions", ["default", "avx2"])
def test_lesser_instruction_sets(instructions: str):
    """The same in a process that is to use less than this processor has."""
    known = ["default", "avx2", "avx512"]
    here = torch.backends.cpu.get_cpu_capability().lower()
    if here not in known or known.index(here) <= known.index(instructions):
        pytest.skip(f"{here} is the best here: the other tests use no more than {instructions}")
    tests = "test_values_and_gradients and cpu or spoil and cpu or pixels_of_one_class or far_from"
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": instructions}
    result = subprocess.run(
        [*command, "-k", tests], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.parametrize(
    ("dtype", "layout", "mean"),
    [
        (F32, "contiguous", 0),
        (F32, "channels_last", 3),
        (BF16, "contiguous", 3),
        (BF16, "channels_last", 0),
        (F16, "contiguous", 3),
    ],
)
def test_65536_pixels_of_one_class(dtype: torch.dtype, layout: str, mean: float):
    case = Case((2, 9, 128, 256), 1, dtype, layout)
    features = make_features(case)[0] + mean
    check(case, features, torch.zeros(2, 128, 256, dtype=torch.uint8), torch.randn(1, 9))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every other"])
@pytest.mark.parametrize("labels", ["random", "coherent"])
def test_anchors_far_from_zero(layout: str, labels: str):
    """Features at 1e3 with noise 1e-2 about their anchors: s − n·a would lose the digits."""
    case = Case((2, 19, 20, 33), 5, F32, layout, labels)
    features, labels_ = make_features(case)[0], make_labels(case)
    anchors = 1e3 + torch.randn(5, 19)
    near = anchors[labels_.clamp(0, 4)].movedim(-1, 1)
    check(case, features.mul_(1e-2).add_(near), labels_, anchors)


def test_anchors_far_from_features():
    case = Case((2, 19, 20, 33), 5, F32)
    features = make_features(case)[0] * 1e-2
    check(case, features, make_labels(case), 1e3 + torch.randn(5, 19))


def unusual_values(case: Case):
    features, labels = make_features(case)[0], make_labels(case)
    anchors = torch.randn(case.num_classes, case.size[1]).to(reference.statistics_dtype(case.dtype))
    _, shape = pixel_keys(case, features, labels)
    weights = torch.randn(*shape, case.size[1]), torch.rand(shape)
    return features, labels, anchors, *weights


SPOILT = [
    Case((2, 19, 7, 33), 3, F32, labels="coherent"),
    Case((2, 19, 7, 33), 40, BF16),
    Case((2, 19, 7, 33), 3, F16, "channels_last", "coherent"),
    Case((2, 19, 7, 33), 3, F64, "every other", groups=2),
    Case((90, 17), 3, F32, per_image=True),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", SPOILT, ids=str)
def test_not_finite_ignored_pixels_change_nothing(case: Case, backend: str):
    features, labels, *rest = unusual_values(case)
    keys, _ = pixel_keys(case, features, labels)
    ignored = (keys < 0).view(features.movedim(1, -1).shape[:-1])
    with ao.use_backend(backend):
        clean = run(case, features, labels, *rest)
        for value in (torch.nan, torch.inf, -torch.inf):
            features.movedim(1, -1)[ignored] = value
            for ours, expected in zip(run(case, features, labels, *rest), clean, strict=True):
                assert torch.equal(ours, expected)
    assert ignored.any() and not clean[3].movedim(1, -1)[ignored].any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", SPOILT, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite_pixels_spoil_their_class_alone(case: Case, backend: str, value: float):
    features, labels, *rest = unusual_values(case)
    keys, shape = pixel_keys(case, features, labels)
    pixel = int((keys >= 0).nonzero()[5])
    key = int(keys[pixel])
    at = torch.unravel_index(torch.tensor(pixel), features.movedim(1, -1).shape[:-1])
    with ao.use_backend(backend):
        clean = run(case, features, labels, *rest)
        features.movedim(1, -1)[at] = value
        ours = run(case, features, labels, *rest)
    assert torch.equal(ours[0], clean[0])
    others = (torch.arange(torch.Size(shape).numel()) != key).view(shape)
    for i in (1, 2):
        assert torch.equal(ours[i][others], clean[i][others])
        assert not ours[i][~others].isfinite().any()
    classes = torch.arange(case.num_classes) != key // case.groups % case.num_classes
    assert torch.equal(ours[4][classes], clean[4][classes])
    kept = (torch.arange(len(keys)) != pixel).view(features.movedim(1, -1).shape[:-1])
    assert torch.equal(ours[3].movedim(1, -1)[kept], clean[3].movedim(1, -1)[kept])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("size", "labels"),
    [
        ((0, 5), (0,)),
        ((0, 5, 7), (0, 7)),
        ((2, 5, 0), (2, 0)),
        ((0, 5, 3, 4), (0, 6, 8)),
        ((2, 5, 0, 4), (2, 0, 4)),
        ((2, 5, 3, 0), (2, 3, 8)),
        ((2, 5, 3, 4), (2, 6, 8)),
        ((9, 5), (9,)),
    ],
)
@pytest.mark.parametrize("per_image", [False, True])
def test_nothing_valid(size, labels, backend: str, per_image: bool, poisoned: None):
    features = torch.full(size, torch.nan, requires_grad=True)
    anchors = torch.randn(3, 5, requires_grad=True)
    ignored = torch.full(labels, 255)
    with ao.use_backend(backend):
        statistics = ao.class_moments(features, ignored, 3, anchors=anchors, per_image=per_image)
        mse = ao.pixel_to_anchor_mse(features, ignored, anchors)
        centroids, _ = ao.class_centroids(features, ignored, 3, per_image=per_image)
    images = (1 if len(size) == 2 else size[0],) if per_image else ()
    assert [tuple(s.shape) for s in statistics] == [(*images, 3), (*images, 3, 5), (*images, 3)]
    assert not any(s.any() for s in (*statistics, mse, centroids))
    (statistics.sums.sum() + statistics.sqdists.sum() + mse + centroids.sum()).backward()
    assert features.grad.shape == size and not features.grad.any() and not anchors.grad.any()


def test_many_keys_and_images():
    """65,536 classes × images × groups, few of them present."""
    case = Case((2, 5, 6, 7), 65_536, groups=2, per_image=True)
    check(case, make_features(case)[0], make_labels(case), torch.randn(65_536, 5))


def test_threads_and_repetition_do_not_matter():
    threads = torch.get_num_threads()
    for case in (
        Case((2, 40, 60, 70), 5, F32, labels="coherent"),
        Case((2, 40, 60, 70), 150, BF16, "channels_last"),
        Case((9000, 17), 3, F16, groups=2),
    ):
        arguments = unusual_values(case)
        results = []
        try:
            for count in (1, 2, 2, 7):
                torch.set_num_threads(count)
                results.append(run(case, *arguments))
        finally:
            torch.set_num_threads(threads)
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_offsets_are_64_bit():
    """Strides of 2^30 elements and more: of the 4 GB buffer few pages are ever touched."""
    buffer = torch.empty(2**31 + 2**10, dtype=F16)
    for size, stride in (
        ((3, 64), (2**30, 1)),
        ((64, 3), (1, 2**30)),
        ((3, 2, 3, 5), (2**30, 15, 5, 1)),
        ((1, 17, 3, 16), (0, 16, 2**30, 1)),
        ((1, 3, 2, 17), (0, 2**30, 17, 1)),
    ):
        case, view = Case(size, 2, F16), buffer.as_strided(size, stride)
        view.copy_(torch.randn(size))
        labels, anchors = make_labels(case), torch.randn(2, size[1])
        check(case, view, labels, anchors)
        dsums, dsqdists = torch.randn(2, size[1]), torch.rand(2)
        keys = pixel_keys(case, view, labels)[0].int()
        dfeatures = torch.ops.anchorops.class_moments_backward.cpu(
            view, keys, anchors, dsums, dsqdists, 1, size, stride, F16
        )
        assert dfeatures.stride() == stride
        assert torch.equal(dfeatures, run(case, view, labels, anchors, dsums, dsqdists)[3])


@st.composite
def drawn_cases(draw: st.DrawFn) -> tuple[Case, list[int], list[int], list[int]]:
    dims = draw(st.integers(2, 4))
    size = tuple(draw(st.lists(st.integers(1, 20), min_size=dims, max_size=dims)))
    case = Case(
        size,
        draw(st.sampled_from([1, 2, 5, 300])),
        draw(st.sampled_from([F32, BF16, F16, F64])),
        labels=draw(st.sampled_from(["random", "coherent"])),
        anchors=draw(st.booleans()),
        groups=draw(st.integers(1, 3)),
        per_image=draw(st.booleans()),
        labels_size=draw(st.tuples(*[st.integers(1, 30)] * 2)) if dims == 4 else None,
    )
    order = draw(st.permutations(range(dims)))
    steps, margins = (
        draw(st.lists(st.integers(*r), min_size=dims, max_size=dims)) for r in ((1, 3), (0, 2))
    )
    return case, order, steps, margins


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(drawn_cases())
def test_any_shape_and_strides(drawn: tuple[Case, list[int], list[int], list[int]]):
    case, order, steps, margins = drawn
    torch.manual_seed(0)
    around = [steps[i] * case.size[i] + 2 * margins[i] for i in order]
    buffer = torch.full(around, torch.nan, dtype=case.dtype)
    view = buffer.permute([order.index(i) for i in range(len(order))])
    view = view[
        tuple(
            slice(m, m + step * n, step)
            for n, step, m in zip(case.size, steps, margins, strict=True)
        )
    ]
    view.copy_(torch.randn(case.size))
    anchors = torch.randn(case.num_classes, case.size[1])
    check(case, view, make_labels(case), anchors.to(reference.statistics_dtype(case.dtype)))
