"""Data sets in directories that the tests write: pairing, formats, label values, messages."""

import os
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from anchorops.train.data.counts import class_counts
from anchorops.train.data.folders import MaskFolder, open_folder, open_published
from tests.helpers.image_files import image, mask, write


def open_two(root: Path, **options: Any) -> MaskFolder:
    """The training split of a folder, with two classes."""
    (root / "classes.txt").write_text("ground\nthing\n")
    return open_folder(root, "train", **options)


def test_folder(folder: Path):
    train, val = (open_folder(folder, split) for split in ("train", "val"))
    assert len(train) == len(val) == 2 and list(train.classes) == ["ground", "thing"]
    pixels, labels = train[0]
    assert pixels.shape == (3, 6, 9) and pixels.dtype == torch.uint8
    assert labels[:, 0].tolist() == [0, 1, -1, 0, 1, -1]
    assert train[1][0].shape == (3, 4, 5)


def test_label_map_and_suffixes(tmp_path: Path):
    write(tmp_path / "images/train/x_rgb.png", image())
    write(tmp_path / "images/train/x_depth.png", mask(9))
    write(tmp_path / "masks/train/x_label.png", mask(7, 128, 0))
    suffixes = {"image_suffix": "_rgb.png", "mask_suffix": "_label.png"}
    data = open_two(tmp_path, **suffixes, label_map={7: 255, 128: 1})
    assert len(data) == 1 and data[0][1][:3, 0].tolist() == [-1, 1, 0]


@pytest.mark.parametrize("shape", [(7, 6, 9), (7, 9, 6)])
def test_tiff_whose_channels_come_first(shape: tuple[int, ...], tmp_path: Path):
    planes = np.arange(7 * 6 * 9, dtype=np.uint8).reshape(shape)
    write(tmp_path / "images/train/x.tif", planes)
    write(tmp_path / "masks/train/x.png", mask(0, 1, height=shape[1], width=shape[2]))
    data = open_two(tmp_path, channels=7)
    assert data[0][0].tolist() == planes.tolist() and data.read_labels(0).shape == shape[1:]


def test_label_map_of_colours(tmp_path: Path):
    """The class values 0 and 1 are colours no more."""
    rows = [[[128, 64, 0]] * 2, [[0, 0, 0]] * 2, [[255, 255, 255]] * 2]
    write(tmp_path / "images/train/x.png", image(3, 2))
    write(tmp_path / "masks/train/x.png", np.array(rows, np.uint8))
    labels = {"128,64,0": 1, "0, 0, 0": 0, "255,255,255": -1}
    assert open_two(tmp_path, label_map=labels)[0][1].tolist() == [[1, 1], [0, 0], [-1, -1]]
    del labels["128,64,0"]
    unknown = r"x.png: colours \['128,64,0'\] are not in --data\.label_map"
    with pytest.raises(ValueError, match=unknown):
        open_two(tmp_path, label_map=labels).read_labels(0)


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        ({"1,2,3": 0, 4: 1}, "expected either values or colours, got both"),
        ({"1,2,256": 0}, "expected values, or colours 'R,G,B' of 0 to 255, got '1,2,256'"),
        ({"1,2": 0}, "got '1,2'"),
        ({"red": 0}, "got 'red'"),
        ({"1,2,3": 2}, "and classes -1 to 1, got 1,2,3: 2"),
        ({-1: 1}, "expected values 0 to 65535 and classes -1 to 1, got -1: 1"),
        ({70_000: 1}, "expected values 0 to 65535 and classes -1 to 1, got 70000: 1"),
    ],
)
def test_label_map_that_cannot_be(label_map: dict[int | str, int], message: str, folder: Path):
    with pytest.raises(ValueError, match=f"--data.label_map: .*{message}"):
        open_folder(folder, "train", label_map=label_map)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("masks/train/b.png", mask(7, height=4, width=5), r"label values \[7\] are not those of"),
        ("masks/train/b.png", mask(1), r"expected the size of its image, \(4, 5\), got \(6, 9\)"),
        ("masks/train/b.png", image(4, 5), "expected one channel of integer labels"),
        (
            "images/train/b.png",
            image(4, 5)[..., [0, 1, 2, 2]],
            r"got 4: save .* alpha channel, .*4",
        ),
        ("images/train/b.png", image(4, 5)[..., :2], "expected 3 channels, got 2: save the image"),
        ("images/train/b.tif", image()[..., [0] * 5], r"got 5: .* \(fit --data.channels 5\)"),
        ("images/train/b.tif", np.full((4, 5), np.inf, np.float32), "expected finite .* 100 %"),
    ],
)
def test_wrong_file(name: str, content: np.ndarray, message: str, folder: Path):
    """All but NaN are found before the first step, when the classes are counted."""
    if name.startswith("images"):
        (folder / "images/train/b.png").unlink()
    write(folder / name, content)
    data = open_folder(folder, "train")
    if "finite" not in message:
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            class_counts(data)
    with pytest.raises(ValueError, match=f"{name}( cannot be read)?: .*{message}"):
        data[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("masks/train/a/1.png", None, r"a/1.png does not exist: the mask of .*a/1.jpg"),
        ("masks/train/c.png", b"", r"c.png has no image in .*images/train"),
        ("images/train/b.jpg", b"", r"b.png is next to .*train/b.jpg: expected one"),
        ("masks/train/b.tif", b"", r"b.tif is next to .*b.png: expected one"),
        ("classes.txt", None, r"classes.txt does not exist: write the name"),
        ("classes.txt", "Straße".encode("latin-1"), r"expected UTF-8, got .* byte 0xdf"),
        ("classes.txt", "a\nb".encode("utf-16"), r"classes.txt: expected UTF-8"),
        ("classes.txt", b"\n \n", r"is empty: expected the name of a class on each line"),
        ("classes.txt", b"a\nb\na\n", r"classes.txt: expected each name once, got again: a$"),
        ("classes.txt", b"a\n", r"classes.txt: expected 2 classes or more, got 1"),
    ],
)
def test_wrong_folder(name: str, content: bytes | None, message: str, folder: Path):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_folder(folder, "train")


