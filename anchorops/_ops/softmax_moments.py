"""Softmax moments: the statistics that pixel losses need, at full resolution, that of the labels,
computed from low-resolution logits.

`SoftmaxMoments` and `Options` define the results and their symbols. Their gradients are

    dz_k = α·(p_k − [y = k]) + β·(V·p_k − v_k) + p_k·(u_k − Σ_j p_j u_j),  V = Σ_j v_j
    α    = d·(m·a_y + dm/dc·(a_y·c + Σ_k v_k·(−log p_k))),  β = d·m
    d    = ω_q·dlosses[y] + dpixel_losses[q],  0 where ignored
    u_k  = dprobability_sums[k] + [y = k]·dintersections[k] + 2·p_k·dsquares[k]
    dω_q = dlosses[y]·L_q + dused[y],  0 where not used; an infinite L_q counts as 0
    dlogits = the transpose of the upsampling, of dz

The upsampled logits are never stored: the backward pass computes p again, from the logits and
lse[q] = log Σ_k e^{z_k(q)}, 0 where ignored. lse is for the backward pass of the same backend:
Triton's is less the logit of a class that it finds again from the labels, and it keeps −log p_y
where that is smaller. The CPU keeps the sum of the exponentials in its place, and none for two
classes: p is then a function of the difference of the logits.

Logits of one channel are those of a sigmoid: the classes are 0 and 1, and z = (0, x).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._backend import select
from .._checks import check_axes, check_flags, check_pixels
from .._moments import (
    BACKWARD_SCHEMA,
    GRADIENTS,
    RESULTS,
    SCHEMA,
    TENSORS,
    Options,
    Results,
    SoftmaxMoments,
    Wanted,
    is_requested,
    split_options,
    statistics_dtype,
)
from .._torch_state import shape_of
from .registration import Gradient, define, run
from .sigmoid import one_batch, two_classes
from .triton_launch import launcher


def forward_fake(logits: Tensor, labels: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Logits (B, K, h, w) of any strides, labels (B, H, W) of any integer dtype and strides. A
    result that was not requested is an empty tensor (0,). On the CPU logits may have one channel:
    K = 2 statistics."""
    options, wanted = split_options(arguments)
    batch, num_classes = logits.shape[0], max(logits.shape[1], 2)
    by_class = (batch, num_classes) if wanted.per_image else (num_classes,)
    shapes = {"classes": by_class, "pixels": labels.shape, "": ()}

    def empty(name: str) -> Tensor:
        shape = shapes[RESULTS[name].axes] if is_requested(name, options, wanted) else (0,)
        return logits.new_empty(shape, dtype=_dtype(name, options, logits))

    return tuple(empty(name) for name in RESULTS)


def _dtype(name: str, options: Options, logits: Tensor) -> torch.dtype:
    weighted = name == "used" and options.pixel_weights is not None
    is_float = weighted or RESULTS[name].dtype is float
    return statistics_dtype(logits.dtype) if is_float else torch.int64


def setup_context(ctx: Any, inputs: Any, results: Any) -> None:
    logits, labels, *arguments = inputs
    constants = [getattr(results, name) for name in RESULTS if name not in (*GRADIENTS, "used")]
    if inputs.pixel_weights is None:
        constants.append(results.used)
    ctx.mark_non_differentiable(*constants)
    ctx.save_for_backward(logits, labels, results.lse, *arguments[: len(TENSORS)])
    ctx.numbers = arguments[len(TENSORS) :]


def reads_lse(backend: str, logits: Tensor) -> bool:
    """Whether the backward pass needs lse: not on the CPU, for two classes or a sigmoid."""
    return backend != "cpu" or logits.shape[1] > 2


def backward(operator: Any, ctx: Any, grads: Any) -> dict[str, Tensor | None]:
    """The gradients of results have their shapes and dtype; those of classes are all [K] or all
    [B, K]."""
    logits, labels, lse, *tensors = ctx.saved_tensors
    options, wanted = split_options((*tensors, *ctx.numbers))
    # The gradient of an absent (empty) output is an empty tensor, not None.
    result_grads = [
        getattr(grads, x) if is_requested(x, options, wanted) else None for x in GRADIENTS
    ]

    def again(options: Options, wanted: Wanted) -> Any:
        return Results(*ctx.forward(logits, labels, *options, *wanted))

    gradients: dict[str, Tensor | None] = {}
    if ctx.needs.logits and any(grad is not None for grad in result_grads):
        if not wanted.with_lse and reads_lse(ctx.backend, logits):
            # torch.vmap and traces without gradients hide that a gradient will be requested
            lse = again(options.plain(), Wanted(with_lse=True)).lse
        gradients["logits"] = operator(logits, labels, lse, *result_grads, *options, *wanted)
    if ctx.needs.pixel_weights:
        gradients["pixel_weights"] = _dpixel_weights(
            again, logits, labels, options, grads.losses, grads.used
        )
    return gradients


