"""Values and all gradients of softmax moments within the error budget."""

import pytest
import torch
from emulator import BACKEND
from pixels import (
    ALL,
    BF16,
    FP16,
    FP32,
    Case,
    check,
    exact_values_and_gradient,
    make_labels,
    make_logits,
    make_weights,
    values_and_gradient,
)
from torch.utils._python_dispatch import TorchDispatchMode

import anchorops as ao

PLAIN = (None, None, 0.0)  # without smoothing, smallest loss and focal factor
CE = ()  # the cross-entropy needs only counts and losses
CASES = [
    # ×4: one cell, several tiles of cells, many classes
    Case((1, 3, 1, 1), (4, 4)),
    Case((2, 19, 3, 5), (12, 20)),
    Case((2, 2, 3, 37), (12, 148), asked=("masses",), per_image=True),
    Case((1, 7, 9, 2), (36, 8), False, BF16, "channels_last", torch.uint8),
    Case((1, 150, 1, 3), (4, 12), False, BF16, asked=CE),
    Case((1, 37, 2, 3), (8, 12), False, FP16, "sliced", asked=("masses", "lse")),
    # ×8
    Case((1, 8, 3, 4), (24, 32), False, FP32, "channels_last", asked=CE),
    Case((2, 5, 2, 3), (16, 24), False, BF16, "cropped", torch.int16),
    # ×2 and ×3, and another ratio along each axis
    Case((1, 7, 4, 5), (8, 10), asked=("hits", "masses")),
    Case((1, 4, 3, 9), (9, 9)),
    Case((1, 4, 9, 3), (3, 24), label_dtype=torch.uint16),
    # odd ratios, both ways to place the corners
    Case((1, 5, 9, 9), (33, 33)),
    Case((1, 5, 9, 9), (33, 33), True),
    Case((2, 6, 4, 6), (17, 25), True, BF16, label_dtype=torch.int8),
    Case((1, 9, 4, 5), (16, 20), True, FP32, "channels_last", asked=CE),
    Case((1, 3, 5, 4), (7, 9), False, FP16, "channels_last", asked=("squares",)),
    # the same size, down, one logit, one label
    Case((2, 6, 7, 5), (7, 5), False, BF16, "channels_last"),
    Case((1, 2, 4, 3), (4, 3)),
    Case((2, 2, 3, 2), (12, 8), per_image=True),
    Case((1, 7, 9, 8), (3, 5)),
    Case((1, 7, 9, 8), (4, 2), True, asked=("masses",)),
    Case((1, 3, 1, 1), (5, 3), True),
    # cells of many pixels, which a program of the gradient takes in blocks
    Case((1, 3, 2, 1), (40, 3)),
    Case((1, 2, 1, 2), (5, 37), False, BF16, "channels_last", asked=CE),
    Case((2, 4, 3, 5), (1, 1), True),
    # points and volumes
    Case((70, 37), (), False, FP32, "sliced", torch.int32),
    Case((150, 19), (), False, BF16, asked=CE),
    Case((600, 5), ()),
    Case((2, 3, 300), (300,), per_image=True),
    Case((2, 4, 1, 90), (1, 810), asked=("hits", "masses")),
    # one row of pixels in geometric sequences: the shifts of one row, of several small images
    Case((2, 5, 1, 40), (1, 160), True),
    Case((20, 3, 1, 1), (1, 4), True),
    Case((3, 5, 40), (40,), per_image=True, label_dtype=torch.uint32),
    Case((2, 4, 3, 2, 5), (3, 2, 5), label_dtype=torch.uint64),
    # more classes than a block of any size has
    Case((5, 1100 if BACKEND == "cuda" else 300), (), asked=CE),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case):
    check(case)


SHAPED = [
    # label smoothing, focal factor, smallest loss: each alone, two, and all of them
    Case((2, 19, 3, 5), (12, 20), smoothing="class"),
    Case((1, 2, 4, 3), (4, 3), asked=CE, smoothing="class"),
    Case((1, 6, 4, 5), (8, 10), asked=CE, focal_gamma=2.0),
    Case((1, 4, 5, 4), (7, 9), True, FP16, asked=("masses",), focal_gamma=0.5),
    Case((2, 5, 3, 4), (12, 16), min_loss=1.0, per_image=True),
    Case((70, 37), (), False, FP32, "sliced", asked=CE, smoothing="class", min_loss=3.0),
    Case((3, 4, 3, 4), (9, 7), True, smoothing="class", focal_gamma=1.5),
    Case(
        *((2, 150, 2, 3), (4, 6), False, BF16, "channels_last"),
        per_image=True, smoothing="image and class", focal_gamma=3.0, min_loss=4.0,
    ),
    Case((2, 3, 2, 1), (40, 3), smoothing="image and class", focal_gamma=2.0),
    # the factor of losses near 0 and far above
    Case((1, 5, 4, 6), (16, 24), asked=CE, scale=9.0, smoothing="class", focal_gamma=1.2),
]  # fmt: skip


