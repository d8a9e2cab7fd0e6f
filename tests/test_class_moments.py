"""Values and all gradients of class moments on every backend, within the error budget."""

import math

import pytest
import torch

import anchorops as ao
from anchorops._backend import CUDA_MAX_KEYS
from tests.helpers.class_moments_cases import (
    BF16,
    F16,
    F32,
    F64,
    Case,
    check,
    make_features,
    make_inputs,
    make_labels,
    pixel_keys,
    run,
)
from tests.helpers.simulated_gpu import BACKEND

cpu = pytest.mark.on("cpu")
on_cpu = pytest.mark.on("cpu", "reference")
on_gpu = pytest.mark.on("gpu")
simulated_cuda = pytest.mark.on("simulated_cuda")


@pytest.fixture(params=["tiles", "sorted"] if BACKEND == "triton" else ["tiles"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes Triton sum pixels tile by tile, or sorted by key, for any shape."""
    if BACKEND != "triton":
        return
    from anchorops.kernels import class_moments

    chunks_of = class_moments.chunks_of
    by_path = {"tiles": lambda *args: max(1, chunks_of(*args)), "sorted": lambda *args: 0}
    monkeypatch.setattr(class_moments, "chunks_of", by_path[request.param])


CASES = [
    Case((1, 3, 4, 5), 2, labels="few ignored"),
    Case((2, 20, 7, 45), 5, labels="long runs"),
    Case((1, 40, 16, 32), 5, BF16, labels="long runs", anchors="fixed"),
    Case((2, 17, 9, 31), 40, F16, labels="few ignored"),
    Case((1, 33, 13, 21), 150, BF16, labels="few ignored", anchors=None),
    Case((2, 70, 8, 24), 7, F32, "channels_last", "long runs"),
    Case((2, 65, 9, 17), 40, BF16, "channels_last", "few ignored"),
    Case((2, 6, 7, 20), 5, F32, "cropped", "long runs"),
    Case((2, 18, 5, 33), 9, BF16, "cropped", groups=3, per_image=True),
    Case((2, 5, 12, 10), 4, F32, "expanded batch", "few ignored", anchors="fixed"),
    Case((130, 24), 10, F32, "every other"),
    Case((70, 9), 3, BF16, "transposed", "long runs"),
    Case((3, 7, 50), 4, F32, "every other", groups=2),
    Case((3, 130, 40), 6, BF16, labels="few ignored", per_image=True),
    Case((3, 130, 600), 6, BF16, labels="long runs", per_image=True),
    Case((2, 4, 30, 1), 3, F32, "every other"),
    Case((60, 3), 1024),
]
LAYOUTS = [  # where planes, rows or elements begin at 16 bytes, and where not
    Case((2, 65, 1, 1), 5),
    Case((2, 40, 6, 1), 5, BF16),
    Case((5, 300), 5, F16),
    Case((33, 1), 5, BF16),
    Case((2, 40, 13, 13), 5, BF16, "misaligned"),
    Case((2, 24, 4, 16), 5, BF16, "misaligned"),
    Case((70, 24), 5, F32, "misaligned"),
    Case((2, 24, 4, 16), 5, BF16, "channels_last misaligned"),
    Case((2, 24, 13, 11), 5, BF16, "cropped aligned"),
    Case((70, 24), 5, F16, "cropped aligned"),
    Case((2, 24, 4, 16), 5, BF16, "channels_last cropped"),
    Case((2, 24, 4, 16), 5, F32, "channels_last cropped aligned"),
    Case((2, 24, 4, 16), 5, BF16, "transposed dense"),
    Case((130, 24), 5, F32, "transposed dense"),
    Case((2, 24, 4, 16), 5, F32, "expanded channels"),
    Case((2, 24, 4, 16), 5, BF16, "expanded pixels"),
]
CASES_OF_CPU = [
    Case((1, 1, 1, 1), 1),
    Case((3, 16, 4, 32), 3, F32, labels="one class"),
    Case((2, 40, 24, 64), 7, F32, labels="coherent"),
    Case((1, 36, 24, 64), 7, BF16, labels="coherent"),
    Case((1, 36, 24, 64), 150, F16),
    Case((2, 20, 9, 16), 5, F64, "channels_last", "coherent"),
    Case((2, 64, 9, 20), 40, BF16, "channels_last", "coherent"),
    Case((2, 18, 5, 33), 9, F32, "channels_last cropped", "coherent"),
    Case((2, 5, 12, 10), 4, F64, "transposed", "coherent", per_image=True),
    Case((3, 17, 6, 20), 4, F32, "expanded batch"),
    Case((2, 17, 6, 20), 4, BF16, "expanded channels"),
    Case((2, 17, 6, 20), 4, F32, "expanded rows", "coherent"),
    Case((50, 1), 4, F32, "expanded batch", groups=4),
    Case((2, 3, 100, 100), 3, F32),  # work is split: 20,000 pixels of few keys
    Case((2, 3, 100, 100), 2, F16, "channels_last", "coherent"),
    Case((60, 3), 65_536, F32),
    Case((2, 5, 6, 7), 65_536, groups=2, per_image=True),  # few keys are present
    Case((20_000, 5), 4, F32, "transposed"),
]
LENGTHS_OF_KEYS = [  # one key with all pixels, keys of one pixel
    Case((600, 20), 3, BF16, labels="one key", anchors="fixed"),
    Case((5000, 3), 2, layout="transposed", labels="one key"),
    Case((1, 36, 13, 11), 143, F16, labels="distinct"),
    Case((150, 130), 150, F32, labels="distinct"),
    Case((2, 300, 15, 11), 9, BF16, "channels_last", "few ignored", per_image=True, groups=2),
    Case((170, 272), 4, F16, labels="few ignored"),
    Case((3, 35, 9, 40), 50, F32, "cropped", "long runs", per_image=True),
]
MANY_KEYS = [
    Case((60, 3), 16_384),
    Case((70, 300), 16_384, anchors=None),
    Case((3, 4, 20), 16_384, anchors="fixed", per_image=True),  # keys of more than 16 bits
]
# In each chunk of the CUDA kernels, across the end of an image; and more keys than their tables
# have rows.
SEVERAL_TILES = [
    Case((2, 640, 10, 136), 600, BF16, labels="long runs", anchors=None),
    Case((2, 640, 10, 136), 600, BF16, "channels_last", "few ignored", anchors=None),
    Case((2, 128, 10, 136), 1000, BF16, labels="short runs"),
    Case((2, 100, 10, 136), 1000, F32, "channels_last", labels="short runs", anchors="fixed"),
    Case((2, 128, 10, 136), 1000, F16, labels="alternating"),
    Case((2, 100, 10, 136), 1000, F32, labels="halves"),
    Case((2, 100, 10, 136), 1000, BF16, "channels_last", anchors=None, labels="halves"),
    # tiles of one key: of different keys, and between tiles of more keys than there are slots
    Case((2, 250, 10, 136), 1000, F32, "channels_last", labels="long runs"),
    Case((2, 250, 10, 136), 1000, BF16, labels="mixed"),
    # random labels: each tile frees the slots
    Case((2, 136, 10, 136), 150, BF16, labels="few ignored"),
    Case((2, 100, 10, 136), 150, F16, "channels_last", "few ignored", anchors="fixed"),
    Case((2, 70, 11, 131), 75, F32, labels="few ignored", per_image=True),
    Case((2, 70, 10, 136), 19, F32, labels="few ignored"),
]
UNALIGNED = [  # planes, or rows of cropped planes, that do not begin at multiples of 16 bytes
    Case((2, 300, 17, 35), 40, BF16, labels="long runs"),  # every eighth channel, two such blocks
    Case(
        (2, 257, 3, 43), 3, BF16, labels="few ignored", anchors="fixed"
    ),  # seven blocks without channels
    Case((3, 150, 17, 35), 40, F32, labels="short runs"),  # every fourth
    Case((2, 70, 13, 13), 5, F16, labels="long runs", anchors="fixed"),
    Case((2, 45, 5, 30), 150, BF16),  # two elements more than a multiple of eight: every fourth
    Case((3, 40, 14, 14), 9, BF16, labels="few ignored", anchors=None),  # every second
    Case((2, 36, 14, 15), 7, F32, labels="long runs", anchors=None, groups=2),
    Case(
        (4, 64, 61), 6, F16, labels="few ignored", per_image=True
    ),  # one or two tiles of a line have pixels
    Case((5, 67, 3), 4, BF16),  # a line is shorter than 16 bytes
    Case((3, 32, 1, 3), 2, F32, labels="few ignored", per_image=True, groups=2),
    Case((2, 70, 5, 150), 9, BF16, "cropped", groups=3, per_image=True),
    Case((2, 33, 7, 70), 9, F32, "cropped", labels="long runs"),
    Case((2, 24, 5, 40), 9, F16, "cropped", labels="short runs", anchors="fixed"),  # each channel
]
CASES_OF_GPUS = [
    Case((2, 720, 32, 64), 19, BF16, labels="coherent"),
    Case((2, 256, 24, 40), 150, BF16, "channels_last"),
    Case((1, 100, 31, 33), 1000),
    Case((2, 129, 17, 65), 19, F32, "channels_last", "long runs"),
    Case((3, 48, 64, 64), 5, F16, labels="one class"),
    Case((5000, 300), 16_384),
]


def marked(cases: list[Case], mark: pytest.MarkDecorator) -> list:
    return [pytest.param(case, marks=mark) for case in cases]


@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        *LAYOUTS,
        *marked(CASES_OF_CPU, on_cpu),
        *marked(SEVERAL_TILES + UNALIGNED, simulated_cuda),
        *marked(CASES_OF_GPUS, on_gpu),
    ],
    ids=str,
)
def test_values_and_gradients(case: Case, backend: str, path: None, poisoned: None):
    if backend == "cuda" and case.num_classes > CUDA_MAX_KEYS:
        pytest.skip("cuda leaves more keys to triton")
    check(case, backend)


@pytest.mark.parametrize("case", LENGTHS_OF_KEYS, ids=str)
@pytest.mark.parametrize("path", ["sorted" if BACKEND == "triton" else "tiles"], indirect=True)
def test_lengths_of_keys(case: Case, backend: str, path: None):
    check(case, backend)


@pytest.mark.on("cpu", "reference", "simulated_triton")
@pytest.mark.parametrize("case", MANY_KEYS, ids=str)
def test_many_keys(case: Case, backend: str):
    check(case, backend)


@simulated_cuda
def test_more_than_1024_keys_are_refused(backend: str):
    features, labels = torch.zeros(2, 3, 5), torch.zeros(2, 5).long()
    refused = pytest.raises(ValueError, match=r'at most 1024 keys .*: choose "triton"')
    with refused:
        ao.ops.class_moments(features, labels, 103, groups=5, per_image=True, seed=1)
    keys = torch.zeros(2, 5, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="num_keys: expected at most 1024, got 1025"):
        torch.ops.anchorops.class_moments.cuda(features, keys, None, 1025, 1, True)


@pytest.mark.on("simulated_triton", "simulated_cuda")
def test_float64_is_refused(backend: str):
    with pytest.raises(ValueError, match=rf"class_moments: backend {backend} .* float64"):
        ao.ops.class_moments(torch.zeros(4, 2, dtype=F64), torch.zeros(4).long(), 2)
    with pytest.raises(ValueError, match="at most 16384 classes"):
        ao.ops.class_moments(torch.zeros(4, 2), torch.zeros(4).long(), 20_000, ignore_index=255)
    with ao.use_backend("auto"):  # never takes kernels without a GPU
        ao.ops.class_moments(torch.zeros(4, 2, dtype=F64), torch.zeros(4).long(), 2)


@cpu
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
def test_65536_pixels_of_one_class(dtype: torch.dtype, layout: str, mean: float, backend: str):
    case = Case((2, 9, 128, 256), 1, dtype, layout)
    labels = torch.zeros(2, 128, 256, dtype=torch.uint8)
    check(case, backend, features=make_features(case) + mean, labels=labels)


FAR = [Case((400, 8), 3, labels="long runs")]
FAR += marked(
    [
        Case((2, 19, 20, 33), 5, F32, layout, labels)
        for layout in ("contiguous", "channels_last", "every other")
        for labels in ("random", "coherent")
    ],
    cpu,
)


@pytest.mark.parametrize("case", FAR, ids=str)
def test_anchors_far_from_zero(case: Case, backend: str, path: None):
    """Features at 4e3 with noise 1e-2 around their anchors: in the expanded squares their digits
    would be lost."""
    features, labels = make_features(case), make_labels(case)
    anchors = 4e3 + torch.randn(case.num_classes, case.size[1])
    near = anchors[labels.clamp(0, case.num_classes - 1)].movedim(-1, 1)
    inputs = {"labels": labels, "anchors": anchors}
    check(case, backend, features=features.mul_(1e-2).add_(near), **inputs)
    if backend != "reference":
        check(case, backend, features=make_features(case) * 1e-2, **inputs)


@on_cpu
@pytest.mark.parametrize("distance", [100.0, 1.0, 1e-2])
def test_gradient_of_anchors_near_the_mean(distance: float, backend: str):
    """The relative error is eps·‖mean‖/‖mean − a‖, as documented; the reference has no such
    error."""
    features = (1e3 + torch.randn(90, 64)).requires_grad_()
    mean = features.detach().double().mean(0, keepdim=True)
    anchors = (mean + distance * torch.randn(1, 64)).float().requires_grad_()
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


SPOILT = [
    Case((2, 19, 7, 33), 3, F32, labels="coherent"),
    Case((2, 19, 7, 33), 40, BF16),
    Case((3, 130, 40), 6, BF16, labels="few ignored", per_image=True),
    *marked([Case((2, 19, 7, 33), 3, F16, "channels_last", "coherent")], on_cpu),
    *marked([Case((2, 19, 7, 33), 3, F64, "every other", groups=2)], on_cpu),
    Case((90, 17), 3, F32, per_image=True),
    *marked(CASES_OF_GPUS[:2], on_gpu),
]


@pytest.mark.parametrize("case", SPOILT, ids=str)
def test_not_finite_ignored_pixels_change_nothing(case: Case, backend: str, path: None):
    inputs = make_inputs(case)
    rows = inputs["features"].movedim(1, -1)
    ignored = (pixel_keys(case, inputs["features"], inputs["labels"]) < 0).view(rows.shape[:-1])
    clean = run(case, inputs)
    for value in (torch.nan, torch.inf, -torch.inf):
        rows[ignored] = value
        for ours, expected in zip(run(case, inputs), clean, strict=True):
            assert torch.equal(ours, expected)
    assert ignored.any() and not clean[3].movedim(1, -1)[ignored].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the machine for PTX
@pytest.mark.parametrize("case", SPOILT, ids=str)
@pytest.mark.parametrize(
    ("value", "channels"),
    [
        (torch.nan, slice(None)),
        pytest.param(torch.inf, slice(None), marks=on_cpu),
        (-torch.inf, slice(4, 5)),
        (3e38, slice(4, 5)),  # its square is not finite
    ],
)
def test_not_finite_pixels_spoil_their_class_alone(
    case: Case, value: float, channels: slice, backend: str, path: None
):
    value = 1e200 if case.dtype == F64 and value == 3e38 else value
    inputs = make_inputs(case)
    rows = inputs["features"].movedim(1, -1)
    keys = pixel_keys(case, inputs["features"], inputs["labels"])
    pixel = int((keys >= 0).nonzero()[5])
    key = int(keys[pixel])
    clean = run(case, inputs)
    at = torch.unravel_index(torch.tensor(pixel), rows.shape[:-1])
    rows[(*at, channels)] = value
    ours = run(case, inputs)

    def assert_same(ours, clean):
        if backend in ("cpu", "reference"):
            assert torch.equal(ours, clean)
        elif ours.is_cuda:
            torch.testing.assert_close(ours, clean, rtol=1e-4, atol=1e-2)
        else:
            torch.testing.assert_close(ours, clean, rtol=1e-5, atol=1e-4)

    assert torch.equal(ours[0], clean[0])
    others = (torch.arange(ours[0].numel()) != key).view(ours[0].shape)
    for i in (1, 2):
        assert_same(ours[i][others], clean[i][others])
    assert not ours[2][~others].isfinite().any()
    if not math.isfinite(value):
        assert not ours[1][~others][:, channels].isfinite().any()
    classes = torch.arange(case.num_classes) != key // case.groups % case.num_classes
    assert_same(ours[4][classes], clean[4][classes])
    kept = (torch.arange(len(keys)) != pixel).view(rows.shape[:-1])
    assert torch.equal(ours[3].movedim(1, -1)[kept], clean[3].movedim(1, -1)[kept])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned", "every other"])
def test_not_finite_element_spoils_its_gradient_alone(layout: str, backend: str):
    case = Case((2, 24, 5, 16), 5, BF16, layout)
    inputs = make_inputs(case)
    inputs["labels"][1, 2, 5] = 1
    clean = run(case, inputs)[3]
    inputs["features"][1, 3, 2, 5] = torch.inf
    ours = run(case, inputs)[3]
    assert not ours[1, 3, 2, 5].isfinite()
    ours[1, 3, 2, 5] = clean[1, 3, 2, 5]
    assert torch.equal(ours, clean)


@simulated_cuda
@pytest.mark.parametrize(
    ("size", "labels"),
    [
        ((1, 40, 10, 136), "few ignored"),
        ((2, 70, 9, 29), "few ignored"),
        ((2, 250, 10, 136), "mixed"),
        ((2, 250, 11, 125), "mixed"),
    ],
)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("anchors", ["learnable", "fixed", None])
def test_not_finite_pixels_of_many_keys_and_of_one(size, labels, dtype, anchors, backend: str):
    """A tile has more keys than there are slots, or a single one, which others have too."""
    case = Case(size, 600, dtype, labels=labels, anchors=anchors)
    inputs = make_inputs(case)
    inputs["features"][0, 3].view(-1)[5::95] = torch.inf
    results = []
    for name in (backend, "reference"):
        with ao.use_backend(name):
            found = [x for x in run(case, inputs) if x is not None]
        results.append([x for x in found if x.dtype == F32])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_anchors_without_pixels(dtype: torch.dtype, backend: str, path: None):
    case = Case((1, 20, 9, 40), 50, dtype, labels="few ignored")
    inputs = make_inputs(case) | {"labels": make_labels(case._replace(num_classes=40))}
    inputs["anchors"][40:] = torch.nan
    _, sums, sqdists, _, danchors = run(case, inputs)
    for result in (sums, sqdists, danchors):
        assert not result[40:].any() and result.isfinite().all()
