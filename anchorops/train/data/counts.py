"""Counts of classes in the masks of a data set, computed before the training, and what tells it
from another data set."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .folders import MaskFolder, class_histogram
from .loading import Segmentation

SCENES = 2_000  # of digits, in which classes are counted


class Counts(NamedTuple):
    """Pixels [K] and images [K] of each class in the masks of a split, int64."""

    pixels: Tensor
    images: Tensor


def class_counts(dataset: Segmentation, *, one_size: bool = False) -> Counts:
    """The counts of the first 2000 digit scenes, or of all masks on disk. Raises ValueError for a
    wrong mask, and with `one_size` for masks of several sizes."""
    num_classes = len(dataset.classes)
    first = dataset.read_labels(0).shape if one_size and isinstance(dataset, MaskFolder) else None

    def count(index: int) -> Counts:  # counts, because masks would fill the memory
        if isinstance(dataset, MaskFolder):
            labels = dataset.read_labels(index)
            if first not in (None, labels.shape):
                (one, _), (other, _) = dataset.pairs[0], dataset.pairs[index]
                raise ValueError(
                    f"--data.eval_batch_size: expected 1 for images of several sizes: {one} has "
                    f"{tuple(first)}, {other} {tuple(labels.shape)}"
                )
        else:
            _, labels = dataset[index]
        pixels = class_histogram(labels, num_classes)
        return Counts(pixels, (pixels > 0).long())

    def add(a: Counts, b: Counts) -> Counts:
        return Counts(a.pixels + b.pixels, a.images + b.images)

    if not isinstance(dataset, MaskFolder):
        return reduce(add, map(count, range(min(len(dataset), SCENES))))
    print(f"counting the classes in {len(dataset)} masks", file=sys.stderr)
    threads = ThreadPoolExecutor()
    try:
        return reduce(add, threads.map(count, range(len(dataset))))
    finally:
        threads.shutdown(cancel_futures=True)  # if one fails, all end


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


def fingerprint(split: Segmentation, counts: Counts, root: Path) -> dict[str, Any]:
    """What is the same for equal data, wherever their root is."""
    paths = chain.from_iterable(split.pairs) if isinstance(split, MaskFolder) else ()
    # in the order of the images, on which that of the batches depends
    names = "\n".join(f"/{path.relative_to(root)}" for path in paths)
    return {
        "images": len(split),
        "names": hashlib.sha256(names.encode()).hexdigest(),
        "pixels": counts.pixels.tolist(),
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between data sets: "classes", and the fingerprints of their splits."""
    old, new = before["classes"], now["classes"]
    if len(old) != len(new):
        return [f"{len(new)} classes instead of {len(old)}"]
    if old != new:
        return [f"the {'order' if sorted(old) == sorted(new) else 'names'} of the classes"]
    found = []
    for split in ("training", "validation"):
        old, new = before[split], now[split]
        if old["images"] != new["images"]:
            found.append(f"{new['images']} {split} images instead of {old['images']}")
        elif old["names"] != new["names"]:
            found.append(f"the names of {split} images or masks")
        elif old["pixels"] != new["pixels"]:
            pixels = zip(now["classes"], old["pixels"], new["pixels"], strict=True)
            name, a, b = next(x for x in pixels if x[1] != x[2])
            found.append(f"{b} pixels of the class {name} in {split} masks instead of {a}")
    return found
