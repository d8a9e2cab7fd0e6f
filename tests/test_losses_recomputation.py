"""Activation checkpointing: a loss with state refuses to be recomputed; other losses, and models
whose layers are recomputed, give the same results."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anchorops as ao
from anchorops.doctor.catalogue.features import METHODS
from tests.helpers.slow import slow_but

K, D = 5, 12
WITH_STATE = (*ao.losses.METHODS, "combined")
WITHOUT_STATE = ("CR", "CBP, penalty")
MESSAGE = "recomputes this loss: call it outside of the checkpointed function"
reentrant_or_not = pytest.mark.parametrize("reentrant", [False, True])


class Step(nn.Module):
    """A layer, the loss called directly with its output, and other parameters."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.classifier = nn.Conv2d(4, D, 1), nn.Conv2d(D, K, 1)
        self.method = METHODS[name](K, D)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        features = self.layer(images)
        loss = self.method(features, labels, self.classifier)
        return loss + self.classifier(features).square().mean()


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    while True:
        yield torch.randn(3, 4, 6, 7, requires_grad=True), torch.randint(0, K, (3, 12, 14))


def gradients(step: nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad for name, p in step.named_parameters() if p.grad is not None}
    step.zero_grad()
    return {name: grad.clone() for name, grad in grads.items() if grad.any()}


def assert_same_step(run: Callable[..., Any], step: nn.Module, plain: nn.Module, seed: int) -> None:
    """`run`, which recomputes `step`, and `plain` draw the same random numbers."""
    images, labels = next(batches())
    for function in (run, plain):
        torch.manual_seed(seed)
        function(images, labels).backward()
    torch.testing.assert_close(gradients(step), gradients(plain), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(step.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", WITH_STATE)
@reentrant_or_not
def test_a_loss_with_state_raises_and_has_updated_it_once(name: str, reentrant: bool) -> None:
    step, plain, batch = Step(name), Step(name), next(batches())
    torch.manual_seed(1)
    loss: Any = checkpoint(step, *batch, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match=f"{type(step.method).__name__}: .*{MESSAGE}"):
        loss.backward()
    torch.manual_seed(1)
    plain(*batch)
    torch.testing.assert_close(step.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", slow_but("SAR", "CeCo", of={x: x for x in WITH_STATE}))
def test_compiled_and_recomputed(name: str) -> None:
    torch.compiler.reset()
    step = Step(name)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    loss: Any = checkpoint(compiled, *next(batches()), use_reentrant=False)
    with pytest.raises(RuntimeError, match=f"{type(step.method).__name__}: .*{MESSAGE}"):
        loss.backward()


@pytest.mark.parametrize("name", WITHOUT_STATE)
@reentrant_or_not
def test_a_loss_without_state_is_recomputed(name: str, reentrant: bool) -> None:
    step, plain = Step(name), Step(name)
    assert_same_step(partial(checkpoint, step, use_reentrant=reentrant), step, plain, 0)


@pytest.mark.parametrize("name", WITH_STATE)
@reentrant_or_not
def test_evaluation_is_recomputed(name: str, reentrant: bool) -> None:
    """It reads the state that training has left."""
    step, plain = Step(name), Step(name)
    assert_same_step(step, step, plain, 0)
    step.eval()
    plain.eval()
    assert_same_step(partial(checkpoint, step, use_reentrant=reentrant), step, plain, 1)


class Attached(nn.Module):
    """A method on a model whose layers are recomputed: all of them, or all but the classifier."""

    def __init__(self, name: str, recomputed: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(4, D, 1), nn.Conv2d(D, K, 1))
        self.loss = ao.attach(self.net, METHODS[name](K, D))
        self.recomputed = recomputed

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        layers, rest = self.net[: self.recomputed], self.net[self.recomputed :]
        logits = rest(checkpoint(layers, images, use_reentrant=False))
        return self.loss(labels) + logits.square().mean()


@pytest.mark.parametrize("name", WITH_STATE + WITHOUT_STATE)
@pytest.mark.parametrize("recomputed", [1, 2])
def test_model_with_recomputed_layers(name: str, recomputed: int) -> None:
    step, plain = Attached(name, recomputed), Attached(name, 0)
    for n in range(3):
        assert_same_step(step, step, plain, n)
        with torch.no_grad():
            for parameter in (*step.parameters(), *plain.parameters()):
                parameter.mul_(1 + 0.1 * n)


def test_an_attached_loss_that_is_recomputed() -> None:
    step = Attached("OCCL", 1)
    loss: Any = checkpoint(step, *next(batches()), use_reentrant=False)
    with pytest.raises(RuntimeError, match=f"OCCL: .*{MESSAGE}"):
        loss.backward()
