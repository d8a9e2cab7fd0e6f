"""The seed of a training step, from a step counter on the device.

    seed = step + offset, then step += 1 with `update`

On GPUs it is an operator of one launch; on CPU the formula is used. The kernel reads the counter,
so each replay of a CUDA graph gets a new seed. It has no gradient.
"""

import torch
from torch import Tensor

from .._backend import select
from .registration import ON_GPU, define


def _fake(step: Tensor, offset: int, update: bool) -> Tensor:
    return torch.empty_like(step)


# step and seed: int64, one element
define(
    "next_seed",
    "(Tensor(a!) step, int offset, bool update) -> Tensor",
    _fake,
    backends=ON_GPU,
)


def next_seed(step: Tensor, offset: int, *, update: bool) -> Tensor:
    """step + offset, in new memory; with `update` the counter is then increased by 1.

    step: int64 []. Arguments already checked.
    """
    backend = select("next_seed", step, 1)
    if backend not in ON_GPU:
        seed = step + offset
        if update:
            step.add_(1)
        return seed
    return getattr(torch.ops.anchorops.next_seed, backend)(step, offset, update)
