"""InfoNCE between the centroids of K classes: K×K×D, so everything is in the launches."""

import torch
from torch import Tensor

from .. import reference
from .._checks import FLOATING, check_choice, describe, fail


def _check(argument: str, tensor: object, shape: tuple[int, ...], queries: Tensor) -> None:
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
    """InfoNCE that pulls each class's query to its positive and pushes it from the other keys.

    L_i = −log [ e^{q_i·p_i/τ} / ( e^{q_i·p_i/τ} + Σ_{j≠i} e^{q_i·k_j/τ} ) ],  p_i = k_i by default

    (OCCL, doi 10.1016/j.patcog.2024.110431, Eqs. 4-6 as the text means them; MVSC, Eq. 2.)
    Nothing is normalised here. Inner products and sums are float32, also under autocast.

    Args:
        queries: [K, D], or [K, G, D] for G queries of each class; float.
        keys: [K, D]; float.
        positives: as queries; takes the place of the query's own key.
        present: bool [K] or [K, G] as queries; the others lose nothing and push nothing. Rows of
            absent classes may hold NaN.
        present_keys: bool [K]: the keys in the denominator besides the query's own; by default the
            classes with a present query.
        temperature: τ > 0.
        reduction: "mean" over the present queries (0 if there is none), "sum", or "none".

    Returns:
        A scalar, or [K] / [K, G] for "none"; float32 (float64 for float64).

    Raises:
        ValueError: wrong shape, dtype, device, temperature or reduction.
    """
    function = "centroid_info_nce"
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
    if not temperature > 0:
        fail(function, "temperature", "a number above 0", temperature)
    check_choice(function, "reduction", reduction, ("mean", "sum", "none"))
    return reference.centroid_info_nce(
        queries,
        keys,
        positives=positives,
        present=present,
        present_keys=present_keys,
        temperature=temperature,
        reduction=reduction,
    )
