"""Data sets on disk: a plain folder of images and masks, and published ones in their layouts."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple
from unicodedata import normalize

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import Cityscapes

from .. import IGNORED
from ..options import Data, expect
from .images import has_data, read_image, read_mask

CLASSES = "classes.txt"
IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
MASKS = (".png", ".tif", ".tiff")
VALUES, COLOURS = 65_536, 2**24  # the numbers of those from 0 that there are
LEAST = -32_768  # of the values
MOST_CLASSES = 32_768  # labels are int16
UNKNOWN, FIRST_ROW = -2, LEAST - 1  # in a table of labels, and the value of its first row
NO_CLASS = 255  # in masks: ignored if there are at most this number of classes

CITYSCAPES = [x for x in Cityscapes.classes if not x.ignore_in_eval]
CAMVID = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
    "bicyclist",
)  # fmt: skip
# these of the 182 labels of COCO-Stuff have no pixels
COCO_STUFF_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
COCO_STUFF = [value for value in range(1, 183) if value not in COCO_STUFF_UNUSED]


class Layout(NamedTuple):
    """The files of a data set, relative to its root. {} stands for the name of a split in them, *
    for that of an image, which may be in subfolders; without an end, any known one is meant."""

    images: str
    masks: str
    values: Sequence[int] | None  # of the classes in the masks; None: as many as in classes.txt
    ignored: Iterable[int]  # other values in the masks
    splits: Mapping[str, str] = {"train": "train", "val": "val", "test": "test"}  # in the files
    classes: Sequence[str] | None = None  # names; None: those in classes.txt, or numbers
    listed: str | None = None  # the file with the names of a split's images; None: all that exist


LAYOUTS = {
    "folder": Layout("images/{}/*", "masks/{}/*", None, ignored=(NO_CLASS,)),
    "cityscapes": Layout(
        "leftImg8bit/{}/*_leftImg8bit.png",
        "gtFine/{}/*_gtFine_labelIds.png",
        [x.id for x in CITYSCAPES],
        ignored=(*range(34), NO_CLASS),
        classes=[x.name for x in CITYSCAPES],
    ),
    "ade20k": Layout(
        "images/{}/*.jpg",
        "annotations/{}/*.png",
        range(1, 151),
        ignored=(0, NO_CLASS),
        splits={"train": "training", "val": "validation"},
    ),
    "pascal-context": Layout(
        "JPEGImages/*.jpg",
        "SegmentationClassContext/*.png",
        range(1, 60),
        ignored=(0, NO_CLASS),
        listed="ImageSets/SegmentationContext/{}.txt",
    ),
    "coco-stuff-10k": Layout(
        "images/*.jpg",
        "annotations/*.mat",
        COCO_STUFF,
        ignored=range(183),
        splits={"train": "train", "val": "test"},
        listed="imageLists/{}.txt",
    ),
    "coco-stuff-164k": Layout(
        "images/{}/*.jpg",
        "annotations/{}/*.png",
        [value - 1 for value in COCO_STUFF],
        ignored=(*range(182), NO_CLASS),
        splits={"train": "train2017", "val": "val2017"},
    ),
    "camvid": Layout("{}/*.png", "{}annot/*.png", range(11), (11, NO_CLASS), classes=CAMVID),
}


@dataclass
class MaskFolder:
    """Images and masks of labels on disk: pairs of their paths. channels: of the images. labels:
    what `label_table` returns. fingerprint: of the names under the root, in the order of the
    images, on which that of the batches depends. nodata: the value of pixels that are ignored."""

    pairs: Sequence[tuple[Path, Path]]
    channels: int
    classes: Sequence[str]
    labels: np.ndarray
    fingerprint: str
    nodata: float | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image (C, H, W), uint8, or float32 if the file has more than 8 bits; labels int16 (H, W).
        Raises ValueError that names a wrong file."""
        image_path, mask_path = self.pairs[index]
        image = read_image(image_path, self.channels, self.nodata)
        colours = len(self.labels) > COLOURS
        values = read_mask(mask_path, colours=colours)
        rows = values.astype(np.int32)
        labels = self.labels.take(rows - FIRST_ROW, mode="clip")
        if (unknown := (labels == UNKNOWN) | (rows != values)).any():
            first = np.unique(values[unknown])[:5].tolist()
            if colours:
                first = ["{},{},{}".format(*value.to_bytes(3, "big")) for value in first]
            raise ValueError(
                f"{mask_path}: label values {first} are not those of the {len(self.classes)} "
                "classes nor ignored; name more classes, or map the values with --data.label_map"
            )
        size = tuple(image.shape[1:])
        upright = f"{labels.shape}; both are upright, by their EXIF orientations"
        expect(size == labels.shape, mask_path, f"the size of its image, {size}", upright)
        if self.nodata is not None:
            labels[~has_data(image, self.nodata).numpy()] = IGNORED
        return image, torch.from_numpy(labels)


