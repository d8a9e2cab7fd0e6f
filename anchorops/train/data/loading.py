"""The interface of data sets, their augmentation, and the endless deterministic stream of training
batches; data workers that end when the training process no longer needs them."""

import os
import signal
import threading
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from multiprocessing import forkserver, parent_process, resource_tracker
from traceback import clear_frames
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..config import IGNORED, Data
from ..signals import STOPPING
from .digits import DigitScenes
from .folders import open_folder, open_published

RETRIES = 10  # for a crop that shows mostly one class
# modules that workers need; importing torch takes seconds; "__main__" is multiprocessing's default
PRELOADED = ["__main__", "anchorops.train.run.loop"]


class Segmentation(Protocol):
    """A data set. Items: image uint8, or float32 in 0..1, (C, H, W); labels int16 (H, W), −1
    ignored."""

    classes: Sequence[str]
    channels: int

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]: ...


def build_datasets(config: Data, seed: int) -> tuple[Segmentation, Segmentation]:
    """Training and validation split."""
    if config.dataset == "digits":
        if config.data_seed is not None:
            seed = config.data_seed
        return (
            DigitScenes("train", config.train_images, config.crop, seed=seed, exponent=config.zipf),
            DigitScenes("val", config.val_images, config.crop, seed=0),
        )
    if config.root is None:
        what = f"--root: expected the directory of the data set {config.dataset}, got nothing"
        raise ValueError(what)
    root = config.root
    if config.dataset == "folder":
        train, val = (
            open_folder(
                root,
                split,
                image_suffix=config.image_suffix,
                mask_suffix=config.mask_suffix,
                num_classes=config.num_classes,
                label_map=config.label_map,
                channels=config.channels,
            )
            for split in ("train", "val")
        )
    else:
        train, val = (open_published(config.dataset, root, split) for split in ("train", "val"))
    return train, val


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
        height, width = v2.functional.get_size(flat_inputs[0])
        factor = float(torch.empty(1).uniform_(*self.scale))
        lengths = min(height, width), max(height, width)
        wanted = zip(self.sides, lengths, strict=True)
        factor *= min((side / length for side, length in wanted if side is not None), default=1)
        # torch cannot scale to a single pixel
        return {"size": [max(2, round(height * factor)), max(2, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.resize, inpt, params["size"], antialias=True)


class VariedCrop(v2.Transform):
    """A random crop, or the whole side if the image is smaller. If a single class has
    `cat_max_ratio` of the valid pixels or more, the crop is drawn again, up to ten times
    (mmsegmentation's RandomCrop)."""

    def __init__(self, size: Sequence[int], cat_max_ratio: float) -> None:
        super().__init__()
        self.size, self.cat_max_ratio = size, cat_max_ratio

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        sides = v2.functional.get_size(flat_inputs[0])
        lengths = [min(pair) for pair in zip(self.size, sides, strict=True)]
        params = {}
        for _ in range(1 + RETRIES):
            top, left = (
                int(torch.randint(side - length + 1, ()))
                for side, length in zip(sides, lengths, strict=True)
            )
            params = {"top": top, "left": left, "height": lengths[0], "width": lengths[1]}
            if self.cat_max_ratio == 1 or self._varied(flat_inputs, params):
                break
        return params

    def _varied(self, flat_inputs: list[Any], params: dict[str, Any]) -> bool:
        (mask,) = (x for x in flat_inputs if isinstance(x, tv_tensors.Mask))
        labels = self.transform(mask, params).flatten()
        counts = torch.bincount(labels[labels != IGNORED], minlength=1)
        return bool(counts.max() < self.cat_max_ratio * counts.sum())

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, **params)


class Pad(v2.Transform):
    """Pad to a size, below and at the right: normalised images with 0, which is the mean colour,
    masks with ignored pixels (mmsegmentation's Pad)."""

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = v2.functional.get_size(inpt)
        padding = [0, 0, max(0, self.size[1] - width), max(0, self.size[0] - height)]
        value = IGNORED if isinstance(inpt, tv_tensors.Mask) else 0
        return self._call_kernel(v2.functional.pad, inpt, padding, fill=value)


class PhotometricDistort(v2.RandomPhotometricDistort):
    """As in mmsegmentation: hues of ±0.1 turns, and no random order of channels."""

    def __init__(self) -> None:
        super().__init__(hue=(-0.1, 0.1))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return super().make_params(flat_inputs) | {"channel_permutation": None}


def normalize(channels: int) -> v2.Transform:
    """Convert to float32 in 0..1, subtract the mean and divide by the standard deviation: those of
    ImageNet for three channels."""
    mean, std = [0.5] * channels, [0.25] * channels
    if channels == 3:
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def augmentation(config: Data, channels: int) -> v2.Transform:
    """The augmentation, in the papers' order: scale, crop, flip, photometric distortion,
    normalisation, padding."""
    steps: list[v2.Transform] = []
    if config.dataset != "digits":
        steps.append(RandomScale(config.short_side, config.scale, config.long_side))
        steps.append(VariedCrop(config.crop, config.cat_max_ratio))
    if config.flip:
        steps.append(v2.RandomHorizontalFlip())
    if config.photometric:
        if channels != 3:
            raise ValueError(f"--photometric: expected images of 3 channels, got {channels}")
        steps.append(PhotometricDistort())
    return v2.Compose([*steps, normalize(channels), Pad(config.crop)])


def evaluation_transform(config: Data, channels: int) -> v2.Transform:
    """Scale only the image to the short or the long side; its labels do not change."""
    scaled = config.short_side or config.long_side
    scale = [RandomScale(config.short_side, (1.0, 1.0), config.long_side)] if scaled else []
    return v2.Compose([*scale, normalize(channels)])


def mixed_seed(*parts: int | str) -> int:
    """A seed for torch from several parts."""
    return zlib.crc32(repr(parts).encode())


class Draws:
    """The image of draw 0, 1, 2, … of a run: shuffled passes over the data, one after another."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __getitem__(self, draw: int) -> int:
        epoch, position = divmod(draw, self.length)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mixed_seed("order", self.seed, epoch))
            self._order = epoch, torch.randperm(self.length, generator=generator)
        return int(self._order[1][position])


class BatchSampler:
    """This rank's passes from `first_step` to `steps`, as lists of (image, draw).

    Draw d is a position in the run. It does not depend on ranks, workers or interruptions.
    """

    def __init__(
        self,
        draws: Draws,
        *,
        batch_size: int,
        accumulate: int,
        rank: int,
        world: int,
        first_step: int,
        steps: int,
    ) -> None:
        if batch_size % (accumulate * world):
            raise ValueError(
                f"--batch-size: expected a multiple of accumulate × ranks = {accumulate * world}, "
                f"got {batch_size}"
            )
        self.draws, self.size = draws, batch_size // (accumulate * world)
        self.rank, self.world = rank, world
        self.passes = range(first_step * accumulate, steps * accumulate)

    def __len__(self) -> int:
        return len(self.passes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in self.passes:
            start = (number * self.world + self.rank) * self.size
            yield [(self.draws[draw], draw) for draw in range(start, start + self.size)]


class Training(Dataset):
    """Augmented images; the augmentation of a draw is a pure function of (seed, draw)."""

    def __init__(self, dataset: Segmentation, transform: v2.Transform, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        index, draw = item
        image, labels = self.dataset[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed("augmentation", self.seed, draw))
            image, labels = self.transform(tv_tensors.Image(image), tv_tensors.Mask(labels))
        return image.as_subclass(Tensor), labels.as_subclass(Tensor)


class Validation(Dataset):
    """Images as the network needs them; unchanged labels."""

    def __init__(self, dataset: Segmentation, transform: v2.Transform) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = self.dataset[index]
        return self.transform(tv_tensors.Image(image)).as_subclass(Tensor), labels


def training_loader(
    dataset: Segmentation, config: Data, sampler: BatchSampler, *, seed: int, pin_memory: bool
) -> DataLoader:
    transform = augmentation(config, dataset.channels)
    data = Training(dataset, transform, seed)
    return _loader(data, config.workers, batch_sampler=sampler, pin_memory=pin_memory)


def evaluation_loader(
    dataset: Segmentation, config: Data, *, batch_size: int, rank: int, world: int
) -> DataLoader:
    """Every image once, over all ranks, without augmentation. With a batch size of more than 1, all
    images have the same size (`check_one_size`)."""
    data = Validation(dataset, evaluation_transform(config, dataset.channels))
    images = range(rank, len(dataset), world)
    return _loader(data, config.workers, batch_size=batch_size, sampler=images)


def _loader(dataset: Dataset, workers: int, **options: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=workers,
        worker_init_fn=follow_parent,
        multiprocessing_context="forkserver" if workers else None,
        generator=torch.Generator(),  # otherwise an iterator draws from torch's random numbers
        **options,
    )


@contextmanager
def batches_of(loader: DataLoader) -> Iterator[Iterator[Any]]:
    """The loader's batches. Its workers always end with the block. Otherwise multiprocessing would
    send SIGTERM at exit, and wait forever for processes that do not handle it.

    Raises ValueError in the block if a worker is killed.
    """
    if loader.num_workers:
        _start_server()
    with closing(_only_owner(loader)) as batches:
        yield batches


def _only_owner(loader: DataLoader) -> Generator[Any, None, None]:
    """The loader's iterator, with no other reference to it: torch ends the workers when the
    iterator is garbage collected. The loader must not have persistent workers, because then it
    refers to the iterator itself."""
    try:
        yield from loader
    except BaseException as error:
        clear_frames(error.__traceback__)  # those of torch refer to the iterator
        if not (loader.num_workers and _of_killed_worker(error)):
            raise
        raise ValueError(
            f"{str(error) or 'no data'}: a process that loads images was killed, usually because "
            "of too little memory (or /dev/shm, in a container): use fewer --workers, or none"
        ) from error


def _of_killed_worker(error: BaseException) -> bool:
    message = str(error)
    if message.startswith("Caught "):  # the data set's own, from the worker
        return False
    if isinstance(error, RuntimeError):
        return "exited unexpectedly" in message or "killed by signal" in message
    return isinstance(error, ConnectionError | EOFError)


def _start_server() -> None:
    """Start the server that workers are forked from, with all modules imported and with the stop
    signals blocked. Ctrl-C, SLURM and `timeout` send these signals to the whole group of processes,
    but only the training process should react. The workers inherit the blocked signals."""
    forkserver.set_forkserver_preload(PRELOADED)
    resource_tracker.ensure_running()  # otherwise the server starts it, and this unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent(worker: int) -> None:
    """End this worker when the training process ends, even if it is killed."""

    def follow() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
