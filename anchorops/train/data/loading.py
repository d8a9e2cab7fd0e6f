"""The splits that the options name: opened, counted, augmented, and loaded in batches."""

import atexit
import multiprocessing
import signal
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler
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
from .images import has_data

RETRIES = 10  # for a crop that shows mostly one class
CHANNELS = "channels"  # in data.yaml
SCENES = 2_000  # of digits, in which classes are counted
Segmentation = DigitScenes | MaskFolder
Like = tuple[bool, object]  # whether images must be of 8 bits, and as what
IMAGENET = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])  # mean, standard deviation


def scaled_size(image: Tensor, options: Data, scale: float) -> list[int]:
    """Of the short side, or of the long side; if both are given, so that neither is exceeded; if
    none is given, of the image. Times scale. torch cannot scale to a single pixel."""
    sides = zip((options.short_side, options.long_side), sorted(image.shape[1:]), strict=True)
    scale *= min((side / length for side, length in sides if side is not None), default=1)
    return [max(2, round(length * scale)) for length in image.shape[1:]]


def filled(image: Tensor, options: Data) -> tuple[Tensor, Tensor]:
    """The image, with the mean where it has no data; and int16 (H, W), 0 there and 1 elsewhere."""
    known = has_data(image, options.nodata)
    if options.nodata is not None:
        mean = torch.tensor(numbers(options)[0])[:, None, None]
        image = torch.where(known, image, mean.to(image.dtype))
    return image, known.short()


def numbers(options: Data) -> tuple[Sequence[float], Sequence[float]]:
    """The mean and the standard deviation of each channel, in values of the files: the options'
    or, for 8 bits, those of ImageNet for three channels."""
    if options.mean is not None and options.std is not None:
        return options.mean, options.std
    return IMAGENET if options.channels == 3 else ([127.5], [63.75])


def normalized(image: Tensor, options: Data) -> Tensor:
    """float32, minus the mean, divided by the standard deviation."""
    white = 255 if image.dtype == torch.uint8 else 1
    mean, std = ([x / white for x in values] for values in numbers(options))
    return functional.normalize(functional.to_dtype(image, torch.float32, scale=True), mean, std)


def network_input(image: Tensor, options: Data) -> Tensor:
    """An image of an evaluation, scaled to the short or the long side; its labels do not change."""
    size = scaled_size(image, options, 1.0)
    image, known = filled(image, options)
    known = functional.resize(known[None], size, InterpolationMode.NEAREST)
    return normalized(functional.resize(image, size, antialias=True), options) * known


def augmented(image: Tensor, labels: Tensor, options: Data) -> tuple[Tensor, Tensor]:
    """A training image and its labels, in the papers' order: scaled, cropped, flipped, distorted,
    normalised, and padded to a crop: below and at the right, with the mean colour, which pixels
    without data get, too.

    A crop in which a class has `cat_max_ratio` of the valid pixels or more is drawn again, up to
    ten times (mmsegmentation's RandomCrop)."""
    size = scaled_size(image, options, float(torch.empty(1).uniform_(*options.scale)))
    image, known = filled(image, options)
    image = functional.resize(image, size, antialias=True)
    pair = torch.stack([labels, known])
    labels, known = functional.resize(pair, size, InterpolationMode.NEAREST)
    height, width = map(min, options.crop, size)
    for _ in range(1 + RETRIES):
        top = int(torch.randint(size[0] - height + 1, ()))
        left = int(torch.randint(size[1] - width + 1, ()))
        window = np.s_[..., top : top + height, left : left + width]
        counts = torch.bincount(labels[window][labels[window] != IGNORED], minlength=1)
        if options.cat_max_ratio == 1 or counts.max() < options.cat_max_ratio * counts.sum():
            break
    image, labels, known = image[window], labels[window], known[window]
    if options.flip and torch.rand(1) < 0.5:
        image, labels, known = image.flip(2), labels.flip(1), known.flip(1)
    if options.photometric:
        image = distorted(image)
    margin = [0, options.crop[1] - width, 0, options.crop[0] - height]
    return pad(normalized(image, options) * known, margin), pad(labels, margin, value=IGNORED)


