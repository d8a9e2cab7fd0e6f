"""Values and all gradients of class moments on the CPU, within the error budget."""

import pytest
import torch
from cpu_kernels import passes_with, same_for_all_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_sums import (
    BF16,
    F16,
    F32,
    F64,
    Case,
    check,
    make_features,
    make_labels,
    pixel_keys,
    run,
)

import anchorops as ao
from anchorops import reference

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


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, backend: str, poisoned: None):
    (features, buffer), labels = make_features(case), make_labels(case)
    before = buffer.clone()
    anchors = torch.randn(case.num_classes, case.size[1])
    check(case, features, labels, anchors.to(reference.statistics_dtype(case.dtype)), backend)
    torch.testing.assert_close(buffer, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["default", "avx2"])
def test_lesser_instruction_sets(instructions: str):
    """The same in a process that uses a lower instruction set than this processor has."""
    tests = "test_values_and_gradients and cpu or spoil and cpu or pixels_of_one_class or far_from"
    passes_with(instructions, __file__, tests)


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
    """Features at 1e3 with noise 1e-2 around their anchors: in the expanded squares their digits
    would be lost."""
    case = Case((2, 19, 20, 33), 5, F32, layout, labels)
    features, labels_ = make_features(case)[0], make_labels(case)
    anchors = 1e3 + torch.randn(5, 19)
    near = anchors[labels_.clamp(0, 4)].movedim(-1, 1)
    check(case, features.mul_(1e-2).add_(near), labels_, anchors)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("distance", [100.0, 1.0, 1e-2])
def test_gradient_of_anchors_near_the_mean(distance: float, backend: str):
    """The relative error is eps·‖mean‖/‖mean − a‖, as documented; the reference has no such
    error."""
    features = (1e3 + torch.randn(90, 64)).requires_grad_()
    mean = features.detach().double().mean(0, keepdim=True)
    anchors = (mean + distance * torch.randn(1, 64)).float().requires_grad_()
    with ao.use_backend(backend):
        sqdists = ao.ops.class_moments(features, torch.zeros(90).long(), 1, anchors=anchors).sqdists
    assert sqdists is not None
    (ours,) = torch.autograd.grad(sqdists.sum(), anchors)
    difference = mean - anchors.detach().double()
    exact = -2 * 90 * difference
    error = (ours.double() - exact).norm() / exact.norm()
    if backend == "reference":
        assert error < 2**-23
    else:
        stated = 2**-24 * mean.norm() / difference.norm()
        assert stated / 10 < error < stated + 2**-23


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
        statistics = ao.ops.class_moments(
            features, ignored, 3, anchors=anchors, per_image=per_image
        )
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
    for case in (
        Case((2, 40, 60, 70), 5, F32, labels="coherent"),
        Case((2, 40, 60, 70), 150, BF16, "channels_last"),
        Case((9000, 17), 3, F16, groups=2),
    ):
        arguments = unusual_values(case)
        same_for_all_threads(lambda case=case, arguments=arguments: run(case, *arguments))


def test_offsets_are_64_bit():
    """Strides of 2^30 elements and more; few pages of the 4 GB buffer are touched."""
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
