"""Class moments with anchors, against the formulas people write by hand.

    pytest bench --benchmark-only -k cpu

Bytes are those of the byte model: forward reads the features once; forward and backward together
read them twice and write their gradient once.
"""

import pytest
import torch
from cases import HRNET, RIVALS, Shape
from measure import peak_extra_bytes, read_ratio
from torch import Tensor

import anchorops as ao

ROUNDS = {"anchorops": 15, "compiled index_add": 7, "compiled one_hot": 7}


def ours(features: Tensor, labels: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    _, sums, sqdists = ao.class_moments(features, labels, len(anchors), anchors=anchors)
    assert sqdists is not None
    return sums, sqdists


FORMULAS = {"anchorops": ours, **RIVALS}


@pytest.fixture(scope="module", params=["coherent", "random"])
def inputs(request) -> tuple[Shape, str, Tensor, Tensor, Tensor]:
    kind = request.param
    return HRNET, kind, HRNET.features(), HRNET.labels(kind), HRNET.anchors()


def measure(benchmark, case: str, name: str, run, features: Tensor, passes: int) -> None:
    features_bytes = features.numel() * features.element_size()
    benchmark.pedantic(run, rounds=ROUNDS.get(name, 3), warmup_rounds=1)
    benchmark.extra_info |= {"case": case, "name": name, "feature_bytes": features_bytes}
    if name == "anchorops":
        benchmark.extra_info |= {
            "bytes": passes * features_bytes,
            "read_share": passes * read_ratio(run, lambda: features.detach().sum()),
            "extra_bytes": peak_extra_bytes(run) - (features_bytes if passes == 3 else 0),
        }


@pytest.mark.parametrize("name", FORMULAS)
def test_forward_cpu(benchmark, inputs, name):
    shape, kind, features, labels, anchors = inputs
    formula = FORMULAS[name]
    for ours_, theirs in zip(ours(*inputs[2:]), formula(*inputs[2:]), strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-3, atol=1e-1)
    case = f"class moments with anchors, forward, {shape.name}, {kind} labels"
    measure(benchmark, case, name, lambda: formula(features, labels, anchors), features, 1)


def test_forward_sums_cpu(benchmark, inputs):
    shape, kind, features, labels, _ = inputs
    case = f"class moments without anchors, forward, {shape.name}, {kind} labels"
    run = lambda: ao.class_moments(features, labels, shape.num_classes)  # noqa: E731
    measure(benchmark, case, "anchorops", run, features, 1)


@pytest.mark.parametrize("name", FORMULAS)
def test_forward_backward_cpu(benchmark, inputs, name):
    shape, kind, features, labels, anchors = inputs
    features = features.detach().requires_grad_()
    weights = torch.randn_like(anchors), torch.rand(len(anchors))

    def gradient(formula) -> Tensor:
        return torch.autograd.grad(formula(features, labels, anchors), features, weights)[0]

    torch.testing.assert_close(gradient(ours), gradient(FORMULAS[name]), rtol=1e-3, atol=1e-3)
    case = f"class moments with anchors, forward and backward, {shape.name}, {kind} labels"
    measure(benchmark, case, name, lambda: gradient(FORMULAS[name]), features, 3)
