"""Values and all gradients of class moments within the error budget."""

import pytest
import torch
from emulator import BACKEND
from moments import (
    BF16,
    FP16,
    FP32,
    Case,
    check,
    make_features,
    make_labels,
    moments_and_gradients,
)

import anchorops as ao
from anchorops import reference

pytestmark = pytest.mark.usefixtures("sorted_by_numpy")

CASES = [
    Case((1, 3, 4, 5), 2),
    Case((2, 20, 7, 45), 5, labels="coherent"),
    Case((1, 40, 16, 32), 5, BF16, labels="coherent", anchors="fixed"),
    Case((2, 17, 9, 31), 40, FP16),
    Case((1, 33, 13, 21), 150, BF16, anchors=None),
    Case((2, 70, 8, 24), 7, FP32, "channels_last", "coherent"),
    Case((2, 65, 9, 17), 40, BF16, "channels_last"),
    Case((2, 6, 7, 20), 5, FP32, "cropped", "coherent"),
    Case((2, 18, 5, 33), 9, BF16, "cropped", groups=3, per_image=True),
    Case((2, 5, 12, 10), 4, FP32, "expanded", anchors="fixed"),
    Case((130, 24), 10, FP32, "sliced"),
    Case((70, 9), 3, BF16, "transposed", "coherent"),
    Case((3, 7, 50), 4, FP32, "sliced", groups=2),
    Case((3, 130, 40), 6, BF16, per_image=True),
    Case((2, 4, 30, 1), 3, FP32, "sliced"),
    Case((60, 3), 1024),
]


LENGTHS_OF_KEYS = [  # one key with all pixels, keys of one pixel
    Case((600, 20), 3, BF16, labels="one", anchors="fixed"),
    Case((5000, 3), 2, layout="transposed", labels="one"),
    Case((1, 36, 13, 11), 143, FP16, labels="distinct"),
    Case((150, 130), 150, FP32, labels="distinct"),
    Case((2, 300, 15, 11), 9, BF16, "channels_last", per_image=True, groups=2),
    Case((170, 272), 4, FP16),
    Case((3, 35, 9, 40), 50, FP32, "cropped", "coherent", per_image=True),
]
MANY_KEYS = [
    Case((60, 3), 16_384),
    Case((70, 300), 16_384, anchors=None),
    Case((3, 4, 20), 16_384, anchors="fixed", per_image=True),  # keys of more than 16 bits
]


SEVERAL_TILES = [  # in each chunk of the CUDA kernels, across the end of an image; and more keys
    # than its tables have rows
    Case((2, 640, 10, 136), 600, BF16, labels="coherent", anchors=None),
    Case((2, 640, 10, 136), 600, BF16, "channels_last", anchors=None),
    Case((2, 128, 10, 136), 1000, BF16, labels="runs"),
    Case((2, 100, 10, 136), 1000, FP32, "channels_last", labels="runs", anchors="fixed"),
    Case((2, 128, 10, 136), 1000, FP16, labels="alternating"),
    Case((2, 100, 10, 136), 1000, FP32, labels="halves"),
    Case((2, 100, 10, 136), 1000, BF16, "channels_last", anchors=None, labels="halves"),
    # tiles of one key: of different keys, and between tiles of more keys than there are slots
    Case((2, 250, 10, 136), 1000, FP32, "channels_last", labels="coherent"),
    Case((2, 250, 10, 136), 1000, BF16, labels="mixed"),
    # random labels: each tile frees the slots
    Case((2, 136, 10, 136), 150, BF16),
    Case((2, 100, 10, 136), 150, FP16, "channels_last", anchors="fixed"),
    Case((2, 70, 11, 131), 75, FP32, per_image=True),
    Case((2, 70, 10, 136), 19, FP32),
]


