"""The examples for Ultralytics and its released classes (`make check-ultralytics`)."""
# pyright: reportMissingImports=false

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("ultralytics", reason="ultralytics is not installed: make check-ultralytics")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import ultralytics_loss
import ultralytics_validator
from pycocotools import mask as coco
from ultralytics.models.yolo.segment import SegmentationPredictor, SegmentationValidator
from ultralytics.nn import tasks
from ultralytics.utils import ops

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


def masks_of_file(kind: type, shape: tuple[int, int]) -> tuple[list[dict], Tensor]:
    """What a validator writes to its file of an image of this shape; the masks apart."""
    torch.manual_seed(0)
    side, n = 320, 20
    gain = side / max(shape)
    pad = [(side - round(x * gain)) / 2 for x in shape]
    image = {"ori_shape": shape, "imgsz": [side, side], "im_file": "7.jpg"}
    image["ratio_pad"] = ((gain, gain), (pad[1], pad[0]))
    boxes = torch.cat([160 + 40 * torch.randn(2, n), 40 + 160 * torch.rand(2, n)])
    scores = torch.cat([torch.rand(1, n), torch.zeros(1, n)])
    predictions = torch.cat([boxes, scores, torch.randn(32, n)])[None]
    protos = nn.functional.interpolate(torch.randn(1, 32, 10, 10), (80, 80), mode="bicubic")

    validator = kind(args={"save_json": True, "conf": 0.1, "iou": 1.0})
    validator.nc, validator.end2end, validator.process = 2, False, ops.process_mask_native
    validator.class_map, validator.jdict = [1, 2], []
    [prediction] = validator.postprocess([predictions, protos])
    scaled = validator.scale_preds(prediction, image)
    validator.pred_to_json(scaled, image)
    entries = validator.jdict
    masks = torch.from_numpy(coco.decode([x.pop("segmentation") for x in entries]))
    if kind is not SegmentationValidator:
        logits = prediction["logits"]
        native = ops.process_mask_native(logits, torch.eye(len(logits)), scaled["bboxes"], shape)
        assert (native.permute(1, 2, 0) != masks).float().mean() < 1e-5
    return entries, masks


# Padding of 4 and of 3 pixels at each end, and none.
@pytest.mark.parametrize("shape", [(720, 739), (628, 640), (500, 500)])
def test_masks_of_the_validator(shape: tuple[int, int]):
    theirs, their_masks = masks_of_file(SegmentationValidator, shape)
    ours, our_masks = masks_of_file(ultralytics_validator.Validator, shape)
    assert len(ours) > 10 and ours == theirs
    assert (our_masks != their_masks).float().mean() < 0.005
    assert (our_masks < their_masks).float().mean() < 1e-4


# Padding at the top, at the left, and none.
@pytest.mark.parametrize(
    ("shape", "size"), [((100, 160), (128, 160)), ((90, 43), (160, 96)), ((64, 64),) * 2]
)
def test_masks_of_the_predictor(shape: tuple[int, int], size: tuple[int, int]):
    corners = torch.rand(20, 2) * torch.tensor(size[::-1])
    boxes = torch.cat([corners - 30 * torch.rand(20, 2), corners + 30 * torch.rand(20, 2)], 1)
    pred = torch.cat([boxes, torch.rand(20, 1), torch.zeros(20, 1), torch.randn(20, 32)], 1)
    low = nn.functional.interpolate(
        torch.randn(1, 32, 8, 8), [n // 4 for n in size], mode="bicubic"
    )
    results = []
    for kind in (SegmentationPredictor, ultralytics_validator.Predictor):
        predictor = kind(overrides={"retina_masks": True})
        predictor.model = SimpleNamespace(names={0: "object"})
        image, batch = np.zeros((*shape, 3), np.uint8), torch.zeros(1, 3, *size)
        results.append(predictor.construct_result(pred.clone(), batch, image, "7.jpg", low[0]))
    theirs, ours = results
    assert ours.masks is None and len(ours.run_lengths) == len(ours.boxes) > 10
    assert torch.equal(ours.boxes.data, theirs.boxes.data)
    assert (ours.run_lengths.dense() != theirs.masks.data).float().mean() < 1e-4
