"""Data sets on disk: a plain folder of images and masks, and published ones in their layouts."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

import numpy as np
import torch
from torch import Tensor

from .. import IGNORED
from .images import read_image, read_mask, upright

CLASSES = "classes.txt"
IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
MASKS = (".png", ".tif", ".tiff")
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
COCO_STUFF = [value for value in range(1, 183) if value not in COCO_STUFF_UNUSED]


class Layout(NamedTuple):
    """The files of a data set, relative to its root. {} stands for the name of a split in them, *
    for that of an image, which may be in subfolders."""

    images: str
    masks: str
    values: Sequence[int]
    """Those of the classes in the masks."""
    ignored: Iterable[int]
    """Other values in the masks."""
    splits: Mapping[str, str] = {"train": "train", "val": "val"}
    """The names of train, val and others in the files."""
    classes: Sequence[str] | None = None
    """Names; if None, classes.txt in the root has them, if it exists."""
    listed: str | None = None
    """The file with the names of a split's images; if None, they are all those that exist."""


LAYOUTS = {
    "cityscapes": Layout(
        "leftImg8bit/{}/*_leftImg8bit.png",
        "gtFine/{}/*_gtFine_labelIds.png",
        CITYSCAPES_IDS,
        ignored=(*range(34), NO_CLASS),
        classes=CITYSCAPES,
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
    "camvid": Layout(
        "{}/*.png",
        "{}annot/*.png",
        range(11),
        ignored=(11, NO_CLASS),
        splits={"train": "train", "val": "val", "test": "test"},
        classes=CAMVID,
    ),
}


@dataclass
class MaskFolder:
    """Images and masks of labels on disk: pairs of their paths. labels: the class of each value in
    the masks, −1 ignored; any other value is an error. channels: of the images. colours: whether
    the values are colours, R·2¹⁶ + G·2⁸ + B."""

    pairs: Sequence[tuple[Path, Path]]
    classes: Sequence[str]
    labels: Mapping[int, int]
    channels: int = 3
    colours: bool = False

    def __post_init__(self) -> None:
        self._table = np.full(COLOURS if self.colours else LABEL_VALUES, UNKNOWN, np.int16)
        for value, label in self.labels.items():
            if not (0 <= value < len(self._table) and IGNORED <= label < len(self.classes)):
                raise ValueError(
                    f"--data.label_map: expected values 0 to {LABEL_VALUES - 1} and classes "
                    f"{IGNORED} to {len(self.classes) - 1}, got {self._key(value)}: {label}"
                )
            self._table[value] = label

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image (C, H, W), uint8, or float32 in 0..1 if the file has more than 8 bits; labels
        int16 (H, W); both upright. If only one file has an EXIF orientation, the sizes tell whether
        the mask was drawn on the upright image or on its stored pixels, which turns both files.

        Raises ValueError that names a wrong file, or one whose orientation is not clear."""
        image_path, mask_path = self.pairs[index]
        values, mask_orientation = read_mask(mask_path, colours=self.colours)
        labels = self._labels(values, mask_path)
        image, orientation = read_image(image_path, self.channels, labels.shape)
        image = upright(image, orientation)
        shown = {turn: upright(labels, turn) for turn in (orientation, mask_orientation)}
        fits = [x for x in shown.values() if x.shape == image.shape[1:]]
        if not fits:
            raise ValueError(
                f"{mask_path}: expected the size of its image, {tuple(image.shape[1:])}, got "
                f"{tuple(shown[orientation].shape)}"
            )
        if len(fits) == 2:
            raise ValueError(
                f"{image_path}: the EXIF orientation is {orientation}, that of {mask_path} is "
                f"{mask_orientation}, and the sizes do not tell whether the mask was drawn on "
                "the upright image: save both without an orientation "
                "(PIL.ImageOps.exif_transpose)"
            )
        return image, fits[0]

    def _labels(self, values: np.ndarray, path: Path) -> Tensor:
        lowest, highest = int(values.min()), int(values.max())
        if not 0 <= lowest <= highest < len(self._table):
            raise ValueError(f"{path}: expected labels 0 to 65535, got {lowest} to {highest}")
        labels = self._table[values.astype(np.uint32, copy=False)]
        if (unknown := labels == UNKNOWN).any():
            first = [self._key(value) for value in np.unique(values[unknown])[:5].tolist()]
            if self.colours:
                raise ValueError(f"{path}: colours {first} are not in --data.label_map")
            raise ValueError(
                f"{path}: label values {first} are not those of the {len(self.classes)} classes "
                "nor ignored; name more classes, or map the values with --data.label_map"
            )
        return torch.from_numpy(labels)

    def _key(self, value: int) -> int | str:
        """A value as in --data.label_map."""
        return "{},{},{}".format(*value.to_bytes(3, "big")) if self.colours else value


def open_published(name: str, root: Path, split: str) -> MaskFolder:
    """A split of a published data set, in the folders of its archives (docs/training.md). Raises
    ValueError for a split that it does not have."""
    layout = LAYOUTS[name]
    if split not in layout.splits:
        raise ValueError(f"--data.split: {name} has {', '.join(layout.splits)}, got {split}")
    number, classes = len(layout.values), layout.classes
    if classes is None:
        classes = _read_classes(root) or [f"class {k + 1}" for k in range(number)]
    if len(classes) != number:
        raise ValueError(f"{root / CLASSES}: expected {number} lines, got {len(classes)}")
    images, masks = (x.format(layout.splits[split]) for x in (layout.images, layout.masks))
    if layout.listed is None:
        (image_folder, image_end), (mask_folder, mask_end) = images.split("/*"), masks.split("/*")
        pairs = _matched(root / image_folder, root / mask_folder, [image_end], [mask_end])
    else:
        names = _read_text(_existing(root / layout.listed.format(layout.splits[split]))).split()
        pairs = [(root / images.replace("*", x), root / masks.replace("*", x)) for x in names]
    labels = dict.fromkeys(layout.ignored, IGNORED) | {x: k for k, x in enumerate(layout.values)}
    return MaskFolder(pairs, classes, labels)


def open_folder(
    root: Path,
    split: str,
    *,
    image_suffix: str | None = None,
    mask_suffix: str | None = None,
    label_map: Mapping[Any, int] | None = None,
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
    mapped = {_numbers(key): label for key, label in (label_map or {}).items()}
    lengths = {len(numbers) for numbers in mapped}
    if len(lengths) == 2:
        raise ValueError("--data.label_map: expected either values or colours, got both")
    if colours := lengths == {3}:
        labels = {int.from_bytes(colour, "big"): label for colour, label in mapped.items()}
    else:
        labels = {NO_CLASS: IGNORED} | {k: k for k in range(len(classes))}
        labels |= {value: label for (value,), label in mapped.items()}
    if len(classes) <= NO_CLASS:
        labels = {k: IGNORED if label == NO_CLASS else label for k, label in labels.items()}
    images, masks = root / "images" / split, root / "masks" / split
    image_ends = [image_suffix] if image_suffix else IMAGES
    mask_ends = [mask_suffix] if mask_suffix else MASKS
    pairs = _matched(images, masks, image_ends, mask_ends)
    return MaskFolder(pairs, classes, labels, channels, colours)


def _numbers(key: int | str) -> tuple[int, ...]:
    """Those in a key of --data.label_map: one value, or a colour."""
    try:
        numbers = tuple(int(part) for part in str(key).split(","))
    except ValueError:
        numbers = ()
    if len(numbers) == 1 or (len(numbers) == 3 and all(0 <= x <= 255 for x in numbers)):
        return numbers
    raise ValueError(
        f"--data.label_map: expected values, or colours 'R,G,B' of 0 to 255, got {key!r}"
    )


def _read_classes(root: Path) -> list[str] | None:
    path = root / CLASSES
    if not path.exists():
        return None
    classes = [line.strip() for line in _read_text(path).splitlines() if line.strip()]
    twice = sorted({name for name in classes if classes.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: expected each name once, got again: {', '.join(twice)}")
    return classes


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"{path} does not exist (--data.root is the directory of the data set)")
    return path


def _matched(
    images: Path, masks: Path, image_ends: Sequence[str], mask_ends: Sequence[str]
) -> list[tuple[Path, Path]]:
    """Images under a folder, each with the mask of the same relative name without its end. Raises
    ValueError for an image without a mask, and a mask without an image."""
    images_by_stem, masks_by_stem = _by_stem(images, image_ends), _by_stem(masks, mask_ends)
    if not images_by_stem:
        raise ValueError(f"{images} has no images ({', '.join(image_ends)})")
    for stem, image in images_by_stem.items():
        if stem not in masks_by_stem:
            missing = masks / (stem + mask_ends[0])
            raise ValueError(f"{missing} does not exist: the mask of {image}")
    pairs = [(image, masks_by_stem.pop(stem)) for stem, image in images_by_stem.items()]
    for mask in masks_by_stem.values():
        raise ValueError(
            f"{mask} has no image in {images} ({len(masks_by_stem)} masks have none): give it its "
            "image or remove it; --data.mask_suffix distinguishes masks from other files"
        )
    return pairs


def _by_stem(folder: Path, ends: Sequence[str]) -> dict[str, Path]:
    """Files under a folder, also in linked subfolders, by relative name without its end, in order.
    Hidden ones, such as the `._a.jpg` of macOS, are skipped. Names are in NFC, because macOS writes
    some in NFD. Raises ValueError for a link to a folder that contains it, for a name that is no
    UTF-8, and for two files of one name."""
    paths: list[Path] = []
    for place, folders, names in os.walk(_existing(folder), followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for link in (Path(place, name) for name in folders):
            if Path(place).resolve().is_relative_to(link.resolve()):
                raise ValueError(f"{link} is a link to a folder that contains it: remove the link")
        paths += [Path(place, name) for name in names if not name.startswith(".")]
    files: dict[str, Path] = {}
    ends = [normalize("NFC", end.lower()) for end in ends]
    for path in sorted(paths):
        name = normalize("NFC", str(path.relative_to(folder)))
        end = next((end for end in ends if name.lower().endswith(end)), None)
        if end is None:
            continue
        if name.encode(errors="replace").decode() != name:
            printable = os.fsencode(path).decode("ascii", "backslashreplace")
            raise ValueError(f"{printable}: expected a name in UTF-8: rename the file")
        if (other := files.setdefault(name[: -len(end)], path)) != path:
            raise ValueError(
                f"{path} is next to {other}: expected one file of that name, whatever its end"
            )
    return files


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, got {error}") from None