UNALIGNED = [  # planes, or rows of cropped planes, that do not begin at multiples of 16 bytes
    Case((2, 300, 17, 35), 40, BF16, labels="coherent"),  # every eighth channel, two such blocks
    Case((2, 257, 3, 43), 3, BF16, anchors="fixed"),  # seven blocks without channels
    Case((3, 150, 17, 35), 40, FP32, labels="runs"),  # every fourth
    Case((2, 70, 13, 13), 5, FP16, labels="coherent", anchors="fixed"),
    Case((2, 45, 5, 30), 150, BF16),  # two elements more than a multiple of eight: every fourth
    Case((3, 40, 14, 14), 9, BF16, anchors=None),  # every second
    Case((2, 36, 14, 15), 7, FP32, labels="coherent", anchors=None, groups=2),
    Case((4, 64, 61), 6, FP16, per_image=True),  # one or two tiles of a line have pixels
    Case((5, 67, 3), 4, BF16),  # a line is shorter than 16 bytes
    Case((3, 32, 1, 3), 2, FP32, per_image=True, groups=2),
    Case((2, 70, 5, 150), 9, BF16, "cropped", groups=3, per_image=True),
    Case((2, 33, 7, 70), 9, FP32, "cropped", labels="coherent"),
    Case((2, 24, 5, 40), 9, FP16, "cropped", labels="runs", anchors="fixed"),  # each channel
]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case):
    check(case)


@pytest.mark.parametrize("case", LENGTHS_OF_KEYS, ids=str)
@pytest.mark.parametrize("path", ["sorted" if BACKEND == "triton" else "tiles"], indirect=True)
@pytest.mark.usefixtures("path")
def test_lengths_of_keys(case: Case):
    check(case)


@pytest.mark.skipif(BACKEND != "triton", reason="cuda supports 1,024 keys")
@pytest.mark.parametrize("case", MANY_KEYS, ids=str)
def test_many_keys(case: Case):
    check(case)


@pytest.mark.skipif(BACKEND != "cuda", reason="Triton supports them")
def test_more_than_1024_keys_are_refused():
    features, labels = torch.zeros(2, 3, 5), torch.zeros(2, 5).long()
    refused = pytest.raises(ValueError, match=r'at most 1024 keys .* has 1030: choose "triton"')
    with refused:
        ao.ops.class_moments(features, labels, 103, groups=5, per_image=True, seed=1)
    keys = torch.zeros(2, 5, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="num_keys: expected at most 1024, got 1025"):
        torch.ops.anchorops.class_moments.cuda(features, keys, None, 1025, 1, True)


@pytest.mark.skipif(BACKEND != "cuda", reason="Triton's chunks of these shapes are one tile each")
@pytest.mark.parametrize("case", SEVERAL_TILES, ids=str)
def test_several_tiles_in_a_chunk(case: Case):
    check(case)


@pytest.mark.skipif(BACKEND != "cuda", reason="Triton's kernels have the same accesses anywhere")
@pytest.mark.parametrize("case", UNALIGNED, ids=str)
def test_unaligned_planes(case: Case):
    check(case)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_anchors_without_pixels(path, dtype):
    case = Case((1, 20, 9, 40), 50, dtype)
    labels = make_labels(case._replace(num_classes=40))
    features, anchors = make_features(case), torch.randn(50, 20)
    anchors[40:] = torch.nan
    weights = torch.randn(50, 20), torch.rand(50)
    of_classes = moments_and_gradients(case, features, labels, anchors, weights)
    for found in of_classes[1:3] + of_classes[4:]:
        assert not found[40:].any() and found.isfinite().all()


