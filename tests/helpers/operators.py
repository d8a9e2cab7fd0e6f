"""An example of each operator, called by its public function, and the same by torch's functions:
what tests/test_guarantees.py and tests/test_guarantees_of_torch.py run.

The formulas are those of `anchorops-doctor --verify` (anchorops/verify/formulas.py), if any.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import lovasz_formulas
import pytest
import softmax_formulas
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import anchorops as ao
from anchorops._ops.upsampled_sums import upsampled_sums
from anchorops.verify import formulas

K, D = 4, 6
F32 = torch.float32
Inputs = dict[str, Tensor]
FUSED = ("reference", "cpu", "simulated_triton")
CUDA_BACKENDS = (*FUSED, "simulated_cuda")
ON_CPU = ("reference", "cpu")
NOT_CPU = ("reference", "simulated_triton", "simulated_cuda")  # on the CPU it is the reference


class Operator(NamedTuple):
    name: str
    run: Callable[..., Any]  # of the inputs, by name: a tensor or several
    formula: Callable[..., Any]  # the same by torch, in the dtype of the inputs
    inputs: Callable[[int], Inputs]  # of n² as many pixels; the gradient of the first is tested
    places: tuple[str, ...] = FUSED
    differentiable: bool = True
    exact: bool = True  # to rounding; its derivative has derivatives on the reference
    ignores: bool = True  # inputs of which nothing valid reads a part
    tables: tuple[str, ...] = ()  # inputs without images
    dense: tuple[str, ...] = ()  # inputs that are contiguous or channels last
    rtol: float = 1e-10  # of float64

    def __str__(self) -> str:
        return self.name


def random_labels(*shape: int, num_classes: int = K) -> Tensor:
    """Class 1 is absent. A tenth is ignored, and half of the first image."""
    labels = torch.randint(0, num_classes, shape)
    labels[(labels == 1) & (num_classes > 2)] = 0
    labels[torch.rand(shape) < 0.1] = -1
    labels[0, ..., shape[-2] // 2 :, :] = -1
    return labels


def feature_inputs(n: int) -> Inputs:
    features, labels = torch.randn(2, D, 5 * n, 7 * n), random_labels(2, 10 * n, 14 * n)
    return {"features": features, "labels": labels.short(), "anchors": torch.randn(K, D)}


def without_anchors(n: int) -> Inputs:
    inputs = feature_inputs(n)
    del inputs["anchors"]
    return inputs


def logit_inputs(*sizes: int, num_classes: int = K) -> Callable[[int], Inputs]:
    """sizes: height and width of the logits and of the labels."""
    h, w, height, width = sizes

    def inputs(n: int) -> Inputs:
        labels = random_labels(2, n * height, n * width, num_classes=num_classes)
        logits = 2 * torch.randn(2, num_classes, n * h, n * w)
        return {"logits": logits, "labels": labels.short()}

    return inputs


def with_pixel_weights(n: int) -> Inputs:
    inputs = logit_inputs(3, 5, 12, 20)(n)
    weights = torch.rand(inputs["labels"].shape)
    return inputs | {"pixel_weights": torch.where(weights < 0.1, 0, weights)}


def channel_inputs(n: int) -> Inputs:
    labels = random_labels(2, 3, 12 * n, 20 * n, num_classes=2)
    return {"logits": 2 * torch.randn(2, 3, 3 * n, 5 * n), "labels": labels}


def volume_inputs(n: int) -> Inputs:
    labels = random_labels(2, 9, 8 * n, 10 * n)
    return {"logits": 2 * torch.randn(2, K, 3, 4 * n, 5 * n), "labels": labels}


def teacher_inputs(volume: bool, n: int) -> Inputs:
    inputs = volume_inputs(n) if volume else logit_inputs(3, 5, 12, 20)(n)
    labels = inputs.pop("labels")
    return inputs | {"teacher": 2 * torch.randn(inputs["logits"].shape), "valid": labels >= 0}


def centroid_inputs(n: int) -> Inputs:
    queries, positives = torch.randn(2, 6 * n, 2, 5)
    present = torch.rand(6 * n, 2) < 0.6
    present[0], present[1] = True, False
    return {
        "queries": queries,
        "keys": torch.randn(6 * n, 5),
        "present": present,
        "positives": positives,
    }


def without_options(loss: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A function of verify, whose arguments are named by one letter."""
    return lambda *inputs, **named: loss(*inputs, *named.values(), **options)


