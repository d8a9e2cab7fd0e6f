"""Class keys: the group whose statistics each pixel joins."""

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
    if features.dim() == 2:
        return labels.long()[None]
    if features.dim() == 4:
        rows, columns = (
            nearest_index(features.shape[i], labels.shape[i - 1], labels.device) for i in (2, 3)
        )
        labels = labels[:, rows[:, None], columns]
    return labels.long().flatten(1)


def _mix32(x: Tensor) -> Tensor:
    """A bijective 32-bit hash on int64 tensors (from Wellons' "hash prospector"). Both multipliers
    are below 2^31, so no product overflows int64."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


def split_groups(keys: Tensor, counts: Tensor, groups: int, seed: int | Tensor) -> Tensor:
    """Split each key's pixels at random into `groups` keys of equal size (±1).

    keys: [B, P] int, −1 where ignored; counts: int64, flattened [num_keys]. The pixels of a key are
    ranked by the 32-bit hash of (seed, pixel index), ties by index. The group of a pixel is
    rank mod groups; its new key is key·groups + group.
    """
    flat = keys.flatten().long()
    if not isinstance(seed, Tensor):
        seed = torch.full((), seed, dtype=torch.int64, device=keys.device)
    seed = seed.reshape(())
    low, high = _mix32(seed & 0xFFFFFFFF), _mix32((seed >> 32) & 0xFFFFFFFF)
    pixel = torch.arange(flat.numel(), device=keys.device) & 0xFFFFFFFF
    hashes = _mix32(_mix32(pixel ^ low) ^ high)
    valid = flat >= 0
    segment = torch.where(valid, flat, counts.numel())
    packed, order = torch.sort((segment << 32) | hashes, stable=True)
    segment = packed >> 32
    start = torch.cat([counts.new_zeros(1), counts.flatten().cumsum(0)])[segment]
    rank = torch.arange(flat.numel(), device=keys.device) - start
    group = torch.empty_like(flat).scatter(0, order, rank % groups)
    return torch.where(valid, flat * groups + group, -1).to(keys.dtype).view_as(keys)


def group_counts(counts: Tensor, groups: int) -> Tensor:
    """Sizes of the groups of `split_groups`: [...] -> [..., groups]."""
    offset = torch.arange(groups, device=counts.device)
    return (counts[..., None] - offset + groups - 1) // groups


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
    if values.is_cuda:  # index_put sorts, and so sums in a fixed order; index_add uses atomics
        out = out.index_put((keys,), values, accumulate=True)
    else:
        out = out.index_add(0, keys, values)
    return out[:-1]