def assert_equal(ours, others):
    for a, b in zip(ours, others, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_far_anchors(path):
    """Squared distances are summed directly, so far anchors lose no digits. Their own gradient is
    computed from the sums: its error is that of the sums."""
    case = Case((400, 8), 3)
    labels = torch.arange(400) // 190
    anchors = torch.full((case.num_classes, 8), 4096.0) + torch.randn(case.num_classes, 8)
    features = (anchors[labels] + 0.01 * torch.randn(400, 8)).float()
    weights = torch.zeros(case.num_classes, 8), torch.ones(case.num_classes)
    ours = moments_and_gradients(case, features, labels, anchors, weights)
    with ao.use_backend("reference"):
        exact = moments_and_gradients(case, features.double(), labels, anchors.double(), weights)
    for i in (2, 3):
        torch.testing.assert_close(
            ours[i].double(), exact[i], rtol=2e-5, atol=2e-5 * float(exact[i].abs().max())
        )
    of_sums = (ours[1].double() - exact[1]).abs()
    assert ((ours[4].double() - exact[4]).abs() <= 2 * of_sums + 2e-7 * exact[4].abs()).all()


@pytest.mark.parametrize(("size", "dtype"), [((1, 20, 10, 30), BF16), ((200, 20), FP32)])
def test_ignored_pixels_change_nothing(path, size, dtype):
    case = Case(size, 6, dtype)
    labels, anchors = make_labels(case), torch.randn(case.num_classes, 20)
    ignored = torch.rand(labels.shape) < 0.3
    labels[ignored] = 255
    features, spoilt = torch.randn(size).to(dtype), torch.tensor([torch.nan, torch.inf, -torch.inf])
    weights = torch.randn(case.num_classes, 20), torch.rand(case.num_classes)
    expected = moments_and_gradients(case, features, labels, anchors, weights)
    rows = features.movedim(1, -1)
    rows[ignored] = spoilt.repeat(int(ignored.sum()))[: int(ignored.sum()), None].to(dtype)
    ours = moments_and_gradients(case, features, labels, anchors, weights)
    assert_equal(ours, expected)


@pytest.mark.skipif(BACKEND != "cuda", reason="Triton's chunks of this shape are one tile each")
@pytest.mark.parametrize("size", [(2, 250, 10, 136), (2, 250, 11, 125)])
def test_not_finite_pixel_of_a_tile_of_one_key(size):
    case = Case(size, 1000, BF16, labels="mixed")
    features, labels, anchors = make_features(case), make_labels(case), torch.randn(1000, 250)
    _, clean, _ = ao.ops.class_moments(features, labels, 1000, anchors=anchors, ignore_index=255)
    pixel, channel = 100, 4  # of tile 1; tile 0 has pixels of the same key
    own = int(labels.view(-1)[pixel])
    features[0, channel, 0, pixel] = torch.inf
    _, sums, sqdists = ao.ops.class_moments(
        features, labels, 1000, anchors=anchors, ignore_index=255
    )
    spoilt = torch.zeros(1000, 250, dtype=torch.bool)
    spoilt[own, channel] = True
    assert torch.equal(sums.isfinite(), ~spoilt)
    torch.testing.assert_close(sums[~spoilt], clean[~spoilt])
    assert torch.equal(sqdists.isfinite(), torch.arange(1000) != own)


@pytest.mark.parametrize(
    ("value", "dtype", "num_classes"),
    [
        (torch.nan, BF16, 50),
        (-torch.inf, FP32, 3),
        (3e38, BF16, 3),
        (3e38, FP32, 50),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
def test_not_finite_pixels_spoil_their_own_class(path, value, dtype, num_classes):
    case = Case((1, 18, 9, 30), num_classes, dtype)
    features, labels, anchors = (
        make_features(case),
        make_labels(case),
        torch.randn(case.num_classes, 18),
    )
    weights = torch.randn(case.num_classes, 18), torch.rand(case.num_classes)
    clean = moments_and_gradients(case, features, labels, anchors, weights)
    features[0, 4, 5, 6] = value
    own = int(labels[0, 5, 6])
    others = torch.arange(case.num_classes) != own
    ours = moments_and_gradients(case, features, labels, anchors, weights)
    for i in (1, 2, 4):
        torch.testing.assert_close(ours[i][others], clean[i][others], rtol=1e-5, atol=1e-4)
    assert not ours[2][own].isfinite()
    kept = labels != labels[0, 5, 6]
    assert torch.equal(ours[3].movedim(1, -1)[kept], clean[3].movedim(1, -1)[kept])


@pytest.mark.skipif(BACKEND != "cuda", reason="Triton's kernels have no slots")
@pytest.mark.parametrize("size", [(1, 40, 10, 136), (2, 70, 9, 29)])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_not_finite_pixels_without_a_slot(dtype, size):
    """A tile has more keys than there are slots."""
    labels = torch.randint(-1, 600, (size[0], *size[2:]))
    features, anchors = torch.randn(size).to(dtype), torch.randn(600, size[1])
    features[0, 3].view(-1)[::7] = torch.inf
    for chosen in (anchors, anchors.clone().requires_grad_(), None):
        results = []
        for backend in (BACKEND, "reference"):
            with ao.use_backend(backend):
                _, *moments = ao.ops.class_moments(
                    features, labels, 600, anchors=chosen, ignore_index=-1
                )
            if chosen is None:
                moments.pop()  # no squared distances
            elif chosen.requires_grad:
                moments += torch.autograd.grad(moments[1].sum(), chosen)
            results.append(moments)
        for ours, exact in zip(*results, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-4)


def test_reproducible(path):
    case = Case((2, 20, 9, 40), 11, BF16)
    inputs = make_features(case), make_labels(case), torch.randn(case.num_classes, 20)
    weights = torch.randn(case.num_classes, 20), torch.rand(case.num_classes)
    first = moments_and_gradients(case, *inputs, weights)
    second = moments_and_gradients(case, *inputs, weights)
    assert_equal(first, second)


@pytest.mark.parametrize("size", [(0, 4), (2, 4, 0), (0, 4, 3, 3)])
def test_empty(size):
    features = torch.empty(size, requires_grad=True)
    labels = torch.empty(size[:1] + size[2:], dtype=torch.int64)
    anchors = torch.randn(3, 4, requires_grad=True)
    counts, sums, sqdists = ao.ops.class_moments(features, labels, 3, anchors=anchors)
    (sums.sum() + sqdists.sum()).backward()
    assert not counts.any() and not sums.any() and not sqdists.any()
    assert features.grad.shape == size and not anchors.grad.any()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_squared_distances_alone(path, dtype):
    case = Case((2, 33, 6, 45), 7, dtype, labels="coherent")
    features, labels = make_features(case).requires_grad_(), make_labels(case)
    anchors = torch.randn(case.num_classes, 33, requires_grad=True)
    ours = ao.pixel_to_anchor_mse(features, labels, anchors, ignore_index=255)
    gradients = torch.autograd.grad(ours, (features, anchors))
    with ao.use_backend("reference"):
        inputs = [x.detach().double().requires_grad_() for x in (features, anchors)]
        exact = ao.pixel_to_anchor_mse(inputs[0], labels, inputs[1], ignore_index=255)
        wanted = torch.autograd.grad(exact, inputs)
    torch.testing.assert_close(ours.double(), exact)
    for gradient, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), right, rtol=2e-2, atol=1e-7)


def test_nothing_valid(path):
    case = Case((1, 4, 6, 30), 3)
    features, labels = torch.full(case.size, torch.nan), torch.full((1, 6, 30), 255)
    anchors, weights = (
        torch.randn(case.num_classes, 4),
        (torch.randn(case.num_classes, 4), torch.ones(1)),
    )
    results = moments_and_gradients(case, features, labels, anchors, weights)
    assert not any(result.any() for result in results if result is not None)


def test_offsets_are_64_bit(path):
    """Strides of 2^30 elements: the last rows are beyond 2^31. Few pages are touched."""
    torch.use_deterministic_algorithms(False)  # otherwise torch.empty would write all of it
    buffer = torch.empty(2**32 + 64, dtype=FP16)
    for view in (
        buffer.as_strided((4, 64), (2**30, 1)),
        buffer.as_strided((64, 4), (1, 2**30)),
        buffer.as_strided((4, 2, 3, 5), (2**30, 15, 5, 1)),
        buffer.as_strided((1, 2, 4, 5), (0, 5, 2**30, 1)),
    ):
        case = Case(tuple(view.shape), 2, FP16)
        view.copy_(torch.randn(view.shape))
        classes, dim = case.num_classes, view.shape[1]
        labels, anchors = make_labels(case), torch.randn(classes, dim)
        labels[labels == 255] = 1
        weights = torch.randn(classes, dim), torch.rand(classes)
        ours = moments_and_gradients(case, view.clone(), labels, anchors, weights)
        _, sums, sqdists = ao.ops.class_moments(
            view, labels, classes, anchors=anchors, ignore_index=255
        )
        torch.testing.assert_close(sums, ours[1])
        torch.testing.assert_close(sqdists, ours[2])

        keys, _ = reference.class_keys(view, labels, classes, False, 255)
        dfeatures = getattr(torch.ops.anchorops.class_moments_backward, BACKEND)(
            view, keys.int(), anchors, *weights, 1, view.shape, view.stride(), FP16
        )
        assert dfeatures.stride() == view.stride()
        assert torch.equal(dfeatures, ours[3])


def test_compiles_as_one_graph():
    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def loss(features, labels, anchors):
        counts, sums, sqdists = ao.ops.class_moments(features, labels, 4, anchors=anchors)
        return sqdists.sum() + (sums.sum(1) * counts).sum()

    for height in (3, 5):
        features, labels = torch.randn(1, 6, height, 7), torch.randint(0, 4, (1, height, 7))
        anchors = torch.randn(4, 6)
        grads = []
        for function in (loss, loss._torchdynamo_orig_callable):
            leaf = features.clone().requires_grad_()
            function(leaf, labels, anchors).backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads)


