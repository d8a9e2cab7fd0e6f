"""Softmax moments: the statistics that pixel losses need, at the labels' resolution, computed from
low-resolution logits.

Let z be the logits upsampled bilinearly to the labels' size, p = softmax_k z, y the labels, V the
valid pixels q:

    counts[k] = #{q ∈ V : y = k}                 hits[k] = #{q ∈ V : y = k = argmax z}
    losses[k] = Σ_{q ∈ V, y = k} −log p_k(q)     overlaps[k] = Σ_{q ∈ V, y = k} p_k(q)
    masses[k] = Σ_{q ∈ V} p_k(q)                 squares[k] = Σ_{q ∈ V} p_k(q)²
    pixel_losses[q] = −log p_y(q)                lse[q] = log Σ_k e^{z_k(q)};  0 where ignored

    dz_k = (d + dlse[q])·p_k − d·[y = k] + p_k·(u_k − Σ_j p_j u_j),  0 where ignored
    d    = dlosses[y] + dpixel_losses[q]
    u_k  = dmasses[k] + [y = k]·doverlaps[k] + 2·p_k·dsquares[k]
    dlogits = the transpose of the upsampling, of dz

The upsampled logits are never stored: the backward pass computes p again, from logits and lse.
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._backend import select
from .._checks import (
    check_flags,
    check_ignore_index,
    check_label_values,
    check_labels_of_logits,
    check_logits,
)
from .._predicted import cross_entropy_by_triton
from ..reference import SoftmaxMoments, statistics_dtype
from .registration import Gradient, define

# logits (B, K, h, w) of any strides, labels (B, H, W) of any integer dtype and strides. Statistics
# of classes are [K], with per_image [B, K]; pixel_losses and lse are (B, H, W), contiguous.
# Floating-point results are float32, for float64 logits float64. A result that was not requested is
# an empty tensor (0,).
_SCHEMA = (
    "(Tensor logits, Tensor labels, int ignore_index, bool align_corners, bool per_image, "
    "bool with_hits, bool with_masses, bool with_squares, bool with_pixel_losses, bool with_lse) "
    "-> (Tensor losses, Tensor overlaps, Tensor masses, Tensor squares, Tensor pixel_losses, "
    "Tensor lse, Tensor counts, Tensor hits)"
)

# Gradients have the shapes and the dtype of the results; those of classes are all [K] or all
# [B, K]. dlogits is dense and has the logits' dtype and layout.
_BACKWARD_SCHEMA = (
    "(Tensor logits, Tensor labels, Tensor lse, Tensor? dlosses, Tensor? doverlaps, "
    "Tensor? dmasses, Tensor? dsquares, Tensor? dpixel_losses, Tensor? dlse, int ignore_index, "
    "bool align_corners) -> Tensor"
)


def _forward_fake(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    align_corners: bool,
    per_image: bool,
    with_hits: bool,
    with_masses: bool,
    with_squares: bool,
    with_pixel_losses: bool,
    with_lse: bool,
) -> tuple[Tensor, ...]:
    dtype = statistics_dtype(logits.dtype)
    by_class = logits.shape[:2] if per_image else logits.shape[1:2]

    def empty(asked: bool, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return logits.new_empty(shape if asked else (0,), dtype=dtype)

    return (
        empty(True, by_class, dtype),
        empty(with_masses, by_class, dtype),
        empty(with_masses, by_class, dtype),
        empty(with_squares, by_class, dtype),
        empty(with_pixel_losses, labels.shape, dtype),
        empty(with_lse, labels.shape, dtype),
        empty(True, by_class, torch.int64),
        empty(with_hits, by_class, torch.int64),
    )


def _backward_fake(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, ctx.ignore_index, ctx.align_corners, _, _, *asked = inputs
    ctx.with_masses, ctx.with_squares, ctx.with_pixel_losses, ctx.with_lse = asked
    lse, counts, hits = output[5:]
    ctx.mark_non_differentiable(counts, hits)
    ctx.save_for_backward(logits, labels, lse)


def _backward(operator: Any, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    dlosses, doverlaps, dmasses, dsquares, dpixel_losses, dlse, _, _ = grads
    # The gradient of an absent (empty) output is an empty tensor, not None.
    given = (
        dlosses,
        doverlaps if ctx.with_masses else None,
        dmasses if ctx.with_masses else None,
        dsquares if ctx.with_squares else None,
        dpixel_losses if ctx.with_pixel_losses else None,
        dlse if ctx.with_lse else None,
    )
    dlogits = None
    if ctx.needs_input_grad[0] and any(grad is not None for grad in given):
        logits, labels, lse = ctx.saved_tensors
        options = ctx.ignore_index, ctx.align_corners
        if not ctx.with_lse:
            # torch.vmap and traces without gradients hide that a gradient will be requested
            lse = ctx.forward(logits, labels, *options, *(False,) * 5, True)[5]
        dlogits = operator(logits, labels, lse, *given, *options)
    return dlogits, *(None,) * 9


define(
    "softmax_moments",
    _SCHEMA,
    _forward_fake,
    gradient=Gradient(_BACKWARD_SCHEMA, _backward_fake, _setup_context, _backward),
)


def _as_images(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K, h, w) and (B, H, W). Points and volumes become one row of pixels. The results are
    views, except for a volume whose strides do not allow merging depth, height and width."""
    if logits.dim() == 2:
        return logits.t()[None, :, None], labels[None, None]
    if logits.dim() == 4:
        return logits, labels
    return logits.flatten(2)[:, :, None], labels.flatten(1)[:, None]


