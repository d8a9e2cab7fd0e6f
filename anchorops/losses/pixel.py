"""The base classes of pixel losses: of all, and of those that softmax moments give."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .._checks import (
    as_ints,
    check_flags,
    check_ignore_index,
    check_pixels,
    check_strided,
    describe,
    fail,
    flat_pos_weight,
)
from .._moments import Options, SoftmaxMoments, Wanted, statistics_dtype
from .._ops.softmax_moments import moments_of, valid_pixels
from .._torch_state import has_values, in_transform, savable
from .initialized_module import InitializedModule


class Terms(NamedTuple):
    """What `terms` are computed from when they are read, detached. parts: weighted, their sum is
    the loss; labels: the number of labels; counts: that of each class; labels_out_of_range: that of
    neither a class nor ignored ones; correct: that of correctly predicted ones of each class, if
    requested."""

    parts: dict[str, Tensor]
    labels: int
    counts: Tensor
    labels_out_of_range: Tensor
    correct: Tensor | None = None


class PixelLoss(InitializedModule):
    """A loss of low-resolution logits, compared with labels at their own size.

    Shapes:
        logits: (B, K, h, w), (B, K, d, h, w), (N, K) or (B, K, N), as `softmax_moments`; K at least
            2. float32, bfloat16, float16 or float64.
        labels: integer; (B, H, W) or (B, D, H, W) of any size, also with a channel, (B, 1, …); or
            (N,), (B, N).
        Returns a scalar, float32 (float64 for float64 logits), also under autocast.

    Raises ValueError for a wrong argument or input; the message names it.

    `terms` contains the weighted terms of the last loss and values to log, as floating-point
    scalars, detached, still on their device. `terms["labels_out_of_range"]` is the number of labels
    that are neither a class nor ignore_index (with sigmoids: neither 0, 1 nor ignore_index), on
    this rank. These labels are ignored, so any number above 0 means that labels or arguments are
    wrong. `terms["labels_ignored"]` is the number of labels that are ignore_index, on this rank.
    If this is a large share of them, more than the void pixels of the data set, a class may be
    stored as ignore_index: of masks of 0 and 255, the object. Then only the rest is learned.
    """

    sigmoid = False  # whether each channel of the logits is a sigmoid of its own

    def __init__(
        self,
        ignore_index: int | None = None,
        align_corners: bool = False,
        check_labels: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if ignore_index is not None:
            ignore_index = check_ignore_index(name, ignore_index, 1)
        check_flags(name, align_corners=align_corners, check_labels=check_labels)
        self.ignore_index, self.align_corners = ignore_index, align_corners
        self.check_labels = check_labels
        self._last: Terms | None = None

    @property
    def terms(self) -> dict[str, Tensor]:
        """The terms of the last loss: copies."""
        if self._last is None:
            return {}
        parts, labels, counts, labels_out_of_range, correct = self._last
        valid = counts.sum()
        terms = {name: part.clone() for name, part in parts.items()}
        dtype = next(iter(terms.values())).dtype
        # floating-point too, because loggers average over steps and ranks
        if correct is not None:
            terms["accuracy"] = correct.sum().to(dtype) / valid.clamp(min=1)
        terms["labels_out_of_range"] = labels_out_of_range.to(dtype, copy=True)
        ignored = labels - valid - labels_out_of_range
        return terms | {"labels_ignored": ignored.to(dtype)}

    def __getstate__(self) -> dict[str, Any]:
        state = {**super().__getstate__()}
        if self._last is not None and in_transform(self._last.counts):
            state["_last"] = None  # tensors of torch.func's transforms cannot be copied
        return state

    def ignored(self, logits: Tensor) -> int:
        """The label to ignore, for the number of classes of these logits."""
        num_classes = 2 if self.sigmoid else logits.shape[1]
        return check_ignore_index(type(self).__name__, self.ignore_index, num_classes)

    def valid(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Which labels are classes: bool, the labels' shape."""
        num_classes = 2 if self.sigmoid else logits.shape[1]
        return valid_pixels(labels, num_classes, self.ignored(logits))

    def loss(
        self, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None
    ) -> tuple[Tensor, Terms]:
        """The loss, in memory of its own, because the caller may change it in place, for labels
        that were already checked. pixel_weights have the labels' shape and the statistics'
        dtype."""
        raise NotImplementedError

    @torch.jit.unused
    def forward(
        self, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None = None
    ) -> Tensor:
        function = type(self).__name__
        original_labels = labels
        given = logits, labels, self.ignore_index, self.check_labels
        labels, _ = check_pixels(function, *given, sigmoid=self.sigmoid)
        if pixel_weights is not None:
            check_strided(function, "pixel_weights", pixel_weights)
            if (
                not isinstance(pixel_weights, Tensor)
                or not pixel_weights.is_floating_point()
                # that of the same labels with or without a channel
                or pixel_weights.shape not in (original_labels.shape, labels.shape)
                or pixel_weights.device != labels.device
            ):
                shape = tuple(original_labels.shape)
                expected = f"a floating tensor {shape} on {labels.device}, as labels"
                fail(function, "pixel_weights", expected, describe(pixel_weights))
            pixel_weights = savable(pixel_weights.to(statistics_dtype(logits.dtype)))
            pixel_weights = pixel_weights.view(labels.shape)
        loss, self._last = self.loss(logits, labels, pixel_weights)
        return loss

    def _no_pixel_weights(self) -> NoReturn:
        function = type(self).__name__
        fail(function, "pixel_weights", f"None: {function} has no pixel weights", "a tensor")


