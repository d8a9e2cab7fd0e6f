"""Activation checkpointing: torch.utils.checkpoint runs a forward again during the backward pass.

The rule for every method: a training forward updates the state once. A recomputation updates
nothing, and reads the state that the first pass read. With use_reentrant=False, the first pass adds
the node `KnowAgain` to the graph, which says which forward is recomputed. With use_reentrant=True
there is no such node, so the recomputation must be that of the last forward. A compiled forward
cannot be distinguished from its recomputation. Cases that cannot be handled raise an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from .base import Regularizer

_WAY_OUT = "call it outside of the checkpointed function"
_library = torch.library.Library("anchorops", "FRAGMENT")


def recomputing() -> bool:
    """Whether the current forward is a recomputation, that is, runs during a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def checkpointed() -> bool:
    """Whether hooks replace saved tensors. A checkpoint with use_reentrant=False has such hooks, in
    its first pass and in its recomputation."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks  # pyright: ignore
    return hooks(True) is not None


class KnowAgain(torch.autograd.Function):
    """The identity on the loss of a checkpointed forward.

    Its backward pass unpacks a saved tensor, the number of the forward. The checkpoint has not kept
    this tensor, so unpacking it starts the recomputation, with the state that the first pass read.
    If another node of the checkpointed function started the recomputation earlier, the state of
    the last forward was read. Then a different number shows that this was another forward.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, regularizer: Regularizer) -> Tensor:
        ctx.regularizer, ctx.seen = regularizer, regularizer.seen()
        ctx.save_for_backward(torch.full((), ctx.seen[0], device="cpu"))
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        last = ctx.regularizer.seen()
        ctx.regularizer.see(*ctx.seen)
        try:
            (number,) = ctx.saved_tensors
        finally:
            ctx.regularizer.see(*last)
        if int(number.numpy()) != ctx.seen[0]:
            raise RuntimeError(
                f"{type(ctx.regularizer).__name__}: torch.utils.checkpoint recomputed an earlier "
                "forward with the state of a later one: return its loss from the checkpointed "
                f"function alone, run backward before the next forward, or {_WAY_OUT}"
            )
        return dloss, None


def check_reentrant(regularizer: Regularizer, first_passes: int, was_last: bool) -> None:
    """first_passes: the number of forwards without gradients that were not recomputed; was_last:
    whether the last forward is one of them."""
    if first_passes > 1 or not was_last:
        raise RuntimeError(
            f"{type(regularizer).__name__}: several forwards before the recomputation by "
            "torch.utils.checkpoint(use_reentrant=True): which one it repeats is not known; pass "
            f"use_reentrant=False, run backward before the next forward, or {_WAY_OUT}"
        )


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch norms keep their running statistics inside this context. It runs the same operators as
    the first pass and saves the same tensors, because torch.utils.checkpoint compares them."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, batches in kept:
            norm.momentum, norm.num_batches_tracked = momentum, batches


# For compiled forwards. The schema says that it changes the state, so the compiler neither removes
# the operator nor moves it behind an operator that changes the state.
_library.define("first_pass(Tensor(a!) state, str name) -> ()", tags=torch.Tag.pt2_compliant_tag)


def _first_pass(state: Tensor, name: str) -> None:
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{name}: torch.utils.checkpoint recomputes a compiled forward, whose state would be "
            f"updated twice: {_WAY_OUT}"
        )


_library.impl("first_pass", _first_pass, "CompositeExplicitAutograd")
torch.library.register_fake("anchorops::first_pass", lambda state, name: None, lib=_library)
