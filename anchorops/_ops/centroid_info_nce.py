"""InfoNCE between the centroids of K classes: products of queries and keys, and a cross-entropy of
their rows.

    x[r, k] = q_r·k_k/τ + b_k,  own[r]: that of row r's own key, which its positive may replace
    loss[r] = lse[r] − own[r],  lse[r] = log Σ e^x[r, k], of the denominator's keys and the own one
    dx[r, k] = dloss[r]·(e^(x[r, k] − lse[r]) − [k is own])/τ,  dq = dx k,  dk = dxᵀ q,
    db[k] = τ·Σ_r dx[r, k]

GPUs keep the logits x for the gradient; a CPU the slopes e^(x − lse) − [k is own], in their memory.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import reference
from .._backend import select
from .._checks import (
    FLOATING,
    check_choice,
    check_normal,
    check_strided,
    check_temperature,
    describe,
    fail,
)
from .._moments import as_scalar, statistics_dtype
from .._torch_state import in_transform, savable
from .registration import Gradient, define, run
from .triton_launch import launcher

LOGITS_AT_ONCE = 2**23  # 32 MiB in float32; more are computed in parts, and again for the gradient
LOGITS_OF_PART = 2**20
INPUTS = "queries", "keys", "positives", "bias"  # those with gradients

# queries and positives [C, D] or [C, G, D] are of the classes from `first` on; C = K, or they
# are a part. keys [K, D]; bias [K]; present: bool [C] or [C, G], None: all; present_keys: bool [K],
# None: the classes with a present query, or all if there is a bias. temperature: (), of the losses'
# dtype (why a tensor: as_scalar of _moments.py). losses: a scalar, or [C] or [C, G] for the
# reduction "none". kept: what a backend keeps for the gradient.
_SCHEMA = (
    "(Tensor queries, Tensor keys, Tensor? positives, Tensor? bias, Tensor? present, "
    "Tensor? present_keys, SymInt first, Tensor temperature, str reduction, float? normalize) "
    "-> (Tensor losses, {kept})"
)
_BACKWARD_SCHEMA = (
    "(Tensor dlosses, Tensor queries, Tensor keys, Tensor? positives, Tensor? bias, "
    "Tensor? present, Tensor? present_keys, {kept}, SymInt first, Tensor temperature, "
    "str reduction, float? normalize, bool of_queries, bool of_keys, bool of_positives, "
    "bool of_bias) -> (Tensor dqueries, Tensor dkeys, Tensor dpositives, Tensor dbias)"
)


def _fake(backend: str, queries: Tensor, keys: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    shape, num_classes = queries.shape[:-1], keys.shape[0]
    new = partial(queries.new_empty, dtype=statistics_dtype(queries.dtype))
    losses, rows = new(shape if arguments[6] == "none" else ()), math.prod(shape)
    if backend == "cpu":
        return losses, new((rows, num_classes))
    pitch = (num_classes + 15) // 16 * 16
    return losses, new((rows, pitch)), new((4, rows)), new(num_classes), new(())


def _backward_fake(dlosses: Tensor, queries: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs = queries, *(queries if x is None else x for x in arguments[:3])
    needed = zip(inputs, arguments[-4:], strict=True)
    return tuple(x.new_empty(x.shape if wanted else 0) for x, wanted in needed)


def _setup_context(ctx: Any, inputs: Any, results: Any) -> None:
    ctx.first, ctx.options = inputs.first, (inputs.reduction, inputs.normalize)
    ctx.save_for_backward(*inputs[:6], *results[1:], inputs.temperature)


def _backward(operator: Any, ctx: Any, grads: Any) -> dict[str, Tensor | None]:
    if grads.losses is None:
        return {}
    *tensors, temperature = ctx.saved_tensors
    needed = ctx.needs[:4]
    gradients = operator(grads.losses, *tensors, ctx.first, temperature, *ctx.options, *needed)
    named = zip(INPUTS, needed, gradients, strict=True)
    return {name: gradient for name, wanted, gradient in named if wanted}


for _backend, _kept in (
    ("cpu", "Tensor slopes"),
    ("triton", "Tensor logits, Tensor rows, Tensor key_lengths, Tensor factor"),
):
    define(
        "centroid_info_nce",
        _SCHEMA.format(kept=_kept),
        partial(_fake, _backend),
        backends=(_backend,),
        gradient=Gradient(
            _BACKWARD_SCHEMA.format(kept=_kept),
            _setup_context,
            _backward,
            _backward_fake,
            triton=launcher("centroid_info_nce_backward"),
        ),
        triton=launcher("centroid_info_nce"),
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
    bias: Tensor | None = None,
    present: Tensor | None = None,
    present_keys: Tensor | None = None,
    temperature: float = 0.07,
    reduction: str = "mean",
    normalize: float | None = None,
) -> Tensor:
    """InfoNCE: pulls the query of each class to its positive, and away from the other keys.

    L_i = −log [ e^{q_i·p_i/τ} / ( e^{q_i·p_i/τ} + Σ_{j≠i} e^{q_i·k_j/τ} ) ],  p_i = k_i by default

    (OCCL, doi 10.1016/j.patcog.2024.110431, Eqs. 4-6 as described in the text; MVSC, Eq. 2.)
    Inner products and sums are float32, also under autocast, and with TF32 allowed: only the
    reference's products are TF32 if `torch.set_float32_matmul_precision` says so.
    The logits (K·G×K) are kept for the gradient if these are at most 2^23 (32 MiB in float32); of
    more the backward pass computes parts again.

    Args:
        queries: [K, D], or [K, G, D] for G queries of each class; float.
        keys: [K, D]; float.
        positives: same shape as queries; replace the query's own key.
        bias: [K], float, of a classifier whose rows are the keys: it is added to their logits, and
            all keys are in the denominators. Not with positives, present_keys or normalize.
        present: bool [K], or [K, G] for [K, G, D] queries. Absent queries have no loss, and their
            keys are not in the denominators. Rows of absent classes may contain NaN (not keys
            with a bias).
        present_keys: bool [K]: the keys in the denominator in addition to the query's own; by
            default the classes with a present query.
        temperature: τ > 0, a normal number of float32 (at least 2⁻¹²⁶).
        reduction: "mean" over the present queries (0 if there is none), "sum", or "none".
        normalize: the eps of F.normalize, a normal number of float32: queries, keys and positives
            are divided by max(length, eps). None: nothing is normalised.

    Returns:
        A scalar, or [K] / [K, G] for "none"; float32 (float64 for float64).

    Raises:
        ValueError: wrong shape, dtype, device, temperature, reduction or eps; a chosen backend that
            does not support the call.
        RuntimeError: a second or a forward-mode derivative was requested from a fused backend.
    """
    function = "centroid_info_nce"
    check_strided(function, "queries", queries)
    if not isinstance(queries, Tensor) or queries.dim() not in (2, 3):
        fail(function, "queries", "a tensor [K, D] or [K, G, D]", describe(queries))
    _check("keys", keys, (queries.shape[0], queries.shape[-1]), queries)
    if positives is not None:
        _check("positives", positives, tuple(queries.shape), queries)
    if bias is not None:
        _check("bias", bias, (queries.shape[0],), queries)
        if not (positives is present_keys is normalize is None):
            expected = "None with positives, present_keys or normalize"
            fail(function, "bias", expected, describe(bias))
    for argument, tensor in zip(INPUTS, (queries, keys, positives, bias), strict=True):
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
    if normalize is not None:
        normalize = check_normal(function, "normalize", normalize)
    backend = select(function, queries, queries.shape[0])
    shape = queries.shape[:-1]
    # not shape.numel(), which torch.export makes a constant
    if backend != "reference" and math.prod(shape) * keys.shape[0] <= LOGITS_AT_ONCE:
        tensors = queries, keys, positives, bias, present, present_keys
        options = 0, as_scalar(temperature, queries), reduction, normalize
        return run(function, backend, *tensors, *options)[0]
    if queries.dim() == 2:
        queries = queries[:, None]
        positives, present = (x if x is None else x[:, None] for x in (positives, present))
    # The gradients of keys and bias are the sums of those of the parts, and are rounded once.
    wide_keys, wide_bias = (
        x if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in (keys, bias)
    )
    inputs = queries, wide_keys, positives, wide_bias, present, present_keys
    tensors: Any = tuple(map(savable, inputs))
    losses = _losses_in_parts(backend, *tensors, temperature=temperature, normalize=normalize)
    if reduction == "none":
        return losses.view(shape)
    number = shape.numel() if present is None else present.sum()
    total = losses.sum()
    return total if reduction == "sum" else total / torch.as_tensor(number).clamp(min=1)


def _losses_in_parts(
    backend: str,
    queries: Tensor,
    keys: Tensor,
    positives: Tensor | None,
    bias: Tensor | None,
    present: Tensor | None,
    present_keys: Tensor | None,
    temperature: float,
    normalize: float | None,
) -> Tensor:
    """[K, G]; a part has the queries of some classes."""
    (num_classes, groups), device = queries.shape[:2], queries.device
    if present is None:
        present = torch.ones((num_classes, groups), dtype=torch.bool, device=device)
    if present_keys is None and bias is None:
        present_keys = present.any(1)
    arguments = present_keys, temperature, normalize
    # torch.func's transforms do not support torch.utils.checkpoint.
    inputs = queries, keys, positives, bias
    transformed = any(x is not None and in_transform(x) for x in inputs)
    if transformed or num_classes * groups * num_classes <= LOGITS_AT_ONCE:
        return _losses_of_part(backend, 0, *inputs, present, *arguments)
    most = max(LOGITS_OF_PART // (num_classes * groups), 1)
    again = partial(checkpoint, _losses_of_part, use_reentrant=False, preserve_rng_state=False)
    losses = []
    for first in range(0, num_classes, most):
        part = slice(first, first + most)
        of_part = None if positives is None else positives[part]
        tensors = queries[part], keys, of_part, bias, present[part]
        losses.append(again(backend, first, *tensors, *arguments))
    return torch.cat(losses)


def _losses_of_part(
    backend: str,
    first: int,
    queries: Tensor,
    keys: Tensor,
    positives: Tensor | None,
    bias: Tensor | None,
    present: Tensor,
    present_keys: Tensor | None,
    temperature: float,
    normalize: float | None,
) -> Tensor:
    tensors = queries, keys, positives, bias, present, present_keys
    if backend != "reference":
        options = first, as_scalar(temperature, queries), "none", normalize
        return run("centroid_info_nce", backend, *tensors, *options)[0]
    # There is no autocast for the device "meta".
    with torch.autocast("cpu" if queries.is_meta else queries.device.type, enabled=False):
        return reference.centroid_info_nce(*tensors, first, temperature, normalize)
