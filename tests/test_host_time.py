"""The host's work of a call: operators that torch dispatches, launches, and the gradient of a loss
in one node of autograd."""

import copy
from typing import Any

import host_time
import pytest
import torch

import anchorops as ao

CALLS = {call.name: call for call in host_time.calls("cpu")}
MOST = {  # operators, forward and backward
    "pixel_cross_entropy": 8,
    "CrossEntropy": 10,
    "CrossEntropyDice": 25,
    "pixel_to_anchor_mse": 12,
}
WEIGHT = torch.tensor([0.5, 0, 2, 1])
LOSSES: dict[str, Any] = {
    "mean": ao.pixel_cross_entropy,
    "sum": lambda x, y: ao.pixel_cross_entropy(x, y, reduction="sum"),
    "weights": ao.CrossEntropy(WEIGHT, accuracy=True),
    "smoothing of hard pixels": ao.CrossEntropy(WEIGHT, label_smoothing=0.1, ohem_threshold=0.3),
    "hardest pixels": ao.CrossEntropy(ohem_min_kept=9, focal_gamma=2.0),
    "Dice": ao.Dice(),
    "Dice of images": ao.Dice(weight=WEIGHT, per_image=True, absent="zero"),
    "Tversky": ao.Dice(alpha=0.3, beta=0.6, smooth=0.5, smooth_denominator=1.0),
    "squares": ao.Dice(squared=True),
    "keep": ao.Dice(absent="keep", smooth=1.0),
    "logarithms": ao.Dice(log=True),
    "no false negatives": ao.Dice(alpha=1.0, beta=0.0),
    "both": ao.CrossEntropyDice(
        ao.CrossEntropy(WEIGHT), ao.Dice(per_image=True), ce_weight=0.7, dice_weight=0.2
    ),
}


@pytest.mark.on("cpu")
@pytest.mark.parametrize("name", MOST)
def test_operators(name: str, backend: str) -> None:
    with host_time.Operators() as operators:
        CALLS[name].step()
    assert len(operators.names) <= MOST[name], operators.names
    assert any(operator.startswith("anchorops.") for operator in operators.names)


@pytest.mark.on("cpu", "simulated_triton")
def test_a_profiler_names_the_operators(backend: str) -> None:
    with torch.autograd.profiler.profile() as profile:
        CALLS["CrossEntropy"].step()
    names = {event.name for event in profile.function_events or ()}
    assert {"anchorops::softmax_moments", "anchorops::softmax_moments_backward"} <= names


@pytest.mark.on("cpu")
@pytest.mark.parametrize("name", MOST)
def test_kernels_make_their_outputs_without_the_dispatcher(name: str, backend: str) -> None:
    with torch.autograd.profiler.profile() as profile:
        CALLS[name].step()
    events = profile.function_events or ()
    operators = [event for event in events if event.name.startswith("anchorops::")]
    inside = {part.name for event in operators for part in event.cpu_children}
    assert operators and not any("empty" in x or "zeros" in x for x in inside), inside


@pytest.mark.on("simulated_triton")
@pytest.mark.parametrize("name", MOST)
def test_launches(name: str, backend: str) -> None:
    from ptx.triton_launches import launches

    before = launches.total()
    CALLS[name].step()
    # the moments and their gradient; those of classes also make keys and list them by tile
    assert launches.total() - before == (5 if name == "pixel_to_anchor_mse" else 2)


