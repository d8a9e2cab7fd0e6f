"""Activation checkpointing: torch.utils.checkpoint runs a forward again in the backward pass. A
loss with a state refuses this."""

import torch
from torch import Tensor

from .._torch_state import recomputing
from .registration import library


def recomputation_refused(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name}: torch.utils.checkpoint recomputes this loss: call it outside of the checkpointed "
        "function"
    )


def check_first_pass(state: Tensor, name: str) -> None:
    """Raises RuntimeError in a recomputation, which would update the state of this loss again. In
    compiled code an operator does. Its schema says that it changes `state`, so that the compiler
    does not remove it."""
    if torch.compiler.is_compiling():
        torch.ops.anchorops.first_pass(state, name)
    else:
        _first_pass(state, name)


def _first_pass(state: Tensor, name: str) -> None:
    if recomputing():
        raise recomputation_refused(name)


library.add("first_pass", "(Tensor(a!) state, str name) -> ()", lambda state, name: None)
library.impl("first_pass", _first_pass, "CompositeExplicitAutograd")
