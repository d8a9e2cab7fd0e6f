"""Networks by name, and the weights from which they start."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from anchorops.train.networks.learner import Learner, build_loss, build_regularizer
from anchorops.train.networks.models import build_model, upsample_late
from anchorops.train.options import Model

MOBILENET = "fpn:tu-mobilenetv3_small_050"


@pytest.mark.parametrize(
    ("name", "dim", "stride", "moved"),
    [
        ("hrnet-w18-small", 240, 4, 1),
        ("segformer-b0", 256, 4, 1),
        ("pspnet:resnet50", 512, 8, 1),
        ("unet:resnet18", 16, 1, 0),
        ("dpt:tu-vit_tiny_patch16_224", 256, 2, 4),
        ("upernet:tu-swin_tiny_patch4_window7_224", 256, 4, 0),
        ("fpn:tu-swin_tiny_patch4_window7_224", 128, 4, 0),
    ],
)
def test_networks(name: str, dim: int, stride: int, moved: int):
    """Their logits. Late upsampling changes no loss, gradient or method, in float64, at other sizes
    and in evaluation too."""
    images, labels = torch.randn(2, 4, 64, 32).double(), torch.randint(7, (2, 64, 32))
    auxiliary_weight = 0.0 if "dpt" in name else 0.4
    options = Model(name, auxiliary_weight=auxiliary_weight, dropout=0.1)
    network = build_model(options, 7, 4).double()
    results = []
    for late in (False, True):
        torch.manual_seed(0)
        model = copy.deepcopy(network)
        learner = Learner(model, build_regularizer(["sar"], {}, 7, dim)).double()
        if late:
            upsample_late(model, torch.zeros(1, 4, 64, 64).double())
            assert sum("_forward_changes" in vars(x) for x in model.modules()) == moved
        loss, _ = learner(images, labels)
        (gradient,) = torch.autograd.grad(loss, model.classifier.weight)
        results.append((loss, gradient, model.state_dict(), model.eval()(images)))
    torch.testing.assert_close(*results)
    assert results[0][-1].shape == (2, 7, 64 // stride, 32 // stride)


@pytest.mark.parametrize("architecture", ["fpn", "pspnet", "deeplabv3", "deeplabv3plus"])
def test_dropout_replaces_that_of_the_architecture(architecture: str):
    def rates(dropout: float) -> list[float]:
        model = build_model(Model(f"{architecture}:resnet18", dropout=dropout), 7)
        kinds = (nn.Dropout, nn.Dropout2d)
        return [x.p for x in model.modules() if isinstance(x, kinds) and x.p > 0]

    assert rates(0.1) == [0.1] and 0.1 not in rates(0.0) and rates(0.0)


def test_methods_see_the_features_before_dropout():
    model, seen = build_model(Model(dropout=0.5), 5), list[Tensor]()
    attachment = Learner(model, build_regularizer(["cr"], {}, 5, 240)).attachment
    assert attachment is not None
    model.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.randn(2, 3, 32, 32))
    dropped = (seen[0] == 0).flatten(2).all(2).float().mean()
    torch.testing.assert_close(seen[0], 2 * attachment.features * (seen[0] != 0))
    assert 0.3 < dropped < 0.7


def test_classifiers_start_from_a_given_deviation():
    options = Model("fpn:resnet18", auxiliary_weight=0.4, classifier_std=0.01)
    model = build_model(options, 50)
    assert model.auxiliary is not None
    for classifier in (model.classifier, model.auxiliary[-1]):
        assert float(classifier.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
        assert not classifier.bias.any()


def test_size_of_the_paper():
    """Parameters and multiply-adds (which papers print as FLOPs) of SAR's Table 20, except those of
    norms."""
    model = build_model(Model("hrnet-w48"), 19).eval().to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 1024, 1024, device="meta"))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(65.86e6, rel=5e-4)
    assert counter.get_total_flops() / 2 == pytest.approx(374.34e9, rel=0.01)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_weights_start_a_model_with_other_classes(auxiliary: bool, tmp_path: Path):
    """Those of a run. An auxiliary head comes and goes; the vectors of a method and the class
    weights stay behind."""
    source = build_model(Model(auxiliary_weight=0.4 * auxiliary), 5)
    loss = build_loss(Model(), torch.ones(5))
    run = Learner(source, build_regularizer(["sar"], {}, 5, 240), loss).state_dict()
    assert "pixel_loss.weight" in run
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": {f"learner.{name}": x for name, x in run.items()}}, path)
    model = build_model(Model(weights=str(path), auxiliary_weight=0.4 * (not auxiliary)), 9)
    assert torch.equal(next(model.parameters()), next(source.parameters()))


@pytest.mark.parametrize("kind", ["pth", "safetensors", "half precision"])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        (MOBILENET, lambda: timm.create_model("mobilenetv3_small_050")),
        ("fpn:mit_b0", lambda: smp.create_model("fpn", "mit_b0", encoder_weights=None)),
        ("fpn:tu-convnext_atto", lambda: timm.create_model("convnext_atto")),
    ],
)
def test_weights_of_a_backbone(
    name: str, make: Callable[[], Any], kind: str, tmp_path: Path, capsys: Any
):
    """Under the names of timm, which may number stages otherwise, or of smp, here with the rest of
    its network. A head is not used; batch norm's counters may be missing."""
    given, path = make().state_dict(), tmp_path / f"x.{kind}"
    if kind == "half precision":
        given = {name: x.half() for name, x in given.items() if x.dim()}
    save_file(given, path) if kind == "safetensors" else torch.save({"state_dict": given}, path)
    backbone = build_model(Model(name, backbone_weights=str(path)), 5).backbone.state_dict()
    sums = {float(x.double().sum()) for x in given.values()}
    assert all(float(x.double().sum()) in sums for x in backbone.values())
    assert not any(x.dtype == torch.half for x in backbone.values())
    taken = sum(kind != "half precision" or x.dim() > 0 for x in backbone.values())
    said = f"backbone: {taken} tensors of {path} taken, {len(given) - taken} not used"
    assert said in capsys.readouterr().err


