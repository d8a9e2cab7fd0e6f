"""What only a GPU has: streams, CUDA graphs, threads that launch at once, several devices, and
compilation for it. Values and gradients are in the cases of each operator: those marked on("gpu").
"""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import anchorops as ao
from anchorops.doctor.catalogue import Inputs
from anchorops.measure import cuda_graph
from tests.helpers.class_moments_cases import BF16, Case, make_inputs, run
from tests.helpers.operators import results as results_of
from tests.helpers.softmax_cases import moments
from tests.test_guarantees import same_bits
from tests.test_methods import METHODS, classifier_of, labels_of

pytestmark = pytest.mark.on("gpu")
CASE = Case((2, 720, 32, 64), 19, BF16, labels="coherent")
LOGITS_CASE = moments((2, 19, 32, 64), (128, 256), layout="channels_last")


def logits_and_labels() -> tuple[Tensor, Tensor]:
    inputs = LOGITS_CASE.sample.inputs()
    return inputs["logits"].cuda(), inputs["labels"].cuda()


Call = tuple[Callable[[Inputs], Any], Inputs]


@pytest.fixture(
    params=["class_moments", pytest.param("softmax_moments", marks=pytest.mark.on("triton"))]
)
def calls(request: pytest.FixtureRequest, backend: str) -> list[Call]:
    """Values and gradient of an operator, of two inputs."""
    if request.param == "class_moments":
        return [(partial(run, CASE), make_inputs(CASE)) for _ in range(2)]
    logits, labels = logits_and_labels()
    inputs = [{"logits": x, "labels": labels} for x in (logits, logits.flip(0))]
    return [(partial(results_of, LOGITS_CASE.ours), x) for x in inputs]


def test_cuda_graph(calls: list[Call]):
    function, inputs = calls[0]
    expected, (name, x) = function(inputs), next(iter(inputs.items()))
    static = torch.zeros_like(x)
    replay = cuda_graph(lambda: function(inputs | {name: static}))
    static.copy_(x)
    assert same_bits(replay(), expected)


def test_two_streams(calls: list[Call]):
    expected = [function(inputs) for function, inputs in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    streamed: list[list[Any]] = [[] for _ in calls]
    for _ in range(20):
        for stream, found, (function, inputs) in zip(streams, streamed, calls, strict=True):
            with torch.cuda.stream(stream):
                found.append(function(inputs))
    torch.cuda.synchronize()
    for found, right in zip(streamed, expected, strict=True):
        assert all(same_bits(result, right) for result in found)


FIRST_LAUNCHES = """
import torch, anchorops as ao
torch.set_default_device("cuda")
features = torch.randn(2, 64, 16, 32, dtype=torch.bfloat16, requires_grad=True)
anchors = torch.randn(19, 64, requires_grad=True)
labels, seed = torch.randint(0, 19, (2, 64, 128)), torch.ones(1, dtype=torch.int64)

def step():
    groups = ao.ops.class_moments(features, labels, 19, anchors=anchors, groups=2, seed=seed)
    loss = ao.pixel_to_anchor_mse(features, labels, anchors) + groups.sums.square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, (features, anchors))]

graph = torch.cuda.CUDAGraph()
with ao.use_backend("cuda"):
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for ours, expected in zip(captured, step(), strict=True):
        assert torch.equal(ours, expected)
"""


@pytest.mark.on("cuda")  # Triton compiles and loads at the first launch
def test_graph_without_a_warm_up(backend: str):
    """In a new process, the first launch of each kernel is captured."""
    process = subprocess.run([sys.executable, "-c", FIRST_LAUNCHES], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.on("gpu" if name == "CR" else "triton"))
        for name in METHODS
        if name != "CBP"  # it has no gradient
    ],
)
def test_graph_of_a_training_step(backend: str, name: str):
    """Loss and gradients of each method. Before each step it gets the state back that it had."""
    features = torch.randn(2, 96, 32, 64).bfloat16().requires_grad_()
    labels, method = labels_of(features, 19, ratio=4), METHODS[name](19, 96)
    classifier = classifier_of(method, 19, 96)
    parameters = [x for x in (*method.parameters(), *classifier.parameters()) if x.requires_grad]
    state = {key: value.clone() for key, value in method.named_buffers()}

    def step() -> list[Tensor | None]:
        for key, value in method.named_buffers():
            value.copy_(state[key])
        loss = method(features, labels, classifier)
        gradients = torch.autograd.grad(loss, [features, *parameters], allow_unused=True)
        return [loss.detach(), *gradients]

    torch.testing.assert_close(cuda_graph(step)(), step())


@pytest.mark.on("triton")
def test_losses_wait_for_nothing(backend: str):
    logits, labels = logits_and_labels()
    logits.requires_grad_()
    losses = [
        ao.CrossEntropy(ohem_threshold=0.7, ohem_min_kept=100, focal_gamma=2.0),
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


@pytest.mark.on("triton")
@pytest.mark.parametrize("method", [ao.OCCL, ao.MVSC])
def test_each_replay_of_a_graph_draws_other_groups(backend: str, method):
    features, labels, anchors = make_inputs(CASE).values()
    method, classifier = method(*anchors.shape).cuda(), torch.randn_like(anchors)

    def loss():
        return method(features, labels, classifier).detach()

    expected = [loss() for _ in range(3)]
    assert not torch.equal(expected[0], expected[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss()
    method.step.zero_()
    for step_loss in expected:
        graph.replay()
        assert torch.equal(captured, step_loss)


def test_threads_that_launch_at_once(backend: str):
    """With 19 and with 150 classes, one kernel needs different amounts of shared memory."""
    cases = [Case((2, 64, 16, 32), k, BF16) for k in (19, 150)]
    inputs = [(case, make_inputs(case)) for case in cases]

    def results(i: int):
        with ao.use_backend(backend):
            return [run(*inputs[i % 2]) for _ in range(50)]

    with ThreadPoolExecutor(4) as threads:
        for i, actual in enumerate(threads.map(results, range(4))):
            expected = run(*inputs[i % 2])
            assert all(same_bits(some, expected) for some in actual)


@pytest.mark.parametrize("name", ["mse", pytest.param("ce", marks=pytest.mark.on("triton"))])
def test_compiles_as_one_graph(backend: str, name: str):
    features, labels, anchors = make_inputs(CASE).values()
    if name == "ce":
        features, labels = logits_and_labels()

    def loss(x: Tensor) -> Tensor:
        if name == "ce":
            return ao.pixel_cross_entropy(x, labels)
        return ao.pixel_to_anchor_mse(x, labels, anchors)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(features), loss(features))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_another_device(calls: list[Call]):
    """Tensors of the second GPU, while the first one is the current device."""
    function, inputs = calls[0]
    actual, expected = function({k: x.to("cuda:1") for k, x in inputs.items()}), function(inputs)
    assert all(x.device.index == 1 for x in actual if x is not None)
    torch.testing.assert_close([None if x is None else x.to("cuda:0") for x in actual], [*expected])
