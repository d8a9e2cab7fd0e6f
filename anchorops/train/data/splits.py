"""The splits that the options name: opened, counted, and as batches of this rank."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ranks
from ..options import Data, Options, expect
from .counts import Counts, check_classes, class_counts, fingerprint
from .digits import DigitScenes
from .folders import open_folder, open_published
from .loading import (
    Loader,
    Segmentation,
    Training,
    Unlabelled,
    Validation,
    augmentation,
    draws,
    evaluation_transform,
)


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
    if options.dataset == "digits":
        expect(name in ("train", "val"), "data.split", "one of digits, train or val", name)
        if name == "val":
            return DigitScenes("val", options.val_images, options.crop, seed=0)
        seed = seed if options.data_seed is None else options.data_seed
        length, exponent = options.train_images, options.zipf
        return DigitScenes("train", length, options.crop, seed=seed, exponent=exponent)
    needed = f"the directory of the data set {options.dataset}"
    expect(options.root is not None, "data.root", needed, "nothing")
    root = Path(options.root or "")
    if options.dataset != "folder":
        return open_published(options.dataset, root, name)
    return open_folder(
        root,
        name,
        image_suffix=options.image_suffix,
        mask_suffix=options.mask_suffix,
        label_map=options.label_map,
        channels=options.channels,
    )


def open_splits(options: Data, seed: int, of_run: dict[str, Any] | None = None) -> Splits:
    """Every image and mask is read, on the first rank.
    of_run: what was found for the training whose network is validated, which then needs no training
    images; None for a training. Raises ValueError for wrong data."""

    def read() -> tuple[list[Segmentation], list[Counts]]:
        names = ("train", options.split) if of_run is None else (options.split,)
        splits = [open_split(options, name, seed) for name in names]
        return splits, [class_counts(split) for split in splits]

    splits, counts = ranks.on_first(read)
    training, validation, sizes = splits[0], splits[-1], counts[-1].sizes
    one_size = options.eval_batch_size == 1 or len(sizes) == 1
    several = ", ".join(f"{height}×{width}" for height, width in sizes[:2])
    expect(one_size, "data.eval_batch_size", "1 for images of several sizes", several)
    classes, found = list(validation.classes), of_run or {}
    if of_run is None:
        found["classes"] = classes
        for name, split, counted in zip(("training", "validation"), splits, counts, strict=True):
            found[f"{name} files"] = fingerprint(split, Path(options.root or ""))
            found[f"{name} pixels"] = counted.pixels.tolist()
    if found["classes"] != classes:
        raise ValueError(
            f"the data are not those of the run: classes {shorten(str(classes), 200)} instead of "
            f"{shorten(str(found['classes']), 200)}"
        )
    pixels = torch.tensor(found["training pixels"])
    absent = check_classes(classes, pixels, counts[-1].pixels)
    if of_run is None:
        numbers = f"{len(training)} training and {len(validation)} validation images"
        ranks.say(f"data set {options.dataset}: {numbers}, {len(classes)} classes")
        if absent:
            ranks.say(f"no training pixels: {shorten(', '.join(absent), 200)}")
    prior = counts[0].images / counts[0].images.sum().clamp(min=1)
    return Splits(training, validation, sizes, pixels / pixels.sum(), prior, found)


def training_batches(options: Options, training: Segmentation, first_step: int) -> Loader:
    """This rank's augmented images and labels, from a step on: `accumulate` batches for each. They
    follow from the seed, the step and the rank alone."""
    return Loader(
        Training(training, augmentation(options.data), options.seed),
        options.data.workers,
        batch_sampler=draws(len(training), options, first_step, ranks.rank(), ranks.world()),
        pin_memory=torch.cuda.is_available(),
    )


def validation_batches(options: Data, validation: Segmentation) -> Loader:
    """Every image once, over all ranks, without augmentation."""
    return Loader(
        Validation(validation, evaluation_transform(options)),
        options.workers,
        batch_size=options.eval_batch_size,
        sampler=range(ranks.rank(), len(validation), ranks.world()),
    )


def images_to_predict(options: Data, paths: Sequence[Path]) -> Loader:
    """Index, image, height and width of each file, over all ranks."""
    return Loader(
        Unlabelled(paths, evaluation_transform(options), options.channels),
        options.workers,
        batch_size=1,
        sampler=range(ranks.rank(), len(paths), ranks.world()),
    )
