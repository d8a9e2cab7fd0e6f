"""Segmentation networks for tests of `attach` and the training program."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anchorops import Attachment

K, D = 5, 16
NO_TORCHVISION = "it needs torchvision, which is not installed"  # smp and timm


class Net(nn.Module):
    """A body, a dropout, a 1×1 convolution and an auxiliary head."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, D, 3, stride=2, padding=1)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(D, K, 1)
        self.aux_head = nn.Conv2d(D, K, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.body(x).relu()))


def batch(size: int = 8, images: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 3, size, size, generator=generator)
    return x, torch.randint(0, K, (images, size, size), generator=generator)


def backward(model: nn.Module, attached: Attachment) -> Tensor:
    """One backward pass of cross-entropy and the attached method; returns the loss."""
    x, labels = batch()
    loss = F.cross_entropy(model(x), labels[:, ::2, ::2]) + attached(labels)
    loss.backward()
    return loss.detach()


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
        model = getattr(torchvision.models.segmentation, name)
        return model(weights=None, weights_backbone=None, num_classes=K, aux_loss=True)

    return build


def smp_model(name: str, encoder: str = "resnet18", **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        smp = pytest.importorskip("segmentation_models_pytorch", reason=NO_TORCHVISION)
        return getattr(smp, name)(encoder, encoder_weights=None, classes=K, **options)

    return build


def transformers_segformer() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.SegformerConfig(
        num_labels=K, hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, decoder_hidden_size=D
    )
    return transformers.SegformerForSemanticSegmentation(config)
