"""The data of a run: a LightningDataModule of digit scenes, own folders and published data sets."""

import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..options import DATA, check, check_used
from .counts import changes, check_classes, class_counts, fingerprint
from .digits import DigitScenes
from .folders import open_folder, open_published
from .images import read_upright
from .loading import (
    BatchSampler,
    Draws,
    Loader,
    RandomScale,
    Segmentation,
    Training,
    Validation,
    augmentation,
    evaluation_transform,
)

Published = Literal[
    "cityscapes", "ade20k", "pascal-context", "coco-stuff-10k", "coco-stuff-164k", "camvid"
]


class SegmentationData(LightningDataModule):
    """The images, labels and order of a run.

    A run is one epoch of `steps` optimizer steps, which goes through the images as often as is
    needed. The order of the images and the augmentation of each follow from the seed and its place
    in the run, so that a run continues in its middle, with any number of workers.

    Args:
        dataset: digits: scenes of handwritten digits, generated while training; needs no files.
            folder: images/train, images/val, masks/train, masks/val and classes.txt under root.
            Others: a published data set, with its files as downloaded.
        root: Directory of the data set.
        steps: Optimizer steps of the run. The learning rate is 0 after the last one.
        batch_size: Images per step, over all ranks and accumulated batches.
        eval_batch_size: Images per batch of a validation; with more than 1, all images must have
            the same size.
        workers: Number of processes that load images, per rank; it does not affect the images.
        crop: Height and width of a training image (digits: of every scene), multiples of 32.
        flip: Mirror half of the training images.
        photometric: Distort brightness, contrast, saturation and hue of training images.
        split: The split of a validation. A training is validated on val, which selects the best
            weights; test is for `validate`, after it (folder: images/test, masks/test).
        head_tail: Head classes have at least the first share of the training pixels, tail classes
            less than the second.
        train_images: digits: scenes in the training split.
        val_images: digits: scenes in the validation split.
        zipf: digits: exponent of the frequencies in the training split: digit d has
            (d + 1)^−zipf; in the validation split the exponent is 1.
        data_seed: digits: seed of the training scenes; that of the run if not given.
        image_suffix: folder: ending of image names (_rgb.tif); any known one if not given.
        mask_suffix: folder: ending of mask names (_labels.png).
        label_map: folder: values in the masks and their classes, or −1 for ignored:
            '{128: 1, 7: -1}'. With at most 255 classes, 255 is also ignored. Or the colours in the
            masks, all of them: '{"128,64,0": 1, "0,0,0": -1}'.
        channels: folder: channels of the images.
        short_side: Images are scaled to this short side, keeping their aspect ratio.
        long_side: Images are scaled to this long side; with short_side, so that neither is
            exceeded.
        scale: Range of an additional random scale of training images, which are then cropped, or
            padded with the mean colour.
        cat_max_ratio: If one class has this share of the valid pixels of a crop or more, the crop
            is drawn again, up to ten times; 1: never.
        images: Files to predict.
        allow_changes: Go on with a run although its data have changed: classes of other names or in
            another order, other images, other masks.
        seed: Random seed of the order and the augmentation; the command line sets it to that of
            the run.

    Raises ValueError for a value out of range, and for a split that the data set does not have.
    """

    def __init__(
        self,
        dataset: Literal["digits", "folder", Published] = "digits",
        root: str | None = None,
        steps: int = 500,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        workers: int = 0,
        crop: tuple[int, int] = (64, 64),
        flip: bool = False,
        photometric: bool = False,
        split: Literal["val", "test"] = "val",
        head_tail: tuple[float, float] = (0.01, 0.001),
        train_images: int = 20_000,
        val_images: int = 200,
        zipf: float = 1.0,
        data_seed: int | None = None,
        image_suffix: str | None = None,
        mask_suffix: str | None = None,
        label_map: dict[int, int] | dict[str, int] | None = None,
        channels: int = 3,
        short_side: int | None = None,
        long_side: int | None = None,
        scale: tuple[float, float] = (1.0, 1.0),
        cat_max_ratio: float = 1.0,
        images: list[str] | None = None,
        allow_changes: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.options: Any = self.hparams
        check("data", self.options, DATA)
        self.training_set: Segmentation | None = None
        self.validation_set: Segmentation
        self.classes: Sequence[str] = ()
        self.frequencies: Tensor
        """float32 [K], each class's share of the training pixels."""
        self.prior: Tensor
        """float32 [K], of the training images that contain each class, with sum 1: CeCo's π."""
        self.fingerprint: dict[str, Any] = {}
        """What tells the data from others: see `changes`."""
        self.of_run: dict[str, Any] | None = None
        """The fingerprint in the checkpoint, if there is one; {} if it has none."""
        self.transform: v2.Transform
        """What is applied to an image before its evaluation."""

    def splits(self, *names: str) -> list[Segmentation]:
        """Those of these names; without names, training and validation split."""
        options = self.options
        names = names or ("train", options.split)
        check_used(options, SegmentationData)
        if options.dataset == "digits":
            if options.split != "val":
                raise ValueError(f"--data.split: digits has train, val, got {options.split}")
            seed = options.seed if options.data_seed is None else options.data_seed
            scenes = {
                "train": DigitScenes(
                    "train", options.train_images, options.crop, seed=seed, exponent=options.zipf
                ),
                "val": DigitScenes("val", options.val_images, options.crop, seed=0),
            }
            return [scenes[name] for name in names]
        if options.root is None:
            raise ValueError(
                f"--data.root: expected the directory of the data set {options.dataset}, got "
                "nothing"
            )
        root = Path(options.root)
        if options.dataset != "folder":
            return [open_published(options.dataset, root, name) for name in names]
        chosen = {
            name: options[name] for name in ("image_suffix", "mask_suffix", "label_map", "channels")
        }
        return [open_folder(root, split, **chosen) for split in names]

    def setup(self, stage: str) -> None:
        """Every mask is read, on one rank: so errors in masks are found before the training. The
        validation of a run takes its class frequencies, and needs no training images."""
        options, trainer = self.options, self.trainer
        self.transform = evaluation_transform(
            options.channels, options.short_side, options.long_side
        )
        if stage == "predict":
            return
        assert trainer is not None
        if stage == "fit" and options.split != "val":
            raise ValueError(f"--data.split: fit expects val, got {options.split}")
        of_run = None if stage == "fit" else self.of_run
        names = (options.split,) if of_run else ("train", options.split)
        *training, self.validation_set = self.splits(*names)
        self._check_shared("validation", len(self.validation_set))
        self.classes = self.validation_set.classes
        counted: Any = None
        if trainer.is_global_zero:
            one_size = options.eval_batch_size > 1
            counted = [class_counts(images) for images in training]
            counted.append(class_counts(self.validation_set, one_size=one_size))
        *counts, validation = trainer.strategy.broadcast(counted)
        root = Path(options.root or "")
        self.fingerprint = {
            "classes": list(self.classes),
            "training": of_run["training"] if of_run else fingerprint(training[0], counts[0], root),
            "validation": fingerprint(self.validation_set, validation, root),
        }
        self._check_fingerprint(stage)
        pixels = torch.tensor(self.fingerprint["training"]["pixels"])
        absent = check_classes(self.classes, pixels, validation.pixels)
        self.frequencies = pixels / pixels.sum()
        if stage != "fit":
            return
        self.training_set = training[0]
        images = counts[0].images
        self.prior = images / images.sum().clamp(min=1)
        if not trainer.is_global_zero:
            return
        print(
            f"data set {options.dataset}: {len(self.training_set)} training and "
            f"{len(self.validation_set)} validation images, {len(self.classes)} classes",
            file=sys.stderr,
        )
        if absent:
            print("no training pixels:", shorten(", ".join(absent), 200), file=sys.stderr)

    def _check_shared(self, what: str, images: int) -> None:
        """Raises ValueError if a rank would get none of the images, and wait for the others."""
        ranks = self.trainer.world_size if self.trainer else 1
        if images < ranks:
            raise ValueError(
                f"{what}: expected at least one image for each of {ranks} ranks "
                f"(--trainer.devices), got {images}"
            )

    def state_dict(self) -> dict[str, Any]:
        return self.fingerprint

    def _check_fingerprint(self, stage: str) -> None:
        before, now = self.of_run, self.fingerprint
        if not before:
            return
        if stage != "fit":  # other images may be validated
            before = {**now, "classes": before["classes"]}
        if not (found := changes(before, now)):
            return
        changed = f"the data are not those of the run: {'; '.join(found)}"
        possible = len(before["classes"]) == len(now["classes"])
        if not (possible and self.options.allow_changes):
            advice = " (--data.allow_changes true permits this)" if possible else ""
            raise ValueError(changed + advice)
        self._say(changed)

    def _say(self, line: str) -> None:
        assert self.trainer is not None
        if self.trainer.is_global_zero:
            print(line, file=sys.stderr)

    def train_dataloader(self) -> Loader:
        options, trainer = self.options, self.trainer
        assert trainer is not None and self.training_set is not None
        scaled = None
        if options.dataset != "digits":
            scaled = RandomScale(options.short_side, options.scale, options.long_side)
        transform = augmentation(
            self.training_set.channels,
            options.crop,
            scaled=scaled,
            cat_max_ratio=options.cat_max_ratio,
            flip=options.flip,
            photometric=options.photometric,
        )
        images = Training(self.training_set, transform, options.seed)
        sampler = BatchSampler(
            Draws(len(images.dataset), options.seed),
            batch_size=options.batch_size,
            accumulate=trainer.accumulate_grad_batches,
            rank=trainer.global_rank,
            world=trainer.world_size,
            first_step=trainer.global_step,
            steps=options.steps,
        )
        pin = trainer.strategy.root_device.type == "cuda"
        return Loader(images, options.workers, batch_sampler=sampler, pin_memory=pin)

    def val_dataloader(self) -> Loader:
        """Every image once, over all ranks, without augmentation."""
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return Loader(
            Validation(self.validation_set, self.transform),
            self.options.workers,
            batch_size=self.options.eval_batch_size,
            sampler=range(rank, len(self.validation_set), world),
        )

    def predict_dataloader(self) -> Loader:
        paths, trainer = self.options.images, self.trainer
        assert trainer is not None
        if not paths:
            raise ValueError("predict: --data.images: expected files of images, got none")
        self._check_shared("predict", len(paths))
        return Loader(
            UnlabelledImages(paths, self.transform, self.options.channels),
            self.options.workers,
            batch_size=1,
            sampler=range(trainer.global_rank, len(paths), trainer.world_size),
        )


class UnlabelledImages(Dataset):
    """Images without masks: index, the normalised image (C, h, w), height and width in the file."""

    def __init__(self, paths: Sequence[str], transform: v2.Transform, channels: int) -> None:
        self.paths, self.transform, self.channels = paths, transform, channels

    def __getitem__(self, index: int) -> tuple[int, Tensor, tuple[int, int]]:
        image = read_upright(Path(self.paths[index]), self.channels)
        network_input = self.transform(tv_tensors.Image(image)).as_subclass(Tensor)
        return index, network_input, (image.shape[1], image.shape[2])