def distorted(image: Tensor) -> Tensor:
    """The photometric distortion, in which torchvision's random order of channels is left out, as
    in mmsegmentation. No value is below 0, which torchvision would clip."""
    distort = v2.RandomPhotometricDistort(hue=(-0.1, 0.1))
    parameters = {**distort.make_params([image]), "channel_permutation": None}
    if not image.is_floating_point():
        return distort.transform(image, parameters)
    scale = max(4 * float(image.max()), 1e-30)  # to 1/4 at most: no distortion makes more than 1
    return distort.transform(image / scale, parameters) * scale


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
    prior: float32 [K], of the training images that contain each class, with sum 1: CeCo's π.
    options: with the mean and the standard deviation that were measured. found: what tells the
    data from others, and the number of ranks.
    """

    training: Segmentation
    validation: Segmentation
    sizes: Sequence[tuple[int, int]]
    frequencies: Tensor
    prior: Tensor
    options: Data
    found: dict[str, Any]


def open_split(options: Data, name: str, seed: int) -> Segmentation:
    """Raises ValueError if the data set has no such split."""
    if options.dataset != "digits":
        return open_files(options, name)
    expect(name in SPLITS, "--data.split", "one of digits, train or val", name)
    return DigitScenes(options, name, seed if options.data_seed is None else options.data_seed)


def check_bits(image: Tensor, name: object, like: Like | None) -> Like:
    """like: whether images must be of 8 bits, and as what; if it is not known, as this one. Raises
    ValueError for another image."""
    kinds, eight_bits = ("more than 8 bits, or floats", "8 bits"), image.dtype == torch.uint8
    expected, reason = like or (eight_bits, name)
    expect(eight_bits == expected, name, f"{kinds[expected]}, as {reason}", kinds[eight_bits])
    return expected, reason


class Counts(NamedTuple):
    """Of a split: pixels [K] and images [K] of each class, int64; the sizes (H, W); whether images
    are of 8 bits, and the name of the first; and if they are not, mean and standard deviation of
    each channel, in values of the files, with the nine digits that tell float32 numbers apart."""

    pixels: Tensor
    images: Tensor
    sizes: list[tuple[int, int]]
    like: Like
    moments: list[list[float]]


def class_counts(
    dataset: Segmentation,
    workers: int = 0,
    like: Like | None = None,
    *,
    measure: bool = False,
    photometric: bool = False,
) -> Counts:
    """Of all images and masks on disk, or of the first 2000 digit scenes. like: of `check_bits`.
    measure: the moments, in float64. photometric: refuse values below 0. Raises ValueError for a
    wrong image or mask: so it is found before the training."""
    num_classes, length = len(dataset.classes), len(dataset)
    if isinstance(dataset, DigitScenes):
        length = min(length, SCENES)
    ranks.say(f"reading {length} images and masks")
    pixels, images = torch.zeros(2, num_classes, dtype=torch.int64)
    sizes, moments = set[tuple[int, int]](), list[list[float]]()
    scaler: Any = StandardScaler()
    read = loaded(dataset, num_workers=workers, batch_size=None, sampler=range(length))
    for index, (image, labels) in enumerate(read):
        found = torch.bincount(labels.flatten().int() + 1, minlength=num_classes + 1)[1:]
        pixels += found
        images += found > 0
        sizes.add((labels.shape[0], labels.shape[1]))
        name = dataset.pairs[index][0] if isinstance(dataset, MaskFolder) else "a scene"
        like = check_bits(image, name, like)
        known = has_data(image, dataset.nodata)
        if not like[0] and known.any():
            if photometric:
                least = image[:, known].min()
                expected = "no values below 0, for --data.photometric"
                expect(bool(least >= 0), name, expected, f"{least:g}")
            if measure:
                scaler.partial_fit(image[:, known].double().numpy().T)
                moments = [[float(f"{x:.9g}") for x in y] for y in (scaler.mean_, scaler.scale_)]
    assert like is not None
    return Counts(pixels, images, sorted(sizes), like, moments)


def open_splits(
    options: Data,
    seed: int,
    of_run: dict[str, Any] | None = None,
    like: Like | None = None,
    of_network: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Splits:
    """Every image and mask is read, on the first rank.
    of_run: what was found for the training whose network is validated, which then needs no training
    images; None for a training. like: of `check_bits`. of_network: mean and standard deviation for
    images of 8 bits, if not ImageNet's. Raises ValueError for wrong data."""

    def read() -> tuple[list[Segmentation], list[Counts]]:
        names = ("train", options.split) if of_run is None else (options.split,)
        splits = [open_split(options, name, seed) for name in names]
        measure = options.mean is None
        photometric = options.photometric and of_run is None
        counts = [
            class_counts(splits[0], options.workers, like, measure=measure, photometric=photometric)
        ]
        for split in splits[1:]:
            counts.append(class_counts(split, options.workers, counts[0].like))
        return splits, counts

    splits, counts = ranks.on_first(read)
    training, validation = splits[0], splits[-1]
    validation_pixels, _, sizes, *_ = counts[-1]
    one_size = options.eval_batch_size == 1 or len(sizes) == 1
    expect(one_size, "--data.eval_batch_size", "1 for images of several sizes", sizes[:2])
    if moments := counts[0].moments:
        options = replace(options, mean=moments[0], std=moments[1])
        texts = (", ".join(f"{x:.6g}" for x in values) for values in moments)
        ranks.say("mean of each channel: {}; standard deviation: {}".format(*texts))
    elif of_network and options.mean is None:
        options = replace(options, mean=of_network[0], std=of_network[1])
    classes = list(validation.classes)
    found = of_run or {"classes": classes, "ranks": ranks.world()}
    if of_run is None:
        for name, split, counted in zip(("training", "validation"), splits, counts, strict=True):
            found[f"{name} files"] = split.fingerprint
            found[f"{name} pixels"] = counted.pixels.tolist()
        if options.mean is not None and options.std is not None:
            mean, std = ([float(x) for x in values] for values in (options.mean, options.std))
            found[CHANNELS] = {"8 bits": counts[0].like[0], "mean": mean, "std": std}
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
    images = counts[0].images
    prior = images / images.sum()
    return Splits(training, validation, sizes, pixels / pixels.sum(), prior, options, found)


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
