"""The class of every pixel, and the figures of a confusion matrix. Logits are kept at the network's
resolution, never at the labels'."""

import copy
from collections.abc import Callable, Sequence
from operator import itemgetter
from textwrap import shorten
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import anchorops as ao

from . import IGNORED, MULTIPLE, ranks
from .data.loading import network_input
from .options import Options
from .run import Stop

TILE = 128  # label rows and columns whose logits exist at the same time
LOWEST_LOGIT = -1e30  # instead of −∞, whose product with a weight of 0 would be NaN
GROUPS = ("head", "body", "tail")


def pad_to_multiple(images: Tensor, value: float = 0.0) -> Tensor:
    """(…, h, w), padded at the bottom and at the right to sizes that the networks support."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % MULTIPLE, 0, -height % MULTIPLE), value=value)


class Term(NamedTuple):
    """Low-resolution logits (B, K, h, w), and the matrices rows [H, h] and columns [W, w], float32
    on the CPU. The logits at full resolution are rows · logits · columnsᵀ.

    Upsampling, cropping, averaging overlapping windows and scaling are all linear, and the same for
    each row and for each column. For a flipped image, `columns` are flipped. Therefore predictions
    from several scales and flips are sums of terms.
    """

    logits: Tensor
    rows: Tensor
    columns: Tensor

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """float32 (B, K, …) at these rows and columns of the labels."""
        row_weights, column_weights = self.rows[rows], self.columns[columns]
        i, j = (weights.any(0).nonzero()[:, 0] for weights in (row_weights, column_weights))
        device = self.logits.device
        logits = (
            self.logits[:, :, i[:, None].to(device), j.to(device)].float().clamp(min=LOWEST_LOGIT)
        )
        return row_weights[:, i].to(device) @ logits @ column_weights[:, j].T.to(device)


def largest(terms: Sequence[Term], *, softmax: bool = False) -> Tensor:
    """Classes int64 (B, H, W) with the largest sum over the terms: of their logits or, with
    softmax, of their probabilities. It is computed tile by tile."""

    def scores(term: Term, rows: slice, columns: slice) -> Tensor:
        tile = term.tile(rows, columns)
        return tile.softmax(1) if softmax else tile

    batch, (height, width) = len(terms[0].logits), (len(terms[0].rows), len(terms[0].columns))
    classes = terms[0].logits.new_empty(batch, height, width, dtype=torch.int64)
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            rows, columns = slice(top, top + TILE), slice(left, left + TILE)
            tile = scores(terms[0], rows, columns)
            for term in terms[1:]:
                tile += scores(term, rows, columns)
            classes[:, rows, columns] = ao.pixel_argmax(tile, (tile.shape[2], tile.shape[3]))
    return classes


def _starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of windows that cover the length: the last one ends where the length ends."""
    if length <= window:
        return [0]
    return [*range(0, length - window, stride), length - window]


def _weights(starts: Sequence[int], length: int, window: int, low: int, size: int) -> Tensor:
    """The matrix [size, windows·low] of one axis. It computes the logits of `size` labels from the
    `low` logits of each window of an image of this length: it upsamples the logits of each window
    to the padded length of the window, crops them, averages the windows where they overlap, and
    scales the result to full resolution. starts: the first pixels of the windows."""
    window = min(length, window)
    padded = window + -window % MULTIPLE
    image = torch.zeros(len(starts), low, length, dtype=torch.float32)
    upsampled = _interpolate(torch.eye(low, dtype=torch.float32), padded)[:, :window]
    for part, start in zip(image, starts, strict=True):
        part[:, start : start + window] = upsampled
    image /= image.any(1).sum(0)
    return _interpolate(image.flatten(0, 1), size).T


def _interpolate(rows: Tensor, size: int) -> Tensor:
    return F.interpolate(rows[None], size, mode="linear", align_corners=False)[0]