def softmax_moments(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int | None = None,
    align_corners: bool = False,
    per_image: bool = False,
    hits: bool = True,
    masses: bool = True,
    squares: bool = False,
    pixel_losses: bool = False,
    lse: bool = False,
    check_labels: bool = False,
) -> SoftmaxMoments:
    """Softmax statistics of each class, from low-resolution logits and labels at their own size.

    With z = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear",
    align_corners=align_corners) and p = z.softmax(1), neither of which is stored:

        counts[k] = #{y = k}            hits[k] = #{y = k = argmax z}
        losses[k] = Σ_{y = k} −log p_k  overlaps[k] = Σ_{y = k} p_k
        masses[k] = Σ p_k               squares[k] = Σ p_k²

    over the valid pixels. Cross-entropy is (Σ losses)/(Σ counts). Dice, Tversky and Jaccard are
    computed from counts, overlaps and masses. Accuracy is (Σ hits)/(Σ counts).

    Args:
        logits: (B, K, h, w), any strides; (N, K), (B, K, N) or volumes (B, K, d, h, w), whose
            labels have the same size. float32, bfloat16, float16 or float64; K from 2 to 65,536
            (16,384 on GPU). Gradients have its dtype and memory layout.
        labels: any integer dtype; (B, H, W) of any size, (N,), (B, N) or (B, d, h, w). A pixel is
            valid if 0 <= label < K and label != ignore_index. Other pixels change nothing, even if
            their logits are NaN or Inf, and have no gradient.
        ignore_index: the label to ignore, 255 by default; with K > 255 it must be given.
        align_corners: of the upsampling, as in F.interpolate.
        per_image: compute the statistics of each image separately.
        hits, masses, squares, pixel_losses, lse: what to compute in addition to counts and losses;
            `masses` includes the overlaps. Each of them needs time.
        check_labels: raise an error if a label is neither a class nor ignore_index; this
            synchronises with the device.

    Returns:
        SoftmaxMoments(counts, hits, losses, overlaps, masses, squares, pixel_losses, lse); None for
        what was not requested. Statistics of classes are [K], with per_image [B, K]. pixel_losses
        = −log p_y and lse = log Σ e^z (log-sum-exp) have the labels' shape and are 0 for ignored
        pixels. counts and hits are int64, the others float32 (float64 for float64 logits). Results
        are bitwise reproducible.
        For hits, the first of equal logits is the largest, and NaN is larger than all numbers.
        A pixel reads only logits whose interpolation weight is not 0, so a NaN affects only the
        pixels that read it. A logit of −inf has p = 0 and gradient 0.

    Raises:
        ValueError: wrong shape, dtype, device or label; a chosen backend that does not support the
            call.
        RuntimeError: a second or a forward-mode derivative was requested from a fused backend.
    """
    return moments_for(
        "softmax_moments",
        logits,
        labels,
        ignore_index=ignore_index,
        align_corners=align_corners,
        per_image=per_image,
        hits=hits,
        masses=masses,
        squares=squares,
        pixel_losses=pixel_losses,
        lse=lse,
        check_labels=check_labels,
    )


