"""The presets compared with the settings of the papers' frameworks."""

import pytest
import torch
from torch import Tensor, nn
from torchvision import tv_tensors

from anchorops.train.commands import PRESETS, load_preset, parse
from anchorops.train.data.loading import RandomScale, augmentation, evaluation_transform
from anchorops.train.networks.learner import Learner, build_regularizer, parameter_groups
from anchorops.train.networks.models import build_model
from anchorops.train.options import Data


def test_classifiers_start_from_a_given_deviation():
    model = build_model("fpn:resnet18", 50, auxiliary=True, classifier_std=0.01)
    assert model.auxiliary is not None
    for classifier in (model.classifier, model.auxiliary[-1]):
        assert isinstance(classifier, nn.Conv2d) and classifier.bias is not None
        assert float(classifier.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
        assert not classifier.bias.any()


def test_methods_see_the_features_before_dropout():
    model = build_model("hrnet-w18-small", 5, dropout=0.5)
    learner = Learner(model, build_regularizer(["cr"], {}, 5, 240))
    seen: dict[str, Tensor] = {}
    model.body.register_forward_hook(lambda _, images, features: seen.update(body=features))
    model.classifier.register_forward_pre_hook(lambda _, args: seen.update(classifier=args[0]))
    model(torch.randn(2, 3, 32, 32))
    assert learner.attachment is not None
    assert learner.attachment._features is seen["body"]
    dropped = (seen["classifier"] == 0).flatten(2).all(2).float().mean()
    assert 0.3 < dropped < 0.7
    model.eval()(torch.randn(2, 3, 32, 32))
    assert torch.equal(seen["classifier"], seen["body"])


def test_learning_rates_of_backbone_head_and_methods():
    model = build_model("hrnet-w18-small", 5)
    Learner(model, build_regularizer(["sar", "mvsc"], {}, 5, 240))
    groups = parameter_groups(model, 0.1, 0.01, head_lr_factor=10.0)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rate) == sum(len(group["params"]) for group in groups)
    assert set(rate) == {id(p) for p in model.parameters()}
    for module, expected in (
        (model.body.backbone, 0.1),
        (model.body.mix, 1.0),
        (model.classifier, 1.0),
        (model.regularizer, 0.1),
    ):
        assert isinstance(module, nn.Module)
        assert all(rate[id(p)] == pytest.approx(expected) for p in module.parameters())
    decayed = {group["weight_decay"] for group in groups if group["params"][0].dim() > 1}
    assert decayed == {0.01}


@pytest.mark.parametrize(
    ("short_side", "long_side", "size"),
    [
        (None, None, (40, 80)),
        (20, None, (20, 40)),
        (None, 20, (10, 20)),
        (20, 30, (15, 30)),
        (20, 60, (20, 40)),
    ],
)
def test_sides(short_side: int | None, long_side: int | None, size: tuple[int, int]):
    image = tv_tensors.Image(torch.zeros(3, 40, 80, dtype=torch.uint8))
    assert RandomScale(short_side, (1.0, 1.0), long_side)(image).shape[1:] == size
    options = Data("folder", short_side=short_side, long_side=long_side)
    assert evaluation_transform(options)(image).shape[1:] == size


def test_padding_comes_after_normalisation():
    """Images are padded at the bottom and at the right, with 0: the mean of normalised images."""
    image = tv_tensors.Image(torch.full((3, 20, 40), 255, dtype=torch.uint8))
    mask = tv_tensors.Mask(torch.ones(20, 40, dtype=torch.int16))
    padded, labels = augmentation(Data("folder", crop=(32, 32)))(image, mask)
    assert padded.shape == (3, 32, 32) and labels.shape == (32, 32)
    assert (padded[:, :20] > 2).all() and not padded[:, 20:].any()
    assert (labels[:20] == 1).all() and (labels[20:] == -1).all()


NAMES = sorted({path.stem for path in PRESETS.glob("*.yaml")} - {"shared"})
CONVOLUTIONAL = {load_preset(x)["model"]["network"] for x in NAMES if "segformer" not in x}


@pytest.mark.parametrize("network", sorted(CONVOLUTIONAL))
def test_networks_of_presets(network: str):
    with torch.device("meta"):
        model = build_model(network, 19, auxiliary=True)
        assert model(torch.empty(2, 3, 64, 96)).shape[:2] == (2, 19)
        assert model.auxiliary and model.auxiliary.logits().shape[:2] == (2, 19)


@pytest.mark.parametrize("preset", NAMES)
def test_presets(preset: str):
    """Their options exist, those of the methods too. Transformers have a linear warm-up and decay;
    windows are those of mmsegmentation: on Pascal-Context 480 by steps of 320, on Cityscapes with
    SegFormer 1024 by 768."""
    options = parse("fit", ["--config", preset]).options
    model, data = options.model, options.data
    paper = model.paper_options or {}
    methods = sorted({option.partition(".")[0] for option in paper})
    assert build_regularizer(methods, paper, 11, 240) is not None or not paper
    if data.dataset in ("digits", "folder", "camvid"):  # without a published result
        return
    transformer = model.optimizer == "adamw"
    assert (model.warmup, model.power) == ((1_500, 1.0) if transformer else (0, 0.9))
    strides = {"pascal-context": (320, 320), "cityscapes-segformer-b4": (768, 768)}
    stride = strides.get(data.dataset) or strides.get(preset)
    assert model.window_stride == stride
    assert (model.evaluation == "sliding") == (stride is not None)


def test_options_of_the_papers():
    """Section 4.2 of CBP and OCCL names families of networks, not only the one of its table."""
    expected = {"cbp.length": 1, "occl.centroid_weight": 1, "occl.category_weight": 0.1}
    for preset, category_weight in (
        ("ade20k-segformer-b5", 0.1),
        ("coco-stuff-10k-segformer-b4", 0.1),
        ("ade20k-upernet-swin-t", 0.2),
    ):
        options = load_preset(preset)["model"]["paper_options"]
        assert options == {**expected, "occl.category_weight": category_weight}
