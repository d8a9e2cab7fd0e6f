"""InfoNCE between the centroids of K classes. It computes only K×K×D products, so on a GPU the
launches determine its time.

On GPUs the losses of few queries are an operator, `anchorops::centroid_info_nce.triton` and `.cuda`
of one schema. It stores no logits: the backward pass computes them again. It uses no matrix
products, so for more than KERNEL_LOGITS logits the formula of the reference is faster (on an H100
equally fast at 171 classes, 18 times at 1,000). On CPU the formula is always used: with its masks
of classes it takes 0.17 ms at K = 19, up to eight times as long as a plain cross-entropy.
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._backend import CUDA_BACKENDS, select
from .._checks import (
    FLOATING,
    check_choice,
    check_strided,
    check_temperature,
    describe,
    fail,
    savable,
)
from .registration import Gradient, define

BACKENDS = ("triton", "cuda")  # on the CPU it is the reference
KERNEL_LOGITS = 2**15  # that a kernel computes at most: queries × keys

# float32 queries, positives [R, D] by strides, R = K·G: row r is a query of class r // G; keys
# [K, D] by strides; bool present [R], present_keys [K]. Without positives, that of a row is the key
# of its class. Without masks, all are present. losses, lse: [R]. Without positives, dpositives are
# (0,).
_SCHEMA = (
    "(Tensor queries, Tensor keys, Tensor? positives, Tensor? present, Tensor? present_keys, "
    "float temperature) -> (Tensor losses, Tensor lse)"
)
_BACKWARD_SCHEMA = (
    "(Tensor dlosses, Tensor queries, Tensor keys, Tensor? positives, Tensor? present, "
    "Tensor? present_keys, Tensor losses, Tensor lse, float temperature) "
    "-> (Tensor dqueries, Tensor dkeys, Tensor dpositives)"
)


def _forward_fake(queries: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape[0]), queries.new_empty(queries.shape[0])


def _backward_fake(
    dlosses: Tensor, queries: Tensor, keys: Tensor, positives: Tensor | None, *saved: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dpositives = queries.new_empty(0 if positives is None else positives.shape)
    return queries.new_empty(queries.shape), keys.new_empty(keys.shape), dpositives


def _setup_context(ctx: Any, inputs: Any, results: Any) -> None:
    *tensors, ctx.temperature = inputs
    ctx.mark_non_differentiable(results.lse)
    ctx.save_for_backward(*tensors, *results)


def _backward(operator: Any, ctx: Any, grads: Any) -> dict[str, Tensor | None]:
    if grads.losses is None:
        return {}
    saved = ctx.saved_tensors
    dqueries, dkeys, dpositives = operator(grads.losses.contiguous(), *saved, ctx.temperature)
    gradients = {"queries": dqueries, "keys": dkeys}
    return gradients if saved[2] is None else gradients | {"positives": dpositives}


define(
    "centroid_info_nce",
    _SCHEMA,
    _forward_fake,
    backends=BACKENDS,
    gradient=Gradient(_BACKWARD_SCHEMA, _backward_fake, _setup_context, _backward),
)


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
    Nothing is normalised here. Inner products and sums are float32, also under autocast.
    On GPUs up to 2^15 logits (K·G×K) are never stored. Otherwise they are kept for the gradient if
    these are at most 2^23 (32 MiB in float32); of more the backward pass computes parts again.

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
    backend = select(function, queries, queries.shape[0], backends=CUDA_BACKENDS)
    few = queries.shape[:-1].numel() * keys.shape[0] <= KERNEL_LOGITS
    if backend not in BACKENDS or not few:
        return reference.centroid_info_nce(
            *map(savable, (queries, keys)),
            positives=savable(positives),
            present=savable(present),
            present_keys=savable(present_keys),
            temperature=temperature,
            reduction=reduction,
        )
    if present_keys is None and present is not None:
        present_keys = present if present.dim() == 1 else present.any(1)
    rows = None if present is None else present.flatten().contiguous()
    losses, _ = getattr(torch.ops.anchorops.centroid_info_nce, backend)(
        queries.float().flatten(0, -2),
        keys.float(),
        None if positives is None else positives.float().flatten(0, -2),
        rows,
        None if present_keys is None else present_keys.contiguous(),
        temperature,
    )
    if reduction == "none":
        return losses.view(queries.shape[:-1])
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (max(losses.numel(), 1) if rows is None else rows.sum().clamp(min=1))
