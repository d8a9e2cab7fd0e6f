"""Rows of length 1, or the means of classes scaled to length 1: one launch in each direction.

    m_r = rows_r / max(counts_r, 1)    u_r = m_r / max(‖m_r‖, eps)
    drows_r = (du_r − (u_r·du_r)·u_r) / (max(counts_r, 1)·‖m_r‖),  without the product below eps

On GPUs it is an operator; on CPU the formula of the reference is used.
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._backend import select
from .._checks import check_derivatives
from .registration import Gradient, define

BACKENDS = ("triton", "cuda")


def _forward_fake(rows: Tensor, counts: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), rows.new_empty(rows.shape[:-1])


def _backward_fake(
    dunits: Tensor, units: Tensor, norms: Tensor, counts: Tensor | None, eps: float
) -> Tensor:
    return units.new_empty(units.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, counts, ctx.eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, counts)


def _backward(operator: Any, ctx: Any, dunits: Tensor | None, _: None) -> tuple[Any, ...]:
    if dunits is None:
        return None, None, None
    return operator(dunits.contiguous(), *ctx.saved_tensors, ctx.eps), None, None


# rows: float32 [..., D]; counts: int64 [...]; norms: float32 [...], of the means
define(
    "unit_rows",
    "(Tensor rows, Tensor? counts, float eps) -> (Tensor units, Tensor norms)",
    _forward_fake,
    backends=BACKENDS,
    gradient=Gradient(
        "(Tensor dunits, Tensor units, Tensor norms, Tensor? counts, float eps) -> Tensor",
        _backward_fake,
        _setup_context,
        _backward,
    ),
)


def unit_rows(rows: Tensor, counts: Tensor | None = None, *, eps: float) -> Tensor:
    """m / max(‖m‖, eps) with m = rows / max(counts, 1), or m = rows without counts. rows: [..., D];
    counts: int64 [...]. Arguments already checked."""
    backend = select("unit_rows", rows, 1)
    if backend not in BACKENDS:
        return reference.unit_rows(rows, counts, eps=eps)
    check_derivatives("unit_rows", rows)
    operator = getattr(torch.ops.anchorops.unit_rows, backend)
    units, _ = operator(rows.to(torch.float32).contiguous(), counts, eps)
    return units.to(rows.dtype)
