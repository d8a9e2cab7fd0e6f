"""attach: which classifier, which features, and what the model is before, after and meanwhile."""

import copy
import io
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anchorops as ao

K, D = 5, 16


class Net(nn.Module):
    """A body, a dropout, a 1×1 convolution and an auxiliary head beside."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, D, 3, stride=2, padding=1)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(D, K, 1)
        self.aux_head = nn.Conv2d(D, K, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.body(x).relu()))


class HRNet(nn.Module):
    """timm's HRNet with HRNetV2's head: four resolutions upsampled and concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model(
            "hrnet_w18_small",
            features_only=True,
            feature_location="",
            out_indices=(1, 2, 3, 4),
            pretrained=False,
        )
        dim = sum(self.backbone.feature_info.channels())  # pyright: ignore
        self.mix = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim), nn.ReLU())
        self.classifier = nn.Conv2d(dim, K, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.backbone(x)
        size = maps[0].shape[2:]
        maps = [F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps]
        return self.classifier(self.mix(torch.cat(maps, 1)))


def segformer() -> nn.Module:
    return smp.Segformer("resnet18", encoder_weights=None, classes=K)


def batch(size: int = 8, images: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 3, size, size, generator=generator)
    return x, torch.randint(0, K, (images, size, size), generator=generator)


@pytest.mark.parametrize(
    ("build", "dim", "name"),
    [
        (HRNet, 240, "classifier"),
        (segformer, 256, "segmentation_head.0"),
    ],
)
def test_segmentation_models_train_with_sar(build: Any, dim: int, name: str) -> None:
    torch.manual_seed(0)
    model = build()
    bare = {key for key, _ in model.named_parameters()}
    sar = ao.SAR(K, dim, aux_weight=1.0)
    attachment = ao.attach(model, sar)
    assert attachment.classifier_name == name
    brought = {key for key, _ in model.named_parameters()} - bare
    assert brought and all(key.startswith("regularizer.") for key in brought)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, labels = batch(64)
    losses = []
    for _ in range(4):
        logits = F.interpolate(model(x), labels.shape[1:], mode="bilinear")
        loss = F.cross_entropy(logits, labels) + sar(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(sar.terms["aux"])
    assert all(p.grad is not None for p in sar.parameters())
    assert losses[-1] < losses[0]


def test_features_are_the_classifiers_input_before_dropout() -> None:
    model = Net(dropout=0.5)
    cr = ao.SAR(K, D, embed=False)
    assert ao.attach(model, cr).classifier_name == "classifier"  # not the auxiliary head
    x, labels = batch()
    model(x)
    features = model.body(x).relu()
    torch.testing.assert_close(cr(labels), cr(features, labels))
