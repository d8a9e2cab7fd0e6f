"""Counts of classes and sizes in the masks of a data set, computed before the training."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import IGNORED
from .folders import MaskFolder, class_histogram
from .loading import Segmentation

FORMAT = 2  # of kept counts; raise it where the same files give other counts
SCENES = 2_000  # of digits, in which classes are counted
RAREST = 5  # classes that are named


class Counts(NamedTuple):
    """Counts of the masks of a split: pixels [K] and images [K] of each class, int64; ignored
    pixels; smallest and largest height and width in pixels, of upright masks."""

    pixels: Tensor
    images: Tensor
    ignored: int
    heights: tuple[int, int]
    widths: tuple[int, int]


def class_counts(dataset: Segmentation, cache: Path) -> Counts:
    """The counts of the first 2000 digit scenes, or of all masks on disk. The counts of masks are
    stored in the folder `cache`, and reused if the files and the label map are the same."""
    if isinstance(dataset, MaskFolder):
        return _kept_counts(dataset, cache)
    num_classes = len(dataset.classes)
    scenes = (dataset[index][1] for index in range(min(len(dataset), SCENES)))
    return _sum(_count(labels, num_classes) for labels in scenes)


def _count(labels: Tensor, num_classes: int) -> Counts:
    """The counts of one mask (H, W)."""
    pixels = class_histogram(labels, num_classes)
    height, width = labels.shape
    ignored = int((labels == IGNORED).sum())
    return Counts(pixels, (pixels > 0).long(), ignored, (height, height), (width, width))


def _sum(masks: Iterable[Counts]) -> Counts:
    def add(a: Counts, b: Counts) -> Counts:
        return Counts(
            a.pixels + b.pixels,
            a.images + b.images,
            a.ignored + b.ignored,
            (min(a.heights[0], b.heights[0]), max(a.heights[1], b.heights[1])),
            (min(a.widths[0], b.widths[0]), max(a.widths[1], b.widths[1])),
        )

    return reduce(add, masks)


def _kept_counts(dataset: MaskFolder, cache: Path) -> Counts:
    # an image may turn its mask
    files = [(str(path), *_state(path)) for pair in dataset.pairs for path in pair]
    labels = sorted(dataset.labels.items())
    key = repr((FORMAT, Counts._fields, files, labels, len(dataset.classes)))
    path = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if not path.exists():

        def read(index: int) -> Counts:  # counts, because masks would fill the memory
            return _count(dataset.read_labels(index), len(dataset.classes))

        threads = ThreadPoolExecutor()
        try:
            print(f"counting the classes in {len(dataset)} masks", file=sys.stderr)
            counts = _sum(threads.map(read, range(len(dataset))))
        finally:
            threads.shutdown(cancel_futures=True)  # if one fails, all end
        temporary = path.with_suffix(f".{os.getpid()}")  # other runs may be counting too
        try:
            cache.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(counts._asdict(), default=Tensor.tolist))
            temporary.replace(path)
        except OSError as error:  # that of a full disk names no file
            raise OSError(f"{path} could not be written: {error}") from error
    try:
        kept = Counts(**json.loads(path.read_text()))
        return kept._replace(
            pixels=torch.tensor(kept.pixels),
            images=torch.tensor(kept.images),
            heights=tuple(kept.heights),
            widths=tuple(kept.widths),
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it") from None


def _state(path: Path) -> tuple[int, float]:
    """Size and time of a file."""
    status = path.stat()
    return status.st_size, status.st_mtime


def check_classes(classes: Sequence[str], training: Tensor, validation: Tensor) -> list[str]:
    """Names of the classes without training pixels; training, validation: pixels [K]. Raises
    ValueError if there is nothing to learn or to measure."""
    if not validation.any():
        raise ValueError("the validation split has no valid pixel")
    absent = [name for name, count in zip(classes, training.tolist(), strict=True) if not count]
    if len(absent) > len(classes) - 2:
        present = [name for name in classes if name not in absent]
        raise ValueError(
            f"the training masks have pixels of {', '.join(present) or 'no class'} only: expected "
            "two classes or more; 255 is ignored unless --data.label_map makes it a class"
        )
    return absent


def check_one_size(validation: Counts) -> None:
    """Raises ValueError if the images cannot be stacked into batches."""
    sizes = validation.heights, validation.widths
    if any(least < largest for least, largest in sizes):
        high, wide = map(_range, sizes)
        raise ValueError(
            "--data.eval_batch_size: more than 1 needs images of one size, the validation images "
            f"are {high} high and {wide} wide"
        )


def describe_counts(classes: Sequence[str], training: Counts, validation: Counts) -> list[str]:
    """Lines about sizes, ignored pixels and rare classes."""
    lines = []
    for split, counts in (("training", training), ("validation", validation)):
        total = int(counts.pixels.sum()) + counts.ignored
        lines.append(
            f"{split} images: {_range(counts.heights)} high, {_range(counts.widths)} wide, "
            f"{100 * counts.ignored / total:.3g} % of the pixels ignored"
        )
    present = [k for k in training.pixels.argsort(stable=True).tolist() if training.pixels[k] > 0]
    total = int(training.pixels.sum())
    rarest = [
        f"{classes[k]} {100 * int(training.pixels[k]) / total:.2g} %" for k in present[:RAREST]
    ]
    return [*lines, f"rarest classes: {', '.join(rarest)} of the training pixels"]


def _range(bounds: tuple[int, int]) -> str:
    least, largest = bounds
    return str(least) if least == largest else f"{least} to {largest}"
