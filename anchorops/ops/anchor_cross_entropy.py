"""Cross-entropy of the anchors: row k of the logits belongs to the anchor of class k.

    losses[k] = −log p_k,  p = softmax(logits[k])    recognised[k] = (k = argmax p) and (p_k > δ)
    dlogits[k, j] = dlosses[k]·(p_j − [j = k])

On GPUs it is an operator; on CPU the formula of the reference is used.
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._backend import select
from .registration import ON_GPU, Gradient, define


def _forward_fake(logits: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(logits.shape[:1])
    return losses, torch.empty_like(losses, dtype=torch.bool)


def _backward_fake(dlosses: Tensor, logits: Tensor) -> Tensor:
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0])


def _backward(operator: Any, ctx: Any, dlosses: Tensor | None, _: None) -> tuple[Any, ...]:
    return None if dlosses is None else operator(dlosses.contiguous(), *ctx.saved_tensors), None


# logits: float32 [K, K], contiguous; recognised: bool [K]
define(
    "anchor_cross_entropy",
    "(Tensor logits, float delta) -> (Tensor losses, Tensor recognised)",
    _forward_fake,
    backends=ON_GPU,
    gradient=Gradient(
        "(Tensor dlosses, Tensor logits) -> Tensor", _backward_fake, _setup_context, _backward
    ),
)


def anchor_cross_entropy(logits: Tensor, *, delta: float) -> tuple[Tensor, Tensor]:
    """−log p_k of each anchor, and whether it is recognised: k is its argmax, and p_k > delta.

    logits: [K, K]. Returns [K], and bool [K]. Arguments already checked.
    """
    backend = select("anchor_cross_entropy", logits, logits.shape[0])
    if backend not in ON_GPU:
        return reference.anchor_cross_entropy(logits, delta=delta)
    operator = getattr(torch.ops.anchorops.anchor_cross_entropy, backend)
    return operator(logits.to(torch.float32).contiguous(), delta)