@pytest.mark.on("cpu")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (1, 4, 2, 3, 2), (20, 4)], ids=str)
def test_one_node_has_the_gradient_of_autograd(name: str, shape: tuple, backend: str) -> None:
    """Where a mode of torch functions is active, autograd differentiates the arithmetic."""
    x = torch.randn(shape)
    size = (shape[0], *(2 * n for n in shape[2:])) if len(shape) > 3 else shape[:1]
    labels = torch.randint(0, 3, size)  # class 3 is absent
    gradients = []
    for mode in (torch.device("cpu"), torch.enable_grad()):
        leaf = x.clone().requires_grad_()
        with mode:
            loss = LOSSES[name](leaf, labels)
        (0.3 * loss).backward()
        gradients.append((loss.detach(), leaf.grad))
    (expected, expected_gradient), (actual, gradient) = gradients
    assert torch.equal(actual, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    assert gradient.any()


@pytest.mark.on("cpu")
def test_batched_gradients(backend: str) -> None:
    """torch.vmap runs the backward pass of a loss that it did not see."""
    x, labels = torch.randn(2, 4, 3, 5, requires_grad=True), torch.randint(0, 4, (2, 6, 10))
    loss = ao.CrossEntropyDice()(x, labels)
    (one,) = torch.autograd.grad(loss, x, retain_graph=True)
    factors = torch.tensor([1.0, -2.0])
    (both,) = torch.autograd.grad(loss, x, factors, is_grads_batched=True)
    torch.testing.assert_close(both, torch.stack([one, -2 * one]))


def test_what_a_caller_changes_in_place_does_not_change_the_terms() -> None:
    """The loss, and the terms that were returned."""
    x, labels = torch.randn(2, 4, 3, 5, requires_grad=True), torch.randint(0, 4, (2, 6, 10))
    for make in (ao.CrossEntropy, ao.Dice, ao.CrossEntropyDice, ao.Lovasz):
        module = make()
        before = module(x, labels).detach().clone()
        loss = module(x, labels)
        loss.mul_(3)
        parts = [x for name, x in module.terms.items() if not name.startswith("labels")]
        torch.testing.assert_close(torch.stack(parts).sum(), before)
        terms = copy.deepcopy(module.terms)
        for term in module.terms.values():
            term += 1
        module.terms.clear()
        assert module.terms == terms


@pytest.mark.on("cpu")
def test_squares_above_probabilities(backend: str) -> None:
    """With squared and alpha above beta a denominator may be below beta."""
    p = torch.tensor([0.4375, 0.28125, 0.28125])
    x = p.log().view(1, 3, 1, 1).requires_grad_()
    for alpha, beta in ((2.0, 0.5), (1.0, 0.25), (1.0, 1.0)):
        dice = ao.Dice(alpha=alpha, beta=beta, squared=True)
        denominator = p[0] + alpha * (p[0] ** 2 - p[0]) + beta * (1 - p[0])
        loss = dice(x, torch.zeros(1, 1, 1, dtype=torch.long))
        torch.testing.assert_close(loss.detach(), 1 - p[0] / denominator)


@pytest.mark.on("cpu")
@pytest.mark.parametrize("name", ["CrossEntropy", "Dice", "pixel_cross_entropy"])
def test_weights_that_change_before_the_backward_pass(name: str, backend: str) -> None:
    x, labels = torch.randn(2, 4, 3, 5, requires_grad=True), torch.randint(0, 4, (2, 6, 10))
    weight, module = WEIGHT.clone(), None
    if name != "pixel_cross_entropy":
        module = getattr(ao, name)(WEIGHT) if name == "CrossEntropy" else ao.Dice(weight=WEIGHT)
        weight = module.weight

    def loss() -> torch.Tensor:
        return module(x, labels) if module else ao.pixel_cross_entropy(x, labels, weight=weight)

    (expected,) = torch.autograd.grad(loss(), x)
    last = loss()
    weight.mul_(torch.tensor([3.0, 1, 1, 0.5]))
    if name == "Dice":
        module.alpha, module.beta, module.squared = 0.9, 0.2, True
    assert torch.equal(torch.autograd.grad(last, x)[0], expected)


@pytest.mark.on("cpu")
@pytest.mark.parametrize("make", [ao.CrossEntropy, lambda w: ao.Dice(weight=w)], ids=["ce", "dice"])
def test_weights_that_require_a_gradient(make: Any, backend: str) -> None:
    x, labels = torch.randn(2, 4, 3, 5), torch.randint(0, 4, (2, 6, 10))
    gradients = []
    for name in ("cpu", "reference"):
        module, leaf = make(WEIGHT), x.clone().requires_grad_()
        module.weight.requires_grad_()
        with ao.use_backend(name):
            module(leaf, labels).backward()
        gradients += [module.weight.grad, leaf.grad]
    torch.testing.assert_close(gradients[:2], gradients[2:])


@pytest.mark.on("cpu", "simulated_triton")
def test_tensors_whose_values_are_not_in_memory(backend: str) -> None:
    x, labels = torch.randn(2, 4, 3, 5, requires_grad=True), torch.randint(0, 4, (2, 6, 10))
    negated = torch.complex(x, -x).conj().imag
    assert negated.is_neg()
    loss, expected = (ao.CrossEntropyDice()(logits, labels) for logits in (negated, x))
    assert torch.equal(loss, expected)
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(expected, x)[0])
    # the gradient of sgn has no memory
    assert not torch.autograd.grad(loss.sgn(), x)[0].any()


@pytest.mark.on("cpu")
@pytest.mark.parametrize("base", [ao.CrossEntropy, ao.Dice, ao.CrossEntropyDice])
def test_a_subclass_with_other_parts(base: Any, backend: str) -> None:
    class Sum(base):
        def parts(self, moments: ao.ops.SoftmaxMoments, logits: torch.Tensor) -> Any:
            return super().parts(moments, logits) | {"sum": moments.losses.sum()}

    x, labels = torch.randn(2, 4, 3, 5, requires_grad=True), torch.randint(0, 4, (2, 6, 10))
    loss = Sum()(x, labels)
    expected = base()(x, labels) + ao.pixel_cross_entropy(x, labels, reduction="sum")
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, x)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.on("cpu")
def test_parts_of_a_mixin(backend: str) -> None:
    """Also of a subclass of the class that has it."""

    class Extra:
        def parts(self, moments: ao.ops.SoftmaxMoments, logits: torch.Tensor) -> Any:
            more = {"sum": moments.losses.sum()}
            return super().parts(moments, logits) | more  # pyright: ignore

    class Mixed(Extra, ao.Dice):
        pass

    class Further(Mixed):
        pass

    x, labels = torch.randn(2, 4, 3, 5, requires_grad=True), torch.randint(0, 4, (2, 6, 10))
    added = ao.pixel_cross_entropy(x, labels, reduction="sum")
    for kind in (Mixed, Further):
        torch.testing.assert_close(kind()(x, labels), ao.Dice()(x, labels) + added)
    whole = ao.CrossEntropyDice(dice=Further())
    torch.testing.assert_close(whole(x, labels), ao.CrossEntropyDice()(x, labels) + added)
    assert {"ce", "dice", "sum"} < whole.terms.keys()

    class Other(Extra, ao.CrossEntropy):
        pass

    with pytest.raises(ValueError, match="parts of other names than the cross-entropy's, got sum"):
        ao.CrossEntropyDice(Other(), Further())(x, labels)


@pytest.mark.on("cpu")
def test_statistics_that_a_part_of_a_sum_needs(backend: str) -> None:
    class Focus(ao.CrossEntropy):
        def wanted(self) -> Any:
            return super().wanted()._replace(correct=True)

        def parts(self, moments: ao.ops.SoftmaxMoments, logits: torch.Tensor) -> Any:
            assert moments.correct is None  # the sum decides on the accuracy
            return super().parts(moments, logits)

    ao.CrossEntropyDice(Focus())(torch.randn(2, 4, 3, 5), torch.randint(0, 4, (2, 6, 10)))
