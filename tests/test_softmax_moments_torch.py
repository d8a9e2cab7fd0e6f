"""pixel_cross_entropy together with torch: autograd, GradScaler, F.cross_entropy."""

import pytest
import torch
import torch.nn.functional as F
from emulator import BACKEND
from softmax_formulas import F16, F32, F64
from torch import Tensor

import anchorops as ao

cpu = pytest.mark.on("cpu")
without_cuda = pytest.mark.on("cpu", "reference", "interpreter")  # it leaves them to triton


def inputs(dtype: torch.dtype = F32, num_classes: int = 5) -> tuple[Tensor, Tensor]:
    logits = torch.randn(2, num_classes, 4, 5, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, num_classes, (2, 16, 20))
    labels[torch.rand(labels.shape) < 0.1] = 255
    return logits, labels


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


def same_loss_and_gradient(ours: Tensor, expected: Tensor, logits: Tensor) -> None:
    torch.testing.assert_close(ours, expected)
    actual, wanted = (torch.autograd.grad(x.sum(), logits)[0] for x in (ours, expected))
    torch.testing.assert_close(actual, wanted)


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
