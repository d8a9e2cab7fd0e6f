"""Cross-entropy of the anchors. One launch, a program per anchor."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _anchor_cross_entropy_kernel(
    logits_ptr,  # float32 [K, K]
    losses_ptr,  # float32 [K]
    recognised_ptr,  # bool [K]
    delta,
    classes,
    BLOCK_K: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK_K)
    logits = tl.load(logits_ptr + k * classes + j, mask=j < classes, other=float("-inf"))
    own = tl.load(logits_ptr + k * classes + k)
    largest = tl.max(logits, 0)
    loss = tl.log(tl.sum(tl.exp(logits - largest), 0)) - (own - largest)
    # of equal logits, the first is the argmax
    other_is_argmax = (logits > own) | ((logits == own) & (j < k))
    recognised = (tl.sum(other_is_argmax.to(tl.int32), 0) == 0) & (tl.exp(-loss) > delta)
    tl.store(losses_ptr + k, loss)
    tl.store(recognised_ptr + k, recognised)


def options(classes: int) -> dict[str, object]:
    block = max(triton.next_power_of_2(classes), 16)
    return {"BLOCK_K": block, "num_warps": 8 if block > 2048 else 1, "enable_fp_fusion": True}


def anchor_cross_entropy(logits: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """logits float32 [K, K], contiguous -> losses [K], recognised [K]."""
    classes = logits.shape[0]
    losses = logits.new_empty(classes)
    recognised = torch.empty_like(losses, dtype=torch.bool)
    given = logits, losses, recognised, delta, classes
    _anchor_cross_entropy_kernel[(classes,)](*given, **options(classes))
    return losses, recognised