@pytest.mark.skipif(BACKEND == "cuda", reason="it leaves shaped losses to Triton")
@pytest.mark.parametrize("case", SHAPED, ids=str)
def test_shaped_losses(case: Case):
    check(case)


@pytest.mark.skipif(BACKEND != "triton", reason="the interpreter's lanes have one pixel")
@pytest.mark.parametrize(
    "case",
    [
        Case((1, 3, 2, 3), (8, 12)),
        Case((1, 3, 3, 2), (6, 16), dtype=BF16),
        Case((1, 3, 2, 3), (7, 13), True, asked=("masses",)),
        Case((1, 3, 2, 3), (8, 12), smoothing="class", focal_gamma=2.0, min_loss=0.5),
    ],
    ids=str,
)
def test_lanes_of_several_pixels(case: Case, monkeypatch):
    """As on a GPU."""
    from anchorops.kernels import upsampling

    monkeypatch.setattr(upsampling, "MOST_PIXELS", 4)
    check(case)


@pytest.mark.parametrize("through", [("losses",), ("masses",), ("overlaps", "lse"), ("squares",)])
def test_gradient_through_some(through):
    check(Case((1, 6, 3, 4), (12, 16)), through)
    check(Case((1, 6, 3, 4), (8, 9), True, BF16), through)


@pytest.mark.parametrize("scale", [27.0, 3e3])  # neighbours differ by up to 80 and 1e4
@pytest.mark.parametrize("pixels", [(16, 24), (33, 48), (7, 9)])
def test_steep_neighbours(scale, pixels):
    check(Case((1, 5, 4, 6), pixels, scale=scale))


def test_largest_logits():
    """Neighbours whose difference is not finite in float32: p is 0 or 1, the gradient finite."""
    case = Case((1, 4, 3, 4), (12, 16), asked=("hits", "masses"))
    logits = torch.where(make_logits(case) > 0, 3e38, -3e38) * torch.rand(case.size)
    labels, weights = make_labels(case), make_weights(case)
    ours, dlogits = values_and_gradient(case, logits, labels, weights)
    exact, exact_gradient = exact_values_and_gradient(case, logits, labels, weights)
    torch.testing.assert_close(ours, exact)
    torch.testing.assert_close(dlogits, exact_gradient)


@pytest.mark.parametrize("pixels", [(32, 48), (7, 9)])
def test_losses_are_never_negative(pixels):
    """Where the label has almost all of the probability, rounding could make them so."""
    for scale in (10, 10, 20, 20):
        logits = scale * torch.randn(1, 5, 4, 6)
        labels = ao.pixel_argmax(logits, pixels)
        moments = ao.ops.softmax_moments(logits, labels, pixel_losses=True)
        assert moments.pixel_losses is not None
        assert (moments.pixel_losses >= 0).all() and (moments.losses >= 0).all()


def test_far_from_zero():
    """A constant that all classes share changes nothing but lse."""
    case = Case((1, 5, 3, 4), (12, 16))
    logits, labels, weights = make_logits(case).round(), make_labels(case), make_weights(case)
    through = ("losses", "masses", "squares")
    ours, dlogits = values_and_gradient(case, logits + 4096, labels, weights, through)
    exact, exact_gradient = exact_values_and_gradient(case, logits, labels, weights, through)
    for name in ("overlaps", "masses", "squares", "pixel_losses"):
        torch.testing.assert_close(ours[name], exact[name], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dlogits, exact_gradient, rtol=1e-3, atol=1e-3)


def bitwise(x):
    return x.view(torch.int32) if x.is_floating_point() else x


@pytest.mark.parametrize("case", [
    Case((2, 7, 3, 20), (12, 80)),
    Case((2, 7, 3, 5), (10, 11), True, BF16, "channels_last"),
], ids=str)  # fmt: skip
def test_reproducible(case):
    logits, labels, weights = make_logits(case), make_labels(case), make_weights(case)
    first = values_and_gradient(case, logits, labels, weights)
    second = values_and_gradient(case, logits, labels, weights)
    assert all(torch.equal(bitwise(first[0][k]), bitwise(second[0][k])) for k in first[0])
    assert torch.equal(first[1], second[1])


