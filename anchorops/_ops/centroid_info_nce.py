"""InfoNCE between the centroids of K classes: K×K×D products, and a cross-entropy of their rows.

On GPUs torch computes the products, and the operator `anchorops::centroid_info_nce` the losses of
the rows and their gradient. On CPU the formula of the reference is used, also by the backend `cpu`.
With its masks of classes it takes longer than a plain cross-entropy (docs/cost.md).
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._backend import select
from .._checks import (
    FLOATING,
    check_choice,
    check_strided,
    check_temperature,
    describe,
    fail,
    savable,
)
from ..reference.centroid_info_nce import LOGITS_AT_ONCE
from .registration import Gradient, define, run

# float32 products [R, K], contiguous: R = K·G, row r is a query of class r // G. float32 positives
# [R] replace the products with the own keys. bool present [R], present_keys [K]; without them, all
# are. losses, lse: [R]. Without positives, dpositives are (0,).
_SCHEMA = (
    "(Tensor products, Tensor? positives, Tensor? present, Tensor? present_keys, "
    "float temperature) -> (Tensor losses, Tensor lse)"
)
_BACKWARD_SCHEMA = (
    "(Tensor dlosses, Tensor products, Tensor? positives, Tensor? present, Tensor? present_keys, "
    "Tensor lse, float temperature) -> (Tensor dproducts, Tensor dpositives)"
)


def _forward_fake(products: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return products.new_empty(products.shape[0]), products.new_empty(products.shape[0])


def _backward_fake(
    dlosses: Tensor, products: Tensor, positives: Tensor | None, *saved: Any
) -> tuple[Tensor, Tensor]:
    dpositives = products.new_empty(0 if positives is None else positives.shape)
    return products.new_empty(products.shape), dpositives


def _setup_context(ctx: Any, inputs: Any, results: Any) -> None:
    *tensors, ctx.temperature = inputs
    ctx.mark_non_differentiable(results.lse)
    ctx.save_for_backward(*tensors, results.lse)


def _backward(operator: Any, ctx: Any, grads: Any) -> dict[str, Tensor | None]:
    if grads.losses is None:
        return {}
    saved = ctx.saved_tensors
    dproducts, dpositives = operator(grads.losses.contiguous(), *saved, ctx.temperature)
    gradients = {"products": dproducts}
    return gradients if saved[1] is None else gradients | {"positives": dpositives}


define(
    "centroid_info_nce",
    _SCHEMA,
    _forward_fake,
    backends=("triton",),
    gradient=Gradient(_BACKWARD_SCHEMA, _setup_context, _backward, _backward_fake),
)


def _selected(rows: Tensor, mask: Tensor | None) -> Tensor:
    """float32 [N, D], 0 where the mask [N] is false: absent rows may be NaN."""
    return rows.float() if mask is None else torch.where(mask[:, None], rows.float(), 0)


def _losses(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor | None,
    present: Tensor | None,
    present_keys: Tensor | None,
    temperature: float,
) -> Tensor:
    """By the kernel: losses of the shape [K] or [K, G] of the queries."""
    has_query = present if present is None or present.dim() == 1 else present.any(1)
    if present_keys is None:
        present_keys = has_query
    used = present_keys
    if positives is None and used is not None:  # the own key is the positive
        used = None if has_query is None else used | has_query
    rows = None if present is None else present.flatten().contiguous()
    with torch.autocast(queries.device.type, enabled=False):
        flat = _selected(queries.flatten(0, -2), rows)
        products = flat @ _selected(keys, used).T
        own_products = None
        if positives is not None:
            own_products = (flat * _selected(positives.flatten(0, -2), rows)).sum(-1)
        mask = None if present_keys is None else present_keys.contiguous()
        arguments = products, own_products, rows, mask, temperature
        losses, _ = run("centroid_info_nce", "triton", *arguments)
    return losses.view(queries.shape[:-1])


def _check(argument: str, tensor: object, shape: tuple[int, ...], queries: Tensor) -> None:
    check_strided("centroid_info_nce", argument, tensor)
    if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.device != queries.device:
        fail("centroid_info_nce", argument, f"{shape} on {queries.device}", describe(tensor))


def centroid_info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    positives: Tensor | None = None,
    present: Tensor | None = None,
    present_keys: Tensor | None = None,
    temperature: float = 0.07,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE: pulls the query of each class to its positive, and away from the other keys.

    L_i = −log [ e^{q_i·p_i/τ} / ( e^{q_i·p_i/τ} + Σ_{j≠i} e^{q_i·k_j/τ} ) ],  p_i = k_i by default

    (OCCL, doi 10.1016/j.patcog.2024.110431, Eqs. 4-6 as described in the text; MVSC, Eq. 2.)
    Nothing is normalised here. Inner products and sums are float32, also under autocast; on GPUs
    the products are TF32 if `torch.set_float32_matmul_precision` says so.
    The logits (K·G×K) are kept for the gradient if these are at most 2^23 (32 MiB in float32); of
    more the backward pass computes parts again.

    Args:
        queries: [K, D], or [K, G, D] for G queries of each class; float.
        keys: [K, D]; float.
        positives: same shape as queries; replace the query's own key.
        present: bool [K], or [K, G] for [K, G, D] queries. Absent queries have no loss, and their
            keys are not in the denominators. Rows of absent classes may contain NaN.
        present_keys: bool [K]: the keys in the denominator in addition to the query's own; by
            default the classes with a present query.
        temperature: τ > 0, a normal number of float32 (at least 2⁻¹²⁶).
        reduction: "mean" over the present queries (0 if there is none), "sum", or "none".

    Returns:
        A scalar, or [K] / [K, G] for "none"; float32 (float64 for float64).

    Raises:
        ValueError: wrong shape, dtype, device, temperature or reduction.
    """
    function = "centroid_info_nce"
    check_strided(function, "queries", queries)
    if not isinstance(queries, Tensor) or queries.dim() not in (2, 3):
        fail(function, "queries", "a tensor [K, D] or [K, G, D]", describe(queries))
    _check("keys", keys, (queries.shape[0], queries.shape[-1]), queries)
    if positives is not None:
        _check("positives", positives, tuple(queries.shape), queries)
    for argument, tensor in (("queries", queries), ("keys", keys), ("positives", positives)):
        if tensor is not None and tensor.dtype not in FLOATING:
            fail(function, argument, "float32, bfloat16, float16 or float64", tensor.dtype)
    for argument, mask, shape in (
        ("present", present, tuple(queries.shape[:-1])),
        ("present_keys", present_keys, (queries.shape[0],)),
    ):
        if mask is not None:
            _check(argument, mask, shape, queries)
            if mask.dtype != torch.bool:
                fail(function, argument, "a bool tensor", mask.dtype)
    temperature = check_temperature(function, temperature)
    check_choice(function, "reduction", reduction, ("mean", "sum", "none"))
    backend = select(function, queries, queries.shape[0])
    queries, keys = savable(queries), savable(keys)
    positives, present, present_keys = map(savable, (positives, present, present_keys))
    if backend != "triton" or queries.shape[:-1].numel() * keys.shape[0] > LOGITS_AT_ONCE:
        return reference.centroid_info_nce(
            queries,
            keys,
            positives=positives,
            present=present,
            present_keys=present_keys,
            temperature=temperature,
            reduction=reduction,
        )
    losses = _losses(queries, keys, positives, present, present_keys, temperature)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    count = max(losses.numel(), 1) if present is None else present.sum().clamp(min=1)
    return losses.sum() / count
