"""torch.func and export beside what test_guarantees_of_torch.py has: options, methods, messages."""

import copy

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import anchorops as ao
from anchorops.doctor.catalogue.features import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
K, D = 4, 5
LABELS, ANCHORS = torch.arange(9) % (K + 1), torch.linspace(-1, 1, K * D).view(K, D).cos()
PIXEL_LABELS = torch.arange(2 * 8 * 9).view(2, 8, 9) % (K + 1)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_exported_number_of_hard_examples_is_not_that_of_pixels(backend: str) -> None:
    class Loss(torch.nn.Module):
        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            with ao.use_backend(backend):
                return ao.CrossEntropy(ohem_min_kept=100)(logits, labels)

    def inputs(batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, K, 3, 4), torch.randint(0, K, (batch, height, width))

    auto = torch.export.Dim.AUTO
    shapes = {"logits": {0: auto}, "labels": {0: auto, 1: auto, 2: auto}}
    exported = torch.export.export(Loss(), inputs(2, 12, 13), dynamic_shapes=shapes).module()
    for shape in ((4, 24, 11), (2, 5, 8)):  # the last one has fewer pixels
        arguments = inputs(*shape)
        torch.testing.assert_close(exported(*arguments), Loss()(*arguments))


def test_vmap_with_aligned_corners() -> None:
    """vmap hides that a gradient will be requested, so the backward pass computes lse."""
    loss = ao.CrossEntropyDice(ao.CrossEntropy(align_corners=True), ao.Dice(align_corners=True))
    logits = torch.randn(3, 2, 5, 4, 5, requires_grad=True)
    labels = torch.randint(0, 5, (3, 2, 13, 17))
    expected = torch.stack([loss(x, y) for x, y in zip(logits, labels, strict=True)]).sum()
    actual = vmap(loss)(logits, labels).sum()
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(x, logits)[0] for x in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_vmap_with_learnable_anchors() -> None:
    features, anchors = torch.randn(3, 9, D).requires_grad_(), ANCHORS.clone().requires_grad_()

    def loss(features: Tensor) -> Tensor:
        _, sums, sqdists = ao.ops.class_moments(features, LABELS, K, anchors=anchors)
        assert sqdists is not None
        return (
            sqdists.square().sum() + sums.sum() + ao.pixel_to_anchor_mse(features, LABELS, anchors)
        )

    actual = torch.autograd.grad(vmap(loss)(features).sum(), (features, anchors))
    with ao.use_backend("reference"):
        total = torch.stack([loss(f) for f in features]).sum()
        expected = torch.autograd.grad(total, (features, anchors))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("trace", ["compiled", "fullgraph", "make_fx"])
def test_forward_mode_raises(trace: str) -> None:
    def loss(x: Tensor) -> Tensor:
        return ao.pixel_cross_entropy(x, PIXEL_LABELS)

    def derivative(x: Tensor) -> Tensor:
        return jvp(loss, (x,), (x,))[1]

    torch._dynamo.reset()
    x, whole = torch.randn(2, K, 3, 4), trace == "fullgraph"
    if trace == "make_fx":
        function = make_fx(loss)(x)
    else:
        function = torch.compile(loss, backend="aot_eager", fullgraph=whole)
    message = r"^softmax_moments: forward-mode derivatives"
    if whole:  # Dynamo of torch 2.14 refuses dual tensors; that of 2.12 traces them
        message += "|forward-mode AD tangent"
    with pytest.raises(RuntimeError, match=message), forward_ad.dual_level():
        function(forward_ad.make_dual(x, x))
    function(x)
    if trace == "make_fx":
        with pytest.raises(RuntimeError, match=message):
            jvp(function, (x,), (x,))
    else:
        with pytest.raises(RuntimeError, match="forward-mode derivatives"):
            torch.compile(derivative, backend="aot_eager", fullgraph=whole)(x)


@pytest.mark.parametrize("name", [*ao.losses.METHODS, "combined"])
def test_state_does_not_move_in_a_transform(name: str) -> None:
    method = METHODS[name](K, D)
    features = torch.randn(2, 9, D)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    message = rf"^{type(method).__name__}: .*call eval\(\).*use_backend\(\"reference\"\)$"

    def loss(features: Tensor) -> Tensor:
        return method(features, LABELS, ANCHORS)

    for transformed in (vmap(loss), vmap(grad(loss))):
        with pytest.raises(RuntimeError, match=message):
            transformed(features)
    with ao.use_backend("reference"):
        method.eval()
        if not isinstance(method, ao.CBP):  # a constant 0
            assert grad(loss)(features[0]).isfinite().all()
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def test_copies_after_a_transform() -> None:
    """They have none of its terms, whose tensors cannot be copied."""
    labels = torch.randint(0, K, (3, 2, 8, 9))
    loss, method = ao.CrossEntropy(), ao.SAR(K, D, embed=False, anchors=ANCHORS).eval()
    vmap(loss)(torch.randn(3, 2, K, 4, 5), labels)
    vmap(method)(torch.randn(3, 2, D, 8, 9), labels)
    for module in (loss, method):
        assert copy.deepcopy(module).terms == {}
