"""Rows of length 1, or the means of classes scaled to length 1, and the centroids of views: one
launch in each direction.

    m_r = rows_r / max(counts_r, 1)    u_r = m_r / max(‖m_r‖, eps)    c_k = unit row of mean_g m_kg
    present_r = [counts_r > 0], with centroids: for all views of the class
    drows_r = (dm_r + (du_r − (u_r·du_r)·u_r) / ‖m_r‖) / max(counts_r, 1)

Below eps, ‖m_r‖ is eps in the gradient, without the product. The centroids have no gradient. On
GPUs it is an operator; on CPU the formula of the reference is used.
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._backend import select
from .registration import ON_GPU, Gradient, define


def _forward_fake(
    rows: Tensor, counts: Tensor | None, eps: float, with_means: bool, with_centroids: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        rows.new_empty(rows.shape),
        rows.new_empty(rows.shape if with_means else 0),
        rows.new_empty((rows.shape[0], rows.shape[-1]) if with_centroids else 0),
        rows.new_empty(rows.shape[:-1]),
        rows.new_empty(0 if counts is None else rows.shape[:-1], dtype=torch.bool),
    )


def _backward_fake(
    dunits: Tensor | None, dmeans: Tensor | None, units: Tensor, *saved: Any
) -> Tensor:
    return units.new_empty(units.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, counts, ctx.eps, ctx.with_means, _ = inputs
    units, _, centroids, norms, present = output
    ctx.mark_non_differentiable(centroids, norms, present)
    ctx.save_for_backward(units, norms, counts)


def _backward(
    operator: Any, ctx: Any, dunits: Tensor | None, dmeans: Tensor | None, *_: None
) -> tuple[Any, ...]:
    dmeans = dmeans if ctx.with_means else None
    given = [None if d is None else d.contiguous() for d in (dunits, dmeans)]
    if given == [None, None]:
        return (None,) * 5
    return operator(*given, *ctx.saved_tensors, ctx.eps), None, None, None, None


# rows: float32 [..., D], or [K, G, D] for centroids; counts: int64 [...]; norms: float32 [...], of
# the means; present: bool [...], (0,) without counts
define(
    "unit_rows",
    "(Tensor rows, Tensor? counts, float eps, bool with_means, bool with_centroids) "
    "-> (Tensor units, Tensor means, Tensor centroids, Tensor norms, Tensor present)",
    _forward_fake,
    backends=ON_GPU,
    gradient=Gradient(
        "(Tensor? dunits, Tensor? dmeans, Tensor units, Tensor norms, Tensor? counts, float eps) "
        "-> Tensor",
        _backward_fake,
        _setup_context,
        _backward,
    ),
)


def unit_rows(rows: Tensor, counts: Tensor | None = None, *, eps: float) -> Tensor:
    """m / max(‖m‖, eps) with m = rows / max(counts, 1), or m = rows without counts. rows: [..., D];
    counts: int64 [...]. Arguments already checked."""
    backend = select("unit_rows", rows, 1)
    if backend not in ON_GPU:
        return reference.unit_rows(rows, counts, eps=eps)
    operator = getattr(torch.ops.anchorops.unit_rows, backend)
    units, *_ = operator(rows.to(torch.float32).contiguous(), counts, eps, False, False)
    return units.to(rows.dtype)


def unit_views(
    sums: Tensor, counts: Tensor, *, eps: float, with_means: bool, with_centroids: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The views [K, G, D] of length 1, their means [K, G, D], for each class the centroid of its
    views [K, D], also of length 1, without a gradient, and which views are present, bool [K, G]:
    those with a pixel; with centroids, those of classes with a pixel in each view. sums: [K, G, D];
    counts: int64 [K, G]. Means and centroids that are not wanted are (0,). Arguments already
    checked."""
    flags = with_means, with_centroids
    backend = select("unit_rows", sums, 1)
    if backend not in ON_GPU:
        return reference.unit_views(sums, counts, eps, *flags)
    operator = getattr(torch.ops.anchorops.unit_rows, backend)
    given = sums.to(torch.float32).contiguous(), counts.contiguous(), eps, *flags
    units, means, centroids, _, present = operator(*given)
    return units, means, centroids, present
