"""Networks by name."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from anchorops.train.networks.learner import Learner, build_regularizer
from anchorops.train.networks.models import build_model, upsample_late


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("segformer-b0", 1),
        ("pspnet:resnet50", 1),
        ("unet:resnet18", 0),
        ("hrnet-w18-small", 1),
    ],
)
def test_late_upsampling(name: str, moved: int):
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
        ("fpn:tu-swin_tiny_patch4_window7_224", 128, 4),
    ],
)
def test_networks(name: str, dim: int, stride: int):
    model = build_model(name, 7, channels=4, auxiliary="dpt" not in name, dropout=0.1)
    logits = model(torch.randn(2, 4, 64, 96))
    assert logits.shape == (2, 7, 64 // stride, 96 // stride)
    assert model.classifier.weight.shape == (7, dim, 1, 1)


@pytest.mark.parametrize("architecture", ["fpn", "pspnet", "deeplabv3", "deeplabv3plus"])
def test_dropout_replaces_that_of_the_architecture(architecture: str):
    def rates(dropout: float) -> list[float]:
        model = build_model(f"{architecture}:resnet18", 7, dropout=dropout)
        kinds = (torch.nn.Dropout, torch.nn.Dropout2d)
        return [x.p for x in model.modules() if isinstance(x, kinds) and x.p > 0]

    assert rates(0.1) == [0.1] and 0.1 not in rates(0.0) and rates(0.0)


def test_size_of_the_paper():
    """Parameters and multiply-adds (which papers print as FLOPs) of SAR's Table 20, except those of
    norms."""
    model = build_model("hrnet-w48", 19).eval().to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 1024, 1024, device="meta"))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(65.86e6, rel=5e-4)
    assert counter.get_total_flops() / 2 == pytest.approx(374.34e9, rel=0.01)


def test_auxiliary_head_adds_its_cross_entropy():
    """On the backbone's second last map."""
    name, dim, stride = "fpn:resnet18", 128, 16
    model = build_model(name, 5, auxiliary=True)
    head = model.auxiliary
    assert head is not None
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
    with pytest.raises(ValueError, match=r"--model.network: expected hrnet-.*, got 'alexnet'"):
        build_model("alexnet", 3)
    with pytest.raises(ValueError, match=r"--model.network unet:alexnet: .*encoder name"):
        build_model("unet:alexnet", 3)
    with pytest.raises(ValueError, match=r"--model.network unet:tu-alexnet: Unknown model"):
        build_model("unet:tu-alexnet", 3)
    with pytest.raises(
        ValueError, match=r"--model.auxiliary_weight: expected 0, dpt:.* has no map"
    ):
        build_model("dpt:tu-vit_tiny_patch16_224", 3, auxiliary=True)
