"""Losses and class weights."""

import pytest
import torch
from torch import nn

from anchorops.train.networks.learner import build_loss, class_weights
from anchorops.train.options import Model


def test_class_weights():
    shares = torch.tensor([0.64, 0.32, 0.04, 0.0], dtype=torch.float64)
    weights = class_weights("inverse-sqrt", shares)
    assert weights is not None and weights[:3].mean().item() == pytest.approx(1)
    assert (weights[2] / weights[0]).item() == pytest.approx(4) and weights[3] == 1
    inverse = class_weights("inverse", shares)
    assert inverse is not None and (inverse[2] / inverse[0]).item() == pytest.approx(16)
    assert class_weights("none", shares) is None


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({}, {"ce"}),
        ({"loss": "focal", "focal_gamma": 1.0}, {"ce"}),
        ({"loss": "dice"}, {"dice"}),
        ({"loss": "ce+dice"}, {"ce", "dice"}),
    ],
)
def test_losses(options, terms):
    logits, labels = torch.randn(2, 4, 5, 5), torch.randint(4, (2, 10, 10))
    labels[0, 0] = -1
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    loss = build_loss(Model(**options), weights)
    value = loss(logits, labels)
    assert set(loss.terms) == {*terms, "accuracy", "labels_out_of_range", "labels_ignored"}
    z = nn.functional.interpolate(logits, (10, 10), mode="bilinear")
    right = (z.argmax(1) == labels).sum() / (labels >= 0).sum()
    torch.testing.assert_close(loss.terms["accuracy"], right)
    if not options:
        expected = nn.functional.cross_entropy(z, labels, weights, ignore_index=-1)
        torch.testing.assert_close(value, expected)


def test_hard_example_mining():
    labels = torch.zeros(1, 1, 4, dtype=torch.long)
    labels[..., 3] = -1
    truth = torch.tensor([0.9, 0.8, 0.2, 0.1])
    logits = torch.stack([truth.log(), (1 - truth).log()])[None, :, None]
    losses = -truth.log()
    hard = build_loss(Model(ohem_threshold=0.7, ohem_min_kept=1))(logits, labels)
    torch.testing.assert_close(hard, losses[2])
    two = build_loss(Model(ohem_threshold=0.1, ohem_min_kept=2))(logits, labels)
    torch.testing.assert_close(two, losses[1:3].mean())
