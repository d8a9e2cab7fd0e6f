"""The moving average of the anchors, in which each class has a gate (Eq. 8 of SAR).

    gate[k] = recognised[k], or: all anchors are recognised
    updated[k] = average[k] if the gate is closed; anchors[k] if average[k] is zero: not started;
                 otherwise momentum·average[k] + (1−momentum)·anchors[k]

On GPUs it is an operator; on CPU the formula of the reference is used. It has no gradient.
"""

import torch
from torch import Tensor

from .. import reference
from .._backend import select
from .registration import ON_GPU, define


def _fake(
    average: Tensor,
    anchors: Tensor,
    recognised: Tensor,
    momentum: float,
    per_class: bool,
    update: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(anchors), torch.empty_like(recognised)


# average: float32, bfloat16 or float16 [K, D], any strides; anchors and updated: float32
# [K, D], contiguous; recognised and gate: bool [K]
define(
    "gated_average",
    "(Tensor(a!) average, Tensor anchors, Tensor recognised, float momentum, bool per_class, "
    "bool update) -> (Tensor updated, Tensor gate)",
    _fake,
    backends=ON_GPU,
)


@torch.no_grad()
def gated_average(
    average: Tensor,
    anchors: Tensor,
    recognised: Tensor,
    *,
    momentum: float,
    per_class: bool,
    update: bool,
) -> tuple[Tensor, Tensor]:
    """The updated average [K, D], in new memory, and the gates, bool [K]. With `update` it is also
    written to `average`. Arguments as in the reference, already checked."""
    backend = select("gated_average", average, average.shape[0])
    if backend not in ON_GPU:
        updated, gate = reference.gated_average(
            average, anchors, recognised, momentum=momentum, per_class=per_class
        )
        if update:
            average.copy_(updated)
        return updated, gate
    operator = getattr(torch.ops.anchorops.gated_average, backend)
    rows = anchors.to(torch.float32).contiguous()
    if update and not torch.compiler.is_compiling():
        # So that autograd refuses a graph that saved the old average; the operator does not do it.
        torch.autograd.graph.increment_version(average)
    return operator(average, rows, recognised, momentum, per_class, update)
