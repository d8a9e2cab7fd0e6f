"""The augmentation of images, the order of the training batches, and the processes that load."""

import atexit
import multiprocessing
import signal
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from .. import IGNORED
from ..options import Data, Options, expect
from ..run import STOPPING
from .digits import DigitScenes
from .folders import MaskFolder

RETRIES = 10  # for a crop that shows mostly one class
Segmentation = DigitScenes | MaskFolder
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # mean, standard deviation


def scaled_size(image: Tensor, options: Data, scale: float) -> list[int]:
    """Of the short side, or of the long side; if both are given, so that neither is exceeded; if
    none is given, of the image. Times scale. torch cannot scale to a single pixel."""
    sides = zip((options.short_side, options.long_side), sorted(image.shape[1:]), strict=True)
    scale *= min((side / length for side, length in sides if side is not None), default=1)
    return [max(2, round(length * scale)) for length in image.shape[1:]]


def normalized(image: Tensor) -> Tensor:
    """float32 in 0..1, minus the mean, divided by the standard deviation: those of ImageNet for
    three channels."""
    channels = len(image)
    mean, std = IMAGENET if channels == 3 else ([0.5] * channels, [0.25] * channels)
    return functional.normalize(functional.to_dtype(image, torch.float32, scale=True), mean, std)


def network_input(image: Tensor, options: Data) -> Tensor:
    """An image of an evaluation, scaled to the short or the long side; its labels do not change."""
    return normalized(functional.resize(image, scaled_size(image, options, 1.0), antialias=True))


def augmented(image: Tensor, labels: Tensor, options: Data) -> tuple[Tensor, Tensor]:
    """A training image and its labels, in the papers' order: scaled, cropped, flipped, distorted,
    normalised, and padded to a crop: below and at the right, with the mean colour.

    A crop in which a class has `cat_max_ratio` of the valid pixels or more is drawn again, up to
    ten times (mmsegmentation's RandomCrop)."""
    size = scaled_size(image, options, float(torch.empty(1).uniform_(*options.scale)))
    image = functional.resize(image, size, antialias=True)
    labels = functional.resize(labels[None], size, InterpolationMode.NEAREST)[0]
    height, width = map(min, options.crop, size)
    for _ in range(1 + RETRIES):
        top = int(torch.randint(size[0] - height + 1, ()))
        left = int(torch.randint(size[1] - width + 1, ()))
        window = np.s_[..., top : top + height, left : left + width]
        counts = torch.bincount(labels[window][labels[window] != IGNORED], minlength=1)
        if options.cat_max_ratio == 1 or counts.max() < options.cat_max_ratio * counts.sum():
            break
    image, labels = image[window], labels[window]
    if options.flip and torch.rand(1) < 0.5:
        image, labels = image.flip(2), labels.flip(1)
    if options.photometric:
        expect(options.channels == 3, "data.photometric", "3 channels", options.channels)
        image = distorted(image)
    margin = [0, options.crop[1] - width, 0, options.crop[0] - height]
    return pad(normalized(image), margin), pad(labels, margin, value=IGNORED)


def distorted(image: Tensor) -> Tensor:
    """The photometric distortion, in which torchvision's random order of channels is left out, as
    in mmsegmentation. Raises ValueError for floats beyond 0..1, which torchvision would clip."""
    if image.is_floating_point():
        least, greatest = image.aminmax()
        within = bool(least >= -1e-3 and greatest <= 1.001)  # which scaling an image may exceed
        got = f"{least:g} to {greatest:g}"
        expect(within, "data.photometric", "images of integers, or of 0 to 1", got)
    distort = v2.RandomPhotometricDistort(hue=(-0.1, 0.1))
    return distort.transform(image, {**distort.make_params([image]), "channel_permutation": None})


def mixed_seed(*parts: int | str) -> int:
    """A seed for torch from several parts."""
    return zlib.crc32(repr(parts).encode())


def draws(
    images: int, options: Options, first_step: int, rank: int, world: int
) -> Iterator[list[tuple[int, int]]]:
    """The batches of a rank, as lists of (image, draw), from a step on: draw 0, 1, 2, … of a run
    are shuffled passes over the images, one after another. They do not depend on ranks, workers or
    interruptions."""
    size = options.data.batch_size // (options.accumulate * world)

    @lru_cache(2)
    def order(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(mixed_seed("order", options.seed, epoch))
        return torch.randperm(images, generator=generator).tolist()

    for number in range(first_step * options.accumulate, options.data.steps * options.accumulate):
        start = (number * world + rank) * size
        yield [(order(x // images)[x % images], x) for x in range(start, start + size)]


@dataclass
class Prepared:
    """Images as the network needs them, and their labels. Those of (image, draw) are augmented by
    a pure function of (seed, draw); (image, None) is for an evaluation, with unchanged labels."""

    dataset: Segmentation
    options: Data
    seed: int = 0

    def __getitem__(self, item: tuple[int, int | None]) -> tuple[Tensor, Tensor]:
        index, draw = item
        image, labels = self.dataset[index]
        if draw is None:
            return network_input(image, self.options), labels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed("augmentation", self.seed, draw))
            return augmented(image, labels, self.options)


@atexit.register
def _end_workers() -> None:
    """Those of an iterator that still exists when Python ends: before multiprocessing sends them
    SIGTERM, which they never see, and waits. Without torch's handler, which would report each."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def loaded(dataset: Any, **options: Any) -> Any:
    """An iterator of batches. Its workers never see SIGTERM and Ctrl-C, which SLURM, `timeout` and
    terminals send to all processes of a group: only the training process reacts. They end with its
    last batch, or when they notice that it has ended."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # workers inherit this
    try:  # without a generator of its own, an iterator draws from torch's random numbers
        return iter(DataLoader(dataset, generator=torch.Generator(), **options))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