def our_loss(make: Callable[..., torch.nn.Module], **options: Any):
    """A new module for each call: a traced one would keep its terms, tensors of the trace."""
    return lambda **inputs: make(**options, ignore_index=-1)(**inputs)


def our_moments(features: Tensor, labels: Tensor, anchors: Tensor, **options: Any):
    return ao.ops.class_moments(features, labels, K, anchors=anchors, ignore_index=-1, **options)


def our_mse(features: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
    return ao.pixel_to_anchor_mse(features, labels, anchors, ignore_index=-1)


def our_centroids(features: Tensor, labels: Tensor):
    return ao.class_centroids(features, labels, K, per_image=True, ignore_index=-1)


def centroids(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    counts, sums = formulas.moments(features, labels, num_classes=K, per_image=True)
    return sums / counts.clamp(min=1)[..., None], counts


STATISTICS = ("counts", "losses", "intersections", "probability_sums", "squares", "pixel_losses")


def our_statistics(logits: Tensor, labels: Tensor, **options: Any) -> list[Tensor]:
    options |= {"squares": True, "pixel_losses": True, "ignore_index": -1}
    moments = ao.ops.softmax_moments(logits, labels, **options)
    return [getattr(moments, name) for name in STATISTICS]


def statistics(logits: Tensor, labels: Tensor, **options: Any) -> list[Tensor]:
    size, pixels = tuple(logits.shape), tuple(labels.shape[1:])
    case = softmax_formulas.Case(size, pixels, statistics=STATISTICS[3:], **options)
    moments = softmax_formulas.by_torch(case, logits, labels)
    return [moments[name] for name in STATISTICS]


def lovasz_of_sigmoids(logits: Tensor, labels: Tensor) -> Tensor:
    z = F.interpolate(logits, labels.shape[2:], mode="bilinear")
    losses = [lovasz_formulas.hinge_loss(z[:, k], labels[:, k], -1) for k in range(z.shape[1])]
    return torch.stack(losses).mean()


def our_divergence(logits: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    size = valid.shape[1:]
    return ao.pixel_kl_divergence(logits, teacher, size, valid=valid, temperature=2.0)


def our_sums(features: Tensor, labels: Tensor):
    options = {"per_image": True, "upsample": True, "ignore_index": -1}
    return upsampled_sums(features, labels, K, **options)


def sums_of_upsampled(
    features: Tensor,
    labels: Tensor,
    num_classes: int = K,
    *,
    per_image: bool = True,
    upsample: bool = True,
    ignore_index: int = -1,
) -> tuple[Tensor, ...]:
    pixels = features
    if upsample:
        pixels = F.interpolate(features, labels.shape[1:], mode="bilinear", align_corners=True)
    else:
        labels = F.interpolate(labels[:, None].double(), features.shape[2:])[:, 0]
    masks = [(labels == k) & (labels != ignore_index) for k in range(num_classes)]
    counts = torch.stack([mask.sum((1, 2)) for mask in masks], 1)
    sums = torch.stack([(pixels * mask[:, None]).sum((2, 3)) for mask in masks], 1)
    if not per_image:
        counts, sums = counts.sum(0), sums.sum(0)
    return counts, sums, features.mean((0, 2, 3)), features.var((0, 2, 3), correction=0)


def our_info_nce(queries: Tensor, keys: Tensor, present: Tensor, positives: Tensor) -> Tensor:
    return ao.ops.centroid_info_nce(queries, keys, positives=positives, present=present)


GROUPS = {"groups": 2, "per_image": True, "seed": 5}
ALIGNED = {"align_corners": True}
shaped = our_loss(ao.CrossEntropy, label_smoothing=0.1, focal_gamma=1.5)
shaped_formula = partial(formulas.cross_entropy, label_smoothing=0.1, focal_gamma=1.5)
four_times, any_size = logit_inputs(3, 5, 12, 20), logit_inputs(5, 4, 9, 13)
argmax = partial(formulas.predictions, align=False)
OPERATORS = [
    Operator(
        "class_moments",
        our_moments,
        without_options(formulas.moments, num_classes=K),
        feature_inputs,
        CUDA_BACKENDS,
        tables=("anchors",),
    ),
    Operator(
        "class_moments of groups",
        partial(our_moments, **GROUPS),
        without_options(formulas.moments, num_classes=K, **GROUPS),
        feature_inputs,
        CUDA_BACKENDS,
        tables=("anchors",),
    ),
    Operator(
        "pixel_to_anchor_mse",
        our_mse,
        without_options(formulas.mse),
        feature_inputs,
        CUDA_BACKENDS,
        tables=("anchors",),
    ),
    Operator("class_centroids", our_centroids, centroids, without_anchors, CUDA_BACKENDS),
    Operator(
        "softmax_moments",
        partial(our_statistics, per_image=True),
        partial(statistics, per_image=True),
        four_times,
    ),
    Operator(
        "softmax_moments of any size",
        partial(our_statistics, **ALIGNED),
        partial(statistics, **ALIGNED),
        any_size,
    ),
    Operator(
        "pixel_cross_entropy",
        partial(ao.pixel_cross_entropy, ignore_index=-1, reduction="none"),
        without_options(formulas.loss_of_pixels),
        logit_inputs(6, 7, 6, 7, num_classes=2),
    ),
    Operator("CrossEntropy", shaped, without_options(shaped_formula), with_pixel_weights),
    Operator(
        "CrossEntropy of hard pixels",
        our_loss(ao.CrossEntropy, ohem_threshold=0.5),
        without_options(formulas.cross_entropy, ohem_threshold=0.5),
        with_pixel_weights,
        ignores=False,  # other pixels have no gradient either
    ),
    Operator(
        "CrossEntropy of the hardest",
        our_loss(ao.CrossEntropy, ohem_min_kept=40),
        without_options(formulas.cross_entropy, ohem_min_kept=40),
        four_times,
        ignores=False,
    ),
    Operator(
        "Dice",
        our_loss(ao.Dice, squared=True, per_image=True),
        without_options(formulas.dice, squared=True, per_image=True),
        any_size,
    ),
    Operator(
        "Lovasz",
        our_loss(ao.Lovasz),
        without_options(formulas.lovasz),
        any_size,
        exact=False,  # errors are rounded to bins
    ),
    Operator(
        "Lovasz of sigmoids",
        our_loss(ao.Lovasz, sigmoid=True, absent="keep"),
        without_options(lovasz_of_sigmoids),
        channel_inputs,
        ON_CPU,
        exact=False,
    ),
    Operator(
        "pixel_binary_cross_entropy",
        partial(ao.pixel_binary_cross_entropy, pos_weight=2.5, ignore_index=-1),
        without_options(formulas.binary, pos_weight=2.5),
        channel_inputs,
    ),
    Operator(
        "CrossEntropyDice of volumes",
        our_loss(ao.CrossEntropyDice),
        without_options(formulas.with_dice),
        volume_inputs,
        ON_CPU,
    ),
    Operator(
        "pixel_kl_divergence",
        our_divergence,
        without_options(formulas.divergence, temperature=2.0),
        partial(teacher_inputs, False),
    ),
    Operator(
        "pixel_kl_divergence of volumes",
        our_divergence,
        without_options(formulas.divergence, temperature=2.0),
        partial(teacher_inputs, True),
        ON_CPU,
    ),
    Operator(
        "pixel_argmax",
        without_options(argmax),
        without_options(formulas.largest, align=False),
        four_times,
        differentiable=False,
        ignores=False,
    ),
    Operator(
        "pixel_argmax of volumes",
        without_options(argmax),
        without_options(formulas.largest, align=False),
        volume_inputs,
        ON_CPU,
        differentiable=False,
        ignores=False,
    ),
    Operator(
        "pixel_confusion",
        partial(ao.pixel_confusion, ignore_index=-1),
        without_options(formulas.confusion),
        four_times,
        differentiable=False,
        ignores=False,
    ),
    Operator(
        "upsampled_sums",
        our_sums,
        sums_of_upsampled,
        without_anchors,
        ignores=False,
        dense=("features",),
        rtol=1e-6,  # weights are multiples of 1/SPLAT_UNITS
    ),
    Operator(
        "centroid_info_nce",
        our_info_nce,
        without_options(formulas.info_nce),
        centroid_inputs,
        NOT_CPU,
        tables=("queries", "keys", "present", "positives"),
    ),
]


FEW = ("class_moments", "CrossEntropy", "Dice", "pixel_argmax", "centroid_info_nce")


def each(*places: str, slow: bool = False, **having: object) -> pytest.MarkDecorator:
    """All operators that have these properties, in these places. slow: a case takes about a second,
    so `make test` runs a few of them."""
    cases = [
        pytest.param(
            operator,
            marks=[
                pytest.mark.on(*here),
                *[pytest.mark.slow] * (slow and operator.name not in FEW),
            ],
            id=operator.name,
        )
        for operator in OPERATORS
        if all(getattr(operator, name) == value for name, value in having.items())
        and (here := [place for place in operator.places if place in (places or operator.places)])
    ]
    return pytest.mark.parametrize("operator", cases)


def as_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Floating inputs in this dtype, labels as int64."""
    labels = {torch.int16: torch.int64}
    return {
        name: x.to(dtype if x.is_floating_point() else labels.get(x.dtype, x.dtype))
        for name, x in inputs.items()
    }


def strided(x: Tensor) -> Tensor:
    """x with its axes in the opposite order in memory, and gaps between the numbers."""
    axes = [*range(x.dim())][::-1]
    return torch.stack([x.permute(axes).contiguous()] * 2, -1)[..., 1].permute(axes)


def results(run: Callable[..., Any], inputs: Inputs, weights_are_strided: bool = False):
    """The results; and the gradients of the floating inputs, of a weighted sum of the results."""
    leaves = {name: x.detach() for name, x in inputs.items()}
    floating = [x.requires_grad_() for x in leaves.values() if x.is_floating_point()]
    outputs = run(**leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else [x for x in outputs if x is not None]
    differentiable = [x for x in outputs if x.requires_grad]
    gradients = ()
    if differentiable:
        weights = [torch.linspace(0.5, 1.5, x.numel(), dtype=F32) for x in differentiable]
        weights = [w.view(x.shape).to(x) for w, x in zip(weights, differentiable, strict=True)]
        weights = [strided(x) for x in weights] if weights_are_strided else weights
        gradients = torch.autograd.grad(differentiable, floating, weights, allow_unused=True)
    return [*(x.detach() for x in outputs), *(x for x in gradients if x is not None)]


class Calls(TorchDispatchMode):
    """The calls of our operators, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "anchorops":
            assert not kwargs
            backward = func.overloadpacket.__name__.endswith("_backward")
            self.recorded.append((func, tuple(_leaf(x, backward) for x in args)))
        return func(*args, **(kwargs or {}))


def _leaf(x: Any, constant: bool) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.detach().clone().requires_grad_(x.requires_grad and not constant)
