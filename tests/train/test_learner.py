"""Losses, class weights, methods with their arguments and vectors, learning rates and gradients."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradient_ratios import gradient_ratios, measure
from torch import Tensor

import anchorops as ao
from anchorops.train.networks.learner import (
    SETTINGS,
    Learner,
    arguments_of,
    build_loss,
    build_regularizer,
    class_weights,
    parameter_groups,
)
from anchorops.train.networks.models import build_model
from anchorops.train.options import Model
from tests.helpers.tiny_runs import TINY, assert_equal, figures, fitted, state

K, D = 11, 240  # of HRNet-W18-small on digits


def learner_of(*methods: str, **options: Any) -> Learner:
    model = build_model(Model(auxiliary_weight=0.4 * bool(options)), K)
    return Learner(model, build_regularizer(methods, {}, K, D), **options)


def batch(side: int = 32) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, side, side), torch.randint(K, (2, side, side))


@pytest.mark.parametrize(("kind", "power"), [("inverse-sqrt", 0.5), ("inverse", 1)])
def test_class_weights(kind: str, power: float):
    weights = class_weights(kind, torch.tensor([0.64, 0.32, 0.04, 0]).double())
    expected = torch.tensor([0.64, 0.32, 0.04]) ** -power
    torch.testing.assert_close(weights[:3], expected / expected.mean())
    assert weights[3] == 1 and class_weights("none", torch.ones(3)) is None


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({}, [ao.CrossEntropy]),
        ({"loss": "focal", "focal_gamma": 1.0}, [partial(ao.CrossEntropy, focal_gamma=1.0)]),
        ({"ohem_threshold": 0.3}, [partial(ao.CrossEntropy, ohem_threshold=0.3)]),
        ({"ohem_min_kept": 9}, [partial(ao.CrossEntropy, ohem_min_kept=9)]),
        ({"loss": "dice"}, [ao.Dice]),
        ({"loss": "ce+dice"}, [ao.CrossEntropy, ao.Dice]),
    ],
)
def test_losses(options: dict[str, Any], terms: list[Any]):
    logits, labels = torch.randn(2, 4, 5, 5), torch.randint(4, (2, 10, 10))
    labels[0, 0] = -1
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    loss = build_loss(Model(**options), weights)
    expected = [term(weight=weights, ignore_index=-1)(logits, labels) for term in terms]
    torch.testing.assert_close(loss(logits, labels), sum(expected))
    right = (ao.pixel_argmax(logits, (10, 10)) == labels).sum() / (labels >= 0).sum()
    torch.testing.assert_close(loss.terms["accuracy"], right)


@pytest.mark.parametrize(
    "methods", [(), ("cr",), ("cbp", "occl"), ("ceco",), ("sar", "mvsc")], ids="+".join
)
def test_a_step(methods: tuple[str, ...]):
    """With an auxiliary head, on the backbone's second last map."""
    learner, (images, labels) = learner_of(*methods, auxiliary_weight=0.4), batch(64)
    model, seen = learner.model, list[Tensor]()
    model.auxiliary.register_forward_hook(lambda _, inputs, logits: seen.append(logits))
    loss, terms = learner(images, labels)
    assert seen[0].shape == (2, K, 4, 4)
    auxiliary = 0.4 * learner.pixel_loss(seen[0], labels).detach()
    torch.testing.assert_close(terms["auxiliary"], auxiliary)
    assert all(value.isfinite() for value in terms.values())
    assert (loss > terms["ce"] + auxiliary) == bool(methods)
    loss.backward()
    assert all(
        p.grad is not None for part in (model.body, model.auxiliary) for p in part.parameters()
    )
    assert len(learner.state_dict()) == len(model.state_dict())  # each entry once
    model(images)  # in training, without reading the logits
    model.eval()(images)
    copy.deepcopy(model)  # nothing of the graph is kept


def test_learning_rates_of_backbone_head_and_methods():
    model = learner_of("sar", "mvsc").model
    groups = parameter_groups(model, 0.1, 0.01, head_lr_factor=10.0)
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups)
    slow = {*model.body.backbone.parameters(), *model.regularizer.parameters()}
    assert rates == pytest.approx({p: 0.1 if p in slow else 1.0 for p in model.parameters()})
    assert {p.dim() > 1: group["weight_decay"] for group in groups for p in group["params"]} == {
        True: 0.01,
        False: 0.0,
    }


def test_settings():
    """The named arguments of the chosen methods; options override them, and they override those of
    the preset's paper."""
    paper = {"occl.category_weight": 0.1, "ceco.loss_weight": 0.5}
    methods, options = ["sar", "ceco"], {"ceco.loss_weight": 0.3}
    assert arguments_of(methods, "from-scratch", paper, {}) == {"ceco.loss_weight": 0.2}
    assert arguments_of(methods, "from-scratch", paper, options) == options
    assert arguments_of(methods, "published", paper, {}) == {"ceco.loss_weight": 0.5}
    for arguments in SETTINGS.values():
        build_regularizer(["occl", "ceco"], arguments, K, D)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "clip.npy"
    np.save(path, np.random.default_rng(0).normal(size=(K, D)))
    return path


