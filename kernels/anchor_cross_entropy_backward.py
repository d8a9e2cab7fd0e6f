"""The gradient of anchor_cross_entropy. One launch, a program per anchor."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .anchor_cross_entropy import options


@triton.jit
def _anchor_cross_entropy_bwd_kernel(
    dlosses_ptr,  # float32 [K]
    logits_ptr,  # float32 [K, K]
    dlogits_ptr,  # float32 [K, K]
    classes,
    BLOCK_K: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK_K)
    logits = tl.load(logits_ptr + k * classes + j, mask=j < classes, other=float("-inf"))
    powers = tl.exp(logits - tl.max(logits, 0))
    slopes = powers / tl.sum(powers, 0) - tl.where(j == k, 1.0, 0.0)
    dlogits = tl.load(dlosses_ptr + k) * slopes
    tl.store(dlogits_ptr + k * classes + j, dlogits, mask=j < classes)


def anchor_cross_entropy_backward(dlosses: Tensor, logits: Tensor) -> Tensor:
    """Everything contiguous -> dlogits [K, K]."""
    dlogits, classes = torch.empty_like(logits), logits.shape[0]
    given = dlosses, logits, dlogits, classes
    _anchor_cross_entropy_bwd_kernel[(classes,)](*given, **options(classes))
    return dlogits