def moments_for(
    function: str,
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int | None,
    align_corners: bool,
    per_image: bool = False,
    hits: bool = False,
    masses: bool = False,
    squares: bool = False,
    pixel_losses: bool = False,
    lse: bool = False,
    check_labels: bool = False,
) -> SoftmaxMoments:
    """`softmax_moments`, with messages that name `function`."""
    check_logits(function, logits)
    check_labels_of_logits(function, labels, logits)
    ignore_index = check_ignore_index(function, ignore_index, logits.shape[1])
    check_flags(
        function,
        align_corners=align_corners,
        per_image=per_image,
        hits=hits,
        masses=masses,
        squares=squares,
        pixel_losses=pixel_losses,
        lse=lse,
        check_labels=check_labels,
    )
    if check_labels:
        check_label_values(function, labels, logits.shape[1], ignore_index)
    return unchecked_moments(
        function,
        logits,
        labels,
        ignore_index=ignore_index,
        align_corners=align_corners,
        per_image=per_image,
        hits=hits,
        masses=masses,
        squares=squares,
        pixel_losses=pixel_losses,
        lse=lse,
    )


def unchecked_moments(
    function: str,
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    align_corners: bool,
    per_image: bool = False,
    hits: bool = False,
    masses: bool = False,
    squares: bool = False,
    pixel_losses: bool = False,
    lse: bool = False,
) -> SoftmaxMoments:
    """`moments_for`, of arguments that were already checked; K may be 1."""
    shape = labels.shape
    logits, labels = _as_images(logits, labels)
    cross_entropy_only = not (hits or masses or squares)
    by_triton = cross_entropy_only and cross_entropy_by_triton(logits.shape[1])
    backend = select(function, logits, logits.shape[1], by_triton=by_triton)
    if backend == "reference":
        moments = reference.softmax_moments(
            logits,
            labels,
            ignore_index=ignore_index,
            align_corners=align_corners,
            per_image=per_image,
            hits=hits,
            masses=masses,
            squares=squares,
            pixel_losses=pixel_losses,
            lse=lse,
        )
    else:
        keep_lse = lse or (logits.requires_grad and torch.is_grad_enabled())
        operator = getattr(torch.ops.anchorops.softmax_moments, backend)
        found = operator(
            logits,
            labels,
            ignore_index,
            align_corners,
            per_image,
            hits,
            masses,
            squares,
            pixel_losses,
            keep_lse,
        )
        moments = SoftmaxMoments(
            counts=found[6],
            hits=found[7] if hits else None,
            losses=found[0],
            overlaps=found[1] if masses else None,
            masses=found[2] if masses else None,
            squares=found[3] if squares else None,
            pixel_losses=found[4] if pixel_losses else None,
            lse=found[5] if lse else None,
        )
    pixel_maps = {"pixel_losses": moments.pixel_losses, "lse": moments.lse}
    return moments._replace(**{k: v.view(shape) for k, v in pixel_maps.items() if v is not None})
