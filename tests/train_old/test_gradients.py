"""The gradients of the methods relative to the cross-entropy's. Measuring them changes no run."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TINY, metrics
from torch import nn

from anchorops.train.networks.learner import Learner, build_regularizer
from anchorops.train.networks.models import Segmenter, build_model
from anchorops.train.report.cost import gradient_ratios
from anchorops.train.run import loop
from anchorops.train.run.checkpoint import load_checkpoint

RUN = TINY.replace(val_images=4, steps=4, eval_every=0)


@pytest.fixture(autouse=True)
def _only_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop, "finish", lambda *arguments: {})  # no pictures


@pytest.mark.parametrize(
    "options",
    [
        {"methods": ("sar", "occl", "ceco", "mvsc"), "accumulate": 2, "bf16": True},
        {"methods": ("cbp", "occl"), "method_options": {"cbp.update": "ema"}, "clip": 1.0},
    ],
    ids=["combined", "ema"],
)
def test_measuring_changes_no_run(options: dict, tmp_path: Path):
    runs = []
    for every in (0, 1):
        config = RUN.replace(
            out=tmp_path, name=f"every-{every}", gradient_ratio_every=every, **options
        )
        loop.start(config)
        runs.append(config.run)
    first, second = (load_checkpoint(run / "checkpoint-00000004.pt")["model"] for run in runs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    shown = [[line["loss"] for line in metrics(run, "loss")] for run in runs]
    assert shown[0] == shown[1] and len(shown[0]) == 2
    for name in (f"{method}.gradient_ratio" for method in options["methods"]):
        assert not metrics(runs[0], name)
        ratios = {line["step"]: line[name] for line in metrics(runs[1], name)}
        assert list(ratios) == [1, 2, 3, 4]
        assert name in ("sar.gradient_ratio", "cbp.gradient_ratio") or min(ratios.values()) > 0


def test_resumed_run_measures_the_same(tmp_path: Path):
    config = RUN.replace(out=tmp_path, name="run", methods=("occl",), gradient_ratio_every=2)
    loop.start(config)
    first = metrics(config.run, "occl.gradient_ratio")
    assert [line["step"] for line in first] == [1, 3]
    (config.run / "checkpoint-00000004.pt").unlink()
    loop.resume(config.run)
    assert metrics(config.run, "occl.gradient_ratio") == first


def test_ratios_are_those_of_the_gradients():
    torch.manual_seed(0)
    methods = ("cbp", "occl", "mvsc")
    model = build_model("hrnet-w18-small", 11)
    learner = Learner(model, build_regularizer(methods, {}, 11, 240))
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 11, (2, 32, 32))
    state = {name: value.clone() for name, value in learner.state_dict().items()}
    random = torch.get_rng_state()
    ratios = gradient_ratios(learner, images, labels, bf16=False)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in learner.state_dict().items())
    assert all(parameter.grad is None for parameter in learner.parameters())

    learner.train().model(images)
    attachment = learner.attachment
    assert attachment is not None and attachment.features is not None
    features = attachment.features.detach().requires_grad_()
    logits = model.classifier(features)
    (expected,) = torch.autograd.grad(learner.pixel_loss(logits, labels), features)
    norms = [torch.zeros(())]
    combined: Any = attachment.regularizer
    for method in combined.methods[1:]:
        (gradient,) = torch.autograd.grad(method(features, labels, model.classifier), features)
        norms.append(gradient.norm())
    assert ratios == pytest.approx([float(norm / expected.norm()) for norm in norms], rel=1e-4)


def test_compiled_learner():
    """The measurement does not use the compiled code, and the learner stays compiled."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, stride=4), nn.BatchNorm2d(16), nn.ReLU())
    learner = Learner(Segmenter(body, 16, 11), build_regularizer(("occl",), {}, 11, 16))
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 11, (2, 32, 32))
    eager = gradient_ratios(learner, images, labels, bf16=False)
    learner.compile(backend="aot_eager")
    assert gradient_ratios(learner, images, labels, bf16=False) == eager
    alone, measured = copy.deepcopy(learner), copy.deepcopy(learner)
    for each in (alone, measured):
        each.compile(backend="aot_eager")
    for _ in range(2):
        gradient_ratios(measured, images, labels, bf16=False)
        (first, _), (second, _) = (each(images, labels) for each in (alone, measured))
        assert torch.equal(first, second)
        first.backward()
        second.backward()
    gradients = [[p.grad for p in each.parameters()] for each in (alone, measured)]
    for first, second in zip(*gradients, strict=True):
        assert first is not None and torch.equal(first, second)
