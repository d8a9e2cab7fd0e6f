"""The class of every pixel, pictures, and the figures of a confusion matrix. Logits are kept at the
network's resolution, never at the labels'."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, reduce
from itertools import product
from operator import itemgetter
from textwrap import shorten

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize, to_dtype

import anchorops as ao

from . import IGNORED, MULTIPLE, ranks
from .data.loading import Segmentation, Splits, network_input, validation_batches
from .networks import autocast
from .options import Options, expect
from .run import Stop

PICTURES, SIZE = 8, (192, 192)  # validation images in predictions.png, and their pixels
Size = tuple[int, ...]
SQUARES = (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 768, 1024)


def multiple_of(model: Callable[[Tensor], Tensor]) -> int:
    """Image sides are multiples of this, the coarsest stride of a network."""
    return getattr(model, "multiple", MULTIPLE)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """(…, h, w), padded at the bottom and at the right to sizes that the network supports."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple))


def check_crop(model: nn.Module, options: Options) -> None:
    crop, multiple = options.data.crop, multiple_of(model)
    fits = crop[0] % multiple == crop[1] % multiple == 0
    expect(fits, "--data.crop", f"two multiples of {multiple}", crop)


def _windows(
    model: Callable[[Tensor], Tensor], images: Tensor, options: Options
) -> tuple[Iterator[tuple[Size, Tensor]], Size, Size]:
    """What `ao.window_argmax` takes: logits of windows of images (B, C, h, w), or of whole images,
    and the sizes of an image and of a window. The padding of a window reaches past the border of
    the image: crops, whose sides are multiples, are padded where the image is smaller."""
    image_size = tuple(images.shape[2:])
    crop = stride = image_size
    if options.model.evaluation == "sliding":
        crop = options.data.crop
        stride = options.model.window_stride or tuple(max(1, side * 2 // 3) for side in crop)
    inside = tuple(map(min, crop, image_size))
    multiple = multiple_of(model)
    padded = tuple(side + -side % multiple for side in inside)

    def windows() -> Iterator[tuple[Size, Tensor]]:
        for top, left in ao.window_origins(image_size, crop, stride):
            part = images[..., top : top + inside[0], left : left + inside[1]]
            yield (top, left), model(pad_to_multiple(part, multiple))

    return windows(), image_size, padded


def _probabilities(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    flip: bool,
    size: Sequence[int],
    options: Options,
) -> Iterator[Tensor]:
    """(B, K, rows, W) of the next rows of labels of this size; with `flip` of the mirror images."""
    windows = _windows(model, images.flip(3) if flip else images, options)
    for _, logits in ao.window_rows(*windows, size):
        yield (logits.flip(3) if flip else logits).softmax(1)


def predict(
    model: Callable[[Tensor], Tensor], images: Tensor, size: Sequence[int], options: Options
) -> Tensor:
    """Classes int64 (B, *size) of images (B, C, h, w), from whole images, or from sliding windows
    whose logits are averaged where they overlap. With several scales, or with the mirror images,
    their probabilities are averaged (as mmsegmentation's test-time augmentation)."""
    with autocast(options.precision, images.device):
        height, width = size
        scales = tuple(options.model.eval_scales)
        flips = (False, True)[: 1 + options.model.eval_flip]
        padded = pad_to_multiple(images, multiple_of(model))
        aligned = padded.shape == images.shape  # padded and scaled images are interpolated twice
        once = aligned or images.shape[2:] == (height, width)
        if scales == (1.0,) and flips == (False,):
            if once and options.model.evaluation == "whole":
                whole = size if aligned else padded.shape[2:]
                return ao.pixel_argmax(model(padded), whole)[:, :height, :width]
            return ao.window_argmax(*_windows(model, images, options), size)
        views = []
        for scale, flip in product(scales, flips):
            sides = [max(1, round(side * scale)) for side in images.shape[2:]]
            scaled = resize(images, sides, antialias=True)
            views.append(_probabilities(model, scaled, flip, size, options))
        sums = (reduce(torch.add, rows) for rows in zip(*views, strict=True))
        return torch.cat([ao.pixel_argmax(x, x.shape[2:]) for x in sums], 1)


@torch.no_grad()
def evaluate(model: nn.Module, data: Splits, options: Options, stop: Stop) -> Tensor:
    """The confusion matrix int64 [K, K] of the validation images, of all ranks: pixels of true
    class i predicted as j, without ignored pixels. model: in eval mode. Raises Stopped."""
    device = next(model.parameters()).device
    classes = data.validation.classes
    matrix = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device)
    for buffer in model.buffers() if ranks.world() > 1 else ():
        dist.broadcast(buffer, 0)  # statistics of batch norm: those of the first rank
    for images, labels in stop.until_asked(validation_batches(options.data, data.validation)):
        predicted = predict(model, images.to(device), labels.shape[1:], options)
        labels = labels.to(device)
        matrix += ao.confusion(predicted, labels, len(classes), ignore_index=IGNORED)
    if ranks.world() > 1:
        dist.all_reduce(matrix)
    return matrix.cpu()


def figures_of(confusion: Tensor, data: Splits, options: Options) -> dict[str, float]:
    """Those of `summarize`, as SPLIT/NAME."""
    classes = data.validation.classes
    figures = summarize(confusion, classes, data.frequencies, options.data.head_tail)
    return {f"{options.data.split}/{name}": figure for name, figure in figures.items()}


def summarize(
    confusion: Tensor, classes: Sequence[str], frequencies: Tensor, head_tail: tuple[float, float]
) -> dict[str, float]:
    """miou, macc, accuracy, the miou of head, body and tail, and iou/NAME of each class. Those of a
    class that is neither in the truth nor predicted, and of a group without such a class, are
    absent. A class that is not in the truth is also omitted from the mean of accuracies.

    confusion: int64 [K, K], pixels of true class i predicted as j, without ignored pixels.
    frequencies: float [K], shares of the training pixels. head_tail: head classes have at least
    the first share, tail classes less than the second.
    """
    confusion = confusion.double()
    hits, truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou = hits / (truth + predicted - hits)
    head = frequencies.double() >= head_tail[0]
    tail = ~head & (frequencies.double() < head_tail[1])
    figures = {
        "miou": iou.nanmean(),
        "macc": (hits / truth).nanmean(),
        "accuracy": hits.sum() / truth.sum(),
        "head": iou[head].nanmean(),
        "body": iou[~head & ~tail].nanmean(),
        "tail": iou[tail].nanmean(),
        **{f"iou/{name}": value for name, value in zip(classes, iou, strict=True)},
    }
    return {name: value.item() for name, value in figures.items() if not value.isnan()}


@torch.no_grad()
def draw_predictions(model: nn.Module, dataset: Segmentation, options: Options) -> Image.Image:
    """The first validation images; under each its labels, and under these its prediction. Class 0
    is black, ignored pixels are white, and the other classes have colours at random."""
    size = (len(dataset.classes) + 1, 3)
    colors = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    colors[0] = 0
    colors[-1] = 255  # that of label −1
    columns = []
    for index in range(min(PICTURES, len(dataset))):
        image, labels = dataset[index]
        images = network_input(image, options.data)[None].to(next(model.parameters()).device)
        if image.dtype != torch.uint8:  # two standard deviations from the mean are black and white
            whole = replace(options.data, short_side=None, long_side=None)
            image = (network_input(image, whole) / 4 + 0.5).clamp(0, 1)
        (classes,) = predict(model, images, labels.shape, options)
        three = image[[0, 1, 2] if len(image) >= 3 else [0, 0, 0]]
        pixels = to_dtype(three, torch.uint8, scale=True).permute(1, 2, 0).numpy()
        parts = pixels, colors[labels.numpy()], colors[classes.cpu().numpy()]
        tiles = [ImageOps.pad(Image.fromarray(x), SIZE, Image.Resampling.NEAREST) for x in parts]
        columns.append(np.vstack([np.asarray(tile) for tile in tiles]))
    return Image.fromarray(np.hstack(columns))


def check_sizes(
    model: nn.Module, options: Options, sizes: Sequence[tuple[int, int]], batch: int = 0
) -> None:
    """Raises ValueError if the network cannot take a batch of crops in training, or an image in the
    validation: a whole one, a window or a scaled one. It runs on a copy without data.

    sizes: (H, W) of the validation images, if they are known. batch: of a training step.
    """
    check_crop(model, options)
    crop, channels, multiple = options.data.crop, options.data.channels, multiple_of(model)
    model = copy.deepcopy(model).to("meta")

    @cache
    def failure(training: bool, batch: int, height: int, width: int) -> str:
        """Why the network cannot take such images; an empty text if it can."""
        try:
            with torch.no_grad(), suppress(NotImplementedError):  # of a layer that needs data
                model.train(training)(torch.empty(batch, channels, height, width, device="meta"))
        except Exception as error:
            return " ".join(str(error).split()) or type(error).__name__
        return ""

    if batch and "more than 1 value per channel" in failure(True, batch, *crop):
        raise ValueError(
            f"--data.batch_size: batch norm needs several values of each channel, got {batch} "
            f"crops of {crop[0]}×{crop[1]} for each rank and each of --accumulate"
        )

    def checked(images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        if why := failure(False, 1, height, width):
            fit = ", ".join(f"{x}×{x}" for x in SQUARES if not failure(False, 1, x, x))
            advice = (
                f"; of squares up to 1024 it takes {fit}: give such a --data.crop, and "
                "--model.evaluation sliding for validation images of other sizes, with a "
                "--data.short_side with which no side of an image is below the crop's"
            )
            raise ValueError(
                f"--model.network {options.model.network} cannot take images of {height}×{width} "
                f"({shorten(why, 120)}){advice if fit else ''}"
            )
        return torch.zeros(1, 2, height // multiple, width // multiple)

    checked.multiple = multiple  # pyright: ignore[reportFunctionMemberAccess]
    checked(torch.empty(1, channels, *crop))
    ends = {end(sizes, key=itemgetter(axis)) for end in (min, max) for axis in (0, 1) if sizes}
    for size in ends:
        image = network_input(torch.zeros(channels, *size).byte(), options.data)
        predict(checked, image[None], size, options)
