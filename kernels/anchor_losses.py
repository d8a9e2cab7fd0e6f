"""SAR's losses of pixels and of anchors, from numbers of each class. One launch of one program."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Inputs(NamedTuple):
    """Of each class; the last two are None if there are no anchors to classify."""

    sqdists: Any  # float32 [K]
    counts: Any  # int64 [K]
    gate: Any  # bool [K]
    cross_entropies: Any  # float32 [K]


class Results(NamedTuple):
    """float32; aux and logs are empty without cross_entropies."""

    p2a: Any  # []
    aux: Any  # []
    logs: Any  # [2]
    slopes: Any  # [2, K], or [1, K] without cross_entropies


@triton.jit
def _pixel_loss(inputs, results, is_open, k, classes, dim, loss_weight):
    sqdist = tl.sum(tl.load(inputs.sqdists + k, mask=is_open, other=0.0), 0)
    pixels = tl.sum(tl.load(inputs.counts + k, mask=is_open, other=0), 0)
    size = tl.maximum(pixels * dim, 1).to(tl.float32)
    tl.store(results.p2a, loss_weight * (sqdist / size))
    tl.store(results.slopes + k, tl.where(is_open, loss_weight / size, 0.0), mask=k < classes)


@triton.jit
def _anchor_loss(
    inputs, results, k, classes, aux_weight, tau, REWEIGHT: tl.constexpr,
    DETACH_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Returns the number of classes that the classifier is unsure of."""
    infinity = float("inf")  # its probability, 0, would be unsure: k < classes is asked
    loss = tl.load(inputs.cross_entropies + k, mask=k < classes, other=infinity)
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
    tl.store(results.slopes + classes + k, slopes, mask=k < classes)
    tl.store(results.aux, aux_weight * mean)
    return number


@triton.jit
def _anchor_losses_kernel(
    inputs,  # Inputs
    results,  # Results
    classes,
    dim,
    loss_weight,
    aux_weight,
    tau,
    REWEIGHT: tl.constexpr,
    DETACH_WEIGHTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k = tl.arange(0, BLOCK_K)
    is_open = k < classes
    if inputs.gate is not None:
        is_open = tl.load(inputs.gate + k, mask=k < classes, other=0) != 0
    _pixel_loss(inputs, results, is_open, k, classes, dim, loss_weight)
    if inputs.cross_entropies is not None:
        number = _anchor_loss(
            inputs, results, k, classes, aux_weight, tau, REWEIGHT, DETACH_WEIGHTS
        )
        tl.store(results.logs, tl.sum(is_open.to(tl.int32), 0) / classes)
        tl.store(results.logs + 1, number)


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
        Inputs(sqdists, counts, gate if both else None, cross_entropies),
        Results(p2a, aux, logs, slopes),
        classes,
        dim,
        loss_weight,
        aux_weight,
        tau,
        REWEIGHT=reweight,
        DETACH_WEIGHTS=detach_weights,
        BLOCK_K=max(triton.next_power_of_2(classes), 16),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return p2a, aux, logs, slopes
