"""SAR against the released code's numbers and against its equations written out."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anchorops as ao

ROOT = Path(__file__).parents[1]


def oracle(name: str) -> dict[str, torch.Tensor]:
    shared = ROOT.parent / "shared" / "oracles" / name
    arrays = np.load(shared if shared.exists() else ROOT / "tests" / "oracles" / name)
    return {key: torch.as_tensor(arrays[key]) for key in arrays.files}


def sar_of_release(vectors: dict[str, torch.Tensor]) -> tuple[ao.SAR, nn.Conv2d]:
    num_classes, dim = int(vectors["C"]), int(vectors["D"])
    sar = ao.SAR(num_classes, dim, anchors=vectors["init/random_center"])
    names = {
        "projecter_linear.0": "0",
        "projecter_linear.1": "1",
        "projecter_linear.3": "3",
        "projecter_linear.4": "4",
        "projecter.conv": "6",
        "projecter.bn": "7",
    }
    state = {}
    for key, value in vectors.items():
        prefix, _, leaf = key.removeprefix("init/").rpartition(".")
        if prefix in names:
            state[f"{names[prefix]}.{leaf}"] = value.squeeze() if value.dim() == 4 else value
    sar.embedding.load_state_dict(state)
    classifier = nn.Conv2d(dim, num_classes, 1)
    classifier.load_state_dict(
        {leaf: vectors[f"init/decode_head.conv_seg.{leaf}"] for leaf in ("weight", "bias")}
    )
    return sar, classifier


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_sar_follows_the_release_step_by_step(memory_format: torch.memory_format) -> None:
    vectors = oracle("sar_official.npz")
    sar, classifier = sar_of_release(vectors)
    parameters = [*sar.parameters(), *classifier.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for t in range(14):
        features = vectors[f"{t}/features"].to(memory_format=memory_format).requires_grad_()
        loss = sar(features, vectors[f"{t}/labels"], classifier)
        optimizer.zero_grad()
        loss.backward()
        is_open = not vectors[f"{t}/p2a"].isnan()
        expected_p2a = vectors[f"{t}/p2a"].float() if is_open else torch.zeros(())
        assert sar.terms["gate"] == float(is_open)
        tolerance = {"rtol": 2e-4, "atol": 2e-6}
        torch.testing.assert_close(sar.terms["aux"], vectors[f"{t}/aux"].float(), **tolerance)
        torch.testing.assert_close(sar.terms["p2a"], expected_p2a, **tolerance)
        torch.testing.assert_close(loss.detach(), sar.terms["aux"] + sar.terms["p2a"])
        torch.testing.assert_close(features.grad, vectors[f"{t}/dfeatures"], rtol=1e-4, atol=1e-7)
        assert features.grad is not None and features.grad.stride() == features.stride()
        assert classifier.weight.grad is not None
        dclassifier = vectors[f"{t}/dclassifier"]
        torch.testing.assert_close(classifier.weight.grad, dclassifier, rtol=1e-3, atol=1e-5)
        momentum = vectors[f"{t}/momentum"]
        torch.testing.assert_close(sar.semantic_anchors, momentum, rtol=1e-4, atol=1e-5)
        assert sar.started.all() == is_open or sar.started.all()
        optimizer.step()
