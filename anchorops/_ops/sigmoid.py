"""Sigmoid logits as softmax moments: sigmoid(x) is the softmax of (0, x), so C independent sigmoids
over (B, C, h, w) are B·C images of two classes."""

from typing import Any

import torch
from torch import Tensor

from .._checks import (
    check_binary_labels,
    check_ignore_index,
    check_integers,
    check_strided,
    describe,
    fail,
)
from ..reference import SoftmaxMoments
from .softmax_moments import Options, unchecked_moments


def labels_of_channels(function: str, labels: Tensor, logits: Tensor) -> Tensor:
    """The labels as (B, C, H, W), or the logits' shape if these are not images; integers. With one
    channel, its axis may be absent."""
    check_strided(function, "labels", labels)
    images, shape = logits.dim() >= 4, logits.shape
    axes = ", ".join("DHW"[5 - logits.dim() :]) if images else str(tuple(shape[2:]))[1:-1]
    if isinstance(labels, Tensor) and labels.dim() == logits.dim() - 1 and shape[1] == 1:
        labels = labels.unsqueeze(1)
    if (
        not isinstance(labels, Tensor)
        or labels.dim() != logits.dim()
        or labels.shape[:2] != shape[:2]
        or not (images or labels.shape == shape)
    ):
        expected = f"a tensor ({shape[0]}, {shape[1]}, {axes})".replace(", )", ")")
        fail(function, "labels", f"{expected}, one for each channel of logits", describe(labels))
    if labels.dtype == torch.bool:
        labels = labels.view(torch.uint8)
    check_integers(function, "labels", labels)
    if labels.device != logits.device:
        fail(function, "labels", f"device {logits.device}, as logits", labels.device)
    if images and labels.numel() > 0 and logits.numel() == 0:
        fail(function, "logits", "at least one pixel per image", f"shape {tuple(shape)}")
    return labels


class _Contiguous(torch.autograd.Function):
    """A contiguous copy of x, whose gradient is channels last if x is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.channels_last = inputs[0].stride(1) < inputs[0].stride(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        return grad.movedim(1, -1).contiguous().movedim(-1, 1) if ctx.channels_last else grad


class _ContiguousWithTangent(_Contiguous):
    """For forward-mode derivatives of the reference, because torch.compile traces no jvp."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].contiguous()


def _as_one_batch(logits: Tensor) -> Tensor:
    """(B, C, …) as (B·C, …): a view, or a copy if the channels of an image are not adjacent."""
    batch, channels = logits.shape[:2]
    copied = batch > 1 and channels > 1 and logits.stride(0) != channels * logits.stride(1)
    # torch.jit cannot save a traced Function
    if copied and not torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        compiling = torch.compiler.is_compiling()
        logits = (_Contiguous if compiling else _ContiguousWithTangent).apply(logits)
    return logits.flatten(0, 1)


def sigmoid_moments(
    function: str,
    logits: Tensor,
    labels: Tensor,
    options: Options,
    *,
    ignore_index: int | None,
    check_labels: bool = False,
) -> SoftmaxMoments:
    """Softmax moments of the two classes of each channel, from labels of `labels_of_channels`.

    Statistics of classes are [C, 2], with per_image [B, C, 2]; maps have the labels' shape, and
    `outside` is of all channels.
    """
    ignore_index = check_ignore_index(function, ignore_index, 2)
    if check_labels:
        check_binary_labels(function, labels, ignore_index)
    points = logits.dim() == 2
    batch, channels = (1 if points else logits.shape[0]), logits.shape[1]
    images = (logits.t() if points else _as_one_batch(logits))[:, None]

    def of_images(pixel_map: Tensor) -> Tensor:
        return pixel_map.t() if points else pixel_map.flatten(0, 1)

    weights = options.pixel_weights
    options_of_images = options._replace(
        pixel_weights=None if weights is None else of_images(weights),
        ignore_index=ignore_index,
        per_image=True,
    )
    moments = unchecked_moments(function, images, of_images(labels), options_of_images)

    def by_channel(statistic: Tensor | None) -> Tensor | None:
        if statistic is None:
            return None
        statistic = statistic.view(batch, channels, 2)
        return statistic if options.per_image else statistic.sum(0)

    def by_pixel(pixel_map: Tensor | None) -> Tensor | None:
        if pixel_map is None:
            return None
        return pixel_map.t() if points else pixel_map.view(labels.shape)

    maps = {"pixel_losses", "lse"}
    return moments._replace(
        **{
            name: by_pixel(value) if name in maps else by_channel(value)
            for name, value in moments._asdict().items()
            if name != "outside"
        }
    )
