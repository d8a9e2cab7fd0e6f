"""attach: several forwards before a call of the method."""

from typing import Any

import pytest
import torch
from torch import Tensor

import anchorops as ao
from tests.helpers.small_networks import D, K, Net, batch


def test_the_labels_of_several_forwards_are_refused() -> None:
    """Two views, and a classifier that runs twice in one forward."""
    x, labels = batch()
    model = Net()
    occl = ao.attach(model, ao.OCCL(K, D))
    model(x)
    model(x.flip(3))
    for _ in range(2):  # the error does not take the features
        with pytest.raises(RuntimeError, match=r"OCCL: features of several forwards: .* once"):
            occl(labels)
    occl.forget()
    model(x)
    occl(labels)

    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[..., ::2, ::2]).mean() + super().forward(x)

    model = Twice()
    occl = ao.attach(model, ao.OCCL(K, D))
    model(x)
    with pytest.raises(RuntimeError, match="use_last=True"):
        occl(labels)
    occl.detach()
    occl = ao.attach(model, ao.OCCL(K, D), use_last=True)
    model(x)
    assert occl.features is not None and occl.features.shape == (2, D, 4, 4)  # of the last run
    occl(labels)
    with pytest.raises(ValueError, match="attach: use_last: expected True or False, got 1"):
        ao.attach(model, ao.OCCL(K, D), use_last=1)  # type: ignore[arg-type]


def test_forwards_whose_features_nobody_can_mean_do_not_count() -> None:
    x, labels = batch()
    model = Net()
    occl = ao.attach(model, ao.OCCL(K, D))
    for _ in range(2):  # gradient accumulation: a loss after each forward
        (model(x).mean() + occl(labels)).backward()
    for _ in range(2):  # steps without the method's loss
        model(x).mean().backward()
    (model(x).mean() + occl(labels)).backward()
    first, last = model(x), model(x.flip(3))
    first.mean().backward()  # it has not gone through the last features
    model(x)
    with pytest.raises(RuntimeError, match="several forwards"):
        occl(labels)
    last.mean().backward()
    occl.forget()
    with torch.no_grad():
        model(x)
    model(x)
    with torch.no_grad():
        model(x.flip(3))
    model.train()
    occl(labels)
    model(x)
    model.eval()
    model(x)
    model.train()
    model(x)
    assert occl(labels).isfinite()


def test_several_forwards_of_a_compiled_model() -> None:
    torch.compiler.reset()
    x, labels = batch()
    compiled: Any = torch.compile(Net(), fullgraph=True, backend="aot_eager")
    occl = ao.attach(compiled, ao.OCCL(K, D))
    for _ in range(2):
        (compiled(x).mean() + occl(labels)).backward()
    compiled(x)
    compiled(x)
    with pytest.raises(RuntimeError, match=r"several forwards.*forget\(\)"):
        occl(labels)
    occl.forget()
    compiled(x)
    occl(labels)
