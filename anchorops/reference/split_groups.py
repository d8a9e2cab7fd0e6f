"""Random groups: each key's pixels in parts of equal size."""

import torch
from torch import Tensor


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