def test_hidden_files_are_skipped(folder: Path):
    write(folder / "images/train/.hidden/b.jpg", image())
    (folder / "images/train/a/._1.jpg").write_bytes(b"of macOS")
    (folder / "masks/train/._b.png").write_bytes(b"of macOS")
    assert len(open_folder(folder, "train")) == 2


def test_links_to_folders_are_followed(folder: Path, tmp_path: Path):
    for kind, content in (("images", image()), ("masks", mask(0))):
        write(tmp_path / f"elsewhere/{kind}/c.png", content)
        (folder / kind / "train/more").symlink_to(tmp_path / "elsewhere" / kind)
    assert len(open_folder(folder, "train")) == 3
    (folder / "images/train/itself").symlink_to(folder / "images")
    with pytest.raises(ValueError, match=r"train/itself is a link to a folder that contains it"):
        open_folder(folder, "train")


@pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_in_two_forms_of_unicode(forms: tuple[str, str], folder: Path):
    names = [normalize(form, "Füße/é") for form in forms]
    write(folder / f"images/train/{names[0]}_é.png", image())
    write(folder / f"masks/train/{names[1]}_é.png", mask(0))
    assert len(open_folder(folder, "train")) == 3
    for suffix in (normalize(form, "_é.PNG") for form in forms):
        (images, masks), *others = open_folder(
            folder, "train", image_suffix=suffix, mask_suffix=suffix
        ).pairs
        assert images.exists() and masks.exists() and not others


def test_a_name_that_is_no_utf_8(folder: Path):
    for kind, content in (("images", image()), ("masks", mask(0))):
        write(folder / kind / "train" / os.fsdecode(b"\xc3\xbc\xff.png"), content)
    with pytest.raises(ValueError) as raised:
        open_folder(folder, "train")
    message = str(raised.value)
    assert message.isascii() and r"images/train/\xc3\xbc\xff.png: expected a name in" in message


