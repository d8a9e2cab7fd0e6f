"""All methods at a small size, and a batch for them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import anchorops as ao
from anchorops.losses import Regularizer

K, D = 5, 12


def combined() -> ao.Combined:
    return ao.Combined(ao.SAR(K, D, delta=0.1), ao.OCCL(K, D), ao.MVSC(K, D))


METHODS: dict[str, Callable[[], Regularizer]] = {
    "sar": lambda: ao.SAR(K, D, delta=0.1),
    "sar_per_class": lambda: ao.SAR(K, D, gate="per_class", delta=0.1),
    "cr": lambda: ao.SAR(K, D, embed=False),
    "occl": lambda: ao.OCCL(K, D),
    "occl_images": lambda: ao.OCCL(K, D, split="images"),
    "mvsc": lambda: ao.MVSC(K, D),
    "ceco": lambda: ao.CeCo(K, D, reduced_dim=7, center_dim=9, dropout=0.0),
    "ceco_feature": lambda: ao.CeCo(
        K, D, reduced_dim=7, center_dim=9, dropout=0.0, resolution="feature"
    ),
    "cbp_penalty": lambda: ao.CBP(K, D, update="penalty"),
    "combined": combined,
}
on_pixels = {k: v for k, v in METHODS.items() if k != "cbp_penalty"}
each_method = pytest.mark.parametrize("build", METHODS.values(), ids=METHODS.keys())
each_on_pixels = pytest.mark.parametrize("build", on_pixels.values(), ids=on_pixels.keys())


def batch(images: int = 3) -> tuple[Tensor, Tensor, nn.Conv2d]:
    torch.manual_seed(0)
    features = torch.randn(images, D, 6, 7, requires_grad=True)
    labels = torch.randint(0, K, (images, 24, 28))
    labels[:, :5] = 255
    return features, labels, nn.Conv2d(D, K, 1)


def open_gate(method: Regularizer) -> Regularizer:
    """The method with an open gate, so that SAR uses the features."""
    for module in method.modules():
        if isinstance(module, ao.SAR) and module.embed:
            module.delta, module.gate = 0.0, "per_class"
    return method
