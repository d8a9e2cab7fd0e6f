"""Class moments: count, sum and squared distance to an anchor, over the pixels of each class.

`ClassMoments` defines the results. Their gradients are, with the key of each pixel in place of the
class,

    dfeatures[p] = 2·dsqdists[k]·(f_p − anchors[k]) + dsums[k],  k = key_p;  0 where ignored
    danchors[k]  = −2·dsqdists[k]·(sums[k] − counts[k]·anchors[k])

The forward pass reads the features once, and so does the backward pass.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import reference
from .._backend import CUDA_MAX_KEYS, select
from .._checks import (
    check_anchors,
    check_choice,
    check_count,
    check_features,
    check_flags,
    check_ignore_index,
    check_int,
    check_label_values,
    check_labels,
    check_num_classes,
    check_strided,
    fail,
)
from .._moments import ClassMoments, statistics_dtype
from .._shared.sums import fixed_order_sum, histogram
from .._torch_state import shape_of
from .class_keys import KeyOptions, class_keys
from .registration import Gradient, define, run
from .triton_launch import launcher

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11

# sums and sqdists are empty tensors (0,) if not requested. The anchor of key k is row
# (k // groups) % K. Statistics and anchors are float32, for float64 features float64.
_SCHEMA = (
    "(Tensor features, Tensor keys, Tensor? anchors, SymInt num_keys, SymInt groups, "
    "bool with_sums) -> (Tensor sums, Tensor sqdists)"
)

# features are needed only for dsqdists. size, stride and dtype describe dfeatures; size and dtype
# are those of the features. With features the stride may be empty: then it is that of
# torch.empty_like(features), because a traced stride may not be the one at run time.
_BACKWARD_SCHEMA = (
    "(Tensor? features, Tensor keys, Tensor? anchors, Tensor? dsums, Tensor? dsqdists, "
    "SymInt groups, SymInt[] size, SymInt[] stride, ScalarType dtype) -> Tensor"
)


def _forward_fake(features: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    _, anchors, num_keys, _, with_sums = arguments
    matrix = (num_keys, features.shape[1])
    dtype = statistics_dtype(features.dtype)
    return (
        features.new_empty(matrix if with_sums else (0,), dtype=dtype),
        features.new_empty((num_keys,) if anchors is not None else (0,), dtype=dtype),
    )


def _backward_fake(features: Tensor | None, keys: Tensor, *arguments: Any) -> Tensor:
    *_, size, stride, dtype = arguments
    if not stride:
        assert features is not None
        return torch.empty_like(features)
    return keys.new_empty_strided(size, stride, dtype=dtype)


def _setup_context(ctx: Any, inputs: Any, results: Any) -> None:
    features, anchors = inputs.features, inputs.anchors
    ctx.groups, ctx.with_sums = inputs.groups, inputs.with_sums
    ctx.size, ctx.dtype = features.shape, features.dtype
    ctx.stride = _dense_stride(features) if anchors is None else None
    ctx.save_for_backward(
        features if anchors is not None else None,
        inputs.keys,
        anchors,
        results.sums if ctx.with_sums and ctx.needs.anchors else None,
    )


def _dense_stride(features: Tensor) -> tuple[int, ...]:
    return torch.empty_like(features, device="meta").stride()


def _backward(operator: Any, ctx: Any, grads: Any) -> dict[str, Tensor | None]:
    features, keys, anchors, sums = ctx.saved_tensors
    # The gradient of an absent (empty) output is an empty tensor, not None.
    dsums = grads.sums if ctx.with_sums else None
    dsqdists = grads.sqdists if anchors is not None else None
    gradients: dict[str, Tensor | None] = {}
    if ctx.needs.features and not (dsums is None and dsqdists is None):
        read, stride = (features, anchors), ()
        if dsqdists is None:
            read, stride = (None, None), ctx.stride or _dense_stride(features)
        arguments = read[0], keys, read[1], dsums, dsqdists, ctx.groups
        gradients["features"] = operator(*arguments, ctx.size, stride, ctx.dtype)
    if ctx.needs.anchors and dsqdists is not None:
        assert anchors is not None
        if sums is None:
            sums, _ = ctx.forward(features, keys, None, dsqdists.numel(), 1, True)
        gradients["anchors"] = _danchors(keys, anchors, sums, dsqdists, ctx.groups)
    return gradients


def _danchors(keys: Tensor, anchors: Tensor, sums: Tensor, dsqdists: Tensor, groups: int) -> Tensor:
    """danchors[k] = −2·dsqdists[k]·(sums[k] − counts[k]·anchors[k]), added over images and groups.

    The difference is in float64, so its error is that of the sums: relative to it,
    eps·‖a‖/‖mean − a‖, with eps = 2⁻²⁴ for float32.
    """
    counts = histogram(keys, keys >= 0, dsqdists.numel())
    num_classes, dim = anchors.shape  # keys are (image, class, group)
    counts, dsqdists = (x.view(-1, num_classes, groups, 1) for x in (counts, dsqdists))
    differences = (
        sums.double().view(-1, num_classes, groups, dim) - counts * anchors[:, None].double()
    )
    # By selection: the anchor of a class without pixels may be infinite or NaN.
    danchors = torch.where(counts > 0, -2 * dsqdists * differences, 0)
    return danchors.sum((0, 2)).to(anchors.dtype)


define(
    "class_moments",
    _SCHEMA,
    _forward_fake,
    gradient=Gradient(
        _BACKWARD_SCHEMA,
        _setup_context,
        _backward,
        _backward_fake,
        triton=launcher("class_moments_backward"),
    ),
    triton=launcher("class_moments"),
    any_strides=True,
)


def _check_inputs(
    function: str,
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: int | None,
    check_labels_: bool,
) -> tuple[int, int]:
    """Returns the number of classes and the label to ignore."""
    check_labels(function, labels, features)
    num_classes = check_num_classes(function, num_classes)
    ignored = check_ignore_index(function, ignore_index, num_classes)
    check_flags(function, check_labels=check_labels_)
    if check_labels_:
        check_label_values(function, labels, num_classes, ignored)
    return num_classes, ignored


def _check_groups(
    groups: object, seed: object, features: Tensor
) -> tuple[int, int | Tensor | None]:
    groups = check_count("class_moments", "groups", groups)
    if groups == 1:
        return 1, None
    expected = "an int of 64 bits or an int64 tensor of one element where groups > 1"
    check_strided("class_moments", "seed", seed)
    if isinstance(seed, Tensor):
        if seed.dtype == torch.int64 and seed.device == features.device and seed.numel() == 1:
            return groups, seed  # its value stays on the device
        expected = f"one int64 on {features.device}"
    return groups, check_int("class_moments", "seed", seed, expected)


def class_moments(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    anchors: Tensor | None = None,
    groups: int = 1,
    per_image: bool = False,
    seed: int | Tensor | None = None,
    ignore_index: int | None = None,
    check_labels: bool = False,
) -> ClassMoments:
    """Count, sum and squared distance to an anchor, over the features of each class, in one pass.

    Args:
        features: (B, D, H, W), (B, D, N) or (N, D), any strides; float32, bfloat16, float16 or
            float64. Gradients have its dtype and memory layout.
        labels: any integer dtype; (B, H', W') at any size (resized to H×W by nearest-neighbour
            interpolation), (B, N) or (N,). A pixel is valid if 0 <= label < num_classes and
            label != ignore_index. Other pixels change nothing, even if their feature is NaN or Inf.
        num_classes: K, 1 to 65,536 (16,384 on GPU). The backend `cuda` supports at most 1,024
            keys (images × K × groups); `auto` uses `triton` for more.
        anchors: [K, D], any floating dtype. Without anchors `sqdists` is None, and the backward
            pass neither reads nor keeps the features. The gradient of anchors is computed from
            `sums`: its relative error is about 2⁻²⁴·‖a‖/‖mean − a‖ (float64: 2⁻⁵³), so it has few
            correct digits where an anchor has almost reached the mean of its class. That of the
            features has no such error.
        groups: G > 1 splits each class's pixels at random into G groups of equal size (±1). The
            groups are the same on every device and backend.
        per_image: compute the statistics of each image separately.
        seed: for the groups: an int, or an int64 tensor with one element (a step counter).
        ignore_index: the label to ignore, 255 by default. With more than 255 classes, 255 is a
            class; then it must be given, for example −1. A class may be given, and is then ignored.
        check_labels: as in `softmax_moments`.

    Returns:
        ClassMoments(counts, sums, sqdists) with shapes [K], [K, D], [K]; with groups [K, G, …];
        with per_image [B, K, …]; with both [B, K, G, …]. counts are int64, the others float32
        (float64 for float64 features). Results are bitwise reproducible. They are zero for an
        absent class.

    Raises:
        ValueError: wrong shape, dtype, device, number or label; a chosen backend that does not
            support the call.
        RuntimeError: a second or a forward-mode derivative was requested from a fused backend.

    Every loss of SAR (arXiv 2312.11872), CBP+OCCL (doi 10.1016/j.patcog.2024.110431), CeCo
    (CVPR 2023) and MVSC is computed from these statistics.
    """
    check_features("class_moments", features)
    num_classes, ignored = _check_inputs(
        "class_moments", features, labels, num_classes, ignore_index, check_labels
    )
    groups, seed = _check_groups(groups, seed, features)
    check_flags("class_moments", per_image=per_image)
    images = features.shape[0] if per_image and features.dim() > 2 else 1
    num_keys = images * num_classes * groups
    if num_keys >= 2**31:
        fail("class_moments", "num_classes", "fewer than 2^31 images × classes × groups", num_keys)
    if anchors is not None:
        check_anchors("class_moments", anchors, features, num_classes)
    return unchecked_moments(
        features,
        labels,
        num_classes,
        anchors=anchors,
        groups=groups,
        per_image=per_image,
        seed=seed,
        ignore_index=ignored,
    )


def refusal(num_keys: int, backend: str) -> str | None:
    """Why a backend cannot serve so many keys, for `select`. The text does not contain the number
    of keys, because torch.compile would compile again for each one."""
    if backend == "cuda" and num_keys > CUDA_MAX_KEYS:
        return f"it supports at most {CUDA_MAX_KEYS} keys (images × classes × groups)"
    return None


# Where an H100 was slower with CUDA than with Triton (bench/results): class moments of points in
# random order, bfloat16, with sums and anchors, forward and backward; ms of CUDA and of Triton:
#
#     points       channels   classes   CUDA   Triton
#     1,000,000    96         200       1.72   1.05
#     1,024        2,048      1,000     0.33   0.24
#
# Rows have no fewer classes, other dtypes or groups of points; with images CUDA was faster.
KEYS_FOR_TRITON = 200


def faster_backend(features: Tensor, num_keys: int, with_sums_and_anchors: bool) -> str | None:
    """The backend that "auto" tries first, for `select`. It cannot see whether the labels of points
    are in random order, which they mostly are."""
    points = features.dim() == 2 and features.dtype == torch.bfloat16 and with_sums_and_anchors
    return "triton" if points and num_keys >= KEYS_FOR_TRITON else None


def unchecked_moments(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    anchors: Tensor | None,
    with_sums: bool = True,
    function: str = "class_moments",
    **options: Unpack[KeyOptions],
) -> ClassMoments:
    """`class_moments` of arguments that were already checked. If sums are not requested, the fused
    operators do not compute them, and `sums` is empty."""
    images = features.shape[0] if options["per_image"] and features.dim() > 2 else 1
    num_keys = images * num_classes * options["groups"]
    called = ("class_moments", "split_groups") if options["groups"] > 1 else ("class_moments",)
    backend = select(
        function,
        features,
        num_classes,
        called=called,
        refusal=partial(refusal, num_keys),
        faster=faster_backend(
            features, num_keys, with_sums and anchors is not None and options["groups"] == 1
        ),
    )
    if backend == "reference":
        return reference.class_moments(features, labels, num_classes, anchors=anchors, **options)
    keys, counts = class_keys(features, labels, num_classes, backend=backend, **options)
    if anchors is not None:
        anchors = anchors.to(statistics_dtype(features.dtype)).contiguous()
    # The gradient of anchors needs the sums. Whether there will be one is not always known here:
    # backward computes them if this call did not, and reads the features once more for it.
    learnable = anchors is not None and anchors.requires_grad and torch.is_grad_enabled()
    arguments = features, keys, anchors, counts.numel(), options["groups"], with_sums or learnable
    sums, sqdists = run("class_moments", backend, *arguments)
    if with_sums:
        sums = sums.view(*counts.shape, features.shape[1])
    elif learnable:
        sums = sums.new_empty((0,))
    if anchors is None:
        return ClassMoments(counts, sums, None)
    return ClassMoments(counts, sums, sqdists.view(counts.shape) if counts.dim() > 1 else sqdists)


def class_centroids(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    per_image: bool = False,
    ignore_index: int | None = None,
    check_labels: bool = False,
) -> tuple[Tensor, Tensor]:
    """The mean feature of each class (zero for an absent class) and the number of its pixels.

    With per_image this is the masked average pooling of few-shot segmentation. Arguments and errors
    are those of `class_moments`.

    Returns:
        centroids [K, D] or [B, K, D], float32 (float64 for float64); counts [K] or [B, K], int64.
    """
    check_features("class_centroids", features)
    num_classes, ignored = _check_inputs(
        "class_centroids", features, labels, num_classes, ignore_index, check_labels
    )
    check_flags("class_centroids", per_image=per_image)
    counts, sums, _ = class_moments(
        features, labels, num_classes, per_image=per_image, ignore_index=ignored
    )
    return sums / counts.clamp(min=1)[..., None], counts


def pixel_to_anchor_mse(
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
    check_labels: bool = False,
) -> Tensor:
    """Mean squared distance of the valid pixels' features to the anchor of their class.

    L = Σ_valid ‖f_p − a_{y_p}‖² / (D·N_valid)   (the pixel-to-anchor loss of SAR, arXiv 2312.11872;
    equal to F.mse_loss(features of valid pixels, anchors[labels])).

    Args:
        features, labels, ignore_index, check_labels: as `class_moments`.
        anchors: [K, D], any floating dtype; K is the number of classes.
        reduction: "mean" as above; "sum" without the division.

    Returns:
        A scalar, float32 (float64 for float64 features); 0 if no pixel is valid.
    """
    function = "pixel_to_anchor_mse"
    check_features(function, features)
    check_anchors(function, anchors, features)
    num_classes = shape_of(anchors)[0]
    num_classes, ignored = _check_inputs(
        function, features, labels, num_classes, ignore_index, check_labels
    )
    check_choice(function, "reduction", reduction, ("mean", "sum"))
    options: KeyOptions
    options = {"groups": 1, "per_image": False, "seed": None, "ignore_index": ignored}
    pixels = features, labels, num_classes
    counts, _, sqdists = unchecked_moments(
        *pixels, anchors=anchors, with_sums=False, function=function, **options
    )
    assert sqdists is not None
    total = fixed_order_sum(sqdists)
    if reduction == "sum":
        return total
    return total / (features.shape[1] * counts.sum()).clamp(min=1)
