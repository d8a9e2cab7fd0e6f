"""The augmentation of images, the order of the training batches, and the processes that load."""

import atexit
import multiprocessing
import signal
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from .. import IGNORED
from ..options import Data, Options, expect
from ..run import STOPPING
from .digits import DigitScenes
from .folders import MaskFolder
from .images import read_image

RETRIES = 10  # for a crop that shows mostly one class
Segmentation = DigitScenes | MaskFolder
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # mean, standard deviation


class RandomScale(v2.Transform):
    """Scale to the short side, or to the long side; if both are given, so that neither is exceeded;
    if none is given, not at all. Then scale by a random factor. Labels are scaled by
    nearest-neighbour interpolation."""

    def __init__(
        self, short_side: int | None, scale: tuple[float, float], long_side: int | None = None
    ) -> None:
        super().__init__()
        self.sides, self.scale = (short_side, long_side), scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = functional.get_size(flat_inputs[0])
        factor = float(torch.empty(1).uniform_(*self.scale))
        sides = zip(self.sides, sorted([height, width]), strict=True)
        factor *= min((side / length for side, length in sides if side is not None), default=1)
        # torch cannot scale to a single pixel
        return {"size": [max(2, round(height * factor)), max(2, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return functional.resize(inpt, antialias=True, **params)


class VariedCrop(v2.Transform):
    """A random crop, or the whole side if the image is smaller. If a single class has
    `cat_max_ratio` of the valid pixels or more, the crop is drawn again, up to ten times
    (mmsegmentation's RandomCrop)."""

    def __init__(self, size: Sequence[int], cat_max_ratio: float) -> None:
        super().__init__()
        self.size, self.cat_max_ratio = size, cat_max_ratio

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        *_, mask = flat_inputs
        sides = functional.get_size(mask)
        height, width = (min(pair) for pair in zip(self.size, sides, strict=True))
        params = {}
        for _ in range(1 + RETRIES):
            top = int(torch.randint(sides[0] - height + 1, ()))
            left = int(torch.randint(sides[1] - width + 1, ()))
            params = {"top": top, "left": left, "height": height, "width": width}
            if self.cat_max_ratio == 1:
                break
            labels = functional.crop(mask, **params)
            counts = torch.bincount(labels[labels != IGNORED], minlength=1)
            if counts.max() < self.cat_max_ratio * counts.sum():
                break
        return params

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return functional.crop(inpt, **params)


class PhotometricDistort(v2.RandomPhotometricDistort):
    """Without a random order of channels, as in mmsegmentation. Raises ValueError for images of
    floats beyond 0..1, which torchvision would clip."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        least, greatest = flat_inputs[0].min(), flat_inputs[0].max()
        if flat_inputs[0].is_floating_point() and (least < -1e-3 or greatest > 1.001):  # of scaling
            got = f"{least:g} to {greatest:g}"
            expect(False, "data.photometric", "images of integers, or of 0 to 1", got)
        return super().make_params(flat_inputs) | {"channel_permutation": None}


def padded(x: Tensor, size: Sequence[int]) -> Tensor:
    """At least of this size, padded below and at the right: normalised images with 0, which is the
    mean colour, masks with ignored pixels (mmsegmentation's Pad)."""
    height, width = functional.get_size(x)
    padding = [0, 0, max(0, size[1] - width), max(0, size[0] - height)]
    return functional.pad(x, padding, fill=IGNORED if isinstance(x, tv_tensors.Mask) else 0)


def normalization(channels: int) -> list[v2.Transform]:
    """Convert to float32 in 0..1, subtract the mean and divide by the standard deviation: those of
    ImageNet for three channels."""
    mean, std = IMAGENET if channels == 3 else ([0.5] * channels, [0.25] * channels)
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]


def augmentation(options: Data) -> v2.Transform:
    """Of a training image, in the papers' order: scale, crop, flip, photometric distortion,
    normalisation, padding."""
    steps: list[v2.Transform] = [
        RandomScale(options.short_side, options.scale, options.long_side),
        VariedCrop(options.crop, options.cat_max_ratio),
    ]
    if options.flip:
        steps.append(v2.RandomHorizontalFlip())
    if options.photometric:
        expect(options.channels == 3, "data.photometric", "3 channels", options.channels)
        steps.append(PhotometricDistort(hue=(-0.1, 0.1)))
    steps += [*normalization(options.channels), v2.Lambda(partial(padded, size=options.crop))]
    return v2.Compose([*steps, v2.ToPureTensor()])


def evaluation_transform(options: Data) -> v2.Transform:
    """Scale only the image to the short or the long side; its labels do not change."""
    scale = RandomScale(options.short_side, (1.0, 1.0), options.long_side)
    return v2.Compose([scale, *normalization(options.channels), v2.ToPureTensor()])


def mixed_seed(*parts: int | str) -> int:
    """A seed for torch from several parts."""
    return zlib.crc32(repr(parts).encode())


def draws(
    images: int, options: Options, first_step: int, rank: int, world: int
) -> Iterator[list[tuple[int, int]]]:
    """The batches of a rank, as lists of (image, draw), from a step on: draw 0, 1, 2, … of a run
    are shuffled passes over the images, one after another. They do not depend on ranks, workers or
    interruptions."""
    parts = options.accumulate * world
    size, rest = divmod(options.data.batch_size, parts)
    multiple = f"a multiple of --accumulate × ranks = {parts}"
    expect(rest == 0, "data.batch_size", multiple, options.data.batch_size)

    @lru_cache(2)
    def order(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(mixed_seed("order", options.seed, epoch))
        return torch.randperm(images, generator=generator).tolist()

    for number in range(first_step * options.accumulate, options.data.steps * options.accumulate):
        start = (number * world + rank) * size
        yield [(order(x // images)[x % images], x) for x in range(start, start + size)]


@dataclass
class Training:
    """Augmented images; the augmentation of a draw is a pure function of (seed, draw)."""

    dataset: Segmentation
    transform: v2.Transform
    seed: int

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        index, draw = item
        image, labels = self.dataset[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed("augmentation", self.seed, draw))
            return self.transform(tv_tensors.Image(image), tv_tensors.Mask(labels))


@dataclass
class Unlabelled:
    """Images without masks; instead of labels, the index, and (H, W) of the file."""

    paths: Sequence[Path]
    channels: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[int, Sequence[int]]]:
        image = read_image(self.paths[index], self.channels)
        return image, (index, image.shape[1:])


@dataclass
class Validation:
    """Images as the network needs them; unchanged labels."""

    dataset: Segmentation | Unlabelled
    transform: v2.Transform

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, labels = self.dataset[index]
        return self.transform(tv_tensors.Image(image)), labels


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
