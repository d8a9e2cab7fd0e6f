"""Predictions and the confusion matrix of a validation split."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import anchorops as ao

from .config import IGNORED, MULTIPLE


def pad_to_multiple(images: Tensor, value: float = 0.0) -> Tensor:
    """(…, h, w), padded at the bottom and right to sides that the networks support."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % MULTIPLE, 0, -height % MULTIPLE), value=value)


def _image_logits(logits: Tensor, padded: Tensor, images: Tensor) -> Tensor:
    """float32 (B, K, h, w) at the size of images (B, C, h, w), from the logits of padded images."""
    height, width = images.shape[2:]
    size = padded.shape[2:]
    logits = F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
    return logits[..., :height, :width]


def _starts(length: int, window: int) -> list[int]:
    """First pixels of windows that cover the length, overlapping by at least a third."""
    if length <= window:
        return [0]
    stride = max(1, window * 2 // 3)
    return [*range(0, length - window, stride), length - window]


def predict(
    model: nn.Module, images: Tensor, size: Sequence[int], window: tuple[int, int] | None = None
) -> Tensor:
    """Classes int64 (B, *size) of images (B, C, h, w): of whole images, or by sliding windows whose
    logits are averaged where they overlap. Logits at the size of the images are stored only for
    windows, and if images were both scaled and padded."""
    height, width = images.shape[2:]
    if window is None:
        padded = pad_to_multiple(images)
        logits = model(padded)
        if padded.shape == images.shape:
            return ao.pixel_argmax(logits, (size[0], size[1]))
        if (height, width) == tuple(size):
            return ao.pixel_argmax(logits, (padded.shape[2], padded.shape[3]))[:, :height, :width]
        return ao.pixel_argmax(_image_logits(logits, padded, images), (size[0], size[1]))
    rows, columns = window
    total, times = None, images.new_zeros(height, width)
    for top in _starts(height, rows):
        for left in _starts(width, columns):
            place = (..., slice(top, top + rows), slice(left, left + columns))
            part = images[place]
            padded = pad_to_multiple(part)
            logits = _image_logits(model(padded), padded, part)
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[place] += logits
            times[place] += 1
    assert total is not None
    total /= times
    return ao.pixel_argmax(total, (size[0], size[1]))


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """Confusion matrix int64 [K, K] (truth × prediction) of the valid pixels, summed over all
    ranks. Restores the mode of the model."""
    training = model.training
    model.eval()
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    for images, labels in batches:
        labels = labels.to(device)
        predictions = predict(model, images.to(device), labels.shape[1:], window)
        matrix += ao.confusion(predictions, labels, num_classes, ignore_index=IGNORED)
    model.train(training)
    if dist.is_initialized():
        dist.all_reduce(matrix)
    return matrix.cpu()
