"""How a loss goes through autograd: what it saves, when that changes, checkpoints, modes of torch
functions, compiled autograd."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint

import anchorops as ao
from anchorops.doctor.catalogue import Case
from anchorops.doctor.catalogue.pixels import Loss
from tests.helpers.operators import each

WEIGHT = torch.tensor([0.5, 0, 2, 1])


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    """Logits, and labels of twice their size. Class 3 is absent."""
    size = (shape[0], *(2 * n for n in shape[2:])) if len(shape) > 3 else shape[:1]
    return torch.randn(shape, requires_grad=True), torch.randint(0, 3, size)


@each("cpu", "reference", options=True, differentiable=True)
def test_checkpoint_under_a_mode(case: Case, backend: str) -> None:
    """torch.device, as a context manager, is a mode of torch functions. It has ended before the
    backward pass."""
    if not isinstance(case.entry.ours, Loss):
        pytest.skip("it is no loss")
    x, *others = case.sample.inputs(1).values()
    x.requires_grad_()
    run = partial(case.entry.ours, **case.sample.options)
    (expected,) = torch.autograd.grad(run(x, *others), x)
    with torch.device("cpu"):
        loss: Any = checkpoint(run, x, *others, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)
    assert expected.any()


@pytest.mark.on("cpu", "simulated_triton")
def test_compiled_autograd(backend: str) -> None:
    """Of a loss whose forward pass was not compiled: one graph."""
    x, labels = inputs(2, 4, 3, 5)
    (expected,) = torch.autograd.grad(ao.CrossEntropyDice()(x, labels), x)
    loss = ao.CrossEntropyDice()(x, labels)
    torch._dynamo.reset()
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    with compiled_autograd._enable(compiler):
        loss.backward()
    torch.testing.assert_close(x.grad, expected)


BUFFERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "labels": lambda x, labels: ao.CrossEntropy()(x, labels),
    "pixel weights": lambda x, weights: ao.CrossEntropy()(x, LABELS, weights),
    "teacher": lambda x, teacher: ao.pixel_kl_divergence(x, teacher, (6, 10)),
}
LABELS = torch.arange(120).view(2, 6, 10) % 5  # some are ignored
VALUES = {
    "labels": LABELS,
    "pixel weights": LABELS / 4.0,
    "teacher": torch.ones(2, 4, 3, 5).cumsum(1),
}


@pytest.mark.on("cpu", "simulated_triton")
@pytest.mark.parametrize("name", BUFFERS)
def test_a_buffer_that_is_filled_again_before_the_backward_pass(name: str, backend: str) -> None:
    """autograd notices it. Of a buffer that was made under inference mode, where it could not, a
    copy was saved."""
    x, _ = inputs(2, 4, 3, 5)
    (expected,) = torch.autograd.grad(BUFFERS[name](x, VALUES[name]), x)
    buffer = VALUES[name].clone()
    loss = BUFFERS[name](x, buffer)
    buffer.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        buffer = VALUES[name].clone()
    loss = BUFFERS[name](x, buffer)
    with torch.inference_mode():
        buffer.zero_()
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.on("cpu")
@pytest.mark.parametrize("name", ["CrossEntropy", "Dice", "pixel_cross_entropy"])
def test_weights_that_change_before_the_backward_pass(name: str, backend: str) -> None:
    x, labels = inputs(2, 4, 3, 5)
    weight, module = WEIGHT.clone(), None
    if name != "pixel_cross_entropy":
        module = getattr(ao, name)(WEIGHT) if name == "CrossEntropy" else ao.Dice(weight=WEIGHT)
        weight = module.weight

    def loss() -> Tensor:
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
    x, labels = inputs(2, 4, 3, 5)
    negated = torch.complex(x, -x).conj().imag
    assert negated.is_neg()
    loss, expected = (ao.CrossEntropyDice()(logits, labels) for logits in (negated, x))
    assert torch.equal(loss, expected)
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(expected, x)[0])
    # the gradient of sgn has no memory
    assert not torch.autograd.grad(loss.sgn(), x)[0].any()
