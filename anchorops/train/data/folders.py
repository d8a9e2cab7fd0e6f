"""Data sets on disk: a plain folder of images and masks, and published ones in their layouts."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import IGNORED
from .images import (
    read_colours,
    read_image,
    read_size,
    read_values,
    upright,
    upright_size,
    with_channels,
)

CLASSES = "classes.txt"
IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
LABEL_VALUES = 65_536
COLOURS = 2**24
UNKNOWN = -2  # in a table of labels
NO_CLASS = 255  # in masks: ignored if there are at most this number of classes

CITYSCAPES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
    "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle",
    "bicycle",
)  # fmt: skip
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CAMVID = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
    "bicyclist",
)  # fmt: skip
# these of the 182 labels of COCO-Stuff have no pixels
COCO_STUFF_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)


class Layout(NamedTuple):
    """The file structure of a data set, relative to its root."""

    pairs: Callable[[Path, str], list[tuple[Path, Path]]]
    """(root, "train", "val" or one of `more`) to the paths of images and masks."""
    labels: Mapping[int, int]
    """Class of each value in the masks, −1 ignored."""
    classes: Sequence[str] | int
    """Names, or their number; then names are read from classes.txt in the root, if it exists."""
    more: Sequence[str] = ()
    """Other splits."""


class MaskFolder:
    """Images and masks of labels on disk.

    Args:
        pairs: paths of images and their masks.
        classes: names.
        labels: class of each value in the masks, −1 ignored; any other value is an error.
        channels: of the images.
        colours: whether the values are colours, R·2¹⁶ + G·2⁸ + B.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        classes: Sequence[str],
        labels: Mapping[int, int],
        channels: int = 3,
        colours: bool = False,
    ) -> None:
        self.pairs, self.classes, self.channels, self.colours = pairs, classes, channels, colours
        limit = COLOURS if colours else LABEL_VALUES
        for value, label in labels.items():
            if not (0 <= value < limit and IGNORED <= label < len(classes)):
                raise ValueError(
                    f"--data.label_map: expected values 0 to {LABEL_VALUES - 1} and classes "
                    f"{IGNORED} to {len(classes) - 1}, got {self._key(value)}: {label}"
                )
        self._table = np.full(limit, UNKNOWN, np.int16)
        for value, label in labels.items():
            self._table[value] = label

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image (C, H, W), uint8, or float32 in 0..1 if the file has more than 8 bits; labels
        int16 (H, W); both upright. If only one file has an EXIF orientation, the sizes tell whether
        the mask was drawn on the upright image or on its stored pixels, which turns both files.

        Raises ValueError that names a wrong file, or one whose orientation is not clear."""
        image_path = self.pairs[index][0]
        labels, mask_orientation = self._read_labels(index)
        image, orientation = read_image(image_path, labels.shape)
        image = with_channels(image, self.channels, image_path)
        turn = self._turn_of_labels(index, labels, mask_orientation, image.shape[1:], orientation)
        return upright(image, orientation), upright(labels, turn)

    def read_labels(self, index: int) -> Tensor:
        """Only the labels, as in `self[index]`. Of an image that is no PNG file only the header is
        read. Raises ValueError that names a wrong mask, or files whose sizes differ or whose
        orientation is not clear."""
        labels, mask_orientation = self._read_labels(index)
        size, orientation = read_size(self.pairs[index][0], labels.shape)
        turn = self._turn_of_labels(index, labels, mask_orientation, size, orientation)
        return upright(labels, turn)

    def _turn_of_labels(
        self,
        index: int,
        labels: Tensor,
        mask_orientation: int,
        size: Sequence[int],
        orientation: int,
    ) -> int:
        """The orientation of the labels: that of their own file, or of the image if they were drawn
        on its stored pixels. size: (H, W) of the image as it is stored."""
        image_path, mask_path = self.pairs[index]
        shown, drawn = upright_size(size, orientation), labels.shape
        turns = (orientation, mask_orientation)
        fits = {turn for turn in turns if upright_size(drawn, turn) == shown}
        if not fits:
            raise ValueError(
                f"{mask_path}: expected the size of its image, {shown}, got "
                f"{upright_size(drawn, orientation)}"
            )
        if len(fits) == 2:
            raise ValueError(
                f"{image_path}: the EXIF orientation is {orientation}, that of {mask_path} is "
                f"{mask_orientation}, and the sizes do not tell whether the mask was drawn on "
                "the upright image: save both without an orientation "
                "(PIL.ImageOps.exif_transpose)"
            )
        return fits.pop()

    def _read_labels(self, index: int) -> tuple[Tensor, int]:
        path = self.pairs[index][1]
        values, orientation = (read_colours if self.colours else read_values)(path)
        lowest, highest = int(values.min()), int(values.max())
        if not 0 <= lowest <= highest < len(self._table):
            raise ValueError(f"{path}: expected labels 0 to 65535, got {lowest} to {highest}")
        labels = self._table[values.astype(np.uint32 if self.colours else np.uint16, copy=False)]
        if (labels == UNKNOWN).any():
            first = np.unique(values[labels == UNKNOWN])[:5].tolist()
            unknown = [self._key(value) for value in first]
            if self.colours:
                raise ValueError(f"{path}: colours {unknown} are not in --data.label_map")
            raise ValueError(
                f"{path}: label values {unknown} are not those of the {len(self.classes)} classes "
                "nor ignored; name more classes, or map the values with --data.label_map"
            )
        return torch.from_numpy(labels), orientation

    def _key(self, value: int) -> int | str:
        """A value as in --data.label_map."""
        red, green, blue = value >> 16, value >> 8 & 255, value & 255
        return f"{red},{green},{blue}" if self.colours else value


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"{path} does not exist (--data.root is the directory of the data set)")
    return path


def _matched(
    images: Path,
    masks: Path,
    image_end: Sequence[str],
    mask_end: Sequence[str],
    *,
    other_masks: bool = True,
) -> list[tuple[Path, Path]]:
    """Images under a folder, each with the mask of the same relative name without suffix.
    other_masks: whether masks without an image are permitted."""
    images_by_stem, masks_by_stem = _by_stem(images, image_end), _by_stem(masks, mask_end)
    if not images_by_stem:
        raise ValueError(f"{images} has no images ({', '.join(image_end)})")
    for stem, image in images_by_stem.items():
        if stem not in masks_by_stem:
            raise ValueError(f"{masks / (stem + mask_end[0])} does not exist: the mask of {image}")
    alone = [mask for stem, mask in masks_by_stem.items() if stem not in images_by_stem]
    if alone and not other_masks:
        raise ValueError(
            f"{alone[0]} has no image in {images} ({len(alone)} masks have none): give it its "
            "image or remove it; --data.mask_suffix distinguishes masks from other files"
        )
    return [(image, masks_by_stem[stem]) for stem, image in images_by_stem.items()]


def _files(folder: Path) -> Iterator[Path]:
    """Those in a folder and its subfolders, also in linked ones; hidden ones are skipped. Raises
    ValueError for a link to a folder that contains it."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if Path(place).resolve().is_relative_to((link := Path(place, name)).resolve()):
                raise ValueError(f"{link} is a link to a folder that contains it: remove the link")
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _by_stem(folder: Path, endings: Sequence[str]) -> dict[str, Path]:
    """Files under a folder by relative name without suffix, in order. Links to folders are
    followed; hidden files (such as the `._a.jpg` of macOS) are skipped."""
    files: dict[str, Path] = {}
    for path in sorted(_files(_existing(folder))):
        end = next((end for end in endings if path.name.lower().endswith(end.lower())), None)
        if end is None:
            continue
        stem = str(path.relative_to(folder))[: -len(end)]
        if stem in files:
            raise ValueError(
                f"{path} is next to {files[stem]}: expected one file of that name, whatever its "
                "ending"
            )
        files[stem] = path
    return files


