"""InfoNCE between the centroids of K classes, in PyTorch on every device: K×K×D products, and a
cross-entropy of their rows."""

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._checks import (
    FLOATING,
    check_choice,
    check_strided,
    check_temperature,
    describe,
    fail,
    in_transform,
    savable,
)

LOGITS_AT_ONCE = 2**23  # 32 MiB in float32; more are computed in parts, and again for the gradient
LOGITS_OF_PART = 2**20  # the formula needs a few copies of them


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
    queries, keys = savable(queries), savable(keys)
    positives, present, present_keys = map(savable, (positives, present, present_keys))
    if present is None:
        present = torch.ones(queries.shape[:-1], dtype=torch.bool, device=queries.device)
    losses = _losses(queries, keys, positives, present, present_keys, temperature)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / present.sum().clamp(min=1)


def _losses(
    queries: Tensor,
    keys: Tensor,
    positives: Tensor | None,
    present: Tensor,
    present_keys: Tensor | None,
    temperature: float,
) -> Tensor:
    """Of the shape [K] or [K, G] of `present`."""
    num_classes, num_queries = keys.shape[0], present.numel()
    has_query = present if present.dim() == 1 else present.any(1)
    if present_keys is None:
        present_keys = has_query
    # There is no autocast for the device "meta".
    with torch.autocast("cpu" if queries.is_meta else queries.device.type, enabled=False):
        # Absent classes are removed by selection, because their centroids may be NaN.
        used = present_keys if positives is not None else present_keys | has_query
        dtype = torch.promote_types(queries.dtype, torch.float32)
        keys = torch.where(used[:, None], keys.to(dtype), 0)
        own_class = torch.arange(num_classes, device=keys.device).repeat_interleave(
            present.shape[1:].numel()
        )
        flat = None if positives is None else positives.flatten(0, -2)
        rows = queries.flatten(0, -2), flat, present.flatten(), own_class
        arguments = keys, present_keys, temperature
        # torch.func's transforms do not support torch.utils.checkpoint.
        transformed = any(x is not None and in_transform(x) for x in (queries, keys, flat))
        if transformed or num_queries * num_classes <= LOGITS_AT_ONCE:
            return _losses_of_rows(rows, *arguments).view(present.shape)
        most = max(LOGITS_OF_PART // num_classes, 1)
        count = -(-num_queries // most)
        parts = ([None] * count if x is None else x.split(most) for x in rows)
        again = partial(checkpoint, _losses_of_rows, use_reentrant=False, preserve_rng_state=False)
        losses = [again(part, *arguments) for part in zip(*parts, strict=True)]
        return torch.cat(losses).view(present.shape)


def _losses_of_rows(
    rows: tuple[Tensor, Tensor | None, Tensor, Tensor],
    keys: Tensor,
    present_keys: Tensor,
    temperature: float,
) -> Tensor:
    """Losses [R] of rows: queries, positives [R, D]; present bool [R]; their own class [R]."""
    queries, positives, present, own_class = rows
    queries = torch.where(present[:, None], queries.to(keys.dtype), 0)
    # A mask, not gather or index_select: on a GPU, their gradients are added in any order.
    is_own_key = own_class[:, None] == torch.arange(keys.shape[0], device=keys.device)
    logits = queries @ keys.T / temperature
    if positives is not None:
        positives = torch.where(present[:, None], positives.to(keys.dtype), 0)
        product = (queries * positives).sum(-1, keepdim=True)
        logits = torch.where(is_own_key, product / temperature, logits)
    positive = torch.where(is_own_key, logits, 0).sum(-1)
    lse = torch.where(present_keys | is_own_key, logits, -torch.inf).logsumexp(-1)
    return torch.where(present, lse - positive, 0)
