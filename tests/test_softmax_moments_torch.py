"""softmax_moments and pixel_cross_entropy together with torch: gradcheck, compile, autograd,
F.cross_entropy."""

import pytest
import torch
import torch.nn.functional as F
from emulator import BACKEND
from softmax_formulas import EVERYTHING, F16, F32, F64
from torch import Tensor

import anchorops as ao

cpu = pytest.mark.on("cpu")
on_cpu = pytest.mark.on("cpu", "reference")
without_cuda = pytest.mark.on("cpu", "reference", "interpreter")  # it leaves them to triton


def inputs(dtype: torch.dtype = F32, num_classes: int = 5) -> tuple[Tensor, Tensor]:
    logits = torch.randn(2, num_classes, 4, 5, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, num_classes, (2, 16, 20))
    labels[torch.rand(labels.shape) < 0.1] = 255
    return logits, labels


@cpu
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(16, 20), (9, 13), (3, 4)])
def test_gradcheck(size: tuple[int, int], align_corners: bool, backend: str):
    logits = torch.randn(1, 3, 4, 5, dtype=F64, requires_grad=True)
    labels = torch.randint(0, 4, (1, *size))

    def function(x: Tensor):
        return ao.ops.softmax_moments(x, labels, align_corners=align_corners, **EVERYTHING)[2:7]

    assert torch.autograd.gradcheck(function, logits)


@cpu
def test_second_derivatives_raise(backend: str):
    logits, labels = inputs()
    loss = ao.pixel_cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        gradient.square().sum().backward()
    dual = torch.autograd.forward_ad
    with dual.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        x = dual.make_dual(logits.detach(), torch.ones_like(logits))
        ao.pixel_cross_entropy(x, labels)


@cpu
def test_backward_twice_and_in_place_scaling(backend: str):
    logits, labels = inputs()
    loss = ao.pixel_cross_entropy(logits, labels)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    expected = first.clone()
    first.mul_(7)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(second, expected)


@cpu
def test_grad_scaler_in_half_precision(backend: str):
    logits, labels = inputs(F16)
    loss = ao.pixel_cross_entropy(logits, labels)
    (plain,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 2.0**12, logits)
    torch.testing.assert_close(
        scaled / 2**12, plain.float(), rtol=2e-3, atol=1e-6, check_dtype=False
    )


@pytest.mark.on("cpu", "interpreter", "emulator")
def test_fullgraph_and_dynamic_shapes(backend: str):
    def step(x: Tensor, y: Tensor) -> Tensor:
        moments = ao.ops.softmax_moments(x, y, align_corners=True, pixel_losses=True)
        total = moments.losses.sum() / moments.counts.sum() + moments.masses.square().sum()
        return total + moments.pixel_losses.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, height, width in ((2, 2, 3), (1, 3, 2), (1, 8, 3))[: 2 if BACKEND else 3]:
        logits = torch.randn(batch, 5, height, width, requires_grad=True)
        labels = torch.randint(0, 5, (batch, 3 * height, 2 * width))
        losses = [f(logits, labels) for f in (step, compiled)]
        grads = [torch.autograd.grad(loss, logits)[0] for loss in losses]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*grads)


def same_loss_and_gradient(ours: Tensor, expected: Tensor, logits: Tensor) -> None:
    torch.testing.assert_close(ours, expected)
    found, wanted = (torch.autograd.grad(x.sum(), logits)[0] for x in (ours, expected))
    torch.testing.assert_close(found, wanted)


@without_cuda
@pytest.mark.parametrize("size", [(130, 24), (3, 7, 50), (2, 4, 3, 5, 6)])
def test_points_and_volumes(size: tuple[int, ...], backend: str):
    logits = torch.randn(size, requires_grad=True)
    labels = torch.randint(0, size[1], (size[0], *size[2:]))
    labels[0] = 255
    loss = ao.pixel_cross_entropy(logits, labels)
    same_loss_and_gradient(loss, F.cross_entropy(logits, labels, ignore_index=255), logits)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("label_smoothing", "align_corners"),
    [
        pytest.param(0.0, False),
        pytest.param(0.3, False, marks=without_cuda),
        pytest.param(0.3, True, marks=without_cuda),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(weighted, label_smoothing, align_corners, reduction, backend: str):
    dtype = F32 if BACKEND else F64
    logits = torch.randn(2, 7, 5, 6, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 7, (2, 11, 16))
    labels[torch.rand(labels.shape) < 0.2] = 255
    weight = torch.rand(7, dtype=dtype) if weighted else None
    options = {"weight": weight, "label_smoothing": label_smoothing, "reduction": reduction}
    loss = ao.pixel_cross_entropy(logits, labels, align_corners=align_corners, **options)
    z = F.interpolate(logits, (11, 16), mode="bilinear", align_corners=align_corners)
    same_loss_and_gradient(loss, F.cross_entropy(z, labels, ignore_index=255, **options), logits)
