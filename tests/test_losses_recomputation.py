"""Activation checkpointing: a recomputed forward gives the same result, or raises an error."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from slow import slow_but
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import anchorops as ao
from anchorops.losses import Regularizer

K, D = 5, 12
METHODS: dict[str, Callable[[], Regularizer]] = {
    "sar": lambda: ao.SAR(K, D, delta=0.0, gate="per_class", momentum=0.5),
    "sar_all": lambda: ao.SAR(K, D, delta=0.0, momentum=0.5),
    "cr": lambda: ao.SAR(K, D, embed=False),
    "occl": lambda: ao.OCCL(K, D),
    "occl_images": lambda: ao.OCCL(K, D, split="images"),
    "mvsc": lambda: ao.MVSC(K, D),
    "ceco": lambda: ao.CeCo(K, D, reduced_dim=7, center_dim=9, dropout=0.3),
    "cbp": lambda: ao.CBP(K, D),
    "cbp_gradient": lambda: ao.CBP(K, D, update="gradient"),
    "cbp_ema": lambda: ao.CBP(K, D, update="ema"),
    "cbp_penalty": lambda: ao.CBP(K, D, update="penalty"),
    "combined": lambda: ao.Combined(
        METHODS["sar"](), METHODS["occl"](), METHODS["mvsc"](), METHODS["ceco"]()
    ),
}
ZERO = ("cbp", "cbp_gradient", "cbp_ema")  # without a gradient: nothing to checkpoint
READ_STATE = ("sar", "sar_all", "occl", "occl_images", "mvsc", "combined")
each_method = pytest.mark.parametrize("name", METHODS)
reentrant_or_not = pytest.mark.parametrize("reentrant", [False, True])


class Step(nn.Module):
    """A layer, the loss called directly with its output, and other parameters."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.classifier = nn.Conv2d(4, D, 1), nn.Conv2d(D, K, 1)
        self.method = METHODS[name]()

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        features = self.layer(images)
        loss = self.method(features, labels, self.classifier)
        return loss + self.classifier(features).square().mean()


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    while True:
        yield torch.randn(3, 4, 6, 7, requires_grad=True), torch.randint(0, K, (3, 12, 14))


def gradients(step: Step) -> dict[str, Tensor]:
    grads = {name: p.grad for name, p in step.named_parameters() if p.grad is not None}
    step.zero_grad()
    return {name: grad.clone() for name, grad in grads.items() if grad.any()}


def assert_equal(step: Step, plain: Step) -> None:
    torch.testing.assert_close(gradients(step), gradients(plain), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(step.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-7)


def assert_same_step(
    run: Callable[..., Any], step: Step, plain: Step, batch: tuple[Tensor, Tensor], seed: int = 1
) -> None:
    """run, which recomputes step, and plain draw the same random numbers."""
    for function in (run, plain):
        torch.manual_seed(seed)
        function(*batch).backward()
    assert_equal(step, plain)


@each_method
@reentrant_or_not
@pytest.mark.parametrize("whole", [True, False], ids=["with the layer", "the loss alone"])
def test_steps_are_those_without_checkpoint(name: str, reentrant: bool, whole: bool) -> None:
    step, plain = Step(name), Step(name)

    def run(images: Tensor, labels: Tensor) -> Tensor:
        if whole:
            return checkpoint(step, images, labels, use_reentrant=reentrant)  # type: ignore
        features = step.layer(images)
        arguments = (features, labels, step.classifier)
        if name in ZERO:
            loss = step.method(*arguments)
        else:
            loss = checkpoint(step.method, *arguments, use_reentrant=reentrant)
        return loss + step.classifier(features).square().mean()  # type: ignore[operator]

    for batch, n in zip(batches(), range(3), strict=False):
        assert_same_step(run, step, plain, batch, n)
        with torch.no_grad():
            for module in (step, plain):
                module.classifier.weight += 0.1 * (n + 1)
                for p in module.method.parameters():
                    p.mul_(1 + 0.1 * n)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ZERO])
def test_several_forwards_before_backward(name: str) -> None:
    """The function returns only their losses: each recomputation knows which forward it repeats."""
    step, plain, batch = Step(name), Step(name), batches()
    total = torch.zeros(())
    expected = torch.zeros(())
    for n in range(3):
        images, labels = next(batch)
        features = step.layer(images)
        torch.manual_seed(n)
        total = total + checkpoint(  # type: ignore[operator]
            step.method, features, labels, step.classifier, use_reentrant=False
        )
        torch.manual_seed(n)
        expected = expected + plain.method(plain.layer(images), labels, plain.classifier)
    for _ in range(2):  # the second time the recomputation is one more
        total.backward(retain_graph=True)
        expected.backward(retain_graph=True)
        assert_equal(step, plain)


