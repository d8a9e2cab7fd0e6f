"""All methods at a small size, and a batch for them; numbers of released code."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import anchorops as ao
from anchorops.doctor.catalogue import features as catalogue
from anchorops.losses import Regularizer

K, D = 5, 12


METHODS: dict[str, Callable[[], Regularizer]] = {
    name: partial(make, K, D)
    for name, make in catalogue.METHODS.items()
    if name not in ("CBP", "CeCo, images")
}
on_pixels = {k: v for k, v in METHODS.items() if k != "CBP, penalty"}
each_method = pytest.mark.parametrize("build", METHODS.values(), ids=METHODS.keys())
each_on_pixels = pytest.mark.parametrize("build", on_pixels.values(), ids=on_pixels.keys())


def batch(images: int = 3) -> tuple[Tensor, Tensor, nn.Conv2d]:
    torch.manual_seed(0)
    features = torch.randn(images, D, 6, 7, requires_grad=True)
    labels = torch.randint(0, K, (images, 24, 28))
    labels[:, :5] = 255
    return features, labels, nn.Conv2d(D, K, 1)


def oracle(name: str) -> dict[str, Tensor]:
    """What the released code of a method computed, in a file of tests/oracles."""
    arrays = np.load(Path(__file__).parents[1] / "oracles" / name)
    return {key: torch.as_tensor(arrays[key]) for key in arrays.files}


def open_gate(method: Regularizer) -> Regularizer:
    """The method with an open gate, so that SAR uses the features."""
    for module in method.modules():
        if isinstance(module, ao.SAR) and module.embed:
            module.delta, module.gate = 0.0, "per_class"
    return method
