"""The gradients of the methods relative to the cross-entropy's. Measuring them changes no run."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TINY, assert_equal, figures, state
from torch import nn

from anchorops.train.cli import train
from anchorops.train.networks.learner import Learner, build_regularizer
from anchorops.train.networks.models import Segmenter, build_model
from anchorops.train.report.cost import gradient_ratios


@pytest.mark.parametrize(
    ("methods", "options"),
    [
        (
            ["sar", "occl", "ceco", "mvsc"],
            ["--trainer.accumulate_grad_batches", "2", "--trainer.precision", "bf16-mixed"],
        ),
        (
            ["cbp", "occl"],
            ["--model.method_options", "{cbp.update: ema}", "--trainer.gradient_clip_val", "1.0"],
        ),
    ],
    ids=["combined", "ema"],
)
def test_measuring_changes_no_run(methods: list[str], options: list[str], tmp_path: Path):
    runs = []
    for every in (0, 1):
        words = ["--gradients.every", str(every), "--data.steps", "4", "--model.methods"]
        run = str(tmp_path / f"every-{every}")
        runs.append(train(*TINY, *words, f"[{', '.join(methods)}]", *options, "--run", run))
    first, second = (state(run)["state_dict"] for run in runs)
    assert_equal(first, second)
    without, measured = (figures(run) for run in runs)
    names = [f"{method}.gradient_ratio" for method in methods]
    assert not any(name in line for line in without.values() for name in names)
    for name in names:
        ratios = [line[name] for line in measured.values() if name in line]
        assert len(ratios) == 4
        assert name in ("sar.gradient_ratio", "cbp.gradient_ratio") or min(ratios) > 0
    for line in measured.values():
        for name in names:
            line.pop(name, None)
    assert without == {step: line for step, line in measured.items() if line}


def test_ratios_are_those_of_the_gradients():
    torch.manual_seed(0)
    methods = ("cbp", "occl", "mvsc")
    model = build_model("hrnet-w18-small", 11)
    learner = Learner(model, build_regularizer(methods, {}, 11, 240))
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 11, (2, 32, 32))
    state = {name: value.clone() for name, value in learner.state_dict().items()}
    random = torch.get_rng_state()
    ratios = gradient_ratios(learner, images, labels)
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
    eager = gradient_ratios(learner, images, labels)
    learner.compile(backend="aot_eager")
    assert gradient_ratios(learner, images, labels) == eager
    alone, measured = copy.deepcopy(learner), copy.deepcopy(learner)
    for each in (alone, measured):
        each.compile(backend="aot_eager")
    for _ in range(2):
        gradient_ratios(measured, images, labels)
        (first, _), (second, _) = (each(images, labels) for each in (alone, measured))
        assert torch.equal(first, second)
        first.backward()
        second.backward()
    gradients = [[p.grad for p in each.parameters()] for each in (alone, measured)]
    for first, second in zip(*gradients, strict=True):
        assert first is not None and torch.equal(first, second)