@pytest.mark.parametrize("name", READ_STATE)
def test_what_cannot_be_known_raises(name: str) -> None:
    batch = batches()
    for reentrant, message in ((False, "an earlier forward"), (True, "use_reentrant=False")):
        step = Step(name)
        losses = []
        for _ in range(2):
            images, labels = next(batch)
            # The square saves the loss, so its backward starts the recomputation.
            losses.append(
                checkpoint(
                    lambda i, y, step=step: step(i, y).square(),
                    images,
                    labels,
                    use_reentrant=reentrant,
                )
            )
        with pytest.raises(RuntimeError, match=f"{type(step.method).__name__}: .*{message}"):
            (losses[0] + losses[1]).backward()  # type: ignore[operator]


@each_method
def test_a_forward_without_gradients_moves_the_state_once(name: str) -> None:
    step, plain, batch = Step(name), Step(name), next(batches())
    for module in (step, plain):
        torch.manual_seed(0)
        with torch.no_grad():
            module(*batch)
    assert_same_step(partial(checkpoint, step, use_reentrant=False), step, plain, batch)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ZERO])
@reentrant_or_not
def test_an_evaluation_before_the_backward_pass(name: str, reentrant: bool) -> None:
    """It reads another state than the forward that is recomputed."""
    step, plain, batch = Step(name), Step(name), batches()
    for _ in range(2):
        images, labels = next(batch)
        for module in (step, plain):
            torch.manual_seed(1)
            if module is step:
                loss = checkpoint(step, images, labels, use_reentrant=reentrant)
            else:
                loss = plain(images, labels)
            module.eval()
            with torch.no_grad():
                module(images, labels)
            module.train()
            loss.backward()  # type: ignore[union-attr]
        assert_equal(step, plain)


@each_method
@reentrant_or_not
def test_recomputation_in_evaluation(name: str, reentrant: bool) -> None:
    """It reads the state that training has left, not the one that training has read."""
    step, plain = Step(name), Step(name)
    run = partial(checkpoint, step, use_reentrant=reentrant)
    for mode, batch in zip((True, False), batches(), strict=False):
        step.train(mode)
        plain.train(mode)
        assert_same_step(run, step, plain, batch)


@pytest.mark.parametrize(
    "name",
    slow_but("sar", "ceco", "cr", "cbp", "cbp_gradient", "cbp_ema", of={x: x for x in METHODS}),
)
def test_compiled_and_recomputed(name: str) -> None:
    torch.compiler.reset()
    step, plain = Step(name), Step(name)
    images, labels = next(batches())
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    loss = checkpoint(compiled, images, labels, use_reentrant=False)
    if name in (*READ_STATE, "ceco"):
        with pytest.raises(RuntimeError, match="recomputes a compiled forward"):
            loss.backward()  # type: ignore[union-attr]
        return
    loss.backward()  # type: ignore[union-attr]
    plain(images, labels).backward()
    assert_equal(step, plain)


@pytest.mark.parametrize("name", ["sar", "occl", "mvsc", "combined"])
def test_selective_checkpointing(name: str) -> None:
    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = operator in (torch.ops.aten.convolution.default, torch.ops.aten.mul.Tensor)
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    step, plain = Step(name), Step(name)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    run = partial(checkpoint, step, use_reentrant=False, context_fn=contexts)
    for batch, n in zip(batches(), range(2), strict=False):
        assert_same_step(run, step, plain, batch, n)


class Attached(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(4, D, 1), nn.Conv2d(D, K, 1))
        self.loss = ao.attach(self.net, METHODS[name]())

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = self.net(images)
        return self.loss(labels) + logits.square().mean()


@each_method
def test_attached_within_the_checkpointed_function(name: str) -> None:
    step, plain = Attached(name), Attached(name)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (step, plain)]
    for (images, labels), n in zip(batches(), range(3), strict=False):
        torch.manual_seed(n)
        checkpoint(step, images, labels, use_reentrant=False).backward()  # type: ignore
        torch.manual_seed(n)
        plain(images, labels).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(step.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)
    assert step.loss._recomputed is None and step.loss._features is None
    copy.deepcopy(step)
    message = f"{type(step.loss.regularizer).__name__}: .*needs use_reentrant=False"
    with pytest.raises(RuntimeError, match=message):
        checkpoint(step, images.requires_grad_(), labels, use_reentrant=True)
