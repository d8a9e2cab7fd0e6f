"""mmsegmentation's heads on backbones of timm and segmentation-models-pytorch."""

import copy
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from anchorops.train.networks.learner import Learner, build_regularizer
from anchorops.train.networks.models import OCRHead, SoftRegions, build_model


@pytest.mark.parametrize(
    ("name", "dim", "stride"),
    [
        ("mmseg-fcn:tu-resnet18", 512, 8),
        ("mmseg-fcn:hrnet-w18-small", 512, 32),
        ("mmseg-ocrnet:tu-resnet18", 512, 8),
        ("mmseg-ocrnet:hrnet-w18-small", 512, 4),
        ("mmseg-segformer:mit_b0", 256, 4),
    ],
)
def test_networks(name: str, dim: int, stride: int):
    model = build_model(name, 7, channels=4, auxiliary=True, dropout=0.1).eval()
    logits = model(torch.randn(2, 4, 64, 96))
    assert logits.shape == (2, 7, 64 // stride, 96 // stride)
    assert model.classifier.in_channels == dim


@pytest.mark.parametrize(
    ("name", "num_classes", "size", "millions", "giga"),
    [
        ("hrnet-w48", 19, 1024, 65.86, 374.34),  # SAR's Table 20
        ("mmseg-segformer:mit_b4", 150, 512, 61.4, 59.3),  # CBP+OCCL's Table 2
        ("mmseg-fcn:tu-resnet101c", 150, 512, 66.2, 276.0),  # CBP+OCCL's Table 2
    ],
)
def test_size_of_the_papers(name: str, num_classes: int, size: int, millions: float, giga: float):
    """Parameters, and multiply-adds (which papers print as FLOPs), except those of norms."""
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


def test_regions_have_a_loss_of_their_own():
    model = build_model("mmseg-ocrnet:hrnet-w18-small", 5, auxiliary=True)
    assert model.auxiliary is None and isinstance(model.auxiliary_head, SoftRegions)
    learner = Learner(model, build_regularizer(["sar"], {}, 5, 512), auxiliary_weight=0.4)
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(5, (2, 64, 64))
    logits = []
    model.auxiliary_head.register_forward_hook(lambda _, maps, out: logits.append(out))
    loss, terms = learner(images, labels)
    auxiliary = learner.pixel_loss(logits[0], labels)
    torch.testing.assert_close(terms["auxiliary"], 0.4 * auxiliary.detach())
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()(images)
    copy.deepcopy(model)  # nothing of the graph is kept


def test_regions_stay_behind_where_the_classes_differ(tmp_path: Path):
    name, path = "mmseg-ocrnet:hrnet-w18-small", tmp_path / "weights.pt"
    source = build_model(name, 5, auxiliary=True)
    torch.save(source.state_dict(), path)
    model = build_model(name, 7, auxiliary=True, weights=path)
    assert torch.equal(next(model.parameters()), next(source.parameters()))


def test_networks_that_cannot_be():
    with pytest.raises(ValueError, match=r"--auxiliary-weight: expected more than 0, .* regions"):
        build_model("mmseg-ocrnet:hrnet-w18-small", 5)
    with pytest.raises(ValueError, match="model: backbone 'tu-alexnet'"):
        build_model("mmseg-fcn:tu-alexnet", 5)
    with pytest.raises(ValueError, match="backbone: expected mit_b0 to mit_b5, got 'mit_b9'"):
        build_model("mmseg-segformer:mit_b9", 5)
    with pytest.raises(ValueError, match="model: backbone ''"):
        build_model("mmseg-fcn", 5)
