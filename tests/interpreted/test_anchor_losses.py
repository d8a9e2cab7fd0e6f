"""anchor_losses, and SAR, which consists of three small operators and class moments."""

import copy

import pytest
import torch
from emulator import BACKEND
from torch import nn
from torch.utils.checkpoint import checkpoint

import anchorops as ao
from anchorops import reference
from anchorops.ops.anchor_losses import anchor_losses

OPTIONS = {"dim": 7, "loss_weight": 0.3, "aux_weight": 0.6, "tau": 0.5}


def some(classes):
    counts, sqdists = torch.randint(0, 90, (classes,)), 50 * torch.rand(classes)
    gate, losses = torch.rand(classes) > 0.3, 2 * torch.rand(classes)
    return counts, sqdists.requires_grad_(), gate, losses.requires_grad_()


def check(counts, sqdists, gate=None, losses=None, which=("p2a", "aux"), **options):
    inputs = [x for x in (sqdists, losses) if x is not None]
    found = anchor_losses(counts, sqdists, gate, losses, **(OPTIONS | options))
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference.anchor_losses(
        counts, wide[0], gate, *(wide[1:] or [None]), **(OPTIONS | options)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=1e-7)
    gradients = []
    for results, given in ((found, inputs), (expected, wide)):
        weighted = [{"p2a": 0.7, "aux": -1.3}[name] * getattr(results, name) for name in which]
        total = torch.stack(weighted).sum()
        gradients.append(torch.autograd.grad(total, given, allow_unused=True))
    for ours, theirs in zip(*gradients, strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("classes", [2, 19, 33, 300])
def test_classes(classes):
    check(*some(classes))


@pytest.mark.parametrize(
    "options",
    [
        {"detach_weights": True},
        {"reweight": False},
        {"reweight": False, "tau": 0.0},  # no anchor is unsure
        {"tau": 0.0},
        {"tau": 1.0},
    ],
    ids=str,
)
def test_weights_of_the_auxiliary_loss(options):
    check(*some(40), **options)


def test_of_pixels_alone():
    counts, sqdists, _, _ = some(40)
    check(counts, sqdists, which=["p2a"])


@pytest.mark.parametrize("which", ["p2a", "aux"])
def test_gradient_of_one(which):
    check(*some(20), which=[which])


def test_nothing_valid_and_nothing_open():
    counts, sqdists, gate, losses = some(5)
    check(counts * 0, (sqdists * 0).detach().requires_grad_(), gate, losses)
    check(counts, sqdists, gate & False, losses)


def test_a_closed_class_may_be_nan():
    counts, sqdists, gate, losses = some(5)
    gate[2] = False
    sqdists = sqdists.detach()
    sqdists[2] = float("nan")
    check(counts, sqdists.requires_grad_(), gate, losses)


def test_with_torch():
    operators = torch.ops.anchorops
    counts, sqdists, gate, losses = some(6)
    operator, backward = (
        getattr(getattr(operators, name), BACKEND)
        for name in ("anchor_losses", "anchor_losses_backward")
    )
    rest = 7, 0.3, 0.6, 0.5, True, False
    torch.library.opcheck(operator, (sqdists, counts, gate, losses, *rest))
    torch.library.opcheck(operator, (sqdists, counts, None, None, *rest))
    torch.library.opcheck(backward, (torch.tensor(0.5), None, torch.randn(2, 6)))
    aux = anchor_losses(counts, sqdists, gate, losses, **OPTIONS).aux
    assert aux is not None
    (first,) = torch.autograd.grad(aux, losses, create_graph=True)
    with pytest.raises(RuntimeError, match="anchor_losses: second derivatives"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match=r"anchor_losses: torch.func's derivatives"):
        torch.func.grad(lambda q: anchor_losses(counts, q, dim=7).p2a)(sqdists.detach())


K, D = 5, 12


def steps_are_those_of_the_reference(compiled=False, **options):
    sar, classifier = ao.SAR(K, D, **options), nn.Conv2d(D, K, 1)
    modules = (sar, classifier), copy.deepcopy((sar, classifier))
    steps = [method.forward for method, _ in modules]
    if compiled:
        steps[0] = torch.compile(steps[0], backend="aot_eager", fullgraph=True)
    parameters = [[p for module in pair for p in module.parameters()] for pair in modules]
    optimizers = [torch.optim.SGD(some, lr=0.3) for some in parameters]
    labels, gates = torch.randint(0, K, (2, 4, 6)), set()
    for _ in range(3):
        features, results = torch.randn(2, D, 4, 6), []
        for i, backend in enumerate((BACKEND, "reference")):
            leaf, (method, classifier) = features.clone().requires_grad_(), modules[i]
            with ao.use_backend(backend):
                loss = steps[i](leaf, labels, classifier)
                loss.backward()
            gradients = [p.grad.clone() for p in parameters[i] if p.grad is not None]
            results.append((loss, leaf.grad, gradients, method.terms, method.state_dict()))
            optimizers[i].step()
            optimizers[i].zero_grad()
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        gates.add(float(sar.terms.get("gate", 1)))
    return gates


@pytest.mark.parametrize(
    "options",
    [
        {"delta": 0.2, "gate": "per_class", "momentum": 0.5, "detach_weights": True},
        {"delta": 0.0, "momentum": 0.0, "reweight": False},
        {"embed": False},
    ],
    ids=str,
)
def test_steps_of_sar(options):
    steps_are_those_of_the_reference(**options)


def test_compiled_steps_of_sar():
    gates = steps_are_those_of_the_reference(True, delta=0.2)
    assert gates == {0, 1}


def test_a_recomputed_step_of_sar():
    sar, classifier = ao.SAR(K, D, delta=0.0, gate="per_class", momentum=0.5), nn.Conv2d(D, K, 1)
    labels, results = torch.randint(0, K, (2, 4, 6)), []
    features = torch.randn(2, D, 4, 6, requires_grad=True)
    for method in (sar, copy.deepcopy(sar)):
        inputs = features, *method.parameters()
        for _ in range(2):
            if method is sar:
                loss = checkpoint(method, features, labels, classifier, use_reentrant=False)
            else:
                loss = method(features, labels, classifier)
            gradients = torch.autograd.grad(loss, inputs)
        results.append((loss, gradients, method.state_dict()))
    torch.testing.assert_close(*results, rtol=0, atol=0)
