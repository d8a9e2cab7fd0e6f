"""Class keys: the group whose statistics each pixel joins."""

import torch
from torch import Tensor

from .._shared.pixels import resize_labels
from .._shared.sums import sum_by_key


def class_keys(
    features: Tensor, labels: Tensor, num_classes: int, per_image: bool, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The key of each pixel, int64 [B, P]: its class, or image·K + class, or −1 if ignored. And the
    number of pixels with each key: int64 [K] or [B, K]."""
    labels = resize_labels(labels, features)
    valid = (labels >= 0) & (labels < num_classes) & (labels != ignore_index)
    images, keys = (labels.shape[0] if per_image else 1), labels
    if per_image:
        keys = labels + num_classes * torch.arange(images, device=labels.device)[:, None]
    keys = torch.where(valid, keys, -1)
    counts = sum_by_key(keys.flatten(), valid.flatten().long(), images * num_classes)
    return keys, counts.view(images, num_classes) if per_image else counts
