"""Confusion matrices."""

import torch
from torch import Tensor

from .._shared.sums import sum_by_key


def confusion(
    predictions: Tensor, labels: Tensor, num_classes: int, *, ignore_index: int
) -> Tensor:
    """int64 [K, K]: the number of pixels of true class i predicted as class j. Pixels are ignored
    if their label is ignored, or if their prediction is not a class."""
    truth, predictions = labels.flatten().long(), predictions.flatten().long()
    valid = (truth >= 0) & (truth < num_classes) & (truth != ignore_index)
    valid = valid & (predictions >= 0) & (predictions < num_classes)
    keys = torch.where(valid, truth * num_classes + predictions, -1)
    return sum_by_key(keys, valid.long(), num_classes**2).view(num_classes, num_classes)
