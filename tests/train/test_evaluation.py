"""Predictions against logits that are stored at full resolution, their memory, and figures."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anchorops as ao
from anchorops.train import MULTIPLE
from anchorops.train.evaluation import pad_to_multiple, predict, summarize
from anchorops.train.options import Data, Model, Options
from tests.helpers.memory import peak_allocated_bytes

Size = tuple[int, int]


def starts(length: int, window: int, stride: int) -> list[int]:
    """As in the slide_inference of mmsegmentation's encoder_decoder.py."""
    grids = max(length - window + stride - 1, 0) // stride + 1
    ends = [min(i * stride + window, length) for i in range(grids)]
    return [max(end - window, 0) for end in ends]


def stored(
    model: nn.Module, images: Tensor, size: Size, window: Size | None, stride: Size | None
) -> Tensor:
    """Logits (B, K, *size): those of each window are upsampled and cropped, then averaged and
    scaled."""
    height, width = images.shape[2:]
    rows, columns = window or (height, width)
    down, right = stride or (rows * 2 // 3, columns * 2 // 3)
    total, times = torch.zeros(()), torch.zeros(height, width)
    for top in starts(height, rows, down):
        for left in starts(width, columns, right):
            after, below = max(0, width - left - columns), max(0, height - top - rows)
            part = images[..., top : height - below, left : width - after]
            padded = pad_to_multiple(part, MULTIPLE)
            logits = F.interpolate(model(padded), padded.shape[2:], mode="bilinear")
            logits = logits[..., : part.shape[2], : part.shape[3]]
            total = total + F.pad(logits, (left, after, top, below))
            times += F.pad(torch.ones(part.shape[2:]), (left, after, top, below))
    return F.interpolate(total / times, size, mode="bilinear")


def how(window: Size | None, stride: Size | None = None, scales=(1.0,), flip=False) -> Options:
    options = Options(data=Data(crop=window or (64, 64)))
    options.model = Model(window_stride=stride, eval_scales=scales, eval_flip=flip)
    options.model.evaluation = "sliding" if window else "whole"
    return options


def assert_largest(classes: Tensor, logits: Tensor) -> None:
    assert classes.dtype == torch.int64
    chosen = logits.gather(1, classes[:, None])[:, 0]
    torch.testing.assert_close(chosen, logits.amax(1))


# sizes of the image and the labels, window, stride, scales, and whether it is flipped too
@pytest.mark.parametrize(
    "case",
    [
        ((40, 60), (40, 60), None, None, (1,), False),  # padded
        ((40, 60), (33, 277), None, None, (1,), True),  # padded and scaled
        ((64, 160), (64, 160), (64, 64), (64, 32), (1,), False),
        ((40, 61), (40, 61), (64, 32), None, (1,), False),  # a window higher than the image
        ((150, 301), (201, 207), (64, 96), None, (1,), False),
        ((64, 128), (130, 140), None, None, (0.5, 1, 2), False),
        ((64, 128), (64, 128), (64, 64), None, (0.5, 1, 2), True),
    ],
)
def test_classes_of_stored_logits(case: tuple[Any, ...]):
    """With several scales or mirror images, of the mean of their probabilities, as in
    mmsegmentation: logits are upsampled to the image's size, then to the labels' size."""
    image_size, size, window, stride, scales, flip = case
    options = how(window, stride, scales, flip)
    model, images = nn.Conv2d(3, 7, 4, 4), torch.randn(2, 3, *image_size)
    maps = []
    with torch.no_grad():
        classes = predict(model, images, size, options)
        for scale in scales:
            sides = [round(scale * side) for side in image_size]
            scaled = F.interpolate(images, sides, mode="bilinear", antialias=scale != 1)
            maps.append(stored(model, scaled, size, window, stride))
            if flip:
                maps.append(stored(model, scaled.flip(3), size, window, stride).flip(3))
    assert_largest(classes, sum(x.softmax(1) for x in maps) if len(maps) > 1 else maps[0])


def test_a_whole_image_is_interpolated_once():
    model, images = nn.Conv2d(3, 7, 4, 4), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        logits = F.interpolate(model(images), (50, 131), mode="bilinear")
        assert_largest(predict(model, images, (50, 131), Options()), logits)


class Constant(nn.Module):
    """Logits of 150 classes: always class 7; class 1 is masked out."""

    def forward(self, images: Tensor) -> Tensor:
        logits = images.new_zeros(1, 150, images.shape[2] // 4, images.shape[3] // 4)
        logits[:, 1], logits[:, 7] = -torch.inf, 1
        return logits


@pytest.mark.parametrize(
    ("image_size", "window", "megabytes"),
    [((1024, 2048), None, 125), ((1024, 2048), (512, 1024), 200), ((500, 1000), None, 70)],
    ids=["whole", "windows", "scaled and padded"],
)
def test_memory_of_many_classes(image_size: Size, window: Size | None, megabytes: int):
    """No tensor has all pixels and classes, here 1258 MB, or all pixels and pairs of classes. The
    network's logits are 79 MB; those of all windows would be 177 MB, because they overlap."""
    image, truth = torch.zeros(1, 3, *image_size), torch.zeros(1, 1024, 2048, dtype=torch.int16)

    def evaluated() -> Tensor:
        classes = predict(Constant(), image, truth.shape[1:], how(window))
        return ao.confusion(classes, truth, 150, ignore_index=-1)

    assert evaluated()[0, 7] == truth.numel()
    assert peak_allocated_bytes(evaluated) < megabytes * 1e6


def test_figures_of_a_confusion_matrix():
    """A class that is predicted but never true has the IoU 0, one that is neither has none."""
    confusion = torch.tensor([[8, 2, 0, 0], [1, 3, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    shares = torch.tensor([0.9, 0.05, 0.0005, 0.0495])
    figures = summarize(confusion, "abcd", shares, (0.06, 0.001))
    assert figures["miou"] == pytest.approx((8 / 11 + 3 / 7 + 0) / 3)
    assert figures["macc"] == pytest.approx((8 / 10 + 3 / 5) / 2)
    assert figures["accuracy"] == pytest.approx(11 / 15)
    assert figures["head"] == pytest.approx(8 / 11) and figures["body"] == pytest.approx(3 / 14)
    assert "tail" not in figures and "iou/c" not in figures and figures["iou/d"] == 0
