"""Networks by name, their weights, losses, methods and learning rates."""

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from trainings.gradient_ratios import MeasuringLearner

import anchorops as ao
from anchorops.train.networks import (
    Learner,
    build_loss,
    build_model,
    build_optimizer,
    build_regularizer,
    class_weights,
)
from anchorops.train.options import Model
from tests.helpers.tiny_runs import TINY, fitted, small_network

K, D = 11, 240  # of HRNet-W18-small on digits


@pytest.mark.parametrize(
    ("name", "dim", "stride", "moved"),
    [
        ("hrnet-w18-small", 240, 4, 1),
        ("segformer-b0", 256, 4, 1),
        ("pspnet:resnet50", 512, 8, 1),
        ("unet:resnet18", 16, 1, 0),
        ("dpt:tu-vit_tiny_patch16_224", 256, 2, 4),
    ],
)
def test_networks(name: str, dim: int, stride: int, moved: int):
    """Their logits, which late upsampling does not change, at another size too."""
    model = build_model(Model(name), 7, 4).double().eval()
    images = torch.randn(2, 4, 64, 32).double()
    logits = model(images)
    assert model.classifier.in_channels == dim
    assert logits.shape == (2, 7, 64 // stride, 32 // stride)
    with suppress(ValueError):  # there is nothing to move
        ao.late_upsampling(model, torch.zeros(1, 4, 64, 64).double())
    assert sum("_forward_changes" in vars(x) for x in model.modules()) == moved
    torch.testing.assert_close(model(images), logits)


@pytest.mark.parametrize("architecture", ["fpn", "pspnet", "deeplabv3", "deeplabv3plus"])
def test_dropout_replaces_that_of_the_architecture(architecture: str):
    def rates(dropout: float) -> list[float]:
        model = build_model(Model(f"{architecture}:resnet18", dropout=dropout), 7)
        kinds = (nn.Dropout, nn.Dropout2d)
        return [x.p for x in model.modules() if isinstance(x, kinds) and x.p > 0]

    assert rates(0.1) == [0.1] and 0.1 not in rates(0.0) and rates(0.0)


def test_classifiers_start_from_a_given_deviation():
    model: Any = build_model(Model("fpn:resnet18", auxiliary_weight=0.4, classifier_std=0.01), 50)
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
    """Those of a run. An auxiliary head comes and goes; the vectors of a method stay behind."""
    source = Learner(Model(auxiliary_weight=0.4 * auxiliary, methods=["sar"]), 5)
    path = tmp_path / "weights.pt"
    torch.save({"model": source.model.state_dict()}, path)
    model = build_model(Model(weights=str(path), auxiliary_weight=0.4 * (not auxiliary)), 9)
    assert torch.equal(next(model.parameters()), next(source.parameters()))
    names = {x for x in source.model.state_dict() if x.startswith(("classifier", "auxil", "regul"))}
    assert {*model.left_out} == names >= {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("fpn:mit_b0", lambda: smp.create_model("fpn", "mit_b0", encoder_weights=None)),
        ("fpn:tu-convnext_atto", lambda: timm.create_model("convnext_atto")),
        ("fpn:tu-mobilenetv3_small_050", lambda: timm.create_model("mobilenetv3_small_050").half()),
    ],
)
def test_weights_of_a_backbone(name: str, make: Callable[[], Any], tmp_path: Path):
    """Instead of a download. Under the names of smp, here with the rest of its network, or of timm,
    which may number stages otherwise. A head is not used; batch norm's counters may be missing."""
    path = tmp_path / "x.pth"
    given = {name: x for name, x in make().state_dict().items() if x.dim()}
    torch.save({"state_dict": given}, path)
    options = Model(name, pretrained=True, backbone_weights=str(path))
    backbone = build_model(options, 5).backbone.state_dict().values()
    taken = {float(x.double().sum()) for x in backbone if x.dim()}
    assert taken <= {float(x.double().sum()) for x in given.values()}
    assert not any(x.dtype == torch.half for x in backbone)


SMOOTHED = partial(ao.CrossEntropy, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({}, [ao.CrossEntropy]),
        ({"loss": "focal", "focal_gamma": 1.0}, [partial(ao.CrossEntropy, focal_gamma=1.0)]),
        ({"ohem_threshold": 0.3}, [partial(ao.CrossEntropy, ohem_threshold=0.3)]),
        ({"ohem_min_kept": 9}, [partial(ao.CrossEntropy, ohem_min_kept=9)]),
        ({"loss": "dice"}, [ao.Dice]),
        ({"loss": "ce+dice"}, [ao.CrossEntropy, ao.Dice]),
        ({"label_smoothing": 0.1, "loss": "ce+dice"}, [SMOOTHED, ao.Dice]),
        (
            {"class_weights": [1, 0, 2, 3], "loss": "focal"},
            [partial(ao.CrossEntropy, torch.tensor([1.0, 0, 2, 3]), focal_gamma=2.0)],
        ),
    ],
)
def test_losses(options: dict[str, Any], terms: list[Any]):
    logits, labels = torch.randn(2, 4, 5, 5), torch.randint(4, (2, 10, 10))
    labels[0, 0] = -1
    model = Model(**options)
    loss = build_loss(model, class_weights(model, 4, None))
    expected = [term(ignore_index=-1)(logits, labels) for term in terms]
    torch.testing.assert_close(loss(logits, labels), sum(expected))
    right = (ao.pixel_argmax(logits, (10, 10)) == labels).sum() / (labels >= 0).sum()
    torch.testing.assert_close(loss.terms["accuracy"], right)


