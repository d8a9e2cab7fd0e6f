"""Losses of pixels: what a module asks of softmax moments, and what it makes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_ignore_index, describe, fail
from ..ops.pixel_cross_entropy import check_classes
from ..ops.softmax_moments import softmax_moments
from ..reference import SoftmaxMoments, statistics_dtype


class PixelLoss(nn.Module):
    """A loss of logits at low resolution against labels at theirs.

    Shapes:
        logits: (B, K, h, w), (N, K), (B, K, N) or (B, K, d, h, w), as `softmax_moments`; K at least
            2. float32, bfloat16, float16 or float64.
        labels: integer; (B, H, W) of any size, or (N,), (B, N), (B, d, h, w).
        Returns a scalar, float32 (float64 for float64 logits), also under autocast.

    `terms` holds the weighted parts of the last loss, detached, still on their device.
    """

    settings: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        accuracy: bool = False,
        ignore_index: int | None = None,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        if ignore_index is not None:
            check_ignore_index(type(self).__name__, ignore_index, 1)
        self.accuracy = accuracy
        self.ignore_index, self.align_corners = ignore_index, align_corners
        self.terms: dict[str, Tensor] = {}

    def ignored(self, logits: Tensor) -> int:
        """The label that is left out, for so many classes."""
        return check_ignore_index(type(self).__name__, self.ignore_index, logits.shape[1])

    def asked(self) -> dict[str, bool]:
        """Arguments of `softmax_moments`: which statistics the loss needs, hits apart."""
        raise NotImplementedError

    def parts(
        self,
        moments: SoftmaxMoments,
        logits: Tensor,
        labels: Tensor,
        pixel_weights: Tensor | None,
    ) -> dict[str, Tensor]:
        """The loss in weighted parts, from statistics with what was asked for."""
        raise NotImplementedError

    def forward(
        self, logits: Tensor, labels: Tensor, pixel_weights: Tensor | None = None
    ) -> Tensor:
        check_classes(type(self).__name__, logits)
        asked = self.asked() | {"hits": self.accuracy}
        if pixel_weights is not None:
            self._check_pixel_weights(pixel_weights, labels)
            asked["pixel_losses"] = True
        moments = softmax_moments(
            logits,
            labels,
            ignore_index=self.ignored(logits),
            align_corners=self.align_corners,
            **asked,
        )
        parts = self.parts(moments, logits, labels, pixel_weights)
        self.terms = {name: part.detach() for name, part in parts.items()}
        if moments.hits is not None:
            counts = moments.counts.sum().clamp(min=1)
            self.terms["accuracy"] = moments.hits.sum() / counts
        return torch.stack(tuple(parts.values())).sum()

    def _check_pixel_weights(self, pixel_weights: Tensor, labels: Tensor) -> None:
        if (
            not isinstance(pixel_weights, Tensor)
            or not pixel_weights.is_floating_point()
            or pixel_weights.shape != labels.shape
            or pixel_weights.device != labels.device
        ):
            expected = f"a floating tensor {tuple(labels.shape)} on {labels.device}, as labels"
            fail(type(self).__name__, "pixel_weights", expected, describe(pixel_weights))

    def _register_weight(self, weight: object, num_classes: int | None = None) -> None:
        """The buffer `weight`, None or float32 [K]; not in the state dict, as in torch's losses."""
        if weight is not None:
            try:
                weight = torch.as_tensor(weight, dtype=torch.float32)
            except (TypeError, ValueError, RuntimeError):
                fail(type(self).__name__, "weight", "a number for each class", describe(weight))
            if weight.dim() != 1 or not (weight >= 0).all():
                expected = "a number of at least 0 for each class"
                fail(type(self).__name__, "weight", expected, describe(weight))
        self.register_buffer("weight", weight, persistent=False)

    def extra_repr(self) -> str:
        names = [*self.settings, "accuracy", "ignore_index", "align_corners"]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def class_weight(loss: PixelLoss, logits: Tensor) -> Tensor | None:
    """The module's weight [K] in the statistics' dtype."""
    weight: Any = loss.weight
    if weight is None:
        return None
    if weight.shape != logits.shape[1:2]:
        expected = f"{len(weight)} classes in dimension 1, as weight"
        fail(type(loss).__name__, "logits", expected, f"shape {tuple(logits.shape)}")
    if weight.device != logits.device:
        fail(type(loss).__name__, "logits", f"device {weight.device}, as weight", logits.device)
    return weight.to(statistics_dtype(logits.dtype))
