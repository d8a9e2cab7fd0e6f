"""The class of every pixel, and the figures of a confusion matrix. Logits are
kept at the network's resolution, never at the labels'."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao

from . import MULTIPLE

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


def check_stride(window: Sequence[int], stride: Sequence[int]) -> None:
    """Raises ValueError where pixels between two windows would be in none."""
    for side, step in zip(window, stride, strict=True):
        if not 1 <= step <= side:
            raise ValueError(f"--model.window_stride: expected 1 to the crop's {side}, got {step}")


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
    check_stride((rows, columns), (down, right))
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


def class_groups(frequencies: Tensor, head_tail: tuple[float, float]) -> list[str]:
    """ "head", "body" or "tail" of each class, by its share [K] of the training pixels."""
    head, tail = head_tail
    return [
        "head" if share >= head else "tail" if share < tail else "body"
        for share in frequencies.tolist()
    ]


def summarize(
    confusion: Tensor, classes: Sequence[str], frequencies: Tensor, head_tail: tuple[float, float]
) -> dict[str, Any]:
    """Figures of a segmentation.

    Args:
        confusion: int64 [K, K], pixels of true class i predicted as j, without ignored pixels.
        classes: their names.
        frequencies: float [K], share of the training pixels.
        head_tail: see class_groups.

    Returns:
        miou, macc, accuracy, pixels (their number), miou of head, body and tail (None if a group
        has no class), and "classes": name, group, frequency, iou and accuracy of each. A class
        that is neither in the truth nor predicted has None, and is omitted from every mean. A class
        that is not in the truth is also omitted from the mean of accuracies.
    """
    confusion = confusion.double()
    hits, truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou = hits / (truth + predicted - hits)
    accuracy = hits / truth
    groups = class_groups(frequencies, head_tail)
    members = {g: torch.tensor([group == g for group in groups]) for g in GROUPS}
    figures = (map(_number, x) for x in (frequencies, iou, accuracy))
    columns = zip(classes, groups, *figures, strict=True)
    names = ("name", "group", "frequency", "iou", "accuracy")
    return {
        "miou": _number(iou.nanmean()),
        "macc": _number(accuracy.nanmean()),
        "accuracy": _number(hits.sum() / truth.sum()),
        "pixels": int(truth.sum()),
        **{group: _number(iou[member].nanmean()) for group, member in members.items()},
        "classes": [dict(zip(names, column, strict=True)) for column in columns],
    }


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()