def oriented(path: Path, array: np.ndarray, orientation: int) -> np.ndarray:
    """Write a file, and return what PIL shows of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = Image.fromarray(array)
    exif = stored.getexif()
    exif[0x112] = orientation
    stored.save(path, exif=exif, **({"quality": 100} if path.suffix == ".jpg" else {}))
    with Image.open(path) as file:
        return np.asarray(ImageOps.exif_transpose(file))


def assert_shown(root: Path, shown: np.ndarray, labels: np.ndarray) -> None:
    data = open_two(root)
    pixels, read = data[0]
    assert torch.equal(data.read_labels(0), read)
    assert pixels.permute(1, 2, 0).tolist() == shown.tolist() and read.tolist() == labels.tolist()


@pytest.mark.parametrize("ending", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_both_files(orientation: int, ending: str, tmp_path: Path):
    """As in the pictures of a phone."""
    shown = oriented(tmp_path / f"images/train/x{ending}", image(), orientation)
    labels = oriented(tmp_path / "masks/train/x.png", mask(0, 1, 0), orientation)
    assert_shown(tmp_path, shown, labels)


@pytest.mark.parametrize("orientation", range(5, 9))
def test_orientation_that_the_sizes_tell(orientation: int, tmp_path: Path):
    """A mask of the upright image, and one of the stored pixels: both are shown upright."""
    shown = oriented(tmp_path / "images/train/x.png", image(), orientation)
    drawn = np.arange(9 * 6, dtype=np.uint8).reshape(9, 6) % 2
    write(tmp_path / "masks/train/x.png", drawn)
    assert_shown(tmp_path, shown, drawn)
    stored = mask(0, 1, 0)
    write(tmp_path / "masks/train/x.png", stored)
    assert_shown(tmp_path, shown, oriented(tmp_path / "elsewhere/y.png", stored, orientation))


@pytest.mark.parametrize(("orientation", "size"), [(3, (6, 9)), (2, (6, 9)), (6, (8, 8))])
def test_orientation_that_nothing_tells(orientation: int, size: tuple[int, int], tmp_path: Path):
    oriented(tmp_path / "images/train/x.jpg", image(*size), orientation)
    write(tmp_path / "masks/train/x.png", mask(0, 1, height=size[0], width=size[1]))
    expected = rf"x.jpg: the EXIF orientation is {orientation}, that of .*x.png is 1, and the sizes"
    data = open_two(tmp_path)
    for read in (data.__getitem__, data.read_labels):
        with pytest.raises(ValueError, match=expected):
            read(0)


# a split, its image and mask, the values in the mask and their labels, the number of classes
PUBLISHED = {
    "cityscapes": (
        "train",
        "leftImg8bit/train/ulm/1_leftImg8bit.png",
        "gtFine/train/ulm/1_gtFine_labelIds.png",
        {7: 0, 0: -1, 33: 18, 3: -1, 11: 2, 31: 16},
        19,
    ),
    "ade20k": (
        "val",
        "images/validation/1.jpg",
        "annotations/validation/1.png",
        {0: -1, 1: 0, 150: 149},
        150,
    ),
    "pascal-context": (
        "train",
        "JPEGImages/1.jpg",
        "SegmentationClassContext/1.png",
        {0: -1, 1: 0, 59: 58},
        59,
    ),
    "coco-stuff-10k": (
        "val",
        "images/1.jpg",
        "annotations/1.mat",
        {0: -1, 1: 0, 13: 11, 182: 170, 12: -1},
        171,
    ),
    "coco-stuff-164k": (
        "train",
        "images/train2017/1.jpg",
        "annotations/train2017/1.png",
        {255: -1, 0: 0, 12: 11, 181: 170, 11: -1},
        171,
    ),
    "camvid": ("test", "test/1.png", "testannot/1.png", {0: 0, 10: 10, 11: -1}, 11),
}
LISTS = {
    "pascal-context": "ImageSets/SegmentationContext/train.txt",
    "coco-stuff-10k": "imageLists/test.txt",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_data_set(name: str, tmp_path: Path):
    split, image_name, mask_name, labels, classes = PUBLISHED[name]
    write(tmp_path / image_name, image())
    write(tmp_path / mask_name, mask(*labels))
    write(tmp_path / "gtFine/train/ulm/1_gtFine_color.png", image())  # of Cityscapes, not used
    if name in LISTS:
        (tmp_path / LISTS[name]).parent.mkdir(parents=True)
        (tmp_path / LISTS[name]).write_text("1\n")
    data = open_published(name, tmp_path, split)
    assert len(data) == 1 and len(data.classes) == classes
    assert data[0][1][: len(labels), 0].tolist() == [*labels.values()]
    with pytest.raises(ValueError, match=rf"--data\.split: {name} has train, val.*, got other"):
        open_published(name, tmp_path, "other")
    (tmp_path / image_name).unlink()
    with pytest.raises(ValueError, match=r"1.jpg does not exist \(--data.root|has no images"):
        open_published(name, tmp_path, split)
    if name not in ("cityscapes", "camvid"):
        (tmp_path / "classes.txt").write_text("one")
        with pytest.raises(ValueError, match=rf"classes.txt: expected {classes} lines, got 1"):
            open_published(name, tmp_path, split)