FILES: dict[str, Callable[[], Any]] = {
    "list": lambda: [1, 2],
    "numbers": lambda: {"x": torch.zeros(1)},
    "hrnet": lambda: build_model(Model(), 5).state_dict(),
    "four channels": lambda: timm.create_model("mobilenetv3_small_050", in_chans=4).state_dict(),
}
BACKBONE = r"--model\.backbone_weights: .*"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("alexnet", {}, r"--model.network: expected hrnet-.*, got 'alexnet'"),
        ("unet:alexnet", {}, r"--model.network unet:alexnet: .*encoder name"),
        ("unet:tu-alexnet", {}, r"--model.network unet:tu-alexnet: Unknown model"),
        ("dpt:tu-vit_tiny_patch16_224", {"auxiliary_weight": 0.4}, r"_weight: expected 0 for DPT"),
        ("hrnet-w18-small", {"weights": "list"}, r"^list is damaged"),
        ("hrnet-w18-small", {"weights": "numbers"}, r"weights numbers are not .*missing"),
        ("segformer-b0", {"weights": "hrnet"}, r"weights hrnet are not those of this .*missing"),
        (MOBILENET, {"backbone_weights": "numbers"}, rf"{BACKBONE} of another network: \d+ tens"),
        (
            MOBILENET,
            {"backbone_weights": "four channels"},
            rf"{BACKBONE} size mismatch for model.conv_stem.weight: .*16, 4, 3, 3",
        ),
        (MOBILENET, {"backbone_weights": "none"}, rf"{BACKBONE}none cannot be loaded: "),
        (
            MOBILENET,
            {"backbone_weights": "list", "weights": "list"},
            r"--model\.backbone_weights: expected no --model\.weights",
        ),
    ],
)
def test_networks_that_cannot_be(
    name: str, options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.chdir(tmp_path)
    for file in FILES.keys() & set(options.values()):
        torch.save(FILES[file](), file)
    with pytest.raises(ValueError, match=message):
        build_model(Model(name, **options), 3)
