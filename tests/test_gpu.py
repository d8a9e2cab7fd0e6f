"""What only a GPU has: streams, CUDA graphs, threads that launch at once, several devices. Values
and gradients are in the cases of each operator: those marked on("gpu")."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import anchorops as ao
from anchorops.doctor import verify
from anchorops.doctor.catalogue import Inputs
from anchorops.measure import cuda_graph
from tests.helpers.class_moments_cases import BF16, Case, make_inputs, run
from tests.helpers.operators import results as results_of
from tests.helpers.softmax_cases import moments
from tests.test_guarantees import same_bits
from tests.test_methods import METHODS, classifier_of, labels_of

pytestmark = pytest.mark.on("gpu")
# as of HRNet: 720 channels, and many pixels of one class beside each other
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


def test_environment(backend: str):
    """The ways of --verify: torch.compile, autocast, another stream, a CUDA graph, another GPU."""
    rows = list(verify.environment_rows(backend, torch.device("cuda")))
    assert rows and not [str(row) for row in rows if row.right is not True]


def test_two_streams(calls: list[Call]):
    """Twenty calls of each, which may run side by side, give the bits of a call alone: no buffer
    is shared between streams."""
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
    """An error where the host would synchronise with the GPU. The number of hard examples and the
    constants of a loss stay on the device."""
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
    """The seed is a tensor that the step itself counts up."""
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
