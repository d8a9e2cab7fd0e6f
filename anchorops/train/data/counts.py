"""Counts of classes in the masks of a data set, computed before the training, and what tells it
from another data set."""

import hashlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .folders import MaskFolder
from .loading import Segmentation

SCENES = 2_000  # of digits, in which classes are counted
THREADS = 8  # each of which holds an image


class Counts(NamedTuple):
    """Of the masks of a split: pixels [K] and images [K] of each class, int64; sizes (H, W)."""

    pixels: Tensor
    images: Tensor
    sizes: list[tuple[int, int]]


def class_counts(dataset: Segmentation) -> Counts:
    """Of all masks on disk, or of the first 2000 digit scenes. Raises ValueError for a wrong image
    or mask: so it is found before the training."""
    num_classes, length = len(dataset.classes), len(dataset)
    if isinstance(dataset, MaskFolder):
        print(f"reading {length} images and masks", file=sys.stderr)
    else:
        length = min(length, SCENES)
    pixels, images = torch.zeros(2, num_classes, dtype=torch.int64)
    sizes = set()

    def count(index: int) -> tuple[Tensor, tuple[int, int]]:  # masks would fill the memory
        _, labels = dataset[index]
        found = torch.bincount(labels.flatten().int() + 1, minlength=num_classes + 1)
        return found[1:], (labels.shape[0], labels.shape[1])

    with ThreadPoolExecutor(THREADS) as threads:  # if one fails, map cancels the others
        for found, size in threads.map(count, range(length)):
            pixels += found
            images += found > 0
            sizes.add(size)
    return Counts(pixels, images, sorted(sizes))


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


def fingerprint(split: Segmentation, root: Path) -> str:
    """Of the names of a split's images and masks under the root, in the order of the images, on
    which that of the batches depends: 16 hexadecimal digits. "" for digits, which have no files."""
    if not isinstance(split, MaskFolder):
        return ""
    names = (b"/" + os.fsencode(path.relative_to(root)) for path in chain(*split.pairs))
    return hashlib.sha256(b"\n".join(names)).hexdigest()[:16]
