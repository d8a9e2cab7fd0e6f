"""Softmax moments: the statistics that pixel losses need, at the labels' resolution, computed from
low-resolution logits.

Let z be the logits upsampled bilinearly to the labels' size, p = softmax_k z, y the labels, V the
valid pixels q:

    counts[k] = #{q ∈ V : y = k}                 hits[k] = #{q ∈ V : y = k = argmax z}
    losses[k] = Σ_{q ∈ V, y = k} w_q·L_q         overlaps[k] = Σ_{q ∈ V, y = k} p_k(q)
    masses[k] = Σ_{q ∈ V} p_k(q)                 squares[k] = Σ_{q ∈ V} p_k(q)²
    pixel_losses[q] = L_q                        lse[q] = log Σ_k e^{z_k(q)};  0 where ignored
    used[k] = Σ_{q ∈ V, y = k, not c < min_loss} w_q
    outside = #{q : y is neither a class nor ignore_index}

    L_q = m·(a_y·c + Σ_k v_k·(−log p_k))         c = −log p_y
    m   = (1 − e^{−c})^γ,  0 where c < min_loss

L is c without the options: a = 1 and v = 0 without label smoothing, m = 1 without a focal factor
and a smallest loss. w are the pixel weights, 1 if not given. w_q·L_q is 0 where w_q = 0, even if
L_q = ∞.

    dz_k = (α + β·Σ_j v_j + dlse[q])·p_k − α·[y = k] − β·v_k + p_k·(u_k − Σ_j p_j u_j)
    α    = d·(m·a_y + dm/dc·(a_y·c + Σ_k v_k·(−log p_k))),  β = d·m
    d    = w_q·dlosses[y] + dpixel_losses[q],  0 where ignored, like dlse
    u_k  = dmasses[k] + [y = k]·doverlaps[k] + 2·p_k·dsquares[k]
    dw_q = dlosses[y]·L_q + dused[y],  0 where not used; an infinite L_q counts as 0
    dlogits = the transpose of the upsampling, of dz

The upsampled logits are never stored: the backward pass computes p again, from logits and lse. It
needs no lse for two classes on the CPU: p is then a function of the difference of the logits.

Logits of one channel are those of a sigmoid: the classes are 0 and 1, and z = (0, x).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._backend import select
from .._checks import (
    check_flags,
    check_ignore_index,
    check_label_values,
    check_logits,
    labels_of_logits,
    shape_of,
)
from ..reference import SoftmaxMoments, statistics_dtype
from .class_moments import unchecked_moments as class_sums
from .registration import Gradient, define


class Options(NamedTuple):
    """The arguments of the operator, except the logits and the labels.

    smoothing: a and v as the rows of [2, K], or of each image, [B, 2, K]; of at least 0, in the
        statistics' dtype, contiguous. Classes of v_k = 0 are left out of the sum over the classes.
    pixel_weights: w, of the labels' shape and any strides, in the statistics' dtype.
    min_loss: pixels of smaller −log p_y are not used in the losses; NaN is not smaller.
    """

    smoothing: Tensor | None = None
    pixel_weights: Tensor | None = None
    min_loss: float | None = None
    focal_gamma: float = 0.0
    ignore_index: int = 255
    align_corners: bool = False
    per_image: bool = False
    hits: bool = False
    masses: bool = False
    squares: bool = False
    pixel_losses: bool = False
    lse: bool = False
    outside: bool = False

    def only(self, **asked: bool) -> Options:
        """To ask for other results of the same pixels, with L = −log p_y."""
        options = Options(ignore_index=self.ignore_index, align_corners=self.align_corners)
        return options._replace(**asked)


# Functions, because Dynamo of torch 2.10 does not trace a property of a NamedTuple.


def shapes_losses(options: Options) -> bool:
    """Whether L is not just −log p_y."""
    return options.smoothing is not None or options.min_loss is not None or options.focal_gamma > 0


def counts_used(options: Options) -> bool:
    return options.min_loss is not None or options.pixel_weights is not None


# logits (B, K, h, w) of any strides, labels (B, H, W) of any integer dtype and strides. Statistics
# of classes are [K], with per_image [B, K]; pixel_losses and lse are (B, H, W), contiguous.
# Floating-point results are float32, for float64 logits float64. `used` is one of them, with a
# gradient, if there are pixel weights; otherwise int64. A result that was not requested is an empty
# tensor (0,). Three things are for the backend cpu alone, and the others leave them to PyTorch:
# logits of one channel, with K = 2 statistics; pixel weights; `outside`, a scalar.
SCHEMA = (
    "(Tensor logits, Tensor labels, Tensor? smoothing, Tensor? pixel_weights, float? min_loss, "
    "float focal_gamma, int ignore_index, bool align_corners, bool per_image, "
    "bool with_hits, bool with_masses, bool with_squares, bool with_pixel_losses, bool with_lse, "
    "bool with_outside) "
    "-> (Tensor losses, Tensor overlaps, Tensor masses, Tensor squares, Tensor pixel_losses, "
    "Tensor lse, Tensor counts, Tensor hits, Tensor used, Tensor outside)"
)

# Gradients have the shapes and the dtype of the results; those of classes are all [K] or all
# [B, K]. dlogits is dense and has the logits' dtype and layout.
BACKWARD_SCHEMA = (
    "(Tensor logits, Tensor labels, Tensor lse, Tensor? dlosses, Tensor? doverlaps, "
    "Tensor? dmasses, Tensor? dsquares, Tensor? dpixel_losses, Tensor? dlse, Tensor? smoothing, "
    "Tensor? pixel_weights, float? min_loss, float focal_gamma, int ignore_index, "
    "bool align_corners) -> Tensor"
)


def forward_fake(logits: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, ...]:
    asked = Options(*options)
    dtype = statistics_dtype(logits.dtype)
    batch, num_classes = logits.shape[0], 2 if logits.shape[1] == 1 else logits.shape[1]
    by_class = (batch, num_classes) if asked.per_image else (num_classes,)

    def empty(asked: bool, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return logits.new_empty(shape if asked else (0,), dtype=dtype)

    return (
        empty(True, by_class, dtype),
        empty(asked.masses, by_class, dtype),
        empty(asked.masses, by_class, dtype),
        empty(asked.squares, by_class, dtype),
        empty(asked.pixel_losses, labels.shape, dtype),
        empty(asked.lse, labels.shape, dtype),
        empty(True, by_class, torch.int64),
        empty(asked.hits, by_class, torch.int64),
        empty(counts_used(asked), by_class, torch.int64 if asked.pixel_weights is None else dtype),
        empty(asked.outside, (), torch.int64),
    )


def backward_fake(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, *options = inputs
    asked = Options(*options)
    lse, *counts = output[5:]
    ctx.mark_non_differentiable(*(x for x in counts if not x.is_floating_point()))
    ctx.save_for_backward(logits, labels, lse, asked.smoothing, asked.pixel_weights)
    ctx.options = asked._replace(smoothing=None, pixel_weights=None)


def reads_lse(backend: str, logits: Tensor) -> bool:
    """Whether the backward pass needs lse: not on the CPU, for two classes or a sigmoid."""
    return backend != "cpu" or logits.shape[1] > 2


def backward(operator: Any, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    dlosses, doverlaps, dmasses, dsquares, dpixel_losses, dlse, _, _, dused, _ = grads
    asked: Options = ctx.options
    # The gradient of an absent (empty) output is an empty tensor, not None.
    given = (
        dlosses,
        doverlaps if asked.masses else None,
        dmasses if asked.masses else None,
        dsquares if asked.squares else None,
        dpixel_losses if asked.pixel_losses else None,
        dlse if asked.lse else None,
    )
    dlogits, dpixel_weights = None, None
    logits, labels, lse, smoothing, pixel_weights = ctx.saved_tensors
    if ctx.needs_input_grad[0] and any(grad is not None for grad in given):
        if not asked.lse and reads_lse(operator._overloadname, logits):
            # torch.vmap and traces without gradients hide that a gradient will be requested
            lse = ctx.forward(logits, labels, *asked.only(lse=True))[5]
        dlogits = operator(
            logits,
            labels,
            lse,
            *given,
            smoothing,
            pixel_weights,
            asked.min_loss,
            asked.focal_gamma,
            asked.ignore_index,
            asked.align_corners,
        )
    if ctx.needs_input_grad[3]:
        shaped = asked._replace(smoothing=smoothing, pixel_weights=pixel_weights)
        dpixel_weights = _dpixel_weights(ctx.forward, logits, labels, shaped, dlosses, dused)
    return dlogits, None, None, dpixel_weights, *(None,) * 11


def _dpixel_weights(
    forward: Any,
    logits: Tensor,
    labels: Tensor,
    options: Options,
    dlosses: Tensor | None,
    dused: Tensor | None,
) -> Tensor:
    """dw of all pixels."""
    num_classes = max(logits.shape[1], 2)
    plain = options.only(pixel_losses=True)
    shaped = plain._replace(smoothing=options.smoothing, focal_gamma=options.focal_gamma)
    losses = forward(logits, labels, *shaped)[4]
    used = valid_pixels(labels, num_classes, options.ignore_index)
    if options.min_loss is not None:
        own = forward(logits, labels, *plain)[4] if shapes_losses(shaped) else losses
        used &= ~(own < options.min_loss)
    classes = torch.where(used, labels.long(), 0).flatten(1)
    gradient = torch.zeros_like(losses)
    for by_class, factor in ((dlosses, torch.where(losses.isfinite(), losses, 0)), (dused, 1)):
        if by_class is not None:
            of_labels = by_class.expand(len(labels), num_classes).gather(1, classes)
            gradient += of_labels.view_as(losses) * factor
    return torch.where(used, gradient, 0)


def valid_pixels(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    unsigned = labels.dtype in (torch.uint16, torch.uint32, torch.uint64)  # cannot be compared
    if unsigned or num_classes > torch.iinfo(labels.dtype).max:  # or num_classes would overflow
        labels = labels.long()
    valid = (labels >= 0) & (labels < num_classes)
    return valid & (labels != ignore_index) if 0 <= ignore_index < num_classes else valid


define(
    "softmax_moments",
    SCHEMA,
    forward_fake,
    gradient=Gradient(BACKWARD_SCHEMA, backward_fake, setup_context, backward),
    any_strides=True,
)


def _as_images(logits: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
    """(B, K, h, w), and maps of the labels' size as (B, H, W). Points, and volumes of the labels'
    size, become one row of pixels. The results are views, except for a volume whose strides do not
    allow merging depth, height and width. Other volumes remain volumes."""
    if logits.dim() == 2:
        return logits.t()[None, :, None], *(x[None, None] for x in maps)
    if logits.dim() == 4 or (logits.dim() == 5 and logits.shape[2:] != maps[0].shape[1:]):
        return logits, *maps
    return logits.flatten(2)[:, :, None], *(x.flatten(1)[:, None] for x in maps)


def weighted(losses: Tensor, weights: Tensor) -> Tensor:
    """weights · losses, 0 where the weight is 0, because 0 · ∞ would be NaN. An infinite loss gives
    its weight no gradient, because that could be 0 · ∞ too."""
    if not weights.requires_grad:
        return weights * torch.where(weights == 0, 0, losses)
    finite = losses.isfinite()
    constant = weights.detach()
    infinite = constant * torch.where(constant == 0, 0, losses)
    return torch.where(finite, weights * torch.where(finite, losses, 0), infinite)


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
        logits: (B, K, h, w), any strides; volumes (B, K, d, h, w), which are upsampled with
            mode="trilinear"; (N, K) or (B, K, N). float32, bfloat16, float16 or float64; K from 2
            to 65,536 (16,384 on GPU). Gradients have its dtype and memory layout.
        labels: any integer dtype; (B, H, W) or (B, D, H, W) of any size, also with a channel,
            (B, 1, H, W) or (B, 1, D, H, W); (N,) or (B, N). A pixel is valid if 0 <= label < K and
            label != ignore_index. Other pixels change nothing, even if their logits are NaN or Inf,
            and have no gradient.
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
    options = Options(
        align_corners=align_corners,
        per_image=per_image,
        hits=hits,
        masses=masses,
        squares=squares,
        pixel_losses=pixel_losses,
        lse=lse,
    )
    return moments_for(
        "softmax_moments",
        logits,
        labels,
        options,
        ignore_index=ignore_index,
        check_labels=check_labels,
    )


def moments_for(
    function: str,
    logits: Tensor,
    labels: Tensor,
    options: Options,
    *,
    ignore_index: int | None,
    check_labels: bool = False,
) -> SoftmaxMoments:
    """`softmax_moments` with all options and messages that name `function`.

    ignore_index is that of the caller, who may not have given one.
    """
    check_logits(function, logits)
    given = labels
    labels = labels_of_logits(function, given, logits)
    ignore_index = check_ignore_index(function, ignore_index, logits.shape[1])
    flags = {name: value for name, value in options._asdict().items() if name in _FLAGS}
    check_flags(function, **flags, check_labels=check_labels)
    if check_labels:
        check_label_values(function, labels, logits.shape[1], ignore_index)
    options = options._replace(ignore_index=ignore_index)
    return in_shape(unchecked_moments(function, logits, labels, options), shape_of(given))


_FLAGS = ("align_corners", "per_image", "hits", "masses", "squares", "pixel_losses", "lse")


def unchecked_moments(
    function: str, logits: Tensor, labels: Tensor, options: Options
) -> SoftmaxMoments:
    """`moments_for`, of arguments that were already checked. Logits may have one channel."""
    shape = labels.shape
    if options.pixel_weights is None:
        logits, labels = _as_images(logits, labels)
    else:
        logits, labels, pixel_weights = _as_images(logits, labels, options.pixel_weights)
        options = options._replace(pixel_weights=pixel_weights)
    backend = select(
        function,
        logits,
        logits.shape[1],
        runs=("softmax_moments",),
        shapes_losses=shapes_losses(options),
        size=labels.shape[1:],
        align_corners=options.align_corners,
    )
    if logits.shape[1] == 1 and backend != "cpu":
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    if backend == "reference":
        moments = reference.softmax_moments(logits, labels, **options._asdict())
    elif options.pixel_weights is not None and backend != "cpu":
        moments = _moments_by_maps(function, logits, labels, options)
    else:
        differentiates = logits.requires_grad and torch.is_grad_enabled()
        keep_lse = options.lse or (differentiates and reads_lse(backend, logits))
        name = "softmax_moments" if logits.dim() == 4 else "volume_moments"
        operator = getattr(getattr(torch.ops.anchorops, name), backend)
        by_operator = options._replace(lse=keep_lse, outside=options.outside and backend == "cpu")
        found = operator(logits, labels, *by_operator)
        moments = SoftmaxMoments(
            counts=found[6],
            hits=found[7] if options.hits else None,
            losses=found[0],
            overlaps=found[1] if options.masses else None,
            masses=found[2] if options.masses else None,
            squares=found[3] if options.squares else None,
            pixel_losses=found[4] if options.pixel_losses else None,
            lse=found[5] if options.lse else None,
            used=found[8] if counts_used(options) else None,
            outside=found[9] if by_operator.outside else None,
        )
        if options.outside and not by_operator.outside:
            outside = labels_outside(labels, moments.counts, options.ignore_index)
            moments = moments._replace(outside=outside)
    return in_shape(moments, shape)


def _moments_by_maps(
    function: str, logits: Tensor, labels: Tensor, options: Options
) -> SoftmaxMoments:
    """Softmax moments with pixel weights, from maps of the labels' size."""
    shares, unweighted = options.pixel_weights, options._replace(pixel_weights=None)
    assert shares is not None
    moments = unchecked_moments(function, logits, labels, unweighted._replace(pixel_losses=True))
    losses = moments.pixel_losses
    assert losses is not None
    if options.min_loss is not None:
        own = losses.detach()  # 0 where not used
        if options.smoothing is not None or options.focal_gamma > 0:
            plain = options.only(pixel_losses=True)
            with torch.no_grad():
                own = unchecked_moments(function, logits, labels, plain).pixel_losses
            assert own is not None
        shares = torch.where(own < options.min_loss, 0, shares)
    _, sums, _ = class_sums(
        torch.stack([weighted(losses, shares), shares], 1).flatten(2),
        labels.flatten(1),
        moments.counts.shape[-1],
        anchors=None,
        groups=1,
        per_image=options.per_image,
        seed=None,
        ignore_index=options.ignore_index,
    )
    return moments._replace(
        losses=sums[..., 0],
        used=sums[..., 1],
        pixel_losses=losses if options.pixel_losses else None,
    )


def labels_outside(labels: Tensor, counts: Tensor, ignore_index: int) -> Tensor:
    """`outside`, from the number of labels of each class."""
    return labels.numel() - counts.sum() - _number_of(ignore_index, labels)


_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def _number_of(value: int, labels: Tensor) -> Tensor | int:
    """How many labels have this value. Neither they nor the mask are copied in int64."""
    limits = torch.iinfo(labels.dtype)
    if not limits.min <= value <= limits.max:  # it would be converted to another label
        return 0
    if labels.dtype in _SIGNED:  # not every torch compares them: the same bits with a sign
        labels = labels.view(_SIGNED[labels.dtype])
        value -= limits.max + 1 if value > limits.max // 2 else 0
    # row by row, because torch first copies a mask in the dtype of its sum
    return (labels == value).sum(-1, dtype=torch.int32).sum()


def in_shape(moments: SoftmaxMoments, shape: Sequence[int]) -> SoftmaxMoments:
    """The same, with maps of this shape."""
    pixel_maps = {"pixel_losses": moments.pixel_losses, "lse": moments.lse}
    return moments._replace(**{k: v.view(shape) for k, v in pixel_maps.items() if v is not None})
