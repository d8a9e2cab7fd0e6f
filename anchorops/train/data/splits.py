"""The splits that the options name: opened, counted, and as batches of this rank."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ranks
from ..options import Data, Options, expect
from .digits import SPLITS, DigitScenes
from .folders import MaskFolder, open_files
from .loading import Prepared, Segmentation, draws, loaded

SCENES = 2_000  # of digits, in which classes are counted


class Splits(NamedTuple):
    """The splits of a run.

    training: of a validation without a training, the validation split. sizes: distinct (H, W) of
    the validation masks. frequencies: float32 [K], each class's share of the training pixels.
    prior: float32 [K], of the training images that contain each class, with sum 1: CeCo's π. found:
    what tells the data from others.
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
    expect(name in SPLITS, "data.split", "one of digits, train or val", name)
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


def fingerprint(split: Segmentation, root: Path) -> str:
    """Of the names of a split's images and masks under the root, in the order of the images, on
    which that of the batches depends. Scenes of digits have no files."""
    if not isinstance(split, MaskFolder):
        return "none"
    names = [os.fsencode(path.relative_to(root)) for pair in split.pairs for path in pair]
    return f"{len(names)} names ({hashlib.sha256(b'/'.join(names)).hexdigest()[:16]})"


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
    expect(one_size, "data.eval_batch_size", "1 for images of several sizes", sizes[:2])
    classes = list(validation.classes)
    found = of_run or {"classes": classes}
    if of_run is None:
        for name, split, counted in zip(("training", "validation"), splits, counts, strict=True):
            found[f"{name} files"] = fingerprint(split, Path(options.root or ""))
            found[f"{name} pixels"] = counted[0].tolist()
    if found["classes"] != classes:
        known = shorten(str(found["classes"]), 200)
        raise ValueError(f"the data are not those of the run, with the classes {known}")
    pixels = torch.tensor(found["training pixels"])
    absent = [name for name, x in zip(classes, pixels.tolist(), strict=True) if not x]
    seen = [name for name in classes if name not in absent]
    if len(seen) < 2 or not validation_pixels.any():
        raise ValueError(
            f"the training masks have pixels of {', '.join(seen) or 'no class'}; those of the "
            f"validation have {validation_pixels.sum()} pixels of classes: expected two classes, "
            "and any pixel; 255 is ignored unless --data.label_map makes it a class"
        )
    if absent and of_run is None:
        ranks.say(f"no training pixels: {shorten(', '.join(absent), 200)}")
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
