"""The moving average of the anchors, in which each class has a gate. One launch, a program per
class."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gated_average_kernel(
    average_ptr,  # [K, D]
    anchors_ptr,  # float32 [K, D]
    recognised_ptr,  # bool [K]
    updated_ptr,  # float32 [K, D]
    gate_ptr,  # bool [K]
    classes,
    dim,
    stride_k,
    stride_d,
    momentum,
    rest,  # 1 − momentum
    PER_CLASS: tl.constexpr,
    UPDATE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    if PER_CLASS:
        is_open = tl.load(recognised_ptr + k) != 0
    else:
        every = tl.arange(0, BLOCK_K)
        recognised = tl.load(recognised_ptr + every, mask=every < classes, other=1)
        is_open = tl.min((recognised != 0).to(tl.int32), 0) == 1
    d = tl.arange(0, BLOCK_D)
    own = average_ptr + k * stride_k + d.to(tl.int64) * stride_d
    average = tl.load(own, mask=d < dim, other=0.0).to(tl.float32)
    anchor = tl.load(anchors_ptr + k * dim + d, mask=d < dim, other=0.0)
    started = tl.max((average != 0).to(tl.int32), 0) == 1
    updated = tl.where(started, momentum * average + rest * anchor, anchor)
    updated = tl.where(is_open, updated, average)
    tl.store(updated_ptr + k * dim + d, updated, mask=d < dim)
    tl.store(gate_ptr + k, is_open)
    if UPDATE:
        tl.store(own, updated.to(average_ptr.dtype.element_ty), mask=d < dim)


def gated_average(
    average: Tensor,
    anchors: Tensor,
    recognised: Tensor,
    momentum: float,
    per_class: bool,
    update: bool,
) -> tuple[Tensor, Tensor]:
    """average [K, D], anchors float32 [K, D], recognised [K] -> the updated average, gate [K]."""
    updated, gate = torch.empty_like(anchors), torch.empty_like(recognised)
    classes, dim = anchors.shape
    _gated_average_kernel[(classes,)](
        average,
        anchors,
        recognised,
        updated,
        gate,
        classes,
        dim,
        *average.stride(),
        momentum,
        1 - momentum,
        PER_CLASS=per_class,
        UPDATE=update,
        BLOCK_K=max(triton.next_power_of_2(classes), 16),
        BLOCK_D=max(triton.next_power_of_2(dim), 16),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return updated, gate
