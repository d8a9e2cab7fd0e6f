"""The splits that the options name: opened, counted, and as batches of this rank."""

import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2

from .. import ranks
from ..options import Data, Options, expect
from .counts import check_classes, class_counts, fingerprint
from .digits import DigitScenes
from .folders import open_folder, open_published
from .loading import (
    BatchSampler,
    Draws,
    Loader,
    RandomScale,
    Segmentation,
    Training,
    Unlabelled,
    Validation,
    augmentation,
    evaluation_transform,
)


class Splits(NamedTuple):
    """The splits of a run.

    training: None for a validation. sizes: distinct (H, W) of the validation masks. frequencies:
    float32 [K], each class's share of the training pixels. prior: float32 [K], of the training
    images that contain each class, with sum 1: CeCo's π. found: what tells the data from others.
    """

    training: Segmentation | None
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
    if options.root is None:
        expect(False, "data.root", f"the directory of the data set {options.dataset}", "nothing")
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
    """Every mask is read, on the first rank: so errors in masks are found before the training.
    of_run: what was found for the training whose network is validated, which then needs no training
    images; None for a training.

    Raises ValueError for wrong data, and where a rank would get no image.
    """
    names = ("train",) if of_run is None else ()
    splits = ranks.on_first(lambda: [open_split(options, x, seed) for x in (*names, options.split)])
    *training, validation = splits
    _check_shared("validation", len(validation))
    *counted, counts = ranks.on_first(lambda: [class_counts(split) for split in splits])
    one_size = options.eval_batch_size == 1 or len(counts.sizes) == 1
    several = ", ".join(f"{height}×{width}" for height, width in counts.sizes[:2])
    expect(one_size, "data.eval_batch_size", "1 for images of several sizes", several)
    classes, root = list(validation.classes), Path(options.root or "")
    found = {"classes": classes} | (of_run or {})
    if of_run is None:
        found["training files"] = fingerprint(training[0], root)
        found["training pixels"] = counted[0].pixels.tolist()
        found["validation files"] = fingerprint(validation, root)
        found["validation pixels"] = counts.pixels.tolist()
    if found["classes"] != classes:
        raise ValueError(
            f"the data are not those of the run: classes {shorten(str(classes), 200)} instead of "
            f"{shorten(str(found['classes']), 200)}"
        )
    pixels = torch.tensor(found["training pixels"])
    absent = check_classes(classes, pixels, counts.pixels)
    images = counted[0].images if counted else torch.ones(len(classes))
    if training and ranks.rank() == 0:
        numbers = f"{len(training[0])} training and {len(validation)} validation images"
        print(f"data set {options.dataset}: {numbers}, {len(classes)} classes", file=sys.stderr)
        if absent:
            print("no training pixels:", shorten(", ".join(absent), 200), file=sys.stderr)
    prior = images / images.sum().clamp(min=1)
    opened = training[0] if training else None
    return Splits(opened, validation, counts.sizes, pixels / pixels.sum(), prior, found)


def _check_shared(what: str, images: int) -> None:
    """Raises ValueError if a rank would get none of the images, and wait for the others."""
    if images < ranks.world():
        raise ValueError(
            f"{what}: expected at least one image for each of {ranks.world()} ranks, got {images}"
        )


def transform_of(options: Data) -> v2.Transform:
    """What is applied to an image before its evaluation."""
    return evaluation_transform(options.channels, options.short_side, options.long_side)


def training_batches(options: Options, splits: Splits, first_step: int, *, pin: bool) -> Loader:
    """This rank's augmented images and labels, from a step on: `accumulate` batches for each. They
    follow from the seed, the step and the rank alone."""
    data, training, scaled = options.data, splits.training, None
    assert training is not None
    if data.dataset != "digits":
        scaled = RandomScale(data.short_side, data.scale, data.long_side)
    transform = augmentation(
        training.channels,
        data.crop,
        scaled=scaled,
        cat_max_ratio=data.cat_max_ratio,
        flip=data.flip,
        photometric=data.photometric,
    )
    sampler = BatchSampler(
        Draws(len(training), options.seed),
        batch_size=data.batch_size,
        accumulate=options.accumulate,
        rank=ranks.rank(),
        world=ranks.world(),
        first_step=first_step,
        steps=data.steps,
    )
    images = Training(training, transform, options.seed)
    return Loader(images, data.workers, batch_sampler=sampler, pin_memory=pin)


def validation_batches(options: Data, validation: Segmentation) -> Loader:
    """Every image once, over all ranks, without augmentation."""
    return Loader(
        Validation(validation, transform_of(options)),
        options.workers,
        batch_size=options.eval_batch_size,
        sampler=range(ranks.rank(), len(validation), ranks.world()),
    )


def images_to_predict(options: Data, paths: Sequence[Path]) -> Loader:
    """Index, image, height and width of each file, over all ranks."""
    return Loader(
        Unlabelled(paths, transform_of(options), options.channels),
        options.workers,
        batch_size=1,
        sampler=range(ranks.rank(), len(paths), ranks.world()),
    )