def open_files(options: Data, split: str) -> MaskFolder:
    """A split of a data set on disk (docs/training.md). Raises ValueError for a split that it does
    not have, for wrong names of classes, and for an image or a mask without the other."""
    layout = LAYOUTS[options.dataset]
    expect(options.root is not None, "--data.root", "the directory of the data set", "nothing")
    known = ", ".join(layout.splits)
    expect(split in layout.splits, "--data.split", f"one of {options.dataset}, {known}", split)
    root, part = Path(options.root or ""), layout.splits[split]
    values, classes = layout.values, layout.classes
    if values is None:
        classes = _read_classes(root / CLASSES)
        values = range(len(classes))
    classes = classes or [f"class {k + 1}" for k in range(len(values))]
    labels = label_table(values, layout.ignored, options.label_map or {})

    images = root / (layout.images.format(part) + (options.image_suffix or ""))
    masks = root / (layout.masks.format(part) + (options.mask_suffix or ""))
    image_of, mask_of = files_of(images, IMAGES), files_of(masks, MASKS)
    either = image_of | mask_of
    names = list(either)
    if layout.listed is not None:
        names = (root / layout.listed.format(part)).read_text(encoding="utf-8").split()
    both = f"an image {images} and a mask {masks} of this name"
    for name in names:
        expect(name in image_of and name in mask_of, name, both, either.get(name, "none of them"))
    if not names:
        raise ValueError(f"no image {images} (--data.root is the directory of the data set)")
    pairs = [(image_of[name], mask_of[name]) for name in names]
    paths = [os.fsencode(path.relative_to(root)) for pair in pairs for path in pair]
    fingerprint = f"{len(paths)} names ({hashlib.sha256(b'/'.join(paths)).hexdigest()[:16]})"
    return MaskFolder(pairs, options.channels, classes, labels, fingerprint, options.nodata)


def files_of(pattern: Path, known: Sequence[str]) -> dict[str, Path]:
    """Files by what stands for the * of a pattern, in order, also in linked subfolders. Hidden
    ones, such as the `._a.jpg` of macOS, are skipped. Names are in NFC, because macOS writes some
    in NFD. known: the ends, if the pattern has none. Raises ValueError for two files of one name,
    and for a link to a folder in which it is."""
    folder, end = pattern.parent, normalize("NFC", pattern.name.lower()).removeprefix("*")
    found: list[Path] = []
    for place, subfolders, names in os.walk(folder, followlinks=True):
        path = Path(place)
        if path.is_symlink() and path.resolve() in map(Path.resolve, path.parents):
            raise ValueError(f"{path}: expected no link to a folder in which it is")
        subfolders[:] = [x for x in subfolders if not x.startswith(".")]
        found += [path / x for x in names if not x.startswith(".")]
    files: dict[str, Path] = {}
    for path in sorted(found):
        name = normalize("NFC", str(path.relative_to(folder)))
        suffix = next((x for x in ([end] if end else known) if name.lower().endswith(x)), None)
        if suffix is not None and (other := files.setdefault(name[: -len(suffix)], path)) != path:
            raise ValueError(f"{path} is next to {other}: expected one file of that name")
    return files


def label_table(
    values: Sequence[int], ignored: Iterable[int], label_map: Mapping[Any, int]
) -> np.ndarray:
    """int16, the class of each value in masks, in row value + 32,769: that of --data.label_map; 0,
    1, … for `values`; −1 for ignored ones; −2 for others, and in the first and the last row for all
    that are less or greater. Or, if --data.label_map has colours, the class of each colour
    R·2¹⁶ + G·2⁸ + B."""
    colours = any("," in str(key) for key in label_map)
    count, least, limit = (3, 0, 256) if colours else (1, LEAST, VALUES)
    table = np.full((COLOURS if colours else VALUES) - FIRST_ROW + 1, UNKNOWN, np.int16)
    if not colours:
        table[np.subtract([*ignored], FIRST_ROW)] = IGNORED
        table[np.subtract([*values], FIRST_ROW)] = range(len(values))
    for key, label in label_map.items():
        texts = str(key).split(",")
        known = len(texts) == count and all(re.fullmatch(r"\s*-?\d+\s*", x) for x in texts)
        numbers = [int(x) for x in texts] if known else []
        known = known and all(least <= x < limit for x in numbers)
        if not (known and IGNORED <= label < len(values)):
            raise ValueError(
                f"--data.label_map: expected values {LEAST} to {VALUES - 1}, or only colours "
                f"'R,G,B' of 0 to 255, and classes {IGNORED} to {len(values) - 1}, got {key!r}: "
                f"{label}"
            )
        table[int(np.polyval(numbers, 256)) - FIRST_ROW] = label
    return table


def _read_classes(path: Path) -> list[str]:
    """Names, one on each line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected names of classes, a line each: {error}") from None
    classes = [line.strip() for line in lines if line.strip()]
    expect(len({*classes}) == len(classes), path, "different names", shorten(str(classes), 200))
    expect(len(classes) <= MOST_CLASSES, path, f"at most {MOST_CLASSES} names", len(classes))
    return classes
