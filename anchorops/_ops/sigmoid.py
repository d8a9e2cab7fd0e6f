"""Sigmoid logits as softmax moments: sigmoid(x) is the softmax of (0, x), so C independent sigmoids
over (B, C, h, w) are B·C images of two classes."""

from typing import Any

import torch
from torch import Tensor

from .._moments import RESULTS, Options, SoftmaxMoments
from .softmax_moments import moments_of


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
    return (contiguous(logits) if copied else logits).flatten(0, 1)


def contiguous(logits: Tensor) -> Tensor:
    """A contiguous copy, whose gradient is channels last if the logits are."""
    # torch.jit cannot save a traced Function
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return logits.contiguous()
    compiling = torch.compiler.is_compiling()
    return (_Contiguous if compiling else _ContiguousWithTangent).apply(logits)


def sigmoid_moments(
    function: str, logits: Tensor, labels: Tensor, options: Options
) -> SoftmaxMoments:
    """Softmax moments of the two classes of each channel, of arguments that `check_pixels` has
    checked.

    Statistics of classes are [C, 2], with per_image [B, C, 2]; maps have the labels' shape, and
    `outside` is of all channels.
    """
    points = logits.dim() == 2
    batch, channels = (1 if points else logits.shape[0]), logits.shape[1]
    images = (logits.t() if points else _as_one_batch(logits))[:, None]

    def by_image(pixel_map: Tensor) -> Tensor:
        return pixel_map.t() if points else pixel_map.flatten(0, 1)

    def by_channel(statistic: Tensor) -> Tensor:
        statistic = statistic.view(batch, channels, 2)
        return statistic if options.per_image else statistic.sum(0)

    def by_pixel(pixel_map: Tensor) -> Tensor:
        return pixel_map.t() if points else pixel_map.view(labels.shape)

    moments = moments_of(
        function, images, by_image(labels), options.map(by_image)._replace(per_image=True)
    )
    shapes = {"classes": by_channel, "pixels": by_pixel, "": lambda statistic: statistic}
    return moments._replace(
        **{
            name: shapes[RESULTS[name].axes](value)
            for name, value in moments._asdict().items()
            if value is not None
        }
    )