class MomentsLoss(PixelLoss):
    """A pixel loss that softmax moments give.

    Args:
        accuracy: add the share of correctly predicted pixels to `terms`.
        ignore_index, align_corners, check_labels: as in `CrossEntropy`.
    """

    def __init__(
        self,
        accuracy: bool = False,
        ignore_index: int | None = None,
        align_corners: bool = False,
        check_labels: bool = False,
    ) -> None:
        super().__init__(ignore_index, align_corners, check_labels)
        check_flags(type(self).__name__, accuracy=accuracy)
        self.accuracy = accuracy

    def options(self, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None) -> Options:
        """What the loss of a pixel is; ignore_index and align_corners are those of the module.
        pixel_weights have the labels' shape and the statistics' dtype."""
        return Options()

    def wanted(self) -> Wanted:
        """The statistics that the loss needs."""
        return Wanted(correct=self.accuracy, labels_out_of_range=True)

    def parts(self, moments: SoftmaxMoments, logits: Tensor) -> dict[str, Tensor]:
        """The weighted parts of the loss, from the requested statistics."""
        raise NotImplementedError

    def loss(
        self, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None
    ) -> tuple[Tensor, Terms]:
        options = self.options(logits, labels, pixel_weights)
        if pixel_weights is not None and options.pixel_weights is None:
            self._no_pixel_weights()
        options = options._replace(
            ignore_index=self.ignored(logits), align_corners=self.align_corners
        )
        arguments = type(self).__name__, logits, labels, options, self.wanted()
        moments = moments_of(*arguments, sigmoid=self.sigmoid)
        parts = self.parts(moments, logits)
        values = {name: part.detach() for name, part in parts.items()}
        assert moments.labels_out_of_range is not None
        counts = moments.counts, moments.labels_out_of_range, moments.correct
        first, *others = parts.values()
        loss = reduce(torch.add, others, first) if others else first.clone()
        return loss, Terms(values, labels.numel(), *counts)

    def _register_weight(self, weight: object, name: str = "weight") -> None:
        """Register the buffer `name`: None or a copy [K], float32 (float64 if it was that). The
        number `pos_weight` has the shape (1,), and axes of length 1 beside the channels are left
        out."""
        function, given = type(self).__name__, weight
        check_strided(function, name, weight)
        if weight is not None:
            try:
                dtype = torch.float64 if getattr(weight, "dtype", 0) == torch.float64 else None
                if torch.as_tensor(weight).is_complex():
                    raise TypeError
                weight = torch.as_tensor(weight, dtype=dtype or torch.float32).detach().clone()
            except (TypeError, ValueError, RuntimeError):
                fail(function, name, "a number for each class", describe(weight))
            if weight.is_meta:
                expected = 'numbers: build the loss outside of torch.device("meta")'
                fail(function, name, expected, describe(weight))
            if name == "pos_weight":
                weight = flat_pos_weight(function, weight)
            expected = "a finite number of at least 0 for each class"
            if weight.dim() != 1:
                fail(function, name, expected, describe(given))
            if has_values(weight) and len(wrong := weight[~((weight >= 0) & weight.isfinite())]):
                fail(function, name, expected, wrong[0].item())
        self.register_buffer(name, weight)


def class_weight(loss: MomentsLoss, logits: Tensor) -> Tensor | None:
    """A copy of the module's weight [K], in the statistics' dtype: the weight may be changed before
    the backward pass."""
    weight: Any = loss.weight
    if weight is None:
        return None
    loss.check_initialized()
    check_strided(type(loss).__name__, "weight", weight)
    if weight.shape != logits.shape[1:2]:
        expected = f"one number for each of the {logits.shape[1]} classes of logits"
        fail(type(loss).__name__, "weight", expected, len(weight))
    if weight.device != logits.device:
        fail(type(loss).__name__, "logits", f"device {weight.device}, as weight", logits.device)
    return weight.to(statistics_dtype(logits.dtype), copy=True)


def chosen_classes(function: str, classes: Sequence[int] | None) -> tuple[int, ...] | None:
    """The argument `classes`. Raises ValueError if it is not different ints of at least 0."""
    if classes is None:
        return None
    ints = as_ints(classes)
    if not ints or len({*ints}) < len(ints) or min(ints) < 0:
        fail(function, "classes", "different ints of at least 0", describe(classes))
    return ints


def check_chosen_classes(function: str, classes: tuple[int, ...], num_classes: int) -> None:
    if max(classes) >= num_classes:
        expected = f"at least {max(classes) + 1} classes, for classes={classes}"
        fail(function, "logits", expected, num_classes)
