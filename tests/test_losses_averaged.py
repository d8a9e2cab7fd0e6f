"""Averages of models with a method: AveragedModel, which Lightning's callbacks use, over
parameters and buffers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import anchorops as ao
from anchorops.doctor.catalogue import features as catalogue

K, D, DECAY = 3, 8, 0.75


AVERAGES = {
    "swa": {},
    "ema": {"avg_fn": swa_utils.get_ema_avg_fn(DECAY)},
    "multi_ema": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(DECAY)},
}


def average(model: nn.Module, name: str) -> swa_utils.AveragedModel:
    return swa_utils.AveragedModel(model, use_buffers=True, **AVERAGES[name])


def model_and_loss(method: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, D, 1), nn.Conv2d(D, K, 1))
    return model, ao.attach(model, catalogue.METHODS[method](K, D))


def train(model: nn.Module, loss: Any, steps: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(torch.randn(2, 4, 6, 5))
        (logits.square().mean() + loss(torch.randint(0, K, (2, 6, 5)))).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("method", ao.losses.METHODS)
def test_the_average_of_a_model(method: str, kind: str) -> None:
    model, loss = model_and_loss(method)
    averaged = average(model, kind)
    expected: dict[str, Tensor] = {}
    for n in range(4):
        train(model, loss)
        averaged.update_parameters(model)
        for name, value in model.state_dict().items():
            share = 1 / (n + 1) if n == 0 or kind == "swa" else 1 - DECAY
            before = expected.get(name, torch.zeros_like(value))
            expected[name] = before + share * (value - before)
    state = averaged.module.state_dict()
    for name, value in model.state_dict().items():
        assert state[name].dtype == value.dtype and value.dtype != torch.bool
        if value.is_floating_point():
            torch.testing.assert_close(state[name], expected[name], rtol=1e-4, atol=1e-6)
        else:
            assert 0 <= state[name] <= value == 4
    averaged.eval()(torch.randn(1, 4, 6, 5))
    other, its_loss = model_and_loss(method)  # training continues from the average
    other.load_state_dict(state)
    train(other, its_loss, 2)
    assert all(value.isfinite().all() for value in other.state_dict().values())


def test_the_average_has_the_classes_that_have_started() -> None:
    model, loss = model_and_loss("SAR")
    averaged = average(model, "multi_ema")
    sar = loss.regularizer
    sar.delta = 1.0  # no class is recognised
    train(model, loss)
    averaged.update_parameters(model)
    (copied,) = (m for m in averaged.modules() if isinstance(m, ao.SAR))
    assert not copied.started.any()
    sar.delta = 0.0
    train(model, loss, 5)
    averaged.update_parameters(model)
    assert sar.started.any() and torch.equal(copied.started, sar.started)
