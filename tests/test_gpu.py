"""What only a GPU has: streams, CUDA graphs, threads that launch at once, several devices, and
compilation for it. Values and gradients are in the cases of each operator: those marked on("gpu").
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from masked_sums import BF16, Case, make_inputs, run

import anchorops as ao

pytestmark = pytest.mark.on("gpu")
CASE = Case((2, 720, 32, 64), 19, BF16, labels="coherent")


def same(ours, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_cuda_graph_and_streams(backend: str):
    features, *inputs = make_inputs(CASE)
    expected = run(CASE, features, *inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(CASE, features, *inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    static = torch.zeros_like(features)
    with torch.cuda.graph(graph):
        captured = run(CASE, static, *inputs)
    static.copy_(features)
    graph.replay()
    assert same(captured, expected)


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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_another_device(backend: str):
    features, labels, anchors = (t.to("cuda:1") for t in make_inputs(CASE)[:3])
    loss = ao.pixel_to_anchor_mse(features, labels, anchors)
    with ao.use_backend("reference"):
        torch.testing.assert_close(loss, ao.pixel_to_anchor_mse(features, labels, anchors))