def _listed(names: Path, images: Path, masks: Path, mask_end: str) -> list[tuple[Path, Path]]:
    """The pairs that a text file lists by name."""
    stems = _read_text(_existing(names)).split()
    if not stems:
        raise ValueError(f"{names} is empty: expected the names of images")
    pairs = [(images / f"{stem}.jpg", masks / f"{stem}{mask_end}") for stem in stems]
    for path in itertools.chain.from_iterable(pairs):
        _existing(path)
    return pairs


def _cityscapes(root: Path, split: str) -> list[tuple[Path, Path]]:
    return _matched(
        root / "leftImg8bit" / split,
        root / "gtFine" / split,
        ["_leftImg8bit.png"],
        ["_gtFine_labelIds.png"],
    )


def _ade20k(root: Path, split: str) -> list[tuple[Path, Path]]:
    folder = {"train": "training", "val": "validation"}[split]
    return _matched(root / "images" / folder, root / "annotations" / folder, [".jpg"], [".png"])


def _pascal_context(root: Path, split: str) -> list[tuple[Path, Path]]:
    return _listed(
        root / "ImageSets" / "SegmentationContext" / f"{split}.txt",
        root / "JPEGImages",
        root / "SegmentationClassContext",
        ".png",
    )


def _coco_stuff_10k(root: Path, split: str) -> list[tuple[Path, Path]]:
    names = {"train": "train.txt", "val": "test.txt"}[split]
    return _listed(root / "imageLists" / names, root / "images", root / "annotations", ".mat")


def _coco_stuff_164k(root: Path, split: str) -> list[tuple[Path, Path]]:
    year = f"{split}2017"
    return _matched(root / "images" / year, root / "annotations" / year, [".jpg"], [".png"])


def _camvid(root: Path, split: str) -> list[tuple[Path, Path]]:
    return _matched(root / split, root / f"{split}annot", [".png"], [".png"])


def _consecutive(values: Iterable[int], ignored: Iterable[int]) -> dict[int, int]:
    """Values to classes 0, 1, 2, …; the ignored ones to −1."""
    return dict.fromkeys(ignored, IGNORED) | {value: k for k, value in enumerate(values)}