def window_logits(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    size: Sequence[int],
    window: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
) -> Term:
    """The logits of images (B, C, h, w), from whole images or from sliding windows, for labels of
    this size; window and stride as in `predict`."""
    (height, width), (rows, columns) = images.shape[2:], window or images.shape[2:]
    down, right = stride or (max(1, rows * 2 // 3), max(1, columns * 2 // 3))
    tops, lefts = _starts(height, rows, down), _starts(width, columns, right)
    logits = images.new_empty(0)
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            part = images[..., top : top + rows, left : left + columns]
            part = model(pad_to_multiple(part))
            if i == j == 0:
                batch, classes, low_height, low_width = part.shape
                shape = (batch, classes, len(tops), low_height, len(lefts), low_width)
                logits = part.new_empty(shape)
            logits[:, :, i, :, j] = part
    return Term(
        logits.flatten(4).flatten(2, 3),
        _weights(tops, height, rows, logits.shape[3], size[0]),
        _weights(lefts, width, columns, logits.shape[5], size[1]),
    )


def _scaled(images: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return images
    size = [max(1, round(side * scale)) for side in images.shape[2:]]
    # torch has no kernel with antialiasing for bfloat16 on a CPU
    scaled = F.interpolate(
        images.float(), size, mode="bilinear", align_corners=False, antialias=True
    )
    return scaled.to(images.dtype)


def predict(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    size: Sequence[int],
    window: tuple[int, int] | None = None,
    *,
    stride: tuple[int, int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """Classes int64 (B, *size) of images (B, C, h, w), from whole images, or from sliding windows
    whose logits are averaged where they overlap. stride: rows and columns from one window to the
    next, at most those of a window; if not given, two thirds of them. With several scales, or with
    flip, the probabilities of all scaled and mirrored images are averaged (as mmsegmentation's
    test-time augmentation)."""
    if tuple(scales) != (1.0,) or flip:
        terms = []
        for scale in scales:
            scaled = _scaled(images, scale)
            terms.append(window_logits(model, scaled, size, window, stride))
            if flip:
                term = window_logits(model, scaled.flip(3), size, window, stride)
                terms.append(term._replace(columns=term.columns.flip(0)))
        return largest(terms, softmax=True)
    height, width = size
    padded = pad_to_multiple(images)
    aligned = padded.shape == images.shape  # padded and scaled images are interpolated twice
    if window is None and (aligned or images.shape[2:] == (height, width)):
        whole = (height, width) if aligned else (padded.shape[2], padded.shape[3])
        return ao.pixel_argmax(model(padded), whole)[:, :height, :width]
    return largest([window_logits(model, images, size, window, stride)])


def as_weights(model: nn.Module, images: Tensor, channels_last: bool) -> Tensor:
    """The images on the device of the weights, in their dtype and memory format."""
    layout = torch.channels_last if channels_last else torch.preserve_format
    weight = next(model.parameters())
    return images.to(weight.device, weight.dtype, memory_format=layout)


def prediction_of(options: Options) -> dict[str, Any]:
    """How images are predicted: arguments of `predict`."""
    sliding = options.model.evaluation == "sliding"
    return {
        "window": options.data.crop if sliding else None,
        "stride": options.model.window_stride if sliding else None,
        "scales": tuple(options.model.eval_scales),
        "flip": options.model.eval_flip,
    }


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Any, options: Options, num_classes: int, stop: Stop
) -> Tensor:
    """The confusion matrix int64 [K, K] of all ranks' images: pixels by their true and predicted
    classes. Raises Stopped before a batch, on all ranks together."""
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    matrix = matrix.to(next(model.parameters()).device)
    training, how = model.training, prediction_of(options)
    model.eval()
    for buffer in model.buffers() if ranks.world() > 1 else ():
        dist.broadcast(buffer, 0)  # statistics of batch norm: those of the first rank
    iterator = iter(batches)
    for _ in range(ranks.largest(len(batches))):
        stop.check()
        if (batch := next(iterator, None)) is not None:
            images, labels = batch
            images = as_weights(model, images, options.model.channels_last)
            classes = predict(model, images, labels.shape[1:], **how)
            matrix += ao.confusion(
                classes, labels.to(matrix.device), num_classes, ignore_index=IGNORED
            )
    if ranks.world() > 1:
        dist.all_reduce(matrix)
    model.train(training)
    return matrix.cpu()


def class_groups(frequencies: Tensor, head_tail: tuple[float, float]) -> list[str]:
    """ "head", "body" or "tail" of each class, by its share [K] of the training pixels."""
    head, tail = head_tail
    return [
        "head" if share >= head else "tail" if share < tail else "body"
        for share in frequencies.tolist()
    ]


def summarize(
    confusion: Tensor, classes: Sequence[str], frequencies: Tensor, head_tail: tuple[float, float]
) -> dict[str, float]:
    """Figures of a segmentation.

    Args:
        confusion: int64 [K, K], pixels of true class i predicted as j, without ignored pixels.
        classes: their names.
        frequencies: float [K], share of the training pixels.
        head_tail: see class_groups.

    Returns:
        miou, macc, accuracy, the miou of head, body and tail, and iou/NAME of each class. Those of
        a class that is neither in the truth nor predicted, and of a group without such a class, are
        absent. A class that is not in the truth is also omitted from the mean of accuracies.
    """
    confusion = confusion.double()
    hits, truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou, groups = hits / (truth + predicted - hits), class_groups(frequencies, head_tail)
    figures = {
        "miou": iou.nanmean(),
        "macc": (hits / truth).nanmean(),
        "accuracy": hits.sum() / truth.sum(),
        **{name: iou[[group == name for group in groups]].nanmean() for name in GROUPS},
        **{f"iou/{name}": value for name, value in zip(classes, iou, strict=True)},
    }
    return {name: value.item() for name, value in figures.items() if not value.isnan()}


def check_sizes(
    model: nn.Module, options: Options, sizes: Sequence[tuple[int, int]], batch: int = 0
) -> None:
    """Raises ValueError if the network cannot take a batch of crops in training, or an image in the
    validation: a whole one, a window or a scaled one. It runs on a copy without data.

    sizes: (H, W) of the validation images. batch: of a training step.
    """
    crop, channels = options.data.crop, options.data.channels
    model = copy.deepcopy(model).to("meta")
    reason = _failure(model.train(), (batch, channels, *crop)) if batch else ""
    if "more than 1 value per channel" in reason:
        raise ValueError(
            f"--data.batch_size: batch norm needs several values of each channel, and {batch} "
            f"crops of {crop[0]}×{crop[1]} in a batch give one: expected more images for each rank "
            "and each of --accumulate, or a larger --data.crop"
        )
    model.eval()
    for height, width in (crop, *_network_sizes(sizes, options)):
        reason = reason or _failure(model, (1, channels, height, width))
        if reason:
            sides = (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 768, 1024)
            fits = [side for side in sides if not _failure(model, (1, channels, side, side))]
            fit = ", ".join(f"{side}×{side}" for side in fits) or "none"
            raise ValueError(
                f"--model.network {options.model.network} cannot take images of {height}×{width} "
                f"({shorten(reason, 120)}); of squares up to 1024 it takes {fit}: give such a "
                "--data.crop, and --model.evaluation sliding for validation images of other sizes, "
                "with a --data.short_side with which no side of an image is below the crop's"
            )


def _network_sizes(sizes: Sequence[tuple[int, int]], options: Options) -> Sequence[tuple[int, int]]:
    """The sizes that the network gets for the least and greatest of the images."""
    extremes = {choose(sizes, key=itemgetter(axis)) for choose in (min, max) for axis in (0, 1)}
    found = set[tuple[int, int]]()

    def network(images: Tensor) -> Tensor:
        found.add((images.shape[2], images.shape[3]))
        return torch.zeros(1, 2, images.shape[2] // MULTIPLE, images.shape[3] // MULTIPLE)

    for size in extremes:
        image = network_input(torch.zeros(options.data.channels, *size).byte(), options.data)
        predict(network, image[None], size, **prediction_of(options))
    return sorted(found)


def _failure(model: nn.Module, shape: Sequence[int]) -> str:
    """Why the network cannot take such images; an empty text if it can."""
    try:
        with torch.no_grad():
            model(torch.empty(*shape, device="meta"))
    except NotImplementedError:  # of a layer that cannot run without data
        return ""
    except Exception as error:
        return " ".join(str(error).split()) or type(error).__name__
    return ""
