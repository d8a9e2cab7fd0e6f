"""Softmax moments, argmax and confusion on a GPU: values, gradients, graphs, compilation."""

import pytest
import torch

import anchorops as ao

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

SHAPES = [  # size of logits, size of labels, dtype, channels_last, align_corners
    ((2, 150, 32, 32), (128, 128), torch.bfloat16, False, False),
    ((2, 19, 32, 64), (128, 256), torch.float32, True, False),
    ((2, 21, 17, 17), (129, 129), torch.float16, False, True),
    ((1, 1200, 9, 11), (40, 31), torch.float32, False, False),
    ((2, 7, 30, 40), (9, 13), torch.bfloat16, False, False),
    ((2, 4, 1, 4000), (1, 4000), torch.float32, False, False),
    ((2, 5, 3, 2), (200, 129), torch.float16, True, False),  # 65 pixels for each logit
    ((1, 16_384, 4, 4), (16, 16), torch.bfloat16, False, False),
]


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request):
    reason = ao.backends()[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with ao.use_backend(request.param):
        yield request.param


def make_inputs(size, label_size, dtype, channels_last):
    torch.manual_seed(0)
    logits = (3 * torch.randn(size, device="cuda")).to(dtype)
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(-1, size[1], (size[0], *label_size), device="cuda")
    return logits, labels


def moments_and_gradient(logits, labels, align_corners):
    logits = logits.detach().requires_grad_()
    moments = ao.ops.softmax_moments(
        logits,
        labels,
        ignore_index=-1,
        align_corners=align_corners,
        squares=True,
        pixel_losses=True,
        lse=True,
    )
    found = [moment for moment in moments if moment is not None]
    weighted = [
        (x * torch.linspace(0.5, 1, x.numel(), device="cuda", dtype=x.dtype).view(x.shape)).sum()
        for x in found[2:]
    ]
    (gradient,) = torch.autograd.grad(torch.stack(weighted).sum(), logits)
    return [x.detach() for x in found], gradient


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(gpu_backend, shape):
    *sizes, align_corners = shape
    logits, labels = make_inputs(*sizes)
    found, gradient = moments_and_gradient(logits, labels, align_corners)
    with ao.use_backend("reference"):
        exact, exact_gradient = moments_and_gradient(logits.double(), labels, align_corners)
    counts, hits, *others = found
    assert torch.equal(counts, exact[0])
    assert (hits - exact[1]).abs().sum() <= 2  # where two classes are equal but for rounding
    for ours, theirs in zip(others, exact[2:], strict=True):
        assert (ours.double() - theirs).abs().max() <= 2e-5 * theirs.abs().max()
    assert gradient.stride() == logits.stride() and gradient.dtype == logits.dtype
    eps = torch.finfo(logits.dtype).eps
    error = (gradient.double() - exact_gradient).abs()
    assert (error <= eps * exact_gradient.abs() + 2e-5 * exact_gradient.abs().max()).all()
    matrix = ao.pixel_confusion(logits, labels, ignore_index=-1, align_corners=align_corners)
    assert torch.equal(matrix.diagonal(), hits) and matrix.sum() == counts.sum()


def test_reproducible(gpu_backend):
    *sizes, align_corners = SHAPES[0]
    inputs = (*make_inputs(*sizes), align_corners)
    (first, gradient), *others = (moments_and_gradient(*inputs) for _ in range(4))
    for found, other in others:
        assert torch.equal(gradient, other)
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


def test_cuda_graph(gpu_backend):
    *sizes, align_corners = SHAPES[1]
    logits, labels = make_inputs(*sizes)
    expected, expected_gradient = moments_and_gradient(logits, labels, align_corners)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            moments_and_gradient(logits, labels, align_corners)
    torch.cuda.current_stream().wait_stream(stream)
    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(logits)
    with torch.cuda.graph(graph):
        captured, gradient = moments_and_gradient(static, labels, align_corners)
    static.copy_(logits)
    graph.replay()
    assert torch.equal(gradient, expected_gradient)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_compiles_as_one_graph(gpu_backend):
    *sizes, _ = SHAPES[0]
    logits, labels = make_inputs(*sizes)

    def loss(logits):
        return ao.pixel_cross_entropy(logits, labels, ignore_index=-1)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(logits), loss(logits))


def test_losses_wait_for_nothing(gpu_backend):
    *sizes, _ = SHAPES[0]
    logits, labels = make_inputs(*sizes)
    logits.requires_grad_()
    losses = [
        ao.CrossEntropy(ohem=0.7, ohem_kept=100, focal_gamma=2.0, ignore_index=-1),
        ao.CrossEntropyDice(
            ao.CrossEntropy(label_smoothing=0.1, ignore_index=-1), ao.Dice(ignore_index=-1)
        ),
    ]
    for loss in losses:
        loss(logits, labels).backward()  # compiles and loads
    torch.cuda.set_sync_debug_mode("error")
    try:
        for loss in losses:
            loss(logits, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
