"""The data of a run: a LightningDataModule of digit scenes, own folders and published data sets."""

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from .. import MULTIPLE
from ..options import (
    AT_LEAST_0,
    AT_LEAST_1,
    SHARE,
    Expected,
    With,
    check_effects,
    check_values,
)
from .counts import check_classes, check_one_size, class_counts, describe_counts
from .digits import DigitScenes
from .folders import open_folder, open_published, read_upright
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

Published = Literal["cityscapes", "ade20k", "pascal-context", "coco-stuff-10k", "coco-stuff-164k"]
FILES = ("folder", *get_args(Published))
MOST_ABSENT = 10  # names of absent classes in a message
EXPECTED = {
    "steps": AT_LEAST_1,
    "batch_size": AT_LEAST_1,
    "eval_batch_size": AT_LEAST_1,
    "workers": AT_LEAST_0,
    "crop": Expected(
        f"two multiples of {MULTIPLE}",
        lambda sides: min(sides) > 0 and not any(side % MULTIPLE for side in sides),
    ),
    "head_tail": Expected("two shares, that of the head first", lambda x: 1 >= x[0] >= x[1] >= 0),
    "train_images": AT_LEAST_1,
    "val_images": AT_LEAST_1,
    "zipf": AT_LEAST_0,
    "data_seed": AT_LEAST_0,
    "num_classes": Expected("at least 2", lambda x: x >= 2),
    "channels": AT_LEAST_1,
    "short_side": AT_LEAST_1,
    "long_side": AT_LEAST_1,
    "scale": Expected("0 < smallest <= largest", lambda x: 0 < x[0] <= x[1] < torch.inf),
    "cat_max_ratio": SHARE,
}
NEEDED = {
    **dict.fromkeys(
        ("train_images", "val_images", "zipf", "data_seed"), With("dataset", ("digits",))
    ),
    **dict.fromkeys(
        ("image_suffix", "mask_suffix", "num_classes", "label_map", "channels"),
        With("dataset", ("folder",)),
    ),
    **dict.fromkeys(
        ("root", "short_side", "long_side", "scale", "cat_max_ratio"), With("dataset", FILES)
    ),
}


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
        head_tail: Head classes have at least the first share of the training pixels, tail classes
            less than the second.
        train_images: digits: scenes in the training split.
        val_images: digits: scenes in the validation split.
        zipf: digits: exponent of the frequencies in the training split: digit d has
            (d + 1)^−zipf; in the validation split the exponent is 1.
        data_seed: digits: seed of the training scenes; that of the run if not given.
        image_suffix: folder: ending of image names (_rgb.tif); any known one if not given.
        mask_suffix: folder: ending of mask names (_labels.png).
        num_classes: folder: number of classes, if there is no classes.txt.
        label_map: folder: values in the masks and their classes, or −1 for ignored:
            '{128: 1, 7: -1}'. With at most 255 classes, 255 is also ignored.
        channels: folder: channels of the images.
        short_side: Images are scaled to this short side, keeping their aspect ratio.
        long_side: Images are scaled to this long side; with short_side, so that neither is
            exceeded.
        scale: Range of an additional random scale of training images, which are then cropped, or
            padded with the mean colour.
        cat_max_ratio: If one class has this share of the valid pixels of a crop or more, the crop
            is drawn again, up to ten times; 1: never.
        images: Files to predict.
        cache: Directory in which the counts of classes in masks are kept.
        seed: Random seed of the order and the augmentation; the command line sets it to that of
            the run.

    Raises ValueError for an option with a wrong value, or that would have no effect.
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
        head_tail: tuple[float, float] = (0.01, 0.001),
        train_images: int = 20_000,
        val_images: int = 200,
        zipf: float = 1.0,
        data_seed: int | None = None,
        image_suffix: str | None = None,
        mask_suffix: str | None = None,
        num_classes: int | None = None,
        label_map: dict[int, int] | None = None,
        channels: int = 3,
        short_side: int | None = None,
        long_side: int | None = None,
        scale: tuple[float, float] = (1.0, 1.0),
        cat_max_ratio: float = 1.0,
        images: list[str] | None = None,
        cache: str = "runs/class-counts",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.options: Any = self.hparams
        defaults = inspect.signature(SegmentationData).parameters
        check_values("data", self.options, EXPECTED)
        check_effects("data", self.options, {k: p.default for k, p in defaults.items()}, NEEDED)
        self.training_set: Segmentation | None = None
        self.validation_set: Segmentation
        self.classes: Sequence[str] = ()
        self.frequencies: Tensor
        """float64 [K], each class's share of the training pixels."""
        self.prior: Tensor
        """float32 [K], of the training images that contain each class, with sum 1: CeCo's π."""
        self.transform: v2.Transform
        """Of an image before its evaluation."""

    def splits(self) -> tuple[Segmentation, Segmentation]:
        """Training and validation split."""
        options = self.options
        if options.dataset == "digits":
            seed = options.seed if options.data_seed is None else options.data_seed
            return (
                DigitScenes(
                    "train", options.train_images, options.crop, seed=seed, exponent=options.zipf
                ),
                DigitScenes("val", options.val_images, options.crop, seed=0),
            )
        if options.root is None:
            raise ValueError(
                f"--data.root: expected the directory of the data set {options.dataset}, got "
                "nothing"
            )
        root = Path(options.root)
        if options.dataset != "folder":
            train, val = (open_published(options.dataset, root, x) for x in ("train", "val"))
            return train, val
        names = ("image_suffix", "mask_suffix", "num_classes", "label_map", "channels")
        chosen = {name: options[name] for name in names}
        train, val = (open_folder(root, split, **chosen) for split in ("train", "val"))
        return train, val

    def prepare_data(self) -> None:
        """Every mask is read, once and on one rank of a machine: so errors in masks are found."""
        if self.trainer is None or self.trainer.state.fn != "predict":
            self._count()

    def _count(self):
        return [class_counts(split, Path(self.options.cache)) for split in self.splits()]

    def setup(self, stage: str) -> None:
        options = self.options
        self.transform = evaluation_transform(
            options.channels, options.short_side, options.long_side
        )
        if stage == "predict":
            return
        self.training_set, self.validation_set = self.splits()
        self.classes = self.training_set.classes
        self.training_counts, validation = self._count()
        absent = check_classes(self.classes, self.training_counts.pixels, validation.pixels)
        if options.eval_batch_size > 1:
            check_one_size(validation)
        pixels, images = self.training_counts.pixels, self.training_counts.images
        self.frequencies = pixels / pixels.sum()
        self.prior = images / images.sum().clamp(min=1)
        if stage != "fit" or (self.trainer is not None and not self.trainer.is_global_zero):
            return
        place = f" in {options.root}" if options.root else ""
        lines = [
            f"data set {options.dataset}{place}: {len(self.training_set)} training and "
            f"{len(self.validation_set)} validation images, {len(self.classes)} classes",
            *describe_counts(self.classes, self.training_counts, validation),
        ]
        if absent:
            more = f" and {len(absent) - MOST_ABSENT} more" if len(absent) > MOST_ABSENT else ""
            lines.append(f"no training pixels: {', '.join(absent[:MOST_ABSENT])}{more}")
        print(*lines, sep="\n", file=sys.stderr, flush=True)

    def state_dict(self) -> dict[str, Any]:
        """What tells whether a run continues with the data it began with."""
        assert self.training_set is not None
        return {
            "training images": len(self.training_set),
            "validation images": len(self.validation_set),
            "classes": list(self.classes),
            "pixels": self.training_counts.pixels.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        now = self.state_dict()
        for name in now:
            if state.get(name) != now[name]:
                was, now_is = (shorten(str(x[name]), 80, placeholder=" …") for x in (state, now))
                raise ValueError(
                    f"the checkpoint was written with other data ({name}: {was}, now {now_is}): "
                    "the numbers would not be those of the run without a stop. Give --data.root "
                    "the same data, or start a new run with --model.weights"
                )

    def training_images(self) -> Training:
        options = self.options
        assert self.training_set is not None
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
        return Training(self.training_set, transform, options.seed)

    def train_dataloader(self) -> Loader:
        options, trainer = self.options, self.trainer
        assert trainer is not None
        images = self.training_images()
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
        return Loader(
            NewImages(paths, self.transform, self.options.channels),
            self.options.workers,
            batch_size=1,
            sampler=range(trainer.global_rank, len(paths), trainer.world_size),
        )

    def first_batch(self) -> list[Tensor]:
        """A training batch of the size of a rank's: images and labels."""
        options, trainer = self.options, self.trainer
        assert trainer is not None
        images = self.training_images()
        size = options.batch_size // (trainer.accumulate_grad_batches * trainer.world_size)
        draws = range(trainer.global_rank * size, (trainer.global_rank + 1) * size)
        return default_collate([images[draw % len(images.dataset), draw] for draw in draws])


class NewImages(Dataset):
    """Images without masks: index, the normalised image (C, h, w), height and width in the file."""

    def __init__(self, paths: Sequence[str], transform: v2.Transform, channels: int) -> None:
        self.paths, self.transform, self.channels = paths, transform, channels

    def __getitem__(self, index: int) -> tuple[int, Tensor, tuple[int, int]]:
        image = read_upright(Path(self.paths[index]), self.channels)
        network_input = self.transform(tv_tensors.Image(image)).as_subclass(Tensor)
        return index, network_input, (image.shape[1], image.shape[2])
