"""What only a GPU has: streams, CUDA graphs, threads that launch at once, several devices, and
compilation for it. Values and gradients are in the cases of each operator: those marked on("gpu").
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import softmax_formulas as softmax
import torch
from masked_sums import BF16, Case, make_inputs, run

import anchorops as ao

pytestmark = pytest.mark.on("gpu")
CASE = Case((2, 720, 32, 64), 19, BF16, labels="coherent")
OF_LOGITS = softmax.Case((2, 19, 32, 64), (128, 256), layout="channels_last")


def same(ours, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("operator", ["class_moments", "softmax_moments"])
def test_cuda_graph_and_streams(operator: str, backend: str):
    if operator == "class_moments":
        function, case, (x, *inputs) = run, CASE, make_inputs(CASE)
    else:
        function, case, x = softmax.results, OF_LOGITS, softmax.make_logits(OF_LOGITS)[0]
        inputs = softmax.make_labels(case), softmax.make_weights(case)
    expected = function(case, x, *inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(case, x, *inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    static = torch.zeros_like(x)
    with torch.cuda.graph(graph):
        captured = function(case, static, *inputs)
    static.copy_(x)
    graph.replay()
    assert same(captured, expected)


def test_losses_wait_for_nothing(backend: str):
    logits = softmax.make_logits(OF_LOGITS)[0].requires_grad_()
    labels = softmax.make_labels(OF_LOGITS)
    losses = [
        ao.CrossEntropy(ohem=0.7, ohem_kept=100, focal_gamma=2.0),
        ao.CrossEntropyDice(ao.CrossEntropy(label_smoothing=0.1), ao.Dice()),
    ]
    with torch.device("cpu"):  # the usual one for new tensors
        for loss in losses:
            loss(logits, labels).backward()  # compiles and loads
        torch.cuda.set_sync_debug_mode("error")
        try:
            for loss in losses:
                loss(logits, labels).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", [ao.OCCL, ao.MVSC])
def test_each_replay_of_a_graph_draws_other_groups(backend: str, method):
    features, labels, anchors, *_ = make_inputs(CASE)
    method, classifier = method(*anchors.shape).cuda(), torch.randn_like(anchors)

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


def test_threads_that_launch_at_once(backend: str):
    """With 19 and with 150 classes, one kernel needs different amounts of shared memory."""
    cases = [Case((2, 64, 16, 32), k, BF16) for k in (19, 150)]
    inputs = [(case, *make_inputs(case)) for case in cases]

    def results(i: int):
        with ao.use_backend(backend):
            return [run(*inputs[i % 2]) for _ in range(50)]

    with ThreadPoolExecutor(4) as threads:
        for i, found in enumerate(threads.map(results, range(4))):
            expected = run(*inputs[i % 2])
            assert all(same(some, expected) for some in found)


def test_compiles_as_one_graph(backend: str):
    features, labels, anchors, *_ = make_inputs(CASE)

    def loss(features):
        return ao.pixel_to_anchor_mse(features, labels, anchors)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(features), loss(features))

    def cross_entropy(logits):
        return ao.pixel_cross_entropy(logits, labels)

    compiled = torch.compile(cross_entropy, fullgraph=True, dynamic=True)
    logits = softmax.make_logits(OF_LOGITS)[0]
    torch.testing.assert_close(compiled(logits), cross_entropy(logits))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_another_device(backend: str):
    features, labels, anchors = (t.to("cuda:1") for t in make_inputs(CASE)[:3])
    loss = ao.pixel_to_anchor_mse(features, labels, anchors)
    with ao.use_backend("reference"):
        torch.testing.assert_close(loss, ao.pixel_to_anchor_mse(features, labels, anchors))
