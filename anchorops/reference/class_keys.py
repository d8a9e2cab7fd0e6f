"""Class keys: the group whose statistics each pixel joins."""

import torch
from torch import Tensor

from .._checks import is_for_onnx


def nearest_index(size: int, source: int, device: torch.device) -> Tensor:
    """Row (or column) of the labels for each row of the features, as F.interpolate's "nearest":
    floor(i · source/size), with the scale and the product in float32."""
    # filled on the device, because copying a number to it would synchronise
    scale = torch.full((), source / max(size, 1), dtype=torch.float32, device=device)
    index = (torch.arange(size, device=device, dtype=torch.float32) * scale).floor().long()
    return index.clamp(max=source - 1)


def resize_labels(labels: Tensor, features: Tensor) -> Tensor:
    """Labels on the features' grid: int64 [B, P], with B = 1 for points (N,)."""
    labels = labels.long()  # a GPU cannot index unsigned integers of 16 bits or more
    if features.dim() == 2:
        return labels[None]
    if features.dim() == 4:
        rows, columns = (
            nearest_index(features.shape[i], labels.shape[i - 1], labels.device) for i in (2, 3)
        )
        labels = labels[:, rows[:, None], columns]
    return labels.flatten(1)


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


def sum_by_key(keys: Tensor, values: Tensor, num_keys: int) -> Tensor:
    """Σ of values [N, …] for each key [N]; values with key −1 are ignored."""
    keys = torch.where(keys >= 0, keys, num_keys)
    out = values.new_zeros(num_keys + 1, *values.shape[1:])
    if is_for_onnx():  # its index_add forgets all but one value of a key
        columns = keys.view(-1, *(1,) * (values.dim() - 1)).expand_as(values)
        out = out.scatter_add(0, columns, values)
    elif values.is_cuda:  # index_put sorts, and so sums in a fixed order; index_add uses atomics
        out = out.index_put((keys,), values, accumulate=True)
    else:
        out = out.index_add(0, keys, values)
    return out[:-1]
