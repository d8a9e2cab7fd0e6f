"""attach: the chosen classifier and features in common models."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import anchorops as ao
from tests.helpers.small_networks import (
    NO_TORCHVISION,
    D,
    K,
    batch,
    smp_model,
    torchvision_model,
    transformers_segformer,
)


def timm_classifier() -> nn.Module:
    timm = pytest.importorskip("timm", reason=NO_TORCHVISION)
    return timm.create_model("resnet18", pretrained=False, num_classes=K, drop_rate=0.5)


@pytest.mark.parametrize(
    ("build", "dim", "name"),
    [
        (smp_model("Unet"), 16, "segmentation_head.0"),  # 3×3
        (torchvision_model("deeplabv3_resnet50"), 256, "classifier.4"),  # its auxiliary is alike
        (transformers_segformer, D, "decode_head.classifier"),
        (timm_classifier, 512, "fc"),
    ],
)
def test_finds_the_classifier(build: Callable[[], nn.Module], dim: int, name: str) -> None:
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


def test_linear_classifier_on_tokens() -> None:
    """(B, N, D) into a linear layer: a view as (B, D, N)."""
    model = nn.Sequential(nn.Linear(D, K))
    occl = ao.attach(model, ao.OCCL(K, D))
    x, labels = torch.randn(2, 30, D, requires_grad=True), torch.randint(0, K, (2, 30))
    model(x)
    assert occl.features is x
    expected = copy.deepcopy(occl.regularizer)(x.transpose(1, 2), labels, model[0])
    torch.testing.assert_close(occl(labels), expected)