def _dpixel_weights(
    again: Callable[[Options, Wanted], Any],
    logits: Tensor,
    labels: Tensor,
    options: Options,
    dlosses: Tensor | None,
    dused: Tensor | None,
) -> Tensor:
    """dω of all pixels."""
    num_classes = max(logits.shape[1], 2)
    of_all = options._replace(pixel_weights=None, min_loss=None)
    losses = again(of_all, Wanted(pixel_losses=True)).pixel_losses
    used = valid_pixels(labels, num_classes, options.ignore_index)
    if options.selects():
        ce = losses
        if of_all.changes_losses():
            ce = again(options.plain(), Wanted(pixel_losses=True)).pixel_losses
        used &= options.is_used(ce)
    classes = torch.where(used, labels.long(), 0).flatten(1)
    gradient = torch.zeros_like(losses)
    for by_class, factor in ((dlosses, torch.where(losses.isfinite(), losses, 0)), (dused, 1)):
        if by_class is not None:
            label_gradients = by_class.expand(labels.shape[0], num_classes).gather(1, classes)
            gradient += label_gradients.view_as(losses) * factor
    return torch.where(used, gradient, 0)


def valid_pixels(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    unsigned = labels.dtype in (torch.uint16, torch.uint32, torch.uint64)  # cannot be compared
    if unsigned or num_classes > torch.iinfo(labels.dtype).max:  # or num_classes would overflow
        labels = labels.long()
    valid = (labels >= 0) & (labels < num_classes)
    return valid & (labels != ignore_index) if 0 <= ignore_index < num_classes else valid


_launch, _launch_backward = launcher("softmax_moments"), launcher("softmax_moments_backward")


def _triton(logits: Tensor, labels: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    options, wanted = split_options(arguments)
    results = Results(*_launch(logits, labels, options, wanted))
    return tuple(
        logits.new_empty((0,), dtype=_dtype(name, options, logits)) if result is None else result
        for name, result in results._asdict().items()
    )


def _triton_backward(*arguments: Any) -> Tensor:
    count = 3 + len(GRADIENTS)  # before the options
    return _launch_backward(*arguments[:count], split_options(arguments[count:])[0])


GRADIENT = Gradient(BACKWARD_SCHEMA, setup_context, backward, triton=_triton_backward)
define(
    "softmax_moments",
    SCHEMA,
    forward_fake,
    gradient=GRADIENT,
    triton=_triton,
    any_strides=True,
)


def as_images(
    logits: Tensor, labels: Tensor, sigmoid: bool = False
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Logits as images (B, K, h, w), and the function that brings what each pixel has to (B, H, W).

    Points, and full-resolution volumes, become one row of pixels; other volumes remain volumes. C
    sigmoids become B·C images of one channel. The results are views, except where strides do not
    allow it.
    """
    points = logits.dim() == 2
    one_row = logits.dim() < 4 or (logits.dim() == 5 and logits.shape[2:] == labels.shape[-3:])
    if sigmoid:
        logits = (logits.t() if points else one_batch(logits))[:, None]
    elif points:
        logits = logits.t()[None]

    def by_image(pixel_map: Tensor) -> Tensor:
        if sigmoid:
            pixel_map = pixel_map.t() if points else pixel_map.flatten(0, 1)
        elif points:
            pixel_map = pixel_map[None]
        return pixel_map.flatten(1)[:, None] if one_row else pixel_map

    return logits.flatten(2)[:, :, None] if one_row else logits, by_image


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
    correct: bool = True,
    probability_sums: bool = True,
    squares: bool = False,
    pixel_losses: bool = False,
    check_labels: bool = False,
) -> SoftmaxMoments:
    """Softmax statistics of each class, from low-resolution logits and labels at their own size.

    `SoftmaxMoments` defines them, with z = F.interpolate(logits.float(), labels.shape[1:],
    mode="bilinear", align_corners=align_corners) and p = z.softmax(1), neither of which is stored.

    Cross-entropy is (Σ losses)/(Σ counts). Dice, Tversky and Jaccard are computed from counts,
    intersections and probability_sums. Accuracy is (Σ correct)/(Σ counts).

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
        correct, probability_sums, squares, pixel_losses: what to compute in addition to counts and
            losses; `probability_sums` includes the intersections. Each of them needs time.
        check_labels: as in `CrossEntropy`.

    Returns:
        SoftmaxMoments. counts, correct and divisor are int64, the others float32 (float64 for
        float64 logits). Results are bitwise reproducible.
        For correct, the first of equal logits is the largest, and NaN is larger than all numbers.
        A pixel reads only logits whose interpolation weight is not 0, so a NaN affects only the
        pixels that read it. A logit of −inf has p = 0 and gradient 0.

    Raises:
        ValueError: wrong shape, dtype, device or label; a chosen backend that does not support the
            call.
        RuntimeError: a second or a forward-mode derivative was requested from a fused backend.
    """
    wanted = Wanted(per_image, correct, probability_sums, squares, pixel_losses)
    check_flags("softmax_moments", align_corners=align_corners, **wanted._asdict())
    original_labels = labels
    labels, ignore_index = check_pixels(
        "softmax_moments", logits, labels, ignore_index, check_labels
    )
    options = Options(ignore_index=ignore_index, align_corners=align_corners)
    moments = moments_of("softmax_moments", logits, labels, options, wanted)
    return in_shape(moments, shape_of(original_labels))


def moments_of(
    function: str,
    logits: Tensor,
    labels: Tensor,
    options: Options,
    wanted: Wanted,
    *,
    sigmoid: bool = False,
) -> SoftmaxMoments:
    """Softmax moments of arguments that `check_pixels` has checked. Logits may have one channel.
    Messages name `function`.

    With sigmoid, those of the two classes of each channel: sigmoid(x) is the softmax of (0, x).
    Statistics of classes are then [C, 2], with per_image [B, C, 2]; maps have the labels' shape,
    and `divisor` and `labels_out_of_range` are of all channels.
    """
    images, pixels = logits, labels
    if sigmoid or logits.dim() != 4:
        images, by_image = as_images(logits, labels, sigmoid)
        pixels, options = by_image(labels), options.convert(by_image)
    backend = select(function, images, images.shape[1], called=("softmax_moments",))
    check_axes(function, images, pixels.shape[1:])
    if backend != "cpu":
        images = two_classes(images)
    if backend != "reference":
        options = options.in_tensors(images)
    if images.requires_grad and torch.is_grad_enabled() and reads_lse(backend, images):
        wanted = wanted._replace(with_lse=True)
    of_images = wanted._replace(per_image=True) if sigmoid else wanted
    if backend == "reference":
        moments = reference.softmax_moments(images, pixels, options, of_images)
    else:
        operator = "softmax_moments" if images.dim() == 4 else "volume_moments"
        results = run(operator, backend, images, pixels, *options, *of_images)
        moments = _requested(results, options, of_images)
    if not sigmoid:
        return in_shape(moments, labels.shape)
    points = logits.dim() == 2
    batch, channels = (1 if points else logits.shape[0]), logits.shape[1]

    def by_channel(statistic: Tensor) -> Tensor:
        statistic = statistic.view(batch, channels, 2)
        return statistic if wanted.per_image else statistic.sum(0)

    def by_pixel(pixel_map: Tensor) -> Tensor:
        return pixel_map.view(labels.t().shape).t() if points else pixel_map.view(labels.shape)

    shapes = {"classes": by_channel, "pixels": by_pixel, "": lambda statistic: statistic}
    return moments._replace(
        **{
            name: shapes[RESULTS[name].axes](value)
            for name, value in moments._asdict().items()
            if value is not None
        }
    )


def _requested(results: Sequence[Any], options: Options, wanted: Wanted) -> SoftmaxMoments:
    """The statistics that were requested, from the operator's results."""
    named: dict[str, Any] = {
        name: x if is_requested(name, options, wanted) else None
        for name, x in zip(RESULTS, results, strict=True)
        if name != "lse"
    }
    return SoftmaxMoments(**named)


def in_shape(moments: SoftmaxMoments, shape: Sequence[int]) -> SoftmaxMoments:
    """The moments, with `pixel_losses` in this shape."""
    losses = moments.pixel_losses
    return moments if losses is None else moments._replace(pixel_losses=losses.view(shape))
