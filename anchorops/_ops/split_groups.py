"""Random groups: each key's pixels are split at random into keys of equal size (±1).

The pixels of a key are ranked by a hash of (seed, pixel index), as defined by
reference.split_groups. The fused backends do not sort. They divide the n pixels of a key among n
buckets by their hashes, in ascending order. A bucket has one pixel on average, and its pixels are
compared with each other.
"""

import torch
from torch import Tensor

from .. import reference
from .._backend import select
from .registration import define, run
from .triton_launch import launcher


def _split_groups_fake(
    keys: Tensor, counts: Tensor, seed: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(keys), counts.new_empty((*counts.shape, groups))


define(
    "split_groups",
    "(Tensor keys, Tensor counts, Tensor seed, SymInt groups) -> (Tensor keys, Tensor counts)",
    _split_groups_fake,
    triton=launcher("split_groups"),
)


def split_groups(
    keys: Tensor, counts: Tensor, groups: int, seed: int | Tensor, *, backend: str
) -> tuple[Tensor, Tensor]:
    """Keys key·groups + group, and their counts [..., groups].

    keys: int32 [B, P], −1 where ignored; counts: int64, the number of pixels with each key; seed:
    an int, or an int64 tensor of one element on the device of the keys.
    """
    if backend == "reference":
        split = reference.split_groups(keys, counts, groups, seed)
        return split, reference.group_counts(counts, groups)
    if not isinstance(seed, Tensor):
        seed = torch.full((), seed, dtype=torch.int64, device=keys.device)
    return run("split_groups", backend, keys, counts, seed, groups)


def random_halves(items: int, seed: Tensor, like: Tensor) -> Tensor:
    """Two random halves of equal size (±1): integers [items], 0 or 1. The backend is that of an
    operator on `like`."""
    keys = torch.zeros(1, items, dtype=torch.int32, device=seed.device)
    counts = torch.full((1,), items, dtype=torch.int64, device=seed.device)
    backend = select("split_groups", like, 1)
    return split_groups(keys, counts, 2, seed, backend=backend)[0].view(items)
