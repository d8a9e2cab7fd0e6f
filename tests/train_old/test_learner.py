"""Losses, class weights, and the cost of a step."""

import pytest
import torch
from torch import nn

from anchorops.train.config import Optimization
from anchorops.train.networks.learner import Learner, build_loss, build_regularizer, class_weights
from anchorops.train.networks.models import build_model
from anchorops.train.report.cost import measure_cost


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
        (Optimization(), {"ce"}),
        (Optimization(loss="focal", focal_gamma=1.0), {"ce"}),
        (Optimization(loss="dice"), {"dice"}),
        (Optimization(loss="ce+dice"), {"ce", "dice"}),
    ],
)
def test_losses(options, terms):
    logits, labels = torch.randn(2, 4, 5, 5), torch.randint(4, (2, 10, 10))
    labels[0, 0] = -1
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    loss = build_loss(options, weights)
    value = loss(logits, labels)
    assert set(loss.terms) == {*terms, "accuracy", "labels_out_of_range", "labels_ignored"}
    z = nn.functional.interpolate(logits, (10, 10), mode="bilinear")
    right = (z.argmax(1) == labels).sum() / (labels >= 0).sum()
    torch.testing.assert_close(loss.terms["accuracy"], right)
    if options == Optimization():
        expected = nn.functional.cross_entropy(z, labels, weights, ignore_index=-1)
        torch.testing.assert_close(value, expected)


def test_hard_example_mining():
    labels = torch.zeros(1, 1, 4, dtype=torch.long)
    labels[..., 3] = -1
    truth = torch.tensor([0.9, 0.8, 0.2, 0.1])
    logits = torch.stack([truth.log(), (1 - truth).log()])[None, :, None]
    losses = -truth.log()
    hard = build_loss(Optimization(ohem=0.7, ohem_kept=1))(logits, labels)
    torch.testing.assert_close(hard, losses[2])
    two = build_loss(Optimization(ohem=0.1, ohem_kept=2))(logits, labels)
    torch.testing.assert_close(two, losses[1:3].mean())


def test_measuring_the_cost_changes_nothing():
    model = build_model("hrnet-w18-small", 5)
    learner = Learner(model, build_regularizer(["sar"], {}, 5, 240))
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    labels = torch.randint(5, (2, 32, 32))
    plain, full = measure_cost(learner, torch.randn(2, 3, 32, 32), labels, bf16=False)
    assert plain.seconds > 0 and full.seconds > 0 and plain.memory_mb is None
    for name, value in learner.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in learner.parameters())