_coco_stuff = [value for value in range(1, 183) if value not in COCO_STUFF_UNUSED]
LAYOUTS = {
    "cityscapes": Layout(
        _cityscapes, _consecutive(CITYSCAPES_IDS, [*range(34), NO_CLASS]), CITYSCAPES
    ),
    "ade20k": Layout(_ade20k, _consecutive(range(1, 151), [0, NO_CLASS]), 150),
    "pascal-context": Layout(_pascal_context, _consecutive(range(1, 60), [0, NO_CLASS]), 59),
    "coco-stuff-10k": Layout(_coco_stuff_10k, _consecutive(_coco_stuff, range(183)), 171),
    "coco-stuff-164k": Layout(
        _coco_stuff_164k, _consecutive([x - 1 for x in _coco_stuff], [*range(182), NO_CLASS]), 171
    ),
    "camvid": Layout(_camvid, _consecutive(range(11), [11, NO_CLASS]), CAMVID, ["test"]),
}


def open_published(name: str, root: Path, split: str) -> MaskFolder:
    """A split of a published data set, in the folders of its archives (docs/training.md). Raises
    ValueError for a split that it does not have."""
    layout = LAYOUTS[name]
    if split not in (splits := ["train", "val", *layout.more]):
        raise ValueError(f"--data.split: {name} has {', '.join(splits)}, got {split}")
    if isinstance(layout.classes, int):
        classes = _read_classes(root) or [f"class {k + 1}" for k in range(layout.classes)]
        if len(classes) != layout.classes:
            raise ValueError(
                f"{root / CLASSES}: expected {layout.classes} lines, got {len(classes)}"
            )
    else:
        classes = layout.classes
    return MaskFolder(layout.pairs(root, split), classes, layout.labels)


def open_folder(
    root: Path,
    split: str,
    *,
    image_suffix: str | None = None,
    mask_suffix: str | None = None,
    label_map: Mapping[int | str, int] | None = None,
    channels: int = 3,
) -> MaskFolder:
    """A split of your own data: images/SPLIT/… and masks/SPLIT/…, with the same names except for
    their suffixes, and classes.txt with one name per line.

    Values in the masks, of 8 or 16 bits, are the classes 0, 1, …; with at most 255 classes, 255 is
    ignored. label_map replaces this for the values that it contains: by a class, or by −1 for
    ignored (or 255 with at most 255 classes). If its keys are colours, "R,G,B", the masks have no
    other ones.
    """
    classes = _read_classes(_existing(root))
    if classes is None:
        raise ValueError(f"{root / CLASSES} does not exist: write the name of a class on each line")
    if len(classes) < 2:
        raise ValueError(f"{root / CLASSES}: expected 2 classes or more, got {len(classes)}")
    labels, colours = _by_value_or_colour(label_map or {})
    if not colours:
        labels = {NO_CLASS: IGNORED} | {k: k for k in range(len(classes))} | labels
    if len(classes) <= NO_CLASS:
        labels = {k: IGNORED if label == NO_CLASS else label for k, label in labels.items()}
    image_end = (image_suffix,) if image_suffix else IMAGES
    mask_end = (mask_suffix,) if mask_suffix else (".png", ".tif", ".tiff")
    folders = root / "images" / split, root / "masks" / split
    pairs = _matched(*folders, image_end, mask_end, other_masks=False)
    return MaskFolder(pairs, classes, labels, channels, colours)


def _by_value_or_colour(label_map: Mapping[int | str, int]) -> tuple[dict[int, int], bool]:
    """The map with integers as keys, and whether they are colours, R·2¹⁶ + G·2⁸ + B."""
    values: dict[int, int] = {}
    colours: dict[int, int] = {}
    for key, label in label_map.items():
        try:
            numbers = [int(part) for part in str(key).split(",")]
        except ValueError:
            numbers = []
        if len(numbers) == 3 and all(0 <= number <= 255 for number in numbers):
            colours[numbers[0] << 16 | numbers[1] << 8 | numbers[2]] = label
        elif len(numbers) == 1:
            values[numbers[0]] = label
        else:
            raise ValueError(
                f"--data.label_map: expected values, or colours 'R,G,B' of 0 to 255, got {key!r}"
            )
    if values and colours:
        raise ValueError("--data.label_map: expected either values or colours, got both")
    return colours or values, bool(colours)


def _read_classes(root: Path) -> list[str] | None:
    path = root / CLASSES
    if not path.exists():
        return None
    classes = [line.strip() for line in _read_text(path).splitlines() if line.strip()]
    if not classes:
        raise ValueError(f"{path} is empty: expected the name of a class on each line")
    twice = sorted({name for name in classes if classes.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: expected each name once, got again: {', '.join(twice)}")
    return classes


def class_histogram(labels: Tensor, num_classes: int) -> Tensor:
    """The number of pixels of each class, int64 [K]."""
    return torch.bincount(labels.flatten().int() + 1, minlength=num_classes + 1)[1:]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, got {error}") from None
