"""Predictions against logits that are stored at full resolution, and their memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anchorops as ao
from anchorops.train.evaluation import (
    _starts,
    largest,
    pad_to_multiple,
    predict,
    window_logits,
)
from tests.helpers.memory import peak_allocated_bytes

Size = tuple[int, int]


def stored(
    model: nn.Module, images: Tensor, size: Size, window: Size | None, stride: Size | None = None
) -> Tensor:
    """Logits (B, K, *size): those of each window are upsampled and cropped, then averaged and
    scaled."""
    height, width = images.shape[2:]
    rows, columns = window or (height, width)
    down, right = stride or (rows * 2 // 3, columns * 2 // 3)
    total, times = torch.zeros(()), torch.zeros(height, width)
    for top in _starts(height, rows, down):
        for left in _starts(width, columns, right):
            after, below = max(0, width - left - columns), max(0, height - top - rows)
            part = images[..., top : height - below, left : width - after]
            padded = pad_to_multiple(part)
            logits = F.interpolate(model(padded), padded.shape[2:], mode="bilinear")
            logits = logits[..., : part.shape[2], : part.shape[3]]
            total = total + F.pad(logits, (left, after, top, below))
            times += F.pad(torch.ones(part.shape[2:]), (left, after, top, below))
    return F.interpolate(total / times, size, mode="bilinear")


@pytest.mark.parametrize(
    ("image_size", "size", "window"),
    [
        ((64, 96), (64, 96), None),
        ((40, 60), (40, 60), None),  # padded
        ((40, 60), (33, 277), None),  # both
        ((64, 300), (64, 300), (64, 128)),
        ((40, 61), (40, 61), (64, 32)),  # a window higher than the image
        ((150, 301), (201, 207), (48, 96)),
    ],
)
def test_classes_of_stored_logits(image_size: Size, size: Size, window: Size | None):
    generator = torch.Generator().manual_seed(0)
    model = nn.Conv2d(3, 7, 4, 4)
    images = torch.randn(2, 3, *image_size, generator=generator)
    with torch.no_grad():
        logits = stored(model, images, size, window)
        classes = predict(model, images, size, window)
        term = window_logits(model, images, size, window)
        mirrored = window_logits(model, images.flip(3), size, window)
    torch.testing.assert_close(term.tile(slice(None), slice(None)), logits)
    assert classes.shape == (2, *size) and classes.dtype == torch.int64
    assert_largest(classes, logits)
    assert_largest(largest([term]), logits)
    # a flipped copy is one term more
    mirrored = mirrored._replace(columns=mirrored.columns.flip(0))
    with torch.no_grad():
        logits += stored(model, images.flip(3), size, window).flip(3)
    assert_largest(largest([term, mirrored]), logits)


@pytest.mark.parametrize(
    ("length", "window", "stride"),
    [(520, 480, 320), (2048, 1024, 768), (1024, 1024, 768), (390, 480, 320), (100, 10, 10)],
)
def test_windows_are_those_of_mmsegmentation(length: int, window: int, stride: int):
    """As in the slide_inference of its encoder_decoder.py."""
    grids = max(length - window + stride - 1, 0) // stride + 1
    ends = [min(i * stride + window, length) for i in range(grids)]
    assert _starts(length, window, stride) == [max(end - window, 0) for end in ends]


def test_strides_of_windows():
    torch.manual_seed(0)
    model, images = nn.Conv2d(3, 7, 4, 4), torch.randn(1, 3, 64, 160)
    window, stride = (64, 64), (64, 32)
    with torch.no_grad():
        logits = stored(model, images, (64, 160), window, stride)
        term = window_logits(model, images, (64, 160), window, stride)
        assert term.logits.shape == (1, 7, 16, 4 * 16)
        torch.testing.assert_close(term.tile(slice(None), slice(None)), logits)
        assert_largest(predict(model, images, (64, 160), window, stride=stride), logits)
        mirrored = stored(model, images.flip(3), (64, 160), window, stride).flip(3)
        both = predict(model, images, (64, 160), window, stride=stride, flip=True)
        assert_largest(both, logits.softmax(1) + mirrored.softmax(1))


@pytest.mark.parametrize(
    ("image_size", "size", "window", "flip"),
    [
        ((64, 128), (64, 128), None, True),
        ((64, 128), (130, 140), None, False),
        ((64, 128), (64, 128), (64, 64), True),
    ],
)
def test_mean_of_probabilities(image_size: Size, size: Size, window: Size | None, flip: bool):
    """The mean over several scales and mirror images is that of mmsegmentation: logits are
    upsampled to the image's size, then to the labels' size."""
    torch.manual_seed(0)
    model, images = nn.Conv2d(3, 5, 4, 4), torch.randn(2, 3, *image_size)
    scales = (0.5, 1.0, 2.0)
    total = torch.zeros(2, 5, *size)
    with torch.no_grad():
        for scale in scales:
            sides = [round(scale * side) for side in image_size]
            scaled = F.interpolate(images, sides, mode="bilinear", antialias=scale != 1)
            total += stored(model, scaled, size, window).softmax(1)
            if flip:
                total += stored(model, scaled.flip(3), size, window).softmax(1).flip(3)
        assert_largest(predict(model, images, size, window, scales=scales, flip=flip), total)


def test_a_whole_image_is_interpolated_once():
    model, images = nn.Conv2d(3, 7, 4, 4), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        logits = F.interpolate(model(images), (50, 131), mode="bilinear")
        assert_largest(predict(model, images, (50, 131)), logits)


def assert_largest(classes: Tensor, logits: Tensor) -> None:
    chosen = logits.gather(1, classes[:, None])[:, 0]
    torch.testing.assert_close(chosen, logits.amax(1))


def test_a_class_that_is_masked_out():
    class Masked(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits = F.avg_pool2d(images, 4)
            logits[:, 1] = -torch.inf
            return logits

    images = torch.zeros(1, 3, 40, 60)
    images[:, 2] = 1
    assert (predict(Masked(), images, (80, 90), (32, 32)) == 2).all()


@pytest.mark.parametrize(
    ("image_size", "window", "megabytes"),
    [((1024, 2048), None, 125), ((1024, 2048), (512, 1024), 260), ((500, 1000), None, 70)],
    ids=["whole", "windows", "scaled and padded"],
)
def test_memory_of_many_classes(image_size: Size, window: Size | None, megabytes: int):
    """No tensor has all pixels and classes, here 1258 MB, or all pixels and pairs of classes. The
    network's logits are 79 MB; those of all windows are 177 MB, because they overlap."""
    image, truth = torch.zeros(1, 3, *image_size), torch.zeros(1, 1024, 2048, dtype=torch.int16)

    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits = torch.zeros(1, 150, images.shape[2] // 4, images.shape[3] // 4)
            logits[:, 7] = 1
            return logits

    def evaluated() -> Tensor:
        classes = predict(Constant(), image, truth.shape[1:], window)
        return ao.confusion(classes, truth, 150, ignore_index=-1)

    assert evaluated()[0, 7] == truth.numel()
    assert peak_allocated_bytes(evaluated) < megabytes * 1e6
