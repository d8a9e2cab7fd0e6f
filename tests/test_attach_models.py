"""attach: the chosen classifier and features in common models."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import (
    NO_TORCHVISION,
    D,
    K,
    Net,
    batch,
    smp_model,
    torchvision_model,
    transformers_segformer,
)
from torch import Tensor, nn

import anchorops as ao


def timm_model(name: str, **options: Any) -> Any:
    timm = pytest.importorskip("timm", reason=NO_TORCHVISION)
    return timm.create_model(name, pretrained=False, **options)


class HRNet(nn.Module):
    """timm's HRNet with HRNetV2's head: four resolutions upsampled and concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm_model(
            "hrnet_w18_small", features_only=True, feature_location="", out_indices=(1, 2, 3, 4)
        )
        dim = sum(self.backbone.feature_info.channels())
        self.mix = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim), nn.ReLU())
        self.classifier = nn.Conv2d(dim, K, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.backbone(x)
        size = maps[0].shape[2:]
        maps = [F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps]
        return self.classifier(self.mix(torch.cat(maps, 1)))


@pytest.mark.parametrize(
    ("build", "dim", "name"),
    [
        (HRNet, 240, "classifier"),
        (smp_model("Segformer"), 256, "segmentation_head.0"),
    ],
)
def test_segmentation_models_train_with_sar(build: Any, dim: int, name: str) -> None:
    torch.manual_seed(0)
    model = build()
    bare = {key for key, _ in model.named_parameters()}
    sar = ao.attach(model, ao.SAR(K, dim, aux_weight=1.0))
    assert sar.classifier_name == name
    brought = {key for key, _ in model.named_parameters()} - bare
    assert brought and all(key.startswith("regularizer.") for key in brought)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, labels = batch(32)
    losses = []
    for _ in range(3):
        logits = F.interpolate(model(x), labels.shape[1:], mode="bilinear")
        loss = F.cross_entropy(logits, labels) + sar(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(sar.terms["aux"])
    assert all(p.grad is not None for p in sar.regularizer.parameters())
    assert losses[-1] < losses[0]


def lraspp() -> nn.Module:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    return torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=K
    )


def timm_classifier() -> nn.Module:
    return timm_model("resnet18", num_classes=K, drop_rate=0.5)


@pytest.mark.parametrize(
    ("build", "dim", "name"),
    [
        (smp_model("UPerNet"), 256, "segmentation_head.0"),
        (smp_model("DeepLabV3Plus"), 256, "segmentation_head.0"),
        (smp_model("FPN"), 128, "segmentation_head.0"),
        (smp_model("Unet"), 16, "segmentation_head.0"),
        (torchvision_model("fcn_resnet50"), 512, "classifier.4"),
        (torchvision_model("deeplabv3_resnet50"), 256, "classifier.4"),
        (lraspp, 128, "classifier.high_classifier"),
        (transformers_segformer, D, "decode_head.classifier"),
        (timm_classifier, 512, "fc"),
    ],
)
def test_finds_the_classifier(build: Callable[[], nn.Module], dim: int, name: str) -> None:
    torch.manual_seed(0)
    model = build()
    occl = ao.attach(model, ao.OCCL(K, dim))
    assert occl.classifier_name == name and name in repr(occl)
    x, labels = batch(32, images=4)
    labels[0], labels[1] = labels[2], labels[3]
    model(x)
    assert occl._features is not None and occl._features.requires_grad
    assert occl._features.shape[:2] == (4, dim)
    assert occl(labels[:, 0, 0] if name == "fc" else labels) > 0


def test_dropout_elsewhere_is_passed_over_too() -> None:
    """FPN of segmentation-models-pytorch ends its decoder, not its head, with a dropout."""
    model = smp_model("FPN")()
    occl = ao.attach(model, ao.OCCL(K, 128))
    inputs: list[Tensor] = []
    dropout = model.get_submodule("decoder.dropout")
    hook = dropout.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(batch(32)[0])
    assert occl._features is inputs[0]
    hook.remove()
    occl.detach()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_module_can_be_told() -> None:
    for told in ("aux_head", lambda model: model.aux_head):
        model = Net()
        module = told if isinstance(told, str) else told(model)
        assert ao.attach(model, ao.OCCL(K, D), module).classifier_name == "aux_head"


def test_linear_classifier_on_tokens() -> None:
    """(B, N, D) into a linear layer: a view as (B, D, N)."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(D, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    model = Tokens()
    occl = ao.attach(model, ao.OCCL(K, D))
    x, labels = torch.randn(2, 30, D, requires_grad=True), torch.randint(0, K, (2, 30))
    model(x)
    expected = copy.deepcopy(occl.regularizer)(x.transpose(1, 2), labels, model.head)
    torch.testing.assert_close(occl(labels), expected)