def test_operators_are_registered_as_torch_expects():
    operators = torch.ops.anchorops
    features, keys = torch.randn(2, 6, 5), torch.randint(-1, 3, (2, 5), dtype=torch.int32)
    anchors = torch.randn(3, 6)
    moments = (features.requires_grad_(), keys, anchors, 3, 1, True)
    torch.library.opcheck(getattr(operators.class_moments, BACKEND), moments)
    gradient = (features.detach(), keys, anchors, torch.randn(3, 6), torch.randn(3), 1)
    gradient = (*gradient, features.shape, features.stride(), torch.float32)
    torch.library.opcheck(getattr(operators.class_moments_backward, BACKEND), gradient)
    torch.library.opcheck(
        getattr(operators.class_keys, BACKEND), (keys[:, None], 1, 5, 3, True, 255)
    )


@pytest.mark.parametrize("keys", [torch.zeros(6, 2).T, torch.zeros(2, 5)], ids=["strided", "few"])
def test_keys_that_do_not_follow_each_other_are_refused(keys):
    features, anchors = torch.randn(2, 4, 6), torch.randn(3, 4)
    forward, backward = (
        getattr(getattr(torch.ops.anchorops, name), BACKEND)
        for name in ("class_moments", "class_moments_backward")
    )
    refused = pytest.raises((RuntimeError, ValueError), match="keys: expected a contiguous key for")
    with refused:
        forward(features, keys.int(), anchors, 3, 1, True)
    gradients = anchors, anchors[:, 0]
    with refused:
        backward(features, keys.int(), anchors, *gradients, 1, (2, 4, 6), (24, 6, 1), FP32)


def test_float64_is_refused():
    with pytest.raises(ValueError, match=rf"class_moments: backend {BACKEND} .* float64"):
        ao.ops.class_moments(torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4).long(), 2)
    with pytest.raises(ValueError, match="at most 16384 classes"):
        ao.ops.class_moments(torch.zeros(4, 2), torch.zeros(4).long(), 20_000, ignore_index=255)


def test_auto_does_not_take_the_interpreter():
    with ao.use_backend("auto"):
        ao.ops.class_moments(torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4).long(), 2)