class Allocated(TorchDispatchMode):
    """The shapes of new tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.shapes.append(tuple(result.shape))
        return result

    def __enter__(self):
        self.shapes = []
        return super().__enter__()


@pytest.mark.parametrize(
    ("case", "blocks"),
    [
        (Case((600, 9), (), asked=("masses",)), (3, 3)),  # 256 points in a block
        # in launches of one row of patches, or of three
        (Case((1, 5, 30, 30), (240, 240), asked=("masses",)), (4, 12)),
        # in launches of one part of the cells
        (Case((2, 5, 6, 6), (48, 48), asked=("masses", "lse"), per_image=True), (2, 2)),
    ],
    ids=str,
)
def test_partials_are_limited(case, blocks, set_hardware):
    """To a 64th of the logits, if no multiprocessor permits more; each image has a block."""
    set_hardware(0, 228)
    check(case)
    logits, labels = make_logits(case), make_labels(case)
    if logits.dim() == 2:
        logits, labels = logits.t()[None, :, None], labels[None, None]
    options = [case.options[x] for x in ("ignore_index", "align_corners", "per_image", *ALL)]
    operator = torch.ops.anchorops.softmax_moments.cuda
    with Allocated() as new:
        operator._op_dk(torch._C.DispatchKey.CPU, logits, labels, *PLAIN, *options, False)
    num_classes = case.size[1]
    partials = [shape for shape in new.shapes if len(shape) == 3 and shape[2] == num_classes]
    assert partials == [(3, blocks[0], num_classes), (1, blocks[1], num_classes)]
    if not case.per_image:
        assert 3 * blocks[0] * num_classes <= logits.numel() / 64


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("labels_size", [(2, 12, 16), (2, 7, 9)])
def test_nothing_valid(labels_size, dtype):
    logits = torch.full((2, 5, 3, 4), torch.nan, dtype=dtype, requires_grad=True)
    labels = torch.full(labels_size, 255)
    moments = ao.ops.softmax_moments(logits, labels, squares=True, pixel_losses=True, lse=True)
    assert not any(x.any() for x in moments if x is not None)
    torch.stack([x.sum() for x in moments[2:8]]).sum().backward()
    assert not logits.grad.any()


@pytest.mark.parametrize(
    ("size", "labels_size"), [((0, 4), (0,)), ((0, 4, 3, 3), (0, 12, 12)), ((2, 4, 0), (2, 0))]
)
def test_empty(size, labels_size):
    logits = torch.empty(size, requires_grad=True)
    labels = torch.empty(labels_size, dtype=torch.int64)
    moments = ao.ops.softmax_moments(logits, labels, squares=True, pixel_losses=True, lse=True)
    assert not any(x.any() for x in moments if x is not None)
    torch.stack([x.sum() for x in moments[2:8]]).sum().backward()
    assert logits.grad.shape == size


def test_no_labels_of_logits():
    logits = torch.randn(2, 4, 3, 3, requires_grad=True)
    moments = ao.ops.softmax_moments(logits, torch.empty(2, 0, 5, dtype=torch.int64))
    moments.losses.sum().backward()
    assert not moments.losses.any() and not logits.grad.any()


def test_strides_of_labels_and_gradients():
    case = Case((2, 4, 3, 5), (12, 20))
    logits, labels, weights = make_logits(case), make_labels(case), make_weights(case)
    for name in ("losses", "pixel_losses"):
        weights[name] = torch.randn(1).expand(weights[name].shape)
    expected = values_and_gradient(case, logits, labels, weights)
    for strided in (
        labels.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([labels, torch.full_like(labels, 3)], -1)[..., 0],
    ):
        ours = values_and_gradient(case, logits, strided, weights)
        assert all(torch.equal(ours[0][name], expected[0][name]) for name in ours[0])
        assert torch.equal(ours[1], expected[1])
    row = labels[:1, :1].expand(2, 12, 20)
    ours = values_and_gradient(case, logits, row, weights)
    assert torch.equal(ours[1], values_and_gradient(case, logits, row.clone(), weights)[1])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_labels_that_are_ignored(dtype):
    """Negative labels, which could be classes as unsigned numbers, and a class."""
    logits = torch.randn(1, 200, 2, 2, requires_grad=True)
    labels = torch.full((1, 8, 8), 3, dtype=dtype)
    labels[0, 0, :3] = torch.tensor([-100, 7, -1])
    moments = ao.ops.softmax_moments(logits, labels, ignore_index=7, hits=False, masses=False)
    assert moments.counts.tolist() == [61 if k == 3 else 0 for k in range(200)]
    assert (moments.losses != 0).nonzero().tolist() == [[3]]


def test_offsets_are_64_bit():
    """Strides of 2^30 elements: the last ones are beyond 2^31. Few pages are touched."""
    torch.use_deterministic_algorithms(False)  # otherwise torch.empty would write all of it
    buffer = torch.empty(2**32 + 64, dtype=FP16)
    for size, stride in (
        ((4, 2, 3, 4), (2**30, 12, 4, 1)),
        ((1, 4, 3, 4), (0, 2**30, 4, 1)),
        ((1, 3, 4, 4), (0, 4, 2**30, 1)),
        ((1, 3, 3, 4), (0, 1, 3, 2**30)),
    ):
        case = Case(size, (5, 7) if stride[2] == 2**30 else (12, 16), dtype=FP16)
        far = buffer.as_strided(size, stride)
        near = far.copy_(torch.randn(size)).clone()
        labels, weights = make_labels(case), make_weights(case)
        ours = values_and_gradient(case, far, labels, weights)
        expected = values_and_gradient(case, near, labels, weights)
        assert all(torch.equal(ours[0][name], expected[0][name]) for name in ours[0])
        assert torch.equal(ours[1].contiguous(), expected[1].contiguous())


def test_offsets_of_labels_are_64_bit():
    torch.use_deterministic_algorithms(False)
    far = torch.empty(2**32 + 64, dtype=torch.uint8).as_strided((3, 8, 8), (2**31, 8, 1))
    case = Case((3, 4, 2, 2), (8, 8), label_dtype=torch.uint8)
    logits, weights = make_logits(case), make_weights(case)
    near = far.copy_(make_labels(case)).clone()
    ours = values_and_gradient(case, logits, far, weights)
    expected = values_and_gradient(case, logits, near, weights)
    assert all(torch.equal(ours[0][name], expected[0][name]) for name in ours[0])
    assert torch.equal(ours[1], expected[1])


def test_compiles_as_one_graph():
    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def loss(logits, labels):
        moments = ao.ops.softmax_moments(logits, labels, align_corners=True)
        return moments.losses.sum() / moments.counts.sum() + moments.masses.square().sum()

    for width in (3, 5):
        logits, labels = torch.randn(1, 4, 2, width), torch.randint(0, 4, (1, 7, 2 * width))
        grads = []
        for function in (loss, loss._torchdynamo_orig_callable):
            leaf = logits.clone().requires_grad_()
            function(leaf, labels).backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads)


def test_operators_are_registered_as_torch_expects():
    operators = torch.ops.anchorops
    logits, labels = torch.randn(2, 5, 2, 3), torch.randint(0, 5, (2, 8, 12))
    asked = (True, True, True, True, True)
    forward = (logits.requires_grad_(), labels, *PLAIN, 255, False, False, *asked)
    torch.library.opcheck(getattr(operators.softmax_moments, BACKEND), forward)
    gradients = [torch.randn(5) for _ in range(4)] + [torch.randn(2, 8, 12) for _ in range(2)]
    backward = (logits.detach(), labels, torch.randn(2, 8, 12), *gradients, *PLAIN, 255, False)
    torch.library.opcheck(getattr(operators.softmax_moments_backward, BACKEND), backward)


def test_float64_is_refused():
    with pytest.raises(ValueError, match=rf"softmax_moments: backend {BACKEND} .* float64"):
        ao.ops.softmax_moments(torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4).long())
    with pytest.raises(ValueError, match="at most 16384 classes"):
        ao.ops.softmax_moments(torch.zeros(4, 20_000), torch.zeros(4).long(), ignore_index=-1)


@pytest.mark.skipif(BACKEND != "cuda", reason="only cuda leaves them to others")
@pytest.mark.parametrize(
    "option", [(torch.ones(2, 3), None, 0.0), (None, 1.0, 0.0), (None, None, 2.0)]
)
def test_options_that_cuda_leaves_to_triton(option):
    logits, labels = torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 4, dtype=torch.int64)
    asked = (255, False, False, *(False,) * 6)
    operators = torch.ops.anchorops
    with pytest.raises(RuntimeError, match=r"softmax_moments\.cuda: smoothing, min_loss and focal"):
        operators.softmax_moments.cuda(logits, labels, *option, *asked)
    gradients = (labels.float(), torch.zeros(3), *(None,) * 5)
    with pytest.raises(RuntimeError, match=r"softmax_moments_backward\.cuda: smoothing, min_loss"):
        operators.softmax_moments_backward.cuda(logits, labels, *gradients, *option, 255, False)


@pytest.mark.skipif(BACKEND == "cuda", reason="cuda leaves label smoothing to triton")
@pytest.mark.parametrize("align_corners", [False, True])
def test_label_smoothing_of_the_public_function(align_corners):
    logits = torch.randn(2, 5, 3, 4, requires_grad=True)
    labels = torch.randint(0, 6, (2, 9, 16))  # 5 is ignored

    def loss() -> torch.Tensor:
        options = {"align_corners": align_corners, "label_smoothing": 0.3}
        return ao.pixel_cross_entropy(logits, labels, **options)

    ours = loss()
    with ao.use_backend("reference"):
        expected = loss()
    torch.testing.assert_close(ours, expected)
    (found,), (gradient,) = (torch.autograd.grad(x, logits) for x in (ours, expected))
    torch.testing.assert_close(found, gradient)
