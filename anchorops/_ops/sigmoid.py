"""Channels as images: C sigmoids over (B, C, h, w) are B·C images of one channel each, whose logits
are those of class 1 of two."""

from typing import Any

import torch
from torch import Tensor

from .._torch_state import is_jit_traced


class _Contiguous(torch.autograd.Function):
    """A contiguous copy of x, whose gradient is channels last if x is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.channels_last = inputs[0].stride(1) < inputs[0].stride(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        return grad.movedim(1, -1).contiguous().movedim(-1, 1) if ctx.channels_last else grad


class _ContiguousWithTangent(_Contiguous):
    """For forward-mode derivatives of the reference, because torch.compile traces no jvp."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].contiguous()


def one_batch(logits: Tensor) -> Tensor:
    """(B, C, …) as (B·C, …): a view, or a copy if the channels of an image are not adjacent."""
    batch, channels = logits.shape[:2]
    copied = batch > 1 and channels > 1 and logits.stride(0) != channels * logits.stride(1)
    return (contiguous(logits) if copied else logits).flatten(0, 1)


def two_classes(logits: Tensor) -> Tensor:
    """Logits of one channel with those of class 0, which are 0; others as they are."""
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def contiguous(logits: Tensor) -> Tensor:
    """A contiguous copy, whose gradient is channels last if the logits are."""
    # torch.jit cannot save a traced Function
    if is_jit_traced():
        return logits.contiguous()
    compiling = torch.compiler.is_compiling()
    return (_Contiguous if compiling else _ContiguousWithTangent).apply(logits)