def test_balanced_class_weights():
    """As scikit-learn's of the classes that occur: N / (K·n_k)."""
    labels = np.repeat([0, 1, 3], [3, 1, 8])
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    shares = torch.bincount(torch.from_numpy(labels)) / len(labels)
    learner = Learner(Model(class_weights="balanced"), 4, 3, None, shares)
    found: Any = learner.pixel_loss.weight
    torch.testing.assert_close(found, torch.tensor([*expected[:2], 0, expected[2]]).float())


@pytest.mark.parametrize(
    "methods", [(), ("cr",), ("sar",), ("cbp", "occl"), ("ceco", "mvsc")], ids="+".join
)
def test_a_step(methods: tuple[str, ...]):
    """With an auxiliary head, on the backbone's second last map."""
    learner: Any = Learner(Model(methods=methods, auxiliary_weight=0.4), K)
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(K, (2, 64, 64))
    model, seen = learner.model, list[Tensor]()
    model.auxiliary.register_forward_hook(lambda _, inputs, logits: seen.append(logits))
    loss, terms = learner(images, labels)
    assert seen[0].shape == (2, K, 4, 4)
    auxiliary = 0.4 * learner.pixel_loss(seen[0], labels).detach()
    torch.testing.assert_close(terms["auxiliary"], auxiliary)
    assert all(value.isfinite() for value in terms.values())
    parts = [terms[name] for name in ("ce", "auxiliary", "aux", "p2a") if name in terms]
    if {*methods} <= {"cr", "sar"}:
        torch.testing.assert_close(loss.detach(), sum(parts))
    else:
        assert loss > sum(parts)
    loss.backward()
    trained = [*model.body.parameters(), *model.auxiliary.parameters()]
    assert all(parameter.grad is not None for parameter in trained)
    assert len(learner.state_dict()) == len(model.state_dict())  # each entry once
    model(images)  # in training, without reading the logits
    model.eval()(images)
    copy.deepcopy(model)  # nothing of the graph is kept


def test_learning_rates_of_backbone_head_and_methods():
    model = Learner(Model(methods=["sar", "mvsc"]), K).model
    options = Model(lr=0.1, weight_decay=0.01, head_lr_factor=10.0)
    groups = build_optimizer(options, model, "fp32").param_groups
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups)
    slow = {*model.backbone.parameters(), *model.get_submodule("regularizer").parameters()}
    assert rates == pytest.approx({p: 0.1 if p in slow else 1.0 for p in model.parameters()})
    decays = {(p.dim() > 1, group["weight_decay"]) for group in groups for p in group["params"]}
    assert decays == {(True, 0.01), (False, 0.0)}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_that_float16_skips_changes_nothing(name: Any, monkeypatch: pytest.MonkeyPatch):
    """Whatever the memory held of which an optimizer makes its state."""
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, math.nan))
    trained = []
    for losses in ([1.0], [math.inf, 1.0]):
        torch.manual_seed(0)
        model, scaler = small_network(Model(), K), torch.amp.GradScaler("cpu")
        optimizer = build_optimizer(Model(optimizer=name), model, "fp16")
        for loss in losses:
            for parameter in model.parameters():
                parameter.grad = scaler.scale(torch.full_like(parameter, loss))
            scaler.step(optimizer)
            scaler.update()
        trained.append(model.state_dict())
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=0)


def test_settings():
    """The named arguments of the chosen methods; options override those of a preset."""
    paper: Any = {"occl.category_weight": 0.1, "ceco.loss_weight": 0.5}
    options = Model(methods=["ceco"], paper_options=paper)

    def loss_weight() -> float:
        regularizer: Any = build_regularizer(options, K, D)
        return regularizer.loss_weight

    assert loss_weight() == 0.5
    options.method_options = {"ceco.loss_weight": 0.3}
    assert loss_weight() == 0.3


def test_a_run_goes_on_without_the_file_of_weights(tmp_path: Path):
    weights = tmp_path / "weights.pt"
    torch.save(build_model(Model(), K).state_dict(), weights)
    words = f"{TINY} --run {tmp_path}/run --model.weights {weights}"
    fitted(f"{words} --max_steps 1")
    weights.unlink()
    fitted(f"{words} --max_steps 2 --resume")


def test_ratios_are_those_of_the_gradients():
    learner: Any = MeasuringLearner(Model(methods=["cbp", "occl", "mvsc"]), K)
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(K, (2, 32, 32))
    before, random = copy.deepcopy(learner.state_dict()), torch.get_rng_state()
    ratios = [*learner.ratios(images, labels).values()]
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(learner.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in learner.parameters())
    learner.train().model(images)
    features = learner.attachment.features.detach().requires_grad_()
    classifier, combined = learner.model.classifier, learner.attachment.regularizer
    terms = [learner.pixel_loss(classifier(features), labels)]
    terms += [method(features, labels, classifier) for method in combined.methods[1:]]
    norms = [float(torch.autograd.grad(term, features)[0].norm()) for term in terms]
    assert ratios == pytest.approx([0, *(norm / norms[0] for norm in norms[1:])], rel=1e-4)
