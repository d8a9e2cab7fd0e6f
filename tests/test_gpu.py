"""The GPU backends on a GPU: values, gradients, streams, graphs, compilation."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import anchorops as ao
from anchorops._backend import CUDA_MAX_KEYS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

SHAPES = [  # size, classes, dtype, channels_last, pixels to a run of labels
    ((2, 720, 32, 64), 19, torch.bfloat16, False, 37),
    ((2, 256, 24, 40), 150, torch.bfloat16, True, 1),
    ((1, 100, 31, 33), 1000, torch.float32, False, 1),
    ((2, 129, 17, 65), 19, torch.float32, True, 300),
    ((3, 48, 64, 64), 5, torch.float16, False, 4000),
    ((5000, 300), 16_384, torch.float32, False, 1),
]


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request):
    reason = ao.backends()[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with ao.use_backend(request.param):
        yield request.param


def make_inputs(size, num_classes, dtype, channels_last, run):
    torch.manual_seed(0)
    features = torch.randn(size, device="cuda").to(dtype)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    pixels = size[:1] if len(size) == 2 else (size[0], *size[2:])
    count = torch.Size(pixels).numel()
    labels = torch.randint(0, num_classes + 1, (count // run + 1,), device="cuda")
    labels = labels.repeat_interleave(run)[:count].view(pixels)
    labels = torch.where(labels == num_classes, 255 if num_classes < 255 else -1, labels)
    anchors = torch.randn(num_classes, size[1], device="cuda")
    return features, labels, anchors


def moments_and_gradients(features, labels, anchors):
    features, anchors = features.detach().requires_grad_(), anchors.detach().requires_grad_()
    counts, sums, sqdists = ao.ops.class_moments(
        features, labels, anchors.shape[0], anchors=anchors, ignore_index=-1
    )
    assert sqdists is not None
    weights = torch.linspace(0.5, 1, sqdists.numel(), device="cuda", dtype=sums.dtype)
    loss = (sums * weights[:, None]).sum() + (sqdists * weights).sum()
    return counts, sums.detach(), sqdists.detach(), *torch.autograd.grad(loss, (features, anchors))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(gpu_backend, shape):
    if gpu_backend == "cuda" and shape[1] > CUDA_MAX_KEYS:
        pytest.skip("cuda leaves more keys to triton")
    features, labels, anchors = make_inputs(*shape)
    ours = moments_and_gradients(features, labels, anchors)
    with ao.use_backend("reference"):
        exact = moments_and_gradients(features.double(), labels, anchors.double())
        size = moments_and_gradients(features.double().abs(), labels, anchors.double())
    assert torch.equal(ours[0], exact[0])
    for i in (1, 2, 4):  # 2e-6 of the sum of the terms: tensor cores truncate
        terms = size[1].max() if i != 2 else size[2].max()
        assert (ours[i].double() - exact[i]).abs().max() <= 4e-6 * terms
    assert ours[3].stride() == features.stride()
    eps = torch.finfo(features.dtype).eps
    error = (ours[3].double() - exact[3]).abs()
    assert (error <= eps * exact[3].abs() + 1e-6 * exact[3].abs().max()).all()


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_not_finite_pixels(gpu_backend, shape):
    features, labels, anchors = make_inputs(*shape)
    rows = features.movedim(1, -1)
    ignored = (labels < 0) | (labels >= anchors.shape[0])
    clean = moments_and_gradients(features, labels, anchors)
    rows[ignored] = torch.nan
    for a, b in zip(moments_and_gradients(features, labels, anchors), clean, strict=True):
        assert torch.equal(a, b)
    place = tuple(i[0] for i in torch.nonzero(~ignored, as_tuple=True))
    rows[place] = torch.inf
    spoilt = moments_and_gradients(features, labels, anchors)
    others = torch.arange(anchors.shape[0], device="cuda") != labels[place]
    assert all(spoilt[i][others].isfinite().all() for i in (1, 2, 4))
    assert not spoilt[2][~others].isfinite().any()


def test_reproducible(gpu_backend):
    inputs = make_inputs(*SHAPES[0])
    first, *others = (moments_and_gradients(*inputs) for _ in range(4))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_cuda_graph_and_streams(gpu_backend):
    features, labels, anchors = make_inputs(*SHAPES[0])
    expected = moments_and_gradients(features, labels, anchors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            moments_and_gradients(features, labels, anchors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    static = torch.zeros_like(features)
    with torch.cuda.graph(graph):
        captured = moments_and_gradients(static, labels, anchors)
    static.copy_(features)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("method", [ao.OCCL, ao.MVSC])
def test_each_replay_of_a_graph_draws_other_groups(gpu_backend, method):
    features, labels, _ = make_inputs(*SHAPES[0])
    classes, dim = SHAPES[0][1], features.shape[1]
    method, classifier = method(classes, dim).cuda(), torch.randn(classes, dim, device="cuda")

    def loss():
        return method(features, labels, classifier).detach()

    expected = [loss() for _ in range(3)]
    assert not torch.equal(expected[0], expected[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss()
    method.step.zero_()
    for of_step in expected:
        graph.replay()
        assert torch.equal(captured, of_step)


def test_threads_that_launch_at_once(gpu_backend):
    """With 19 and with 150 classes, one kernel needs different amounts of shared memory."""
    inputs = [make_inputs((2, 64, 16, 32), k, torch.bfloat16, False, 9) for k in (19, 150)]

    def results(i):
        with ao.use_backend(gpu_backend):
            return [moments_and_gradients(*inputs[i % 2]) for _ in range(50)]

    with ThreadPoolExecutor(4) as threads:
        for i, found in enumerate(threads.map(results, range(4))):
            expected = moments_and_gradients(*inputs[i % 2])
            assert all(
                torch.equal(a, b) for some in found for a, b in zip(some, expected, strict=True)
            )


def test_compiles_as_one_graph(gpu_backend):
    features, labels, anchors = make_inputs(*SHAPES[0])

    def loss(features):
        return ao.pixel_to_anchor_mse(features, labels, anchors)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(features), loss(features))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_another_device(gpu_backend):
    features, labels, anchors = (t.to("cuda:1") for t in make_inputs(*SHAPES[0]))
    loss = ao.pixel_to_anchor_mse(features, labels, anchors)
    with ao.use_backend("reference"):
        torch.testing.assert_close(loss, ao.pixel_to_anchor_mse(features, labels, anchors))


@pytest.mark.parametrize("with_positives", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((19, 40), torch.float32),
        ((150, 768), torch.float32),
        ((150, 768), torch.bfloat16),
        ((171, 4, 256), torch.float16),
    ],
)
def test_centroid_info_nce(gpu_backend, shape, dtype, with_positives):
    torch.manual_seed(0)
    queries, positives = torch.randn(2, *shape, device="cuda").div(shape[-1] ** 0.25).to(dtype)
    keys = torch.randn(shape[0], shape[-1], device="cuda").to(dtype)
    present = torch.rand(shape[:-1], device="cuda") < 0.8

    def loss_and_gradients(*tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        given = tensors[2] if with_positives else None
        loss = ao.ops.centroid_info_nce(tensors[0], tensors[1], positives=given, present=present)
        return [loss.detach(), *torch.autograd.grad(loss, tensors[: 2 + with_positives])]

    ours = loss_and_gradients(queries, keys, positives)
    with ao.use_backend("reference"):
        exact = loss_and_gradients(queries.double(), keys.double(), positives.double())
    for a, b in zip(ours, exact, strict=True):
        rtol = max(1e-4, torch.finfo(a.dtype).eps)
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=1e-5 * float(b.abs().max()))
