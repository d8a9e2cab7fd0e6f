"""InfoNCE between the centroids of K classes. It computes only K×K×D products, so on a GPU the
launches determine its time.

On GPUs it is an operator, `anchorops::centroid_info_nce.triton` and `.cuda` of one schema. On CPU
the formula of the reference is used: with its masks of classes it takes about 0.1 ms at K = 19, up
to four times as long as a plain cross-entropy.
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
)
from ..reference.centroid_info_nce import LOGITS_AT_ONCE
from .registration import ON_GPU, Gradient, define

# bias: float32 [K]; the other tensors of any floating-point dtype. lse, positive_logits (float32
# [K] or [K, G]), scale (the factor of the sum of the losses) and logits are kept for the gradient.
# logits: float32 [K·G, K, rounded up to a multiple of 8], or (0,) if these are more than
# logits_at_once. dbias and dpositives are (0,) if there is no bias or are no positives.
_SCHEMA = (
    "(Tensor queries, Tensor keys, Tensor? bias, Tensor? positives, Tensor? present, "
    "Tensor? present_keys, bool all_keys, bool mirrored, float temperature, "
    "float loss_weight, str reduction, int logits_at_once) "
    "-> (Tensor loss, Tensor lse, Tensor positive_logits, Tensor scale, Tensor logits)"
)
_BACKWARD_SCHEMA = (
    "(Tensor dloss, Tensor queries, Tensor keys, Tensor? bias, Tensor? positives, Tensor? present, "
    "Tensor? present_keys, Tensor lse, Tensor positive_logits, Tensor scale, Tensor logits, "
    "bool all_keys, bool mirrored, float temperature, int logits_at_once) "
    "-> (Tensor dqueries, Tensor dkeys, Tensor dbias, Tensor dpositives)"
)


def _forward_fake(
    queries: Tensor, keys: Tensor, *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, reduction, logits_at_once = given
    shape = queries.shape[:-1]
    rows, width = shape.numel(), (keys.shape[0] + 7) // 8 * 8
    return (
        queries.new_empty(shape if reduction == "none" else (), dtype=torch.float32),
        queries.new_empty(shape, dtype=torch.float32),
        queries.new_empty(shape, dtype=torch.float32),
        queries.new_empty((), dtype=torch.float32),
        queries.new_empty(
            (rows, width) if rows * width <= logits_at_once else (0,), dtype=torch.float32
        ),
    )


def _backward_fake(
    dloss: Tensor,
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    positives: Tensor | None,
    *saved: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        queries.new_empty(queries.shape),
        keys.new_empty(keys.shape),
        dloss.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        queries.new_empty(0) if positives is None else positives.new_empty(queries.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (all_keys, mirrored, temperature, _, _, logits_at_once) = inputs[:6], inputs[6:]
    ctx.options = all_keys, mirrored, temperature, logits_at_once
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(operator: Any, ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 12
    saved = ctx.saved_tensors
    gradients = operator(dloss, *saved, *ctx.options)
    given = saved[:4]  # queries, keys, bias, positives
    wanted = (d if x is not None else None for d, x in zip(gradients, given, strict=True))
    return *wanted, *(None,) * 8


define(
    "centroid_info_nce",
    _SCHEMA,
    _forward_fake,
    backends=ON_GPU,
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
    The K·G×K logits are kept for the gradient if these are at most 2^23 (32 MiB in float32).
    Otherwise the backward pass computes them again, at most 32 MiB at a time.

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
    check_temperature(function, temperature)
    check_choice(function, "reduction", reduction, ("mean", "sum", "none"))
    return unchecked_info_nce(
        queries,
        keys,
        positives=positives,
        present=present,
        present_keys=present_keys,
        temperature=temperature,
        reduction=reduction,
    )


def unchecked_info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    bias: Tensor | None = None,
    positives: Tensor | None = None,
    mirrored: bool = False,
    present: Tensor | None = None,
    present_keys: Tensor | None = None,
    all_keys: bool = False,
    temperature: float,
    loss_weight: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """`centroid_info_nce` of arguments already checked, and these:

    bias: float [K], added to the logits of the keys. mirrored: the positive of query g of a class
    is its query G−1−g. all_keys: all keys are in the denominators. loss_weight: a factor.
    """
    function = "centroid_info_nce"
    options: dict[str, Any] = {
        "bias": bias,
        "positives": positives,
        "present": present,
        "present_keys": present_keys,
        "all_keys": all_keys,
        "mirrored": mirrored,
        "temperature": temperature,
        "loss_weight": loss_weight,
        "reduction": reduction,
    }
    backend = select(function, queries, queries.shape[0])
    if backend not in ON_GPU:
        return reference.centroid_info_nce(queries, keys, **options)
    if bias is not None:
        options["bias"] = bias.to(torch.float32).contiguous()  # the kernels read it as such
    operator = getattr(torch.ops.anchorops.centroid_info_nce, backend)
    return operator(queries, keys, *options.values(), LOGITS_AT_ONCE)[0]
