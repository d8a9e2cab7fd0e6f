"""Data sets in directories that the tests write: pairing, label values, orientations, messages."""

import os
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from anchorops.train.data.folders import MaskFolder, open_files
from anchorops.train.data.loading import class_counts
from anchorops.train.options import Data
from tests.helpers.image_files import image, mask, write


def open_folder(root: Path, **options: Any) -> MaskFolder:
    return open_files(Data("folder", str(root), **options), "train")


def test_folder(folder: Path):
    data = open_folder(folder)
    (pixels, labels), (smaller, _) = data[0], data[1]
    assert pixels.shape == (3, 6, 9) and smaller.shape == (3, 4, 5)
    assert pixels.dtype == torch.uint8 and labels[:, 0].tolist() == [0, 1, -1, 0, 1, -1]
    pixels, images, sizes, *_ = class_counts(data)
    assert pixels.tolist() == [18, 18 + 20] and images.tolist() == [1, 2]
    assert sizes == [(4, 5), (6, 9)] and list(data.classes) == ["ground", "thing"]


def test_label_map_and_suffixes(folder: Path):
    write(folder / "images/train/x_rgb.png", image())
    write(folder / "masks/train/x_label.png", mask(7, 128, 0))
    suffixes = {"image_suffix": "_rgb.png", "mask_suffix": "_label.png"}
    data = open_folder(folder, **suffixes, label_map={7: -1, 128: 1})
    assert len(data) == 1 and data[0][1][:3, 0].tolist() == [-1, 1, 0]


def test_label_map_of_values_below_0(folder: Path):
    """Which the message about them recommends."""
    write(folder / "images/train/x.png", image(3, 2))
    write(folder / "masks/train/x.tif", np.array([[-1, -9999], [1, -1], [0, 0]], np.int16))
    with pytest.raises(
        ValueError, match=r"label values \[-9999, -1\] .* map the values with --data"
    ):
        open_folder(folder)[2]
    labels = {-1: -1, "-9999": 1}
    assert open_folder(folder, label_map=labels)[2][1].tolist() == [[-1, 1], [1, -1], [0, 0]]


def test_label_map_of_colours(folder: Path):
    """The class values 0 and 1 are colours no more. An opaque alpha channel is left out."""
    rows = [[[128, 64, 0, 255]] * 2, [[0, 0, 0, 255]] * 2, [[255, 255, 255, 255]] * 2]
    write(folder / "images/train/x.png", image(3, 2))
    write(folder / "masks/train/x.png", np.array(rows, np.uint8))
    labels = {"128,64,0": 1, "0, 0, 0": 0, "255,255,255": -1}
    assert open_folder(folder, label_map=labels)[2][1].tolist() == [[1, 1], [0, 0], [-1, -1]]
    del labels["128,64,0"]
    with pytest.raises(ValueError, match=r"x.png: label values \['128,64,0'\] are not"):
        open_folder(folder, label_map=labels)[2]


MANY = "\n".join(map(str, range(32_769))).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("masks/train/b.png", mask(7, height=4, width=5), r"label values \[7\] are not those of"),
        ("masks/train/c.tif", mask(0) + np.int64(2**32 + 1), r"values \[4294967297\] are not"),
        ("masks/train/b.png", mask(1), r"the size of its image, \(4, 5\), got \(6, 9\)"),
        ("masks/train/b.png", image(4, 5), "expected one channel of integer labels"),
        ("images/train/c.png", image()[..., [0, 1, 2, 2]], r"got 4: save .* alpha channel.*s 4\)$"),
        ("images/train/d.png", b"", r"^d: expected an image .* and a mask .*, got .*images.*d.png"),
        ("masks/train/d.png", b"", r"^d: expected an image .* and a mask .*, got .*masks.*d.png"),
        ("images/train/b.jpg", b"", r"/b.png is next to .*train/b.jpg: expected one"),
        ("classes.txt", None, r"classes.txt: expected names of classes, .*No such file"),
        ("classes.txt", "Straße".encode("latin-1"), r"classes.txt: .*'utf-8' .* byte 0xdf"),
        ("classes.txt", b"a\nb\na\n", r"classes.txt: expected different names, got "),
        ("classes.txt", MANY, r"classes.txt: expected at most 32768 names, got 32769"),
        (
            "images/train/c.png",
            image().astype(np.uint16)[..., 0],
            "c.png: expected 8 bits, as .*/1.jpg, got",
        ),
    ],
)
def test_wrong_files(name: str, content: Any, message: str, folder: Path):
    """They are found before the first step, when the classes are counted."""
    write(folder / "images/train/c.png", image())
    write(folder / "masks/train/c.tif", mask(0))
    write(folder / name, content)
    with pytest.raises(ValueError, match=message):
        class_counts(open_folder(folder))


