"""The gradients of the methods relative to the cross-entropy's. Measuring them changes no run."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TINY, assert_equal, figures, state
from trainings.gradient_ratios import measure

from anchorops.train.commands import fit
from anchorops.train.networks.learner import Learner, build_regularizer
from anchorops.train.networks.models import build_model


@pytest.mark.slow
def test_measuring_changes_no_run(tmp_path: Path):
    """With accumulated batches and automatic mixed precision too."""
    methods = ["sar", "occl", "ceco", "mvsc"]
    words = [*TINY, "--data.steps", "4", "--model.methods", f"[{', '.join(methods)}]"]
    words += ["--accumulate", "2", "--precision", "bf16", "--run"]
    plain = fit([*words, str(tmp_path / "plain")])
    run = fit([*words, str(tmp_path / "measured")], partial(measure, methods))
    assert_equal(state(plain)["model"], state(run)["model"])
    for name in methods:
        ratios = [x for line in figures(run).values() if (x := line.get(f"{name}.gradient_ratio"))]
        assert name == "sar" or (len(ratios) == 1 and min(ratios) > 0)


def test_ratios_are_those_of_the_gradients():
    torch.manual_seed(0)
    methods = ("cbp", "occl", "mvsc")
    model = build_model("hrnet-w18-small", 11)
    learner = Learner(model, build_regularizer(methods, {}, 11, 240))
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 11, (2, 32, 32))
    state = {name: value.clone() for name, value in learner.state_dict().items()}
    random = torch.get_rng_state()
    ratios = [*measure(methods, 0, learner, images, labels).values()]
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
