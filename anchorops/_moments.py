"""What the moments take and give. For softmax moments this is the list of options and results, from
which the schemas, the fake kernels and the saved tensors follow. C++ repeats it in
csrc/cpu/softmax_moments.cpp."""

from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_scalar(number: float, logits: Tensor) -> Tensor:
    """A number as operators take it: a tensor () on the logits' device, in the statistics' dtype.
    For a float of a schema, torch.compile would compile again with each number, and also for that
    of torch.full, which is one launch. It keeps an operand of a product variable."""
    dtype = statistics_dtype(logits.dtype)
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=dtype, device=logits.device) * number
    return torch.full((), number, dtype=dtype, device=logits.device)


class ClassMoments(NamedTuple):
    """Count, sum and squared distance to an anchor, over the features f_p of the valid pixels p of
    each class k:

        counts[k] = #{p}    sums[k] = Σ f_p    sqdists[k] = Σ ‖f_p − anchors[k]‖²

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
    """Statistics of each class, over the valid pixels q. y is the label of a pixel, z are the
    logits upsampled to the labels' size, p = softmax z:

        counts[k] = #{q : y = k}            correct[k] = #{q : y = k = argmax z}
        losses[k] = Σ_{y = k} ω_q·L_q       intersections[k] = Σ_{y = k} p_k(q)
        squares[k] = Σ_q p_k(q)²            probability_sums[k] = Σ_q p_k(q)
        pixel_losses[q] = L_q;  0 where ignored
        used[k] = Σ_{y = k} ω_q over the pixels that are used in `losses`
        divisor = max(number of valid pixels, 1)
        labels_out_of_range = number of labels that are neither a class nor ignore_index

    L_q = −log p_y, ω_q = 1, and all pixels are used, unless a loss has other options
    (`losses.pixel.Options`). Statistics of classes are [K], with per_image [B, K]; `pixel_losses`
    has the labels' shape; the last two are scalars. What was not requested is None.
    """

    counts: Tensor
    correct: Tensor | None
    losses: Tensor
    intersections: Tensor | None
    probability_sums: Tensor | None
    squares: Tensor | None
    pixel_losses: Tensor | None
    used: Tensor | None = None
    divisor: Tensor | None = None
    labels_out_of_range: Tensor | None = None


SMALLEST_MISS = 2.0**-24  # of 1 − p_y: at 0 the derivative of a power below 1 is infinite


class Options(NamedTuple):
    """What the loss L of a pixel is, and which pixels there are: the arguments of the operator
    `softmax_moments` after logits and labels, in its order, up to those of Wanted.

        L = m·(a_y·c + Σ_k v_k·(−log p_k)),  c = −log p_y;  0 if not used
        m = max(1 − e^{−c}, 2⁻²⁴)^γ,  1 for an infinite c

    A pixel of weight 0 adds nothing to a sum, even if its L is ∞.

    true_weights, all_weights: a and v, both or none (then 1 and 0): [K], or of each image, [B, K];
        of at least 0, in the statistics' dtype. Classes of v_k = 0 are left out of the sum.
    pixel_weights: ω, of the labels' shape and any strides, in the statistics' dtype. None: 1.
    min_loss: pixels of c < min_loss are not used; NaN is not smaller. None: all are used.
    focal_gamma: γ above 0, or None for 0.

    The operator takes the two numbers as tensors ().
    """

    true_weights: Tensor | None = None
    all_weights: Tensor | None = None
    pixel_weights: Tensor | None = None
    min_loss: Tensor | float | None = None
    focal_gamma: Tensor | float | None = None
    ignore_index: int = 255
    align_corners: bool = False

    def in_tensors(self, logits: Tensor) -> "Options":
        """The options, of which numbers are tensors."""

        def converted(x: Tensor | float | None) -> Tensor | None:
            return x if x is None or isinstance(x, Tensor) else as_scalar(x, logits)

        if self.min_loss is None and self.focal_gamma is None:
            return self
        numbers = converted(self.min_loss), converted(self.focal_gamma)
        return self._replace(min_loss=numbers[0], focal_gamma=numbers[1])

    def convert(
        self,
        convert_pixels: Callable[[Tensor], Tensor],
        convert_images: Callable[[Tensor], Tensor] = lambda weights: weights,
    ) -> "Options":
        """The options for other images: `convert_pixels` converts what each pixel has,
        `convert_images` what each image has."""

        def class_weights(weights: Tensor | None) -> Tensor | None:
            return weights if weights is None or weights.dim() == 1 else convert_images(weights)

        pixel_weights = self.pixel_weights
        return self._replace(
            true_weights=class_weights(self.true_weights),
            all_weights=class_weights(self.all_weights),
            pixel_weights=None if pixel_weights is None else convert_pixels(pixel_weights),
        )

    # Methods, because Dynamo of torch 2.10 does not trace a property of a NamedTuple.

    def plain(self) -> "Options":
        """The options of the same pixels, with L = −log p_y."""
        return Options(ignore_index=self.ignore_index, align_corners=self.align_corners)

    def selects(self) -> bool:
        """Whether pixels are used or not by their −log p_y."""
        return self.min_loss is not None

    def is_used(self, label_losses: Tensor) -> Tensor:
        """Which pixels are used, from their −log p_y; NaN is."""
        assert self.min_loss is not None
        return ~(label_losses < self.min_loss)

    def changes_losses(self) -> bool:
        """Whether L is not just −log p_y."""
        given = self.true_weights, self.min_loss, self.focal_gamma
        return any(x is not None for x in given)

    def counts_used(self) -> bool:
        return self.pixel_weights is not None or self.selects()


class Wanted(NamedTuple):
    """The results that are requested, by their names: the last arguments of the operator.

    per_image: statistics of each image.
    probability_sums: also the intersections.
    with_lse: keep lse for the backward pass; set where a gradient may be requested.
    """

    per_image: bool = False
    correct: bool = False
    probability_sums: bool = False
    squares: bool = False
    pixel_losses: bool = False
    with_lse: bool = False
    labels_out_of_range: bool = False


_TYPES = {
    Tensor | None: "Tensor?",
    Tensor | float | None: "Tensor?",
    int: "SymInt",
    bool: "bool",
}
_KINDS = {
    name: _TYPES[kind] for name, kind in (Options.__annotations__ | Wanted.__annotations__).items()
}
TENSORS = tuple(name for name, kind in _KINDS.items() if kind == "Tensor?")


def split_options(arguments: Sequence[Any]) -> tuple[Options, Wanted]:
    """The operator's arguments after logits and labels, as the two types."""
    count = len(Options._fields)
    return Options(*arguments[:count]), Wanted(*arguments[count:])


