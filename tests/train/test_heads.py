"""Networks by name, and mmsegmentation's heads on backbones of timm and of smp."""

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from anchorops.train.networks import models
from anchorops.train.networks.learner import Learner, build_regularizer
from anchorops.train.networks.models import (
    OCRHead,
    SoftRegions,
    at_first_size,
    build_model,
    conv_norm_relu,
    mixed,
    upsample_late,
)


def upsampled_first(mix: nn.Sequential, maps: Sequence[Tensor]) -> Tensor:
    """What `mixed` computes, as papers write it."""
    return mix(at_first_size(maps))


@pytest.mark.parametrize("widths", [(16, 32, 64, 128), (48, 96, 192, 384), (8, 8)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions_before_the_upsampling(widths: tuple[int, ...], channels_last: bool):
    """Values and all gradients are those of the formula."""
    mix = conv_norm_relu(sum(widths), 40).double()
    layout = torch.channels_last if channels_last else torch.preserve_format
    maps = [
        torch.randn(2, width, 24 >> i, 32 >> i, dtype=torch.float64).to(memory_format=layout)
        for i, width in enumerate(widths)
    ]
    inputs = [x.requires_grad_() for x in (*maps, *mix.parameters())]
    results = []
    for function in (mixed, upsampled_first):
        mix.train()
        out = function(mix, maps)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("segformer-b0", 1),
        ("pspnet:resnet50", 1),
        ("unet:resnet18", 0),
        ("hrnet-w18-small", 0),  # written so itself
    ],
)
def test_late_upsampling_of_other_networks(name: str, moved: int):
    """Logits and gradients in float64, at other sizes and in evaluation too; with a method."""
    model = build_model(name, 7, auxiliary=True).double()
    later = copy.deepcopy(model)
    upsample_late(later, torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    assert sum("_forward_changes" in vars(module) for module in later.modules()) == moved
    assert later.state_dict().keys() == model.state_dict().keys()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    labels = torch.randint(7, (2, 64, 96))
    results = []
    for network in (model, later):
        dim = network.classifier.in_channels
        learner = Learner(network, build_regularizer(["sar"], {}, 7, dim)).double()
        learner.attachment.regularizer.load_state_dict(results[0][0]) if results else None
        torch.manual_seed(0)
        loss, _ = learner(images, labels)
        gradients = torch.autograd.grad(loss, [*network.parameters()], materialize_grads=True)
        state = learner.attachment.regularizer.state_dict()
        results.append((state, loss, gradients, network.eval()(images)))
    for before, after in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(after, before)


@pytest.mark.parametrize(
    ("name", "dim", "stride"),
    [
        ("hrnet-w18-small", 240, 4),
        ("segformer-b0", 256, 4),
        ("unet:resnet18", 16, 1),
        ("dpt:tu-vit_tiny_patch16_224", 256, 2),
        ("upernet:tu-swin_tiny_patch4_window7_224", 256, 4),
        ("mmseg-fcn:tu-resnet18", 512, 8),
        ("mmseg-fcn:hrnet-w18-small", 512, 32),
        ("mmseg-ocrnet:tu-resnet18", 512, 8),
        ("mmseg-ocrnet:hrnet-w18-small", 512, 4),
        ("mmseg-segformer:mit_b0", 256, 4),
    ],
)
def test_networks(name: str, dim: int, stride: int):
    model = build_model(name, 7, channels=4, auxiliary="dpt" not in name, dropout=0.1)
    logits = model(torch.randn(2, 4, 64, 96))
    assert logits.shape == (2, 7, 64 // stride, 96 // stride)
    assert model.classifier.weight.shape == (7, dim, 1, 1)


@pytest.mark.parametrize(
    ("name", "num_classes", "size", "millions", "giga"),
    [
        ("hrnet-w48", 19, 1024, 65.86, 374.34),  # SAR's Table 20
        ("mmseg-segformer:mit_b4", 150, 512, 61.4, 59.3),  # CBP+OCCL's Table 2
        ("mmseg-fcn:tu-resnet101c", 150, 512, 66.2, 276.0),  # CBP+OCCL's Table 2
    ],
)
def test_size_of_the_papers(
    name: str,
    num_classes: int,
    size: int,
    millions: float,
    giga: float,
    monkeypatch: pytest.MonkeyPatch,
):
    """Parameters, and multiply-adds (which papers print as FLOPs), except those of norms. Papers
    count convolutions after the upsampling."""
    monkeypatch.setattr(models, "mixed", upsampled_first)
    model = build_model(name, num_classes).eval().to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1e6 * millions, rel=5e-4)
    assert counter.get_total_flops() / 2 == pytest.approx(1e9 * giga, rel=0.01)


def test_regions_attend_as_the_paper_says():
    """Compared with the formula: softmax over the pixels, then over the regions."""
    head = OCRHead([6, 10], 3, joined=False).eval()
    first, last = torch.randn(2, 6, 4, 5), torch.randn(2, 10, 4, 5)
    pixels, logits = head.pixels(last), head.regions(first)
    shares = logits.flatten(2).softmax(2)
    regions = torch.einsum("bkn,bdn->bdk", shares, pixels.flatten(2))
    query = head.query(pixels).flatten(2)
    key, value = (f(regions[..., None]).flatten(2) for f in (head.key, head.value))
    weights = (torch.einsum("bdn,bdk->bnk", query, key) / head.inner_dim**0.5).softmax(2)
    context = torch.einsum("bnk,bdk->bdn", weights, value).view(2, -1, 4, 5)
    expected = head.mix(torch.cat([head.context(context), pixels], dim=1))
    torch.testing.assert_close(head([first, last]), expected)


@pytest.mark.parametrize(
    ("name", "dim", "stride"), [("fpn:resnet18", 128, 16), ("mmseg-ocrnet:hrnet-w18-small", 512, 4)]
)
def test_auxiliary_head_adds_its_cross_entropy(name: str, dim: int, stride: int):
    """On the backbone's second last map; or it is OCRNet's regions, and there is no other head."""
    model = build_model(name, 5, auxiliary=True)
    head = model.auxiliary_head
    assert head is not None and isinstance(head, SoftRegions) == (model.auxiliary is None)
    learner = Learner(model, build_regularizer(["sar"], {}, 5, dim), auxiliary_weight=0.4)
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(5, (2, 64, 64))
    outputs = []
    head.register_forward_hook(lambda _, inputs, logits: outputs.append(logits))
    loss, terms = learner(images, labels)
    (logits,) = outputs
    assert logits.shape == (2, 5, 64 // stride, 64 // stride)
    auxiliary = learner.pixel_loss(logits, labels)
    torch.testing.assert_close(terms["auxiliary"], 0.4 * auxiliary.detach())
    parts = [value for name, value in terms.items() if name in ("ce", "auxiliary", "aux", "p2a")]
    torch.testing.assert_close(loss.detach(), torch.stack(parts).sum())
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model(images)  # in training, without reading the logits
    model.eval()(images)
    copy.deepcopy(model)  # nothing of the graph is kept


def test_networks_that_cannot_be():
    with pytest.raises(ValueError, match=r"model: expected hrnet-w18-small, .* got 'alexnet'"):
        build_model("alexnet", 3)
    with pytest.raises(ValueError, match="model 'unet:alexnet'"):
        build_model("unet:alexnet", 3)
    with pytest.raises(
        ValueError, match=r"--model.auxiliary_weight: expected 0, dpt:.* has no map"
    ):
        build_model("dpt:tu-vit_tiny_patch16_224", 3, auxiliary=True)
    with pytest.raises(
        ValueError, match=r"--model.auxiliary_weight: expected more than 0, .* regions"
    ):
        build_model("mmseg-ocrnet:hrnet-w18-small", 5)
    with pytest.raises(ValueError, match="model: backbone 'tu-alexnet'"):
        build_model("mmseg-fcn:tu-alexnet", 5)
    with pytest.raises(ValueError, match="backbone: expected mit_b0 to mit_b5, got 'mit_b9'"):
        build_model("mmseg-segformer:mit_b9", 5)
    with pytest.raises(ValueError, match="model: backbone ''"):
        build_model("mmseg-fcn", 5)
