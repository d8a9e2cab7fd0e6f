"""Class moments together with torch: second derivatives, saved tensors, other dtypes of anchors."""

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import anchorops as ao
from anchorops._ops.class_moments import unchecked_moments

fused = pytest.mark.on("cpu", "simulated_triton", "simulated_cuda")
F64 = torch.float64


def some_labels(size: tuple[int, ...], num_classes: int = 3) -> Tensor:
    labels = torch.randint(0, num_classes, size[:1] + size[2:])
    labels.view(-1)[3] = 255
    return labels


def leaves(size: tuple[int, ...], num_classes: int = 3) -> tuple[Tensor, Tensor]:
    features = torch.randn(size, dtype=F64, requires_grad=True)
    return features, torch.randn(num_classes, size[1], dtype=F64, requires_grad=True)


@pytest.mark.parametrize(
    ("wrt", "needed"), [("features", True), ("anchors", True), ("anchors", False)]
)
def test_second_derivatives_of_anchors(wrt: str, needed: bool):
    """The gradient of anchors is computed from the sums by torch."""
    features, anchors = leaves((9, 2))
    inputs, labels = {"features": features, "anchors": anchors}, some_labels((9, 2))
    features.requires_grad_(needed)

    def second() -> Tensor:
        mse = ao.pixel_to_anchor_mse(features, labels, anchors)
        (first,) = torch.autograd.grad(mse, anchors, create_graph=True)
        return torch.autograd.grad(first.square().sum(), inputs[wrt])[0]

    ours = second()
    with ao.use_backend("reference"):
        torch.testing.assert_close(ours, second())


@pytest.mark.parametrize("with_sums", [False, True])
@pytest.mark.parametrize(
    "known", [False, True], ids=["traced without gradients", "called with them"]
)
def test_gradient_of_anchors_with_and_without_sums(with_sums: bool, known: bool):
    """Where the sums were not computed, backward computes them."""
    features, anchors = leaves((2, 3, 4, 5))
    labels = some_labels((2, 3, 4, 5))
    options = {"groups": 2, "per_image": True, "seed": 1, "ignore_index": 255}

    def moments(features: Tensor, anchors: Tensor) -> Tensor:
        _, sums, sqdists = unchecked_moments(
            features, labels, 3, anchors=anchors, with_sums=with_sums, **options
        )
        assert sqdists is not None
        return (sqdists * torch.arange(12.0).view(2, 3, 2)).sum() + (sums.sum() if with_sums else 0)

    traced = moments if known else make_fx(moments)(features.detach(), anchors.detach())
    ours = torch.autograd.grad(traced(features, anchors), (features, anchors))
    with ao.use_backend("reference"):
        expected = torch.autograd.grad(moments(features, anchors), (features, anchors))
    torch.testing.assert_close(ours, expected)


@fused
@pytest.mark.parametrize("keys", [torch.zeros(6, 2).T, torch.zeros(2, 5)], ids=["strided", "few"])
def test_keys_that_do_not_follow_each_other_are_refused(backend: str, keys):
    features, anchors = torch.randn(2, 4, 6), torch.randn(3, 4)
    operators = torch.ops.anchorops
    forward = getattr(operators.class_moments, backend)
    backward = getattr(operators.class_moments_backward, backend)
    refused = pytest.raises((RuntimeError, ValueError), match="keys: expected a contiguous key for")
    with refused:
        forward(features, keys.int(), anchors, 3, 1, True)
    gradients = anchors, anchors[:, 0]
    with refused:
        backward(features, keys.int(), anchors, *gradients, 1, (2, 4, 6), (24, 6, 1), torch.float32)


@pytest.mark.parametrize(
    ("anchors", "kept"),
    [
        (None, [9]),  # keys
        (torch.randn(3, 4), [9, 12, 36]),  # and anchors, features
        (torch.randn(3, 4, requires_grad=True), [9, 12, 12, 36]),  # and sums
    ],
    ids=["no anchors", "fixed", "learnable"],
)
def test_what_is_kept_for_the_backward_pass(anchors: Tensor | None, kept: list[int]):
    features = torch.randn(9, 4, requires_grad=anchors is None or not anchors.requires_grad)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ao.ops.class_moments(features, some_labels((9, 4)), 3, anchors=anchors)
    assert sorted(x.numel() for x in saved) == kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_anchors_of_another_dtype(dtype: torch.dtype):
    features, labels = torch.randn(20, 4), some_labels((20, 4))
    anchors = torch.randn(3, 4).to(dtype).requires_grad_()
    float_anchors = anchors.detach().float().requires_grad_()
    ao.pixel_to_anchor_mse(features, labels, anchors).backward()
    ao.pixel_to_anchor_mse(features, labels, float_anchors).backward()
    assert anchors.grad is not None and float_anchors.grad is not None
    assert anchors.grad.dtype == dtype and torch.equal(anchors.grad, float_anchors.grad.to(dtype))
