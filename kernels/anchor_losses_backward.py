"""The gradient of anchor_losses: the slopes of the forward pass, times the losses' gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


@triton.jit
def _anchor_losses_bwd_kernel(
    dp2a_ptr,  # float32 []
    daux_ptr,  # float32 []
    slopes_ptr,  # float32 [2, K] or [1, K]
    gradients_ptr,  # float32, as slopes
    classes,
    size,
    HAS_DP2A: tl.constexpr,
    HAS_DAUX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slopes = tl.load(slopes_ptr + i, mask=i < size, other=0.0)
    dp2a = tl.load(dp2a_ptr) if HAS_DP2A else 0.0
    daux = tl.load(daux_ptr) if HAS_DAUX else 0.0
    gradients = tl.where(i < classes, dp2a, daux) * slopes
    tl.store(gradients_ptr + i, gradients, mask=i < size)


def anchor_losses_backward(dp2a: Tensor | None, daux: Tensor | None, slopes: Tensor) -> Tensor:
    """slopes contiguous -> dsqdists and dcross_entropies, [2, K] or [1, K]."""
    gradients, size = torch.empty_like(slopes), slopes.numel()
    _anchor_losses_bwd_kernel[(triton.cdiv(size, BLOCK),)](
        dp2a,
        daux,
        slopes,
        gradients,
        slopes.shape[1],
        size,
        HAS_DP2A=dp2a is not None,
        HAS_DAUX=daux is not None,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return gradients
