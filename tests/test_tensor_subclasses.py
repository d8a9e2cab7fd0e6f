"""Tensors without values (fake ones, those that torch.compile traces), and a subclass that wraps a
plain tensor (MONAI's MetaTensor). test_distributed.py has DTensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import anchorops as ao

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


def calls(wrap: Callable[[Tensor], Tensor]) -> dict[str, Callable[[], Any]]:
    logits, features = (wrap(torch.randn(2, n, 5, 6)).requires_grad_() for n in (K, D))
    labels, rows = wrap(LABELS), wrap(ROWS)
    attracting = ao.SAR(K, D, anchors=rows, embed=False)
    return {
        "pixel_cross_entropy": lambda: ao.pixel_cross_entropy(logits, labels),
        "CrossEntropyDice": lambda: ao.CrossEntropyDice()(logits, labels),
        "Lovasz": lambda: ao.Lovasz()(logits, labels),
        "divergence": lambda: ao.pixel_kl_divergence(logits, logits, (10, 12)),
        "pixel_argmax": lambda: ao.pixel_argmax(logits, (10, 12), confidence=True)[1],
        "class_centroids": lambda: ao.class_centroids(features, labels, K)[0],
        "class_moments": lambda: ao.ops.class_moments(features, labels, K, anchors=rows)[1],
        "SAR": lambda: attracting(features, labels),
        "OCCL": lambda: ao.OCCL(K, D)(features, labels, rows),
        "CeCo": lambda: ao.CeCo(K, D, center_dim=K)(features, labels),
    }


@pytest.mark.parametrize("name", calls(lambda x: x))
def test_metatensor(name: str) -> None:
    results = []
    for wrap in (lambda x: x, MetaTensor):
        torch.manual_seed(0)
        result = calls(wrap)[name]()
        if result.requires_grad:
            result.sum().backward()
        results.append(torch.as_tensor(result).detach())
    assert torch.equal(*(x.as_subclass(Tensor) for x in results))