def test_files_that_are_found(folder: Path, tmp_path: Path):
    """Those in folders that are linked; none that is hidden."""
    write(folder / "images/train/.hidden/b.jpg", image())
    write(folder / "images/train/a/._1.jpg", b"of macOS")
    write(folder / "masks/train/._b.png", b"of macOS")
    for kind, content in (("images", image()), ("masks", mask(0))):
        write(tmp_path / f"elsewhere/{kind}/c.png", content)
        (folder / kind / "train/more").symlink_to(tmp_path / "elsewhere" / kind)
    assert len(open_folder(folder)) == 3
    (folder / "masks/train/circle").symlink_to(folder / "images/train")
    for name in ("1", "2"):
        (folder / f"images/train/{name}").symlink_to(folder / "masks/train")
    with pytest.raises(ValueError, match=r"/\d/circle: expected no link to a folder in which"):
        open_folder(folder)


NAMES = [normalize(form, "Füße/é") for form in ("NFC", "NFD")]
NO_UTF_8 = os.fsdecode(b"\xc3\xbc\xff")


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1], [NO_UTF_8, NO_UTF_8]])
def test_names(names: list[str], folder: Path):
    """In two forms of Unicode, and of bytes that are no UTF-8."""
    write(folder / f"images/train/{names[0]}_é.png", image())
    write(folder / f"masks/train/{names[1]}_é.png", mask(0))
    assert len(open_folder(folder)) == 3
    for suffix in ("_é.PNG", normalize("NFD", "_é.PNG")):
        data = open_folder(folder, image_suffix=suffix, mask_suffix=suffix)
        assert len(data) == 1 and data[0][0].shape == (3, 6, 9)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(orientation: int, ending: str, folder: Path):
    """Of each file, by its own EXIF. A mask without one was drawn on what is shown."""
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = {
        folder / f"images/train/x{ending}": image(),
        folder / "masks/train/x.png": image()[..., 0] // 7 % 2,
    }
    for path, content in stored.items():
        Image.fromarray(content).save(path, exif=exif)
    shown, drawn = (np.asarray(ImageOps.exif_transpose(Image.open(path))) for path in stored)
    data = open_folder(folder)
    for content in (path.read_bytes(), drawn):
        write(path, content)
        pixels, labels = data[2]
        assert pixels.permute(1, 2, 0).tolist() == shown.tolist()
        assert labels.tolist() == drawn.tolist()


# an image, its mask, and the file that lists them
FILES = {
    "cityscapes": "leftImg8bit/train/ulm/1_leftImg8bit.png gtFine/train/ulm/1_gtFine_labelIds.png",
    "ade20k": "images/validation/1.jpg annotations/validation/1.png",
    "pascal-context": """JPEGImages/1.jpg SegmentationClassContext/1.png
        ImageSets/SegmentationContext/train.txt""",
    "coco-stuff-10k": "images/1.jpg annotations/1.mat imageLists/test.txt",
    "coco-stuff-164k": "images/train2017/1.jpg annotations/train2017/1.png",
    "camvid": "test/1.png testannot/1.png",
}
# their split, the number of classes, values in the mask and their labels
LABELS = {
    "cityscapes": ("train", 19, {7: 0, 0: -1, 33: 18, 3: -1, 11: 2, 31: 16}),
    "ade20k": ("val", 150, {0: -1, 1: 0, 150: 149}),
    "pascal-context": ("train", 59, {0: -1, 1: 0, 59: 58}),
    "coco-stuff-10k": ("val", 171, {0: -1, 1: 0, 13: 11, 182: 170, 12: -1}),
    "coco-stuff-164k": ("train", 171, {255: -1, 0: 0, 12: 11, 181: 170, 11: -1}),
    "camvid": ("test", 11, {0: 0, 10: 10, 11: -1}),
}


@pytest.mark.parametrize("name", FILES)
def test_published_data_set(name: str, tmp_path: Path):
    image_path, mask_path, *listed = (tmp_path / file for file in FILES[name].split())
    split, classes, labels = LABELS[name]
    write(image_path, image())
    write(mask_path, mask(*labels))
    write(tmp_path / "gtFine/train/ulm/1_gtFine_color.png", image())  # of Cityscapes, not used
    for path in listed:
        write(path, b"1\n")
    options: Any = Data(name, str(tmp_path))
    data = open_files(options, split)
    assert len(data) == 1 and len(data.classes) == classes
    assert data[0][1][: len(labels), 0].tolist() == [*labels.values()]
    with pytest.raises(ValueError, match=f"expected one of {name}, train, val.*, got other"):
        open_files(options, "other")
