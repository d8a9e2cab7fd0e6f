"""pixel_cross_entropy together with torch: autograd, F.cross_entropy."""

import pytest
import torch
import torch.nn.functional as F
from simulated_gpu import BACKEND
from softmax_formulas import F32, F64, check_loss

import anchorops as ao


@pytest.mark.on("cpu")
def test_backward_twice_and_in_place_scaling(backend: str):
    logits, labels = torch.randn(2, 5, 4, 5, requires_grad=True), torch.randint(0, 5, (2, 16, 20))
    loss = ao.pixel_cross_entropy(logits, labels)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    expected = first.clone()
    first.mul_(7)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(second, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("label_smoothing", "align_corners"),
    [(0.0, False), (0.3, False), (0.3, True)],
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
    check_loss(loss, F.cross_entropy(z, labels, ignore_index=255, **options), logits)
