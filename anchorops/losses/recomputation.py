"""Activation checkpointing: torch.utils.checkpoint runs a forward again during the backward pass.

The rule for every method: a training forward updates the state once. A recomputation updates
nothing, and reads the state that the first pass read. With use_reentrant=False, the first pass adds
the node `_RecomputationMark` to the graph, which says which forward is recomputed. With
use_reentrant=True there is no such node, so the recomputation must be that of the last forward. A
compiled forward cannot be distinguished from its recomputation. Cases that cannot be handled raise
an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .initialized_module import InitializedModule

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


class Recomputable(InitializedModule):
    """A module whose training forward updates its state, once."""

    def __init__(self) -> None:
        super().__init__()
        self._read: Tensor | None = None  # the state that the last forward read
        self._forwards = 0
        # forwards without gradients that may still be recomputed; whether the last one is of them
        self._without_grad, self._last_without_grad = 0, False

    def seen(self) -> tuple[int, list[Tensor | None]]:
        """The number of the last forward, and what each module read of its state."""
        return self._forwards, [module._read for module in self._recomputable()]

    def see(self, number: int, reads: list[Tensor | None]) -> None:
        """Set what a recomputation reads: the state that the forward of this number read."""
        self._forwards = number
        for module, read in zip(self._recomputable(), reads, strict=True):
            module._read = read

    def _recomputable(self) -> list[Recomputable]:
        return [module for module in self.modules() if isinstance(module, Recomputable)]

    def _updates(self, state: Tensor) -> bool:
        """Whether this forward updates its state: in training mode, except in a recomputation."""
        if not self.training or recomputing():
            return False
        if torch.compiler.is_compiling():
            torch.ops.anchorops.first_pass(state, type(self).__name__)
        return True

    def _first_read(self, read: Tensor) -> Tensor:
        """What the first pass of this forward read of the state: `read`, unless this is a
        recomputation."""
        if not self.training or torch.compiler.is_compiling():
            return read  # an evaluation that is repeated reads the same state
        if recomputing():
            return read if self._read is None else self._read
        self._read = read
        return read

    def _count_forward(self) -> None:
        """Called first in each forward. Raises RuntimeError if it is a recomputation with
        use_reentrant=True, and which forward it repeats is not known."""
        if not self.training or torch.compiler.is_compiling():  # an evaluation updates no state
            return
        if not recomputing():
            self._forwards += 1
            self._last_without_grad = not torch.is_grad_enabled()
            self._without_grad += self._last_without_grad
            return
        if checkpointed():
            return
        several = self._without_grad > 1 or not self._last_without_grad
        if several and any(read is not None for read in self.seen()[1]):
            raise RuntimeError(
                f"{type(self).__name__}: several forwards before the recomputation by "
                "torch.utils.checkpoint(use_reentrant=True): which one it repeats is not known; "
                f"pass use_reentrant=False, run backward before the next forward, or {_WAY_OUT}"
            )
        self._without_grad = 0

    def _marked(self, loss: Tensor) -> Tensor:
        """The loss of this forward, from which a recomputation knows which forward it repeats."""
        if torch.compiler.is_compiling() or not loss.requires_grad or not checkpointed():
            return loss
        return _RecomputationMark.apply(loss, self)


class _RecomputationMark(torch.autograd.Function):
    """The identity on the loss of a checkpointed forward.

    Its backward pass unpacks a saved tensor, the number of the forward. The checkpoint has not kept
    this tensor, so unpacking it starts the recomputation, with the state that the first pass read.
    If another node of the checkpointed function started the recomputation earlier, the state of
    the last forward was read. Then a different number shows that this was another forward.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, module: Recomputable) -> Tensor:
        ctx.module, ctx.seen = module, module.seen()
        ctx.save_for_backward(torch.full((), ctx.seen[0], device="cpu"))
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        last = ctx.module.seen()
        ctx.module.see(*ctx.seen)
        try:
            (number,) = ctx.saved_tensors
        finally:
            ctx.module.see(*last)
        if int(number.numpy()) != ctx.seen[0]:
            raise RuntimeError(
                f"{type(ctx.module).__name__}: torch.utils.checkpoint recomputed an earlier "
                "forward with the state of a later one: return its loss from the checkpointed "
                f"function alone, run backward before the next forward, or {_WAY_OUT}"
            )
        return dloss, None


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
