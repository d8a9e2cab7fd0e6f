"""What the moments take and give. For softmax moments this is the list of options and results, from
which schemas, fake kernels, and what reaches C++ and Triton follow. C++ repeats the order of the
flags (csrc/cpu/softmax_flags.h) and of the numbers (softmax_moments.cpp)."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class ClassMoments(NamedTuple):
    """Count, sum and squared distance to an anchor, over the features of each class.

    Shapes are [K], [K, D], [K]; with groups [K, G, …]; with per_image [B, K, …]; with both
    [B, K, G, …]. `sqdists` is None if no anchors were given.
    """

    counts: Tensor
    sums: Tensor
    sqdists: Tensor | None


class UpsampledSums(NamedTuple):
    """counts: int64 [K], or [B, K] with per_image. sums: [K, C] or [B, K, C]. mean, variance: [C],
    over all pixels of the features, whatever their labels."""

    counts: Tensor
    sums: Tensor
    mean: Tensor
    variance: Tensor


class SoftmaxMoments(NamedTuple):
    """Statistics of each class, from p = the softmax of the logits upsampled to full resolution.

    `counts`, `hits`, `losses`, `overlaps`, `masses`, `squares` and `used` are [K], with per_image
    [B, K]. `pixel_losses` has the labels' shape, `outside` is a scalar. What was not requested is
    None.
    """

    counts: Tensor
    hits: Tensor | None
    losses: Tensor
    overlaps: Tensor | None
    masses: Tensor | None
    squares: Tensor | None
    pixel_losses: Tensor | None
    used: Tensor | None = None
    outside: Tensor | None = None


class Options(NamedTuple):
    """The arguments of the operator `softmax_moments`, except the logits and the labels.

    smoothing: a and v as the rows of [2, K], or of each image, [B, 2, K]; of at least 0, in the
        statistics' dtype. Classes of v_k = 0 are left out of the sum over the classes.
    pixel_weights: w, of the labels' shape and any strides, in the statistics' dtype.
    min_loss: pixels of smaller −log p_y are not used in the losses; NaN is not smaller.
    lse: keep lse for the backward pass; set where a gradient may be requested.
    The other flags request the results of these names; `masses` also the overlaps.
    """

    smoothing: Tensor | None = None
    pixel_weights: Tensor | None = None
    min_loss: float = -math.inf
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

    def only(self, **requested: bool) -> "Options":
        """To request other results of the same pixels, with L = −log p_y."""
        options = Options(ignore_index=self.ignore_index, align_corners=self.align_corners)
        return options._replace(**requested)

    def of_all_pixels(self) -> "Options":
        """To request L of all pixels, used or not."""
        return self.only(pixel_losses=True)._replace(
            smoothing=self.smoothing, focal_gamma=self.focal_gamma
        )

    def map(
        self, maps: Callable[[Tensor], Tensor], images: Callable[[Tensor], Tensor] | None = None
    ) -> "Options":
        """The options of other images: `maps` converts what each pixel has, `images` what each
        image has."""
        smoothing, weights = self.smoothing, self.pixel_weights
        if smoothing is not None and smoothing.dim() == 3 and images is not None:
            smoothing = images(smoothing)
        return self._replace(
            smoothing=smoothing, pixel_weights=None if weights is None else maps(weights)
        )


def _fields(kind: Any) -> tuple[str, ...]:
    return tuple(name for name, x in Options.__annotations__.items() if x == kind)


TENSORS, NUMBERS, FLAGS = _fields(Tensor | None), _fields(float), _fields(bool)
assert {*TENSORS, *NUMBERS, *FLAGS, "ignore_index"} == {*Options._fields}

# Functions, because Dynamo of torch 2.10 does not trace a property of a NamedTuple.


def selects(options: Options) -> bool:
    """Whether pixels are used or not by their −log p_y."""
    return options.min_loss > -math.inf


def is_unused(options: Options, label_losses: Tensor) -> Tensor:
    """Which pixels are not used, from their −log p_y."""
    return label_losses < options.min_loss


def changes_losses(options: Options) -> bool:
    """Whether L is not just −log p_y."""
    return options.smoothing is not None or selects(options) or options.focal_gamma > 0


def counts_used(options: Options) -> bool:
    return selects(options) or options.pixel_weights is not None


class Result(NamedTuple):
    """axes: "classes" for [K], with per_image [B, K]; "pixels" for (B, H, W), contiguous; "" for a
    scalar. A result is of the statistics' dtype, or int64."""

    axes: str
    dtype: type
    requested: Callable[[Options], bool]
    differentiable: bool = False


# In the order of the operator: opcheck needs a floating-point result first.
RESULTS = {
    "losses": Result("classes", float, lambda options: True, differentiable=True),
    "overlaps": Result("classes", float, lambda options: options.masses, differentiable=True),
    "masses": Result("classes", float, lambda options: options.masses, differentiable=True),
    "squares": Result("classes", float, lambda options: options.squares, differentiable=True),
    "pixel_losses": Result("pixels", float, lambda o: o.pixel_losses, differentiable=True),
    "lse": Result("pixels", float, lambda options: options.lse),
    "counts": Result("classes", int, lambda options: True),
    "hits": Result("classes", int, lambda options: options.hits),
    "used": Result("classes", int, counts_used),  # float with pixel weights
    "outside": Result("", int, lambda options: options.outside),
}
GRADIENTS = tuple(name for name, result in RESULTS.items() if result.differentiable)


def _schemas() -> tuple[str, str]:
    tensors = [f"Tensor? {x}" for x in TENSORS]
    options = ", ".join([*tensors, "float[] numbers, int ignore_index, int flags"])
    gradients = ", ".join(f"Tensor? d{x}" for x in GRADIENTS)
    results = ", ".join(f"Tensor {x}" for x in RESULTS)
    return (
        f"(Tensor logits, Tensor labels, {options}) -> ({results})",
        f"(Tensor logits, Tensor labels, Tensor lse, {gradients}, {options}) -> Tensor",
    )


SCHEMA, BACKWARD_SCHEMA = _schemas()


def pack(options: Options) -> tuple[Any, ...]:
    """The last arguments of the operator: tensors, numbers, ignore_index, and a bit for each flag,
    the first one the lowest (csrc/cpu/softmax_flags.h)."""
    flags = sum(1 << i for i, x in enumerate(FLAGS) if getattr(options, x))
    numbers = [getattr(options, x) for x in NUMBERS]
    return *(getattr(options, x) for x in TENSORS), numbers, options.ignore_index, flags


def unpack(*packed: Any) -> Options:
    *tensors, numbers, ignore_index, flags = packed
    values: dict[str, Any] = dict(zip(TENSORS, tensors, strict=True))
    values |= zip(NUMBERS, numbers, strict=True)
    values |= {x: bool(flags >> i & 1) for i, x in enumerate(FLAGS)}
    return Options(ignore_index=ignore_index, **values)


def by_name(results: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(RESULTS, results, strict=True))
