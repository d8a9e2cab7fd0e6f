"""Predictions and the confusion matrix of a validation split."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from .config import MULTIPLE
from .digits import IGNORED


def pad_to_multiple(images: Tensor, value: float = 0.0) -> Tensor:
    """(…, h, w) with sides that the networks take, filled below and at the right."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % MULTIPLE, 0, -height % MULTIPLE), value=value)


def _upsampled_logits(model: nn.Module, images: Tensor, size: Sequence[int]) -> Tensor:
    """float32 (B, K, *size) of images (B, C, h, w) of any size."""
    height, width = images.shape[2:]
    padded = pad_to_multiple(images)
    logits = model(padded).float()
    if padded.shape != images.shape:
        logits = F.interpolate(logits, padded.shape[2:], mode="bilinear", align_corners=False)
        logits = logits[..., :height, :width]
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def _starts(length: int, window: int) -> list[int]:
    """First pixels of windows that cover the length, overlapping by at least a third."""
    if length <= window:
        return [0]
    stride = max(1, window * 2 // 3)
    return [*range(0, length - window, stride), length - window]


def predict(
    model: nn.Module, images: Tensor, size: Sequence[int], window: tuple[int, int] | None = None
) -> Tensor:
    """Classes int64 (B, *size) of images (B, C, h, w), seen whole or through sliding windows whose
    logits are averaged where they overlap."""
    if window is None:
        return _upsampled_logits(model, images, size).argmax(1)
    height, width = images.shape[2:]
    rows, columns = window
    total, times = None, images.new_zeros(height, width)
    for top in _starts(height, rows):
        for left in _starts(width, columns):
            place = (..., slice(top, top + rows), slice(left, left + columns))
            part = images[place]
            logits = _upsampled_logits(model, part, part.shape[2:])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[place] += logits
            times[place] += 1
    assert total is not None
    logits = total / times
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False).argmax(1)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """Confusion matrix int64 [K, K] (truth × prediction), summed over all ranks; ignored pixels
    left out. Leaves the model in its mode."""
    training = model.training
    model.eval()
    confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORED, validate_args=False)
    confusion = confusion.to(device)
    for images, labels in batches:
        labels = labels.to(device).long()
        confusion.update(predict(model, images.to(device), labels.shape[1:], window), labels)
    model.train(training)
    return confusion.compute().cpu()
