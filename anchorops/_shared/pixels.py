"""Labels and features pixel by pixel."""

import torch
from torch import Tensor


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


def feature_rows(features: Tensor) -> Tensor:
    """One row per pixel: [N, D] or [B·P, D], in the order of the labels."""
    return features if features.dim() == 2 else features.flatten(2).transpose(1, 2).flatten(0, 1)
