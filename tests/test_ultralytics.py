"""The example for Ultralytics against its released class. `make check-ultralytics` installs it."""
# pyright: reportMissingImports=false

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("ultralytics", reason="ultralytics is not installed: make check-ultralytics")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import ultralytics_loss
from ultralytics.nn import tasks

BATCH = 3


class Model(nn.Module):
    """What Ultralytics' loss reads of a model."""

    def __init__(self, classes: int, data: str = "", class_weights: Tensor | None = None) -> None:
        super().__init__()
        self.classes = classes
        head = nn.Conv2d(1, 1, 1)
        head.nc = classes  # pyright: ignore[reportAttributeAccessIssue]
        self.model = nn.ModuleList([head])
        self.args, self.class_weights = SimpleNamespace(data=data), class_weights


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("ratio", [8, 1])
@pytest.mark.parametrize(
    "model",
    [
        Model(19, "cityscapes.yaml"),
        Model(5),
        Model(5, class_weights=torch.linspace(0.5, 2, 5)),
        Model(1),
    ],
    ids=["cityscapes", "plain", "class weights", "one class"],
)
def test_loss(model: Model, ratio: int, auxiliary: bool) -> None:
    classes = model.classes
    labels = torch.randint(0, max(classes - 1, 2), (BATCH, 6 * ratio, 7 * ratio)).int()
    labels[torch.rand(labels.shape) < 0.1] = 255
    batch = {"semantic_mask": labels}
    heads = [2 * torch.randn(BATCH, classes, 6, 7), torch.randn(BATCH, classes, 3, 4)]

    def run(loss: nn.Module) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in heads[: 1 + auxiliary]]
        total, parts = loss(tuple(leaves) if auxiliary else leaves[0], batch)
        assert list(parts) == ["ce_loss", "dice_loss", "aux_loss"]
        assert not any(part.requires_grad for part in parts.values())
        return total.detach(), *torch.autograd.grad(total, leaves), *parts.values()

    ours = run(ultralytics_loss.SemanticSegmentationLoss(model))
    theirs = run(ultralytics_loss.TheirLoss(model))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "SemanticSegmentationLoss", ultralytics_loss.TheirLoss)
    ultralytics_loss.install()
    model = tasks.SemanticSegmentationModel("yolo26n-sem.yaml", nc=4, verbose=False).train()
    model.args = SimpleNamespace(data="")
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 4, (2, 64, 64))
    total, _ = model.loss({"img": images, "semantic_mask": labels})
    assert isinstance(model.criterion, ultralytics_loss.SemanticSegmentationLoss)
    total.sum().backward()
    assert all(x.grad is not None for x in model.model[-1].parameters())
