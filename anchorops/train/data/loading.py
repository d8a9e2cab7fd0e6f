"""The splits that the options name: opened, counted, augmented, and loaded in batches."""

import atexit
import multiprocessing
import signal
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from .. import IGNORED, ranks
from ..options import Data, Options, expect
from ..run import STOPPING
from .digits import SPLITS, DigitScenes
from .folders import MaskFolder, open_files

RETRIES = 10  # for a crop that shows mostly one class
SCENES = 2_000  # of digits, in which classes are counted
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
    mean, std = IMAGENET if len(image) == 3 else ([0.5], [0.25])
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
        expect(options.channels == 3, "--data.photometric", "3 channels", options.channels)
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
        expect(within, "--data.photometric", "images of integers, or of 0 to 1", got)
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
    hook, sys.excepthook = sys.excepthook, lambda *_: None  # and this, for their threads at an end
    try:  # without a generator of its own, an iterator draws from torch's random numbers
        return iter(DataLoader(dataset, generator=torch.Generator(), **options))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        sys.excepthook = hook


class Splits(NamedTuple):
    """The splits of a run.

    training: of a validation without a training, the validation split. sizes: distinct (H, W) of
    the validation masks. frequencies: float32 [K], each class's share of the training pixels.
    prior: float32 [K], of the training images that contain each class, with sum 1: CeCo's π. found:
    what tells the data from others, and the number of ranks.
    """

    training: Segmentation
    validation: Segmentation
    sizes: Sequence[tuple[int, int]]
    frequencies: Tensor
    prior: Tensor
    found: dict[str, Any]


def open_split(options: Data, name: str, seed: int) -> Segmentation:
    """Raises ValueError if the data set has no such split."""
    if options.dataset != "digits":
        return open_files(options, name)
    expect(name in SPLITS, "--data.split", "one of digits, train or val", name)
    return DigitScenes(options, name, seed if options.data_seed is None else options.data_seed)


def class_counts(
    dataset: Segmentation, workers: int = 0
) -> tuple[Tensor, Tensor, list[tuple[int, ...]]]:
    """Of all masks on disk, or of the first 2000 digit scenes: pixels [K] and images [K] of each
    class, int64, and the sizes (H, W). Raises ValueError for a wrong image or mask: so it is found
    before the training."""
    num_classes, length = len(dataset.classes), len(dataset)
    if isinstance(dataset, DigitScenes):
        length = min(length, SCENES)
    ranks.say(f"reading {length} images and masks")
    pixels, images = torch.zeros(2, num_classes, dtype=torch.int64)
    sizes = set[tuple[int, ...]]()
    for _, labels in loaded(dataset, num_workers=workers, batch_size=None, sampler=range(length)):
        found = torch.bincount(labels.flatten().int() + 1, minlength=num_classes + 1)[1:]
        pixels += found
        images += found > 0
        sizes.add(tuple(labels.shape))
    return pixels, images, sorted(sizes)


def open_splits(options: Data, seed: int, of_run: dict[str, Any] | None = None) -> Splits:
    """Every image and mask is read, on the first rank.
    of_run: what was found for the training whose network is validated, which then needs no training
    images; None for a training. Raises ValueError for wrong data."""

    def read() -> tuple[list[Segmentation], list[Any]]:
        names = ("train", options.split) if of_run is None else (options.split,)
        splits = [open_split(options, name, seed) for name in names]
        return splits, [class_counts(split, options.workers) for split in splits]

    splits, counts = ranks.on_first(read)
    training, validation = splits[0], splits[-1]
    validation_pixels, _, sizes = counts[-1]
    one_size = options.eval_batch_size == 1 or len(sizes) == 1
    expect(one_size, "--data.eval_batch_size", "1 for images of several sizes", sizes[:2])
    classes = list(validation.classes)
    found = of_run or {"classes": classes, "ranks": ranks.world()}
    if of_run is None:
        for name, split, counted in zip(("training", "validation"), splits, counts, strict=True):
            found[f"{name} files"] = split.fingerprint
            found[f"{name} pixels"] = counted[0].tolist()
    known, present = (shorten(str(names), 200) for names in (found["classes"], classes))
    expect(found["classes"] == classes, "validate", f"data of the run's {known}", present)
    pixels = torch.tensor(found["training pixels"])
    absent = [name for name, x in zip(classes, found["training pixels"], strict=True) if not x]
    message = f"classes without training pixels: {shorten(', '.join(absent) or 'none', 200)}"
    if len(absent) > len(classes) - 2 or not validation_pixels.any():
        raise ValueError(
            f"{message}; pixels of classes in the validation: {validation_pixels.sum()}: expected "
            "two classes, and any pixel; 255 is ignored unless --data.label_map makes it a class"
        )
    if absent and of_run is None:
        ranks.say(message)
    _, images, _ = counts[0]
    prior = images / images.sum()
    return Splits(training, validation, sizes, pixels / pixels.sum(), prior, found)


def training_batches(options: Options, training: Segmentation, first_step: int) -> Any:
    """This rank's augmented images and labels, from a step on: `accumulate` batches for each. They
    follow from the seed, the step and the rank alone."""
    return loaded(
        Prepared(training, options.data, options.seed),
        num_workers=options.data.workers,
        batch_sampler=draws(len(training), options, first_step, ranks.rank(), ranks.world()),
        pin_memory=torch.cuda.is_available(),
    )


def validation_batches(options: Data, images: Segmentation) -> Any:
    """Every image once, over all ranks, without augmentation."""
    return loaded(
        Prepared(images, options),
        num_workers=options.workers,
        batch_size=options.eval_batch_size,
        sampler=[(index, None) for index in range(ranks.rank(), len(images), ranks.world())],
    )