class Result(NamedTuple):
    """axes: "classes" for [K], with per_image [B, K]; "pixels" for (B, H, W), contiguous; "" for a
    scalar. A result is of the statistics' dtype, or int64. wanted: the field of Wanted that
    requests it; without one it is always there, `used` only if the options count it."""

    axes: str
    dtype: type
    wanted: str = ""
    differentiable: bool = False


# In the order of the operator: opcheck needs a floating-point result first.
RESULTS = {
    "losses": Result("classes", float, differentiable=True),
    "intersections": Result("classes", float, "probability_sums", differentiable=True),
    "probability_sums": Result("classes", float, "probability_sums", differentiable=True),
    "squares": Result("classes", float, "squares", differentiable=True),
    "pixel_losses": Result("pixels", float, "pixel_losses", differentiable=True),
    "lse": Result("pixels", float, "with_lse"),
    "counts": Result("classes", int),
    "correct": Result("classes", int, "correct"),
    "used": Result("classes", int),  # float with pixel weights
    "divisor": Result("", int),
    "labels_out_of_range": Result("", int, "labels_out_of_range"),
}
Results = namedtuple("Results", RESULTS)  # what was not requested is empty, or None
GRADIENTS = tuple(name for name, result in RESULTS.items() if result.differentiable)


def is_requested(result: str, options: Options, wanted: Wanted) -> bool:
    if result == "used":
        return options.counts_used()
    name = RESULTS[result].wanted
    return not name or getattr(wanted, name)


_OPTIONS = ", ".join(f"{kind} {name}" for name, kind in _KINDS.items())
_RESULTS = ", ".join(f"Tensor {name}" for name in RESULTS)
_GRADIENTS = ", ".join(f"Tensor? d{name}" for name in GRADIENTS)
SCHEMA = f"(Tensor logits, Tensor labels, {_OPTIONS}) -> ({_RESULTS})"
BACKWARD_SCHEMA = (
    f"(Tensor logits, Tensor labels, Tensor lse, {_GRADIENTS}, {_OPTIONS}) -> Tensor dlogits"
)
