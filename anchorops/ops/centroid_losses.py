"""Two losses of the same K·G rows, and losses of classes that are given:

    contrast = InfoNCE of queries and keys
    classification = cross-entropy of rows·weightᵀ + bias, an InfoNCE of all keys
    loss = contrast + classification + Σ added

On `cuda` this is one operator, of two launches in the forward pass and one in the backward pass, if
there are at most MOST_LOGITS logits. Otherwise, and on the other backends, both losses are computed
by `unchecked_info_nce`, one after the other.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._backend import select
from .centroid_info_nce import unchecked_info_nce
from .registration import Gradient, define

MOST_LOGITS = 2**18  # with more logits, each of the two losses occupies the device


class CentroidLosses(NamedTuple):
    """terms: contrast, classification, and Σ added or 0, weighted; present: the number of classes
    with a present row, floating-point; total: the sum of the terms, in new memory, or None if it is
    not computed yet. If there is a total, the others have no gradient."""

    terms: tuple[Tensor, Tensor, Tensor]
    present: Tensor
    total: Tensor | None


def _forward_fake(queries: Tensor, keys: Tensor, *given: Any) -> tuple[Tensor, ...]:
    rows, width = queries.shape[0] * queries.shape[1], (keys.shape[0] + 7) // 8 * 8
    sizes = (), (4,), (2, rows), (2, rows), (2,), (2, rows, width)
    return tuple(queries.new_empty(size) for size in sizes)


def _backward_fake(
    dloss: Tensor,
    queries: Tensor,
    keys: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    with_dkeys, with_dweight = options[-2:]
    of_keys, of_weight = keys if with_dkeys else None, weight if with_dweight else None
    given = queries, of_keys, rows, of_weight, bias
    return tuple(queries.new_empty(0 if x is None else x.shape) for x in given)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, added, present, mirrored, temperature, class_temperature, _, _, _ = inputs
    ctx.options = mirrored, temperature, class_temperature
    ctx.added = None if added is None else added.shape
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, present, *output[2:])


def _backward(operator: Any, ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 13
    saved = ctx.saved_tensors
    needed = ctx.needs_input_grad[:5]  # queries, keys, rows, weight, bias
    gradients = operator(dloss, *saved, *ctx.options, needed[1], needed[3])
    wanted = (d if need else None for d, need in zip(gradients, needed, strict=True))
    dadded = None if ctx.added is None else dloss.expand(ctx.added)
    return *wanted, dadded, *(None,) * 7


# float32: queries, rows [K, G, D]; keys, weight [K, D]; bias, added [K]; present: bool [K, G];
# terms [4]: contrast, classification, Σ added, and the number of classes with a present row. The
# others are kept for the gradient, each of both problems: lse and positive_logits [2, K·G], scale
# [2], logits [2, K·G, K rounded up to a multiple of 8]. drows and dbias are (0,) without rows and
# without a bias, dkeys and dweight if they are not requested.
define(
    "centroid_losses",
    "(Tensor queries, Tensor keys, Tensor? rows, Tensor weight, Tensor? bias, Tensor? added, "
    "Tensor present, bool mirrored, float temperature, float class_temperature, "
    "float contrast_weight, float class_weight, bool mean) -> (Tensor loss, Tensor terms, "
    "Tensor lse, Tensor positive_logits, Tensor scale, Tensor logits)",
    _forward_fake,
    backends=("cuda",),
    gradient=Gradient(
        "(Tensor dloss, Tensor queries, Tensor keys, Tensor? rows, Tensor weight, Tensor? bias, "
        "Tensor present, Tensor lse, Tensor positive_logits, Tensor scale, Tensor logits, "
        "bool mirrored, float temperature, float class_temperature, bool with_dkeys, "
        "bool with_dweight) -> "
        "(Tensor dqueries, Tensor dkeys, Tensor drows, Tensor dweight, Tensor dbias)",
        _backward_fake,
        _setup_context,
        _backward,
    ),
)


def centroid_losses(
    queries: Tensor,
    keys: Tensor,
    weight: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    added: Tensor | None = None,
    present: Tensor,
    mirrored: bool = False,
    temperature: float,
    class_temperature: float,
    contrast_weight: float,
    class_weight: float,
    reduction: str = "mean",
) -> CentroidLosses:
    """The losses of queries [K, G, D] with keys [K, D], and of rows [K, G, D], by default the
    queries, with weight [K, D] and bias [K]; added [K] are given. present: bool [K, G].

    mirrored: the positive of query g of a class is its query G−1−g. reduction: "mean" over the
    present rows, or "sum". Arguments already checked.
    """
    function = "centroid_losses"
    num_logits = queries.shape[0] * queries.shape[1] * keys.shape[0]
    backend = select(function, queries, queries.shape[0])
    if backend == "cuda" and num_logits <= MOST_LOGITS:
        bias = None if bias is None else bias.contiguous()  # the kernel reads it as such
        tensors = queries, keys, rows, weight, bias, added
        loss, terms, *_ = torch.ops.anchorops.centroid_losses.cuda(
            *(None if x is None else x.to(torch.float32) for x in tensors),
            present,
            mirrored,
            temperature,
            class_temperature,
            contrast_weight,
            class_weight,
            reduction == "mean",
        )
        contrast, classification, others, number = terms.unbind()
        return CentroidLosses((contrast, classification, others), number, loss)
    contrast = unchecked_info_nce(
        queries,
        keys.to(queries.dtype),
        mirrored=mirrored,
        present=present,
        temperature=temperature,
        loss_weight=contrast_weight,
        reduction=reduction,
    )
    rows = queries if rows is None else rows
    classification = unchecked_info_nce(
        rows,
        weight.to(rows.dtype),
        bias=None if bias is None else bias.to(rows.dtype),
        all_keys=True,
        present=present,
        temperature=class_temperature,
        loss_weight=class_weight,
        reduction=reduction,
    )
    others = queries.new_zeros(()) if added is None else added.sum()
    number = present.any(1).sum(dtype=torch.float32)
    return CentroidLosses((contrast, classification, others), number, None)