def test_arguments_of_methods(rows: Path):
    """Vectors come from files; CBP's are orthogonalised, so the first row keeps its direction."""
    options = {"sar.delta": 0.5, "sar.gate": "per_class", "sar.anchors": f"@{rows}"}
    expected = torch.from_numpy(np.load(rows)).float()
    sar = build_regularizer(["sar"], options, K, D)
    cr = build_regularizer(["cr"], {"cr.anchors": f"@{rows}"}, K, D)
    assert (sar.delta, sar.gate) == (0.5, "per_class")
    assert torch.equal(sar.anchors, expected) and torch.equal(cr.anchors, expected)
    basis = build_regularizer(["cbp"], {"cbp.init": f"@{rows}", "cbp.length": 1}, K, D).basis
    torch.testing.assert_close(basis[0], expected[0] / expected[0].norm())
    torch.testing.assert_close(basis @ basis.T, torch.eye(K))


def test_a_run_goes_on_without_the_file(rows: Path, tmp_path: Path):
    options = f'{{"sar.anchors":"@{rows}"}}'
    words = f"{TINY} --run {tmp_path}/run --model.method_options {options}"
    fitted(f"{words} --max_steps 1")
    anchors = torch.from_numpy(np.load(rows)).float()
    rows.unlink()
    run = fitted(f"{words} --max_steps 2 --resume")
    assert torch.equal(state(run)["model"]["regularizer.anchors"], anchors)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("sar.detla", 0.5, r"sar has .*delta"),
        ("sar.momentum", "foo", r"SAR: momentum: expected .* got 'foo'"),
        ("occl.temperature", 1, r"METHOD among --model.methods \['sar'\]"),
        ("sar.anchors", np.zeros((K, D + 1)), r"anchors: expected .* \[11, 240\], got .*, 241\)"),
        ("sar.anchors", np.full((K, D), np.nan), "x.npy: expected finite numbers"),
        ("sar.anchors", np.full((K, D), 1e300), "x.npy: expected finite"),  # too large for float32
        ("sar.anchors", np.array([[{}]]), r"sar.anchors: .*x.npy cannot be read: .*pickle"),
        ("sar.anchors", "@nowhere.npy", r"nowhere.npy cannot be read: .*No such file"),
        ("sar.anchors", {"a": np.zeros(1), "b": np.zeros(1)}, r"x.npy cannot be read"),
    ],
)
def test_arguments_that_do_not_fit(option: str, value: Any, message: str, tmp_path: Path):
    if not isinstance(value, str | float):
        with open(tmp_path / "x.npy", "wb") as file:
            np.savez(file, **value) if isinstance(value, dict) else np.save(file, value)
        value = f"@{tmp_path}/x.npy"
    with pytest.raises(ValueError, match=message):
        build_regularizer(["sar"], {option: value}, K, D)


@pytest.mark.slow
def test_measuring_gradients_changes_no_run(tmp_path: Path):
    """With accumulated batches and automatic mixed precision too."""
    methods = ["sar", "occl", "ceco", "mvsc"]
    words = f"{TINY} --data.steps 4 --model.methods [{','.join(methods)}] --accumulate 2"
    plain = fitted(f"{words} --precision bf16 --run {tmp_path}/plain")
    run = fitted(f"{words} --precision bf16 --run {tmp_path}/run", partial(measure, methods))
    assert_equal(state(plain)["model"], state(run)["model"])
    for name in methods:
        ratios = [x for line in figures(run).values() if (x := line.get(f"{name}.gradient_ratio"))]
        assert name == "sar" or (len(ratios) == 1 and min(ratios) > 0)


def test_ratios_are_those_of_the_gradients():
    learner, (images, labels) = learner_of("cbp", "occl", "mvsc"), batch()
    before, random = copy.deepcopy(learner.state_dict()), torch.get_rng_state()
    ratios = gradient_ratios(learner, images, labels)
    assert torch.equal(torch.get_rng_state(), random)
    assert_equal(dict(learner.state_dict()), dict(before))
    assert all(parameter.grad is None for parameter in learner.parameters())
    learner.train().model(images)
    features = learner.attachment.features.detach().requires_grad_()
    classifier, combined = learner.model.classifier, learner.attachment.regularizer
    losses = [learner.pixel_loss(classifier(features), labels)]
    losses += [method(features, labels, classifier) for method in combined.methods[1:]]
    norms = [float(torch.autograd.grad(loss, features)[0].norm()) for loss in losses]
    assert ratios == pytest.approx([0, *(norm / norms[0] for norm in norms[1:])], rel=1e-4)
