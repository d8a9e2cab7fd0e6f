"""The seed of a training step, from a step counter. One launch, one program."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["offset"])
def _next_seed_kernel(
    step_ptr,  # int64, one number
    seed_ptr,  # int64, one number
    offset,
    UPDATE: tl.constexpr,
):
    step = tl.load(step_ptr)
    tl.store(seed_ptr, step + offset)
    if UPDATE:
        tl.store(step_ptr, step + 1)


def next_seed(step: Tensor, offset: int, update: bool) -> Tensor:
    """step int64, one number -> step + offset; with `update` the step is then increased by 1."""
    seed = torch.empty_like(step)
    _next_seed_kernel[(1,)](step, seed, offset, UPDATE=update, num_warps=1, enable_fp_fusion=True)
    return seed
