"""The presets compared with the settings of the papers' frameworks."""

import pytest
import torch
from torch import Tensor, nn
from torchvision import tv_tensors

from anchorops.train.config import Data
from anchorops.train.data.loading import RandomScale, augmentation, evaluation_transform
from anchorops.train.networks.learner import Learner, build_regularizer, parameter_groups
from anchorops.train.networks.models import build_model
from anchorops.train.presets import DIGITS, METHOD_OPTIONS, PRESETS, with_published_options


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


def test_deeplab_has_one_dropout():
    shares = [
        sorted(m.p for m in model.modules() if isinstance(m, nn.Dropout | nn.Dropout2d))
        for model in (
            build_model("deeplabv3plus:resnet18", 5),
            build_model("deeplabv3plus:resnet18", 5, dropout=0.1),
        )
    ]
    assert shares == [[0.5], [0.0, 0.1]]


def test_learning_rates_of_backbone_head_and_methods():
    model = build_model("hrnet-w18-small", 5)
    Learner(model, build_regularizer(["sar", "mvsc"], {}, 5, 240))
    groups = parameter_groups(model, 0.1, 0.01, head_lr_factor=10.0, regularizer_lr_factor=2.0)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rate) == sum(len(group["params"]) for group in groups)
    assert set(rate) == {id(p) for p in model.parameters()}
    for module, expected in (
        (model.body.backbone, 0.1),
        (model.body.mix, 1.0),
        (model.classifier, 1.0),
        (model.regularizer, 0.2),
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
    data = Data("ade20k", short_side=short_side, long_side=long_side)
    assert evaluation_transform(data, 3)(image).shape[1:] == size


def test_padding_comes_after_normalisation():
    """Images are padded at the bottom and at the right, with 0: the mean of normalised images."""
    image = tv_tensors.Image(torch.full((3, 20, 40), 255, dtype=torch.uint8))
    mask = tv_tensors.Mask(torch.ones(20, 40, dtype=torch.int16))
    padded, labels = augmentation(Data("ade20k", crop=(32, 32)), 3)(image, mask)
    assert padded.shape == (3, 32, 32) and labels.shape == (32, 32)
    assert (padded[:, :20] > 2).all() and not padded[:, 20:].any()
    assert (labels[:20] == 1).all() and (labels[20:] == -1).all()


def test_options_of_the_methods_that_a_preset_brings():
    preset = "ade20k-segformer-b5"
    config = PRESETS[preset][1]
    assert with_published_options(preset, config) == config
    occl = with_published_options(preset, config.replace(methods=("sar", "occl")))
    assert occl.model.method_options == {
        "occl.centroid_weight": "1",
        "occl.category_weight": "0.1",
    }
    chosen = config.replace(methods=("occl",), method_options={"occl.category_weight": "0.5"})
    assert with_published_options(preset, chosen).model.method_options == {
        "occl.centroid_weight": "1",
        "occl.category_weight": "0.5",
    }
    assert with_published_options("digits", DIGITS) == DIGITS
    scratch = config.replace(methods=("cbp", "occl"), setting="from-scratch")
    assert with_published_options(preset, scratch).model.method_options == {"cbp.length": "1"}


@pytest.mark.parametrize(
    ("preset", "length", "category_weight"),
    [("coco-stuff-10k-segformer-b4", "1", "0.1"), ("ade20k-upernet-swin-t", "1", "0.2")],
)
def test_published_options_of_the_network(preset: str, length: str, category_weight: str):
    """Section 4.2 of CBP and OCCL names families of networks, not only the one of its table."""
    config = PRESETS[preset][1].replace(methods=("cbp", "occl"))
    assert with_published_options(preset, config).model.method_options == {
        "cbp.length": length,
        "occl.centroid_weight": "1",
        "occl.category_weight": category_weight,
    }


@pytest.mark.parametrize("preset", METHOD_OPTIONS)
def test_published_options_are_options(preset: str):
    options = METHOD_OPTIONS[preset]
    methods = {option.partition(".")[0] for option in options}
    assert preset in PRESETS and build_regularizer(sorted(methods), options, 11, 240) is not None


@pytest.mark.parametrize("preset", PRESETS)
def test_schedules_and_windows_of_mmsegmentation(preset: str):
    """Transformers: a linear warm-up and decay; windows: Pascal-Context 480 by steps of 320,
    Cityscapes with SegFormer 1024 by 768."""
    config = PRESETS[preset][1]
    if config.data.dataset in ("digits", "folder"):
        return
    transformer = config.optimization.optimizer == "adamw"
    schedule = config.optimization.warmup, config.optimization.power
    assert schedule == ((1_500, 1.0) if transformer else (0, 0.9))
    strides = {"pascal-context": (320, 320), "cityscapes-segformer-b4": (768, 768)}
    stride = strides.get(config.data.dataset) or strides.get(preset)
    assert config.running.window_stride == stride
    assert (config.running.evaluation == "sliding") == (stride is not None)
