"""The base class of pixel losses, which are computed from softmax moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import (
    check_flags,
    check_ignore_index,
    check_labels_of_logits,
    check_logits,
    check_strided,
    describe,
    fail,
)
from .._ops.softmax_moments import moments_for
from ..reference import SoftmaxMoments, statistics_dtype
from .initialized import Initialized


class PixelLoss(Initialized):
    """A loss of low-resolution logits, compared with labels at their own size.

    Shapes:
        logits: (B, K, h, w), (N, K), (B, K, N) or (B, K, d, h, w), as `softmax_moments`; K at least
            2. float32, bfloat16, float16 or float64.
        labels: integer; (B, H, W) of any size, or (N,), (B, N), (B, d, h, w).
        Returns a scalar, float32 (float64 for float64 logits), also under autocast.

    Raises ValueError for a wrong argument or input; the message names it.

    `terms` contains the weighted terms of the last loss, detached, still on their device.
    """

    settings: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        accuracy: bool = False,
        ignore_index: int | None = None,
        align_corners: bool = False,
        check_labels: bool = False,
    ) -> None:
        super().__init__()
        if ignore_index is not None:
            check_ignore_index(type(self).__name__, ignore_index, 1)
        check_flags(
            type(self).__name__,
            accuracy=accuracy,
            align_corners=align_corners,
            check_labels=check_labels,
        )
        self.accuracy, self.check_labels = accuracy, check_labels
        self.ignore_index, self.align_corners = ignore_index, align_corners
        self.terms: dict[str, Tensor] = {}

    def ignored(self, logits: Tensor) -> int:
        """The label to ignore, for the number of classes of these logits."""
        return check_ignore_index(type(self).__name__, self.ignore_index, logits.shape[1])

    def prepared(self, logits: Tensor) -> Tensor:
        """The logits as the loss needs them."""
        return logits

    def asked(self) -> dict[str, bool]:
        """The statistics that the loss needs, as arguments of `softmax_moments`, except hits."""
        raise NotImplementedError

    def parts(
        self,
        moments: SoftmaxMoments,
        logits: Tensor,
        labels: Tensor,
        pixel_weights: Tensor | None,
    ) -> dict[str, Tensor]:
        """The weighted parts of the loss, from the requested statistics."""
        raise NotImplementedError

    def forward(
        self, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None = None
    ) -> Tensor:
        check_logits(type(self).__name__, logits)
        asked = self.asked() | {"hits": self.accuracy}
        if pixel_weights is not None:
            check_labels_of_logits(type(self).__name__, labels, logits)
            self._check_pixel_weights(pixel_weights, labels)
            asked["pixel_losses"] = True
        logits = self.prepared(logits)
        moments = moments_for(
            type(self).__name__,
            logits,
            labels,
            ignore_index=self.ignored(logits),
            align_corners=self.align_corners,
            check_labels=self.check_labels,
            **asked,
        )
        if pixel_weights is not None:
            pixel_weights = pixel_weights.to(moments.losses.dtype)
        parts = self.parts(moments, logits, labels, pixel_weights)
        self.terms = {name: part.detach() for name, part in parts.items()}
        if moments.hits is not None:
            counts = moments.counts.sum().clamp(min=1)
            self.terms["accuracy"] = moments.hits.sum() / counts
        return torch.stack(tuple(parts.values())).sum()

    def _check_pixel_weights(self, pixel_weights: Tensor, labels: Tensor) -> None:
        check_strided(type(self).__name__, "pixel_weights", pixel_weights)
        if (
            not isinstance(pixel_weights, Tensor)
            or not pixel_weights.is_floating_point()
            or pixel_weights.shape != labels.shape
            or pixel_weights.device != labels.device
        ):
            expected = f"a floating tensor {tuple(labels.shape)} on {labels.device}, as labels"
            fail(type(self).__name__, "pixel_weights", expected, describe(pixel_weights))

    def _register_weight(self, weight: object) -> None:
        """Register the buffer `weight`: None or a copy [K], float32 (float64 if it was that)."""
        if weight is not None:
            try:
                dtype = torch.float64 if getattr(weight, "dtype", 0) == torch.float64 else None
                if torch.as_tensor(weight).is_complex():
                    raise TypeError
                weight = torch.as_tensor(weight, dtype=dtype or torch.float32).detach().clone()
            except (TypeError, ValueError, RuntimeError):
                fail(type(self).__name__, "weight", "a number for each class", describe(weight))
            if weight.is_meta:
                expected = 'numbers: build the loss outside of torch.device("meta")'
                fail(type(self).__name__, "weight", expected, describe(weight))
            if weight.dim() != 1 or not ((weight >= 0) & weight.isfinite()).all():
                expected = "a finite number of at least 0 for each class"
                fail(type(self).__name__, "weight", expected, describe(weight))
        self.register_buffer("weight", weight)

    def extra_repr(self) -> str:
        names = [*self.settings, "accuracy", "ignore_index", "align_corners", "check_labels"]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def class_weight(loss: PixelLoss, logits: Tensor) -> Tensor | None:
    """The module's weight [K] in the statistics' dtype."""
    weight: Any = loss.weight
    if weight is None:
        return None
    loss.check_initialized()
    if weight.shape != logits.shape[1:2]:
        expected = f"one number for each of the {logits.shape[1]} classes of logits"
        fail(type(loss).__name__, "weight", expected, len(weight))
    if weight.device != logits.device:
        fail(type(loss).__name__, "logits", f"device {weight.device}, as weight", logits.device)
    return weight.to(statistics_dtype(logits.dtype))
