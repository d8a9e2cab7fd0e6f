"""SAR's losses of pixels and of anchors, from numbers of each class. One launch of one program."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _anchor_losses_kernel(
    sqdists_ptr,  # float32 [K]
    counts_ptr,  # int64 [K]
    gate_ptr,  # bool [K]
    cross_entropies_ptr,  # float32 [K]
    p2a_ptr,  # float32 []
    aux_ptr,  # float32 []
    logs_ptr,  # float32 [2]
    slopes_ptr,  # float32 [2, K], or [1, K] without cross_entropies
    classes,
    dim,
    loss_weight,
    aux_weight,
    tau,
    HAS_ANCHORS: tl.constexpr,  # gate and cross_entropies
    REWEIGHT: tl.constexpr,
    DETACH_WEIGHTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k = tl.arange(0, BLOCK_K)
    is_open = k < classes
    if HAS_ANCHORS:
        is_open = tl.load(gate_ptr + k, mask=k < classes, other=0) != 0
    sqdist = tl.sum(tl.load(sqdists_ptr + k, mask=is_open, other=0.0), 0)
    pixels = tl.sum(tl.load(counts_ptr + k, mask=is_open, other=0), 0)
    size = tl.maximum(pixels * dim, 1).to(tl.float32)
    tl.store(p2a_ptr, loss_weight * (sqdist / size))
    tl.store(slopes_ptr + k, tl.where(is_open, loss_weight / size, 0.0), mask=k < classes)
    if HAS_ANCHORS:
        infinity = float("inf")  # its probability, 0, would be unsure: k < classes is asked
        loss = tl.load(cross_entropies_ptr + k, mask=k < classes, other=infinity)
        unsure = (tl.exp(-loss) <= tau) & (k < classes)
        loss = tl.where(unsure, loss, 0.0)
        number = tl.sum(unsure.to(tl.int32), 0).to(tl.float32)
        total = tl.sum(loss, 0)
        if REWEIGHT:
            divisor = total + 1e-9
            mean = tl.sum(loss * loss, 0) / divisor
            slopes = loss / divisor if DETACH_WEIGHTS else (2 * loss - mean) / divisor
        else:
            divisor = tl.maximum(number, 1.0)
            mean = total / divisor
            slopes = 1 / divisor
        slopes = tl.where(unsure, aux_weight * slopes, 0.0)
        tl.store(slopes_ptr + classes + k, slopes, mask=k < classes)
        tl.store(aux_ptr, aux_weight * mean)
        tl.store(logs_ptr, tl.sum(is_open.to(tl.int32), 0) / classes)
        tl.store(logs_ptr + 1, number)


def anchor_losses(
    sqdists: Tensor,
    counts: Tensor,
    gate: Tensor | None,
    cross_entropies: Tensor | None,
    dim: int,
    loss_weight: float,
    aux_weight: float,
    tau: float,
    reweight: bool,
    detach_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything contiguous -> p2a [], aux [], logs [2], slopes [2, K]; without cross_entropies aux
    and logs are empty, slopes [1, K]."""
    both, classes = cross_entropies is not None, sqdists.shape[0]
    p2a, aux = sqdists.new_empty(()), sqdists.new_empty(() if both else 0)
    logs, slopes = sqdists.new_empty(2 * both), sqdists.new_empty(1 + both, classes)
    _anchor_losses_kernel[(1,)](
        sqdists,
        counts,
        gate,
        cross_entropies,
        p2a,
        aux,
        logs,
        slopes,
        classes,
        dim,
        loss_weight,
        aux_weight,
        tau,
        HAS_ANCHORS=both,
        REWEIGHT=reweight,
        DETACH_WEIGHTS=detach_weights,
        BLOCK_K=max(triton.next_power_of_2(classes), 16),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return p2a, aux, logs, slopes
