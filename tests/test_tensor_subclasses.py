"""Tensors without values (fake ones, those that torch.compile traces), and a subclass that wraps a
plain tensor (MONAI's MetaTensor). test_distributed.py has DTensors."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import anchorops as ao
from anchorops.doctor.catalogue import Case
from tests.helpers import methods
from tests.helpers.operators import each, results

K, D = 4, 8
ROWS = torch.eye(K, D) + 0.1
SHARES = torch.linspace(0.1, 0.7, K)
LABELS, POINTS = torch.randint(0, K, (2, 10, 12)), torch.randint(0, K, (9,))

# The constructors that check values; each takes a tensor.
WITH_VALUES: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "CrossEntropy": (ao.CrossEntropy, SHARES),
    "BinaryCrossEntropy": (ao.BinaryCrossEntropy, SHARES),
    "Dice": (lambda x: ao.Dice(weight=x), SHARES),
    "CBP": (lambda x: ao.CBP(K, D, init=x), ROWS),
    "CeCo": (lambda x: ao.CeCo(K, D, prior=x, center_dim=K), SHARES),
}


@pytest.mark.parametrize("name", WITH_VALUES)
def test_fake_tensors_in_constructors(name: str) -> None:
    make, values = WITH_VALUES[name]
    with FakeTensorMode() as mode:
        make(mode.from_tensor(values))
    with pytest.raises(ValueError, match=rf"^({name}|category_basis): "):
        make(torch.full_like(values, -1))


@pytest.mark.parametrize("name", ["CrossEntropy", "BinaryCrossEntropy", "Dice", "CBP"])
def test_constructors_in_compiled_functions(name: str) -> None:
    make, values = WITH_VALUES[name]
    logits, features = torch.randn(9, K), torch.randn(9, D)
    labels = POINTS[:, None].eq(torch.arange(K)) if name == "BinaryCrossEntropy" else POINTS

    def call(values: Tensor) -> Tensor:
        return make(values)(features if name == "CBP" else logits, labels)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(values), call(values))


def test_checks_of_fake_labels() -> None:
    with FakeTensorMode() as mode:
        logits, labels = (mode.from_tensor(x) for x in (torch.randn(2, K, 5, 6), LABELS))
        loss = ao.pixel_cross_entropy(logits, labels, check_labels=True)
    assert loss.shape == ()


@each("cpu")
def test_metatensor(case: Case, backend: str) -> None:
    inputs = case.sample.inputs(1)
    wrapped = {name: MetaTensor(x) for name, x in inputs.items()}
    for ours, expected in zip(results(case.ours, wrapped), results(case.ours, inputs), strict=True):
        assert torch.equal(torch.as_tensor(ours).as_subclass(Tensor), expected)


@methods.each_method
def test_metatensor_of_a_method(build: Callable[[], Any]) -> None:
    features, labels, classifier = methods.batch()
    method = build()
    expected = copy.deepcopy(method)(features, labels, classifier)
    loss = method(MetaTensor(features.detach()).requires_grad_(), MetaTensor(labels), classifier)
    assert torch.equal(torch.as_tensor(loss).as_subclass(Tensor), expected)
    if loss.requires_grad:
        loss.backward()
