"""Softmax moments against torch's own upsampling and losses, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao

K = 7
# size of logits, size of labels: up by whole and by odd ratios, the same, down, a single logit
SIZES = [
    ((5, 6), (20, 24)),
    ((5, 6), (17, 25)),
    ((5, 6), (5, 6)),
    ((9, 8), (3, 5)),
    ((1, 1), (4, 3)),
]


def inputs(size, label_size, num_classes: int = K) -> tuple[Tensor, Tensor]:
    logits = torch.randn(2, num_classes, *size, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, num_classes, (2, *label_size))
    labels[torch.rand(labels.shape) < 0.2] = 255
    return logits, labels


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("size", "label_size"), SIZES)
def test_moments_of_the_upsampled_softmax(size, label_size, align_corners):
    logits, labels = inputs(size, label_size)
    with ao.use_backend("reference"):
        moments = ao.softmax_moments(
            logits, labels, align_corners=align_corners, squares=True, pixel_losses=True, lse=True
        )
    z = F.interpolate(logits, label_size, mode="bilinear", align_corners=align_corners)
    valid = labels != 255
    own = F.one_hot(torch.where(valid, labels, 0), K).movedim(-1, 1) * valid[:, None]
    p = z.softmax(1) * valid[:, None]
    losses = F.cross_entropy(z, labels, ignore_index=255, reduction="none")
    expected = ao.SoftmaxMoments(
        counts=own.sum((0, 2, 3)),
        hits=(own * (z.argmax(1) == labels)[:, None]).sum((0, 2, 3)),
        losses=(own * losses[:, None]).sum((0, 2, 3)),
        overlaps=(own * p).sum((0, 2, 3)),
        masses=p.sum((0, 2, 3)),
        squares=p.square().sum((0, 2, 3)),
        pixel_losses=losses,
        lse=z.logsumexp(1) * valid,
    )
    torch.testing.assert_close(tuple(moments), tuple(expected))
    weights = [torch.randn_like(x) for x in expected[2:]]
    found, wanted = (
        torch.autograd.grad(statistics[2:], logits, weights) for statistics in (moments, expected)
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(weighted, label_smoothing, reduction):
    logits, labels = inputs((5, 6), (17, 25))
    weight = torch.rand(K, dtype=torch.float64) if weighted else None
    options = {"weight": weight, "label_smoothing": label_smoothing, "reduction": reduction}
    with ao.use_backend("reference"):
        loss = ao.pixel_cross_entropy(logits, labels, **options)
    z = F.interpolate(logits, (17, 25), mode="bilinear")
    expected = F.cross_entropy(z, labels, ignore_index=255, **options)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(x.sum(), logits)[0] for x in (loss, expected))
    torch.testing.assert_close(found, wanted)
