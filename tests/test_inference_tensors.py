"""Tensors that were made under torch.inference_mode: every input that needs no gradient may be one,
and everything can be called inside."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anchorops as ao
from anchorops import diagnostics
from anchorops.doctor.catalogue import Case, Inputs
from anchorops.doctor.catalogue.entry import tensors_of
from tests.helpers import methods
from tests.helpers.operators import each


def inference(x: Any) -> Any:
    """A copy of x that was made under inference mode."""
    with torch.inference_mode():
        return x.clone() if isinstance(x, Tensor) else x


def gradient(run: Callable[..., Any], inputs: Inputs, of: str) -> list[Tensor]:
    """The results, and the gradient of this input."""
    leaf = inputs[of].clone().requires_grad_()
    values = tensors_of(run(**inputs | {of: leaf}))
    total = torch.stack([x.double().sum() for x in values if x.requires_grad]).sum()
    (dleaf,) = torch.autograd.grad(total, leaf)
    return [*(x.detach() for x in values), dleaf]


def check(run: Callable[..., Any], inputs: Inputs) -> int:
    """For each input that has a gradient, with all others of inference mode: how many."""
    made = {name: inference(x) for name, x in inputs.items()}
    differentiable = 0
    for name, x in inputs.items():
        if not x.is_floating_point():
            continue
        leaf = x.clone().requires_grad_()
        if not any(y.requires_grad for y in tensors_of(run(**inputs | {name: leaf}))):
            continue  # the gradient of a teacher or of keys is not defined
        expected = gradient(run, inputs, name)
        actual = gradient(run, made | {name: x}, name)
        torch.testing.assert_close(actual, expected)
        differentiable += 1
    expected = [x.detach() for x in tensors_of(run(**inputs))]
    torch.testing.assert_close(tensors_of(run(**made)), expected)  # outside
    with torch.inference_mode():
        torch.testing.assert_close(tensors_of(run(**made)), expected)
        torch.testing.assert_close(tensors_of(run(**inputs)), expected)
    return differentiable


@each(options=True, few_in_machine=True)
def test_operators(case: Case, backend: str) -> None:
    assert (check(case.ours, case.sample.inputs(1)) > 0) == case.entry.differentiable


@methods.each_method
@pytest.mark.on("reference", "cpu")
def test_methods(build: Callable[[], Any], backend: str) -> None:
    """With a gradient for the features, or for the classifier and the parameters alone; and inside.
    The state is that of the same steps."""
    features, labels, classifier = methods.batch()
    features = features.detach()
    method = methods.open_gate(build())
    frozen, ours = copy.deepcopy(classifier).requires_grad_(False), copy.deepcopy(method)
    with torch.inference_mode():
        made = copy.deepcopy(frozen)
    leaf = features.clone().requires_grad_()
    steps = (
        ((leaf, labels, frozen), (leaf, inference(labels), made)),
        ((features, labels, classifier), (inference(features), inference(labels), classifier)),
    )
    for plain, changed in steps:
        gradients = []
        for module, inputs in ((method, plain), (ours, changed)):
            loss = module(*inputs)
            leaves = [leaf, *module.parameters(), *classifier.parameters()]
            leaves = [x for x in leaves if x.requires_grad]
            gradients.append([loss])
            if loss.requires_grad:
                gradients[-1] += torch.autograd.grad(loss, leaves, allow_unused=True)
        for actual, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected)
    with torch.inference_mode():
        inside = ours(inference(features), inference(labels), classifier)
    torch.testing.assert_close(inside, method(features, labels, classifier).detach())
    torch.testing.assert_close(ours.state_dict(), method.state_dict())
    loss = ours(leaf, labels, classifier)  # afterwards
    if loss.requires_grad:
        loss.backward()


def test_other_arguments() -> None:
    """Modules copy them."""
    logits, labels = torch.randn(2, 4, 3, 5, requires_grad=True), torch.randint(0, 4, (2, 6, 10))
    features = torch.randn(2, 6, 3, 5, requires_grad=True)
    weight, anchors, seed = torch.rand(4), torch.randn(4, 6), torch.tensor(3)
    maps = torch.stack([labels] * 4, 1) % 2
    for make in (
        lambda x: ao.pixel_cross_entropy(logits, labels, weight=x(weight)),
        lambda x: ao.pixel_binary_cross_entropy(logits, maps, pos_weight=x(weight)),
        lambda x: ao.ops.class_moments(features, labels, 4, groups=2, seed=x(seed)).sums.sum(),
        lambda x: ao.CrossEntropy(weight=x(weight))(logits, labels),
        lambda x: ao.Dice(weight=x(weight))(logits, labels),
        lambda x: ao.BinaryCrossEntropy(x(weight))(logits, maps),
        lambda x: ao.SAR(4, 6, anchors=x(anchors), embed=False)(features, labels),
        lambda x: ao.CeCo(4, 6, prior=x(weight), reduced_dim=3, center_dim=5, dropout=0.0)(
            features, labels
        ),
        lambda x: diagnostics.gradient_ratio(
            features, features.square().sum(), (features * anchors.sum()).sum()
        ),
    ):
        values = []
        for convert in (lambda x: x, inference):
            torch.manual_seed(0)
            values.append(make(convert))
        torch.testing.assert_close(*values)
        if values[1].requires_grad:
            values[1].backward()


def test_a_module_that_is_made_inside() -> None:
    with torch.inference_mode():
        losses = [ao.CrossEntropy([0.5, 1.0, 2.0]), ao.Dice(weight=[0.5, 1.0, 2.0])]
        basis = ao.CBP(3, 6)
    logits, labels = torch.randn(2, 3, 3, 5, requires_grad=True), torch.randint(0, 3, (2, 6, 10))
    for loss in losses:
        loss(logits, labels).backward()
    layer = nn.Conv2d(6, 3, 1)
    basis.install(layer)
    layer(torch.randn(2, 6, 4, 5, requires_grad=True)).sum().backward()


def test_metrics() -> None:
    """Reset and updated inside, then updated outside, with tensors of both kinds."""
    labels, features = torch.randint(0, 5, (2, 8, 9)), torch.randn(2, 12, 4, 5)
    for make, batch in (
        (lambda: diagnostics.CentroidGeometry(5, 12), (features, labels)),
        (lambda: diagnostics.LabelImbalance(5), (labels**2 % 5,)),
        (lambda: ao.MeanIoU(5), (features[:, :5], labels)),
        (lambda: diagnostics.CalibrationError(5), (features[:, :5], labels)),
    ):
        ours, right = make(), make()
        with torch.inference_mode():
            ours.reset()
            ours.update(*batch)
        ours.update(*map(inference, batch))
        right.update(*batch)
        right.update(*batch)
        torch.testing.assert_close(ours.compute(), right.compute())
