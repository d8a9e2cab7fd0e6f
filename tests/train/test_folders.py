"""Data sets in directories that the tests write: pairing, formats, label values, messages."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from image_files import image, mask, write
from jsonargparse import ArgumentParser
from PIL import Image, ImageOps

from anchorops.train.data.folders import MaskFolder, open_folder, open_published
from anchorops.train.data.images import read_image, read_size
from anchorops.train.data.loading import RandomScale, Training, augmentation
from anchorops.train.data.module import SegmentationData


def open_two(root: Path, **options: Any) -> MaskFolder:
    """The training split of a folder, with two classes."""
    (root / "classes.txt").write_text("ground\nthing\n")
    return open_folder(root, "train", **options)


def test_folder(folder: Path):
    train, val = SegmentationData("folder", str(folder)).splits()
    assert len(train) == len(val) == 2 and list(train.classes) == ["ground", "thing"]
    pixels, labels = train[0]
    assert pixels.shape == (3, 6, 9) and pixels.dtype == torch.uint8
    assert labels[:, 0].tolist() == [0, 1, -1, 0, 1, -1]
    assert train[1][0].shape == (3, 4, 5)


def test_label_map_and_suffixes(tmp_path: Path):
    write(tmp_path / "images/train/x_rgb.png", image())
    write(tmp_path / "images/train/x_depth.png", mask(9))
    write(tmp_path / "masks/train/x_label.png", mask(7, 128, 0))
    data = open_two(
        tmp_path,
        image_suffix="_rgb.png",
        mask_suffix="_label.png",
        label_map={7: 255, 128: 1},
    )
    assert len(data) == 1 and data[0][1][:3, 0].tolist() == [-1, 1, 0]


def test_tiff_of_many_channels_and_16_bits(tmp_path: Path):
    write(tmp_path / "images/train/x.tif", np.full((6, 9, 5), 65_535, np.uint16))
    write(tmp_path / "masks/train/x.tif", mask(0, 1).astype(np.uint16))
    data = open_two(tmp_path, channels=5)
    pixels, _ = data[0]
    assert pixels.shape == (5, 6, 9) and pixels.dtype == torch.float32 and (pixels == 1).all()
    transformed, labels = Training(
        data, augmentation(5, (8, 8), scaled=RandomScale(None, (1.0, 1.0))), 0
    )[0, 0]
    assert transformed.shape == (5, 8, 8) and labels.shape == (8, 8)


def test_tiff_whose_channels_come_first(tmp_path: Path):
    planes = np.arange(7 * 6 * 9, dtype=np.uint8).reshape(7, 6, 9)
    write(tmp_path / "images/train/x.tif", planes)
    write(tmp_path / "masks/train/x.png", mask(0, 1))
    pixels, _ = open_two(tmp_path, channels=7)[0]
    assert pixels.numpy().tolist() == planes.tolist()


COLOUR_MAP = {"128,64,0": 1, "0, 0, 0": 0, "255,255,255": -1}


def test_label_map_of_colours(tmp_path: Path):
    """Of an RGB mask and of one with a palette. The class values 0 and 1 are colours no more."""
    rows = [[[128, 64, 0]] * 2, [[0, 0, 0]] * 2, [[255, 255, 255]] * 2]
    for name in ("x", "y"):
        write(tmp_path / f"images/train/{name}.png", image(3, 2))
    write(tmp_path / "masks/train/x.png", np.array(rows, np.uint8))
    indexed = Image.fromarray(np.array([[2, 2], [0, 0], [1, 1]], np.uint8))
    indexed.putpalette([0, 0, 0, 255, 255, 255, 128, 64, 0])
    indexed.save(tmp_path / "masks/train/y.png")
    data = open_two(tmp_path, label_map=COLOUR_MAP)
    for index in range(2):
        assert data[index][1].tolist() == [[1, 1], [0, 0], [-1, -1]]
    rows[0][0] = [128, 64, 1]
    write(tmp_path / "masks/train/x.png", np.array(rows, np.uint8))
    with pytest.raises(
        ValueError, match=r"x.png: colours \['128,64,1'\] are not in --data\.label_"
    ):
        data.read_labels(0)
    with pytest.raises(
        ValueError, match=r"x.png: expected one channel .* --data\.label_map '\{\"R,"
    ):
        open_two(tmp_path)[0]


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        ({"1,2,3": 0, 4: 1}, "expected either values or colours, got both"),
        ({"1,2,256": 0}, "expected values, or colours 'R,G,B' of 0 to 255, got '1,2,256'"),
        ({"1,2": 0}, "got '1,2'"),
        ({"red": 0}, "got 'red'"),
        ({"1,2,3": 2}, "and classes -1 to 1, got 1,2,3: 2"),
    ],
)
def test_label_map_that_cannot_be(label_map: dict[int | str, int], message: str, folder: Path):
    with pytest.raises(ValueError, match=f"--data.label_map: .*{message}"):
        open_folder(folder, "train", label_map=label_map)


@pytest.mark.parametrize("label_map", [{128: 1, 7: -1}, {"128,64,0": 1, "0,0,0": -1}])
def test_label_map_on_the_command_line(label_map: dict[int | str, int]):
    """And in the configuration of the run, which a run that goes on reads."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SegmentationData, "data")
    options = parser.parse_args(["--data.label_map", json.dumps(label_map)])
    assert options.data.label_map == label_map
    assert parser.parse_string(parser.dump(options)).data.label_map == label_map


@pytest.mark.parametrize("value", [-1, 70_000])
def test_label_map_of_impossible_values(folder: Path, value: int):
    with pytest.raises(ValueError, match=r"--data\.label_map: expected values 0 to 65535 and"):
        open_folder(folder, "train", label_map={value: 1})


def test_bilevel_mask_and_palette(tmp_path: Path):
    write(tmp_path / "images/train/x.png", image())
    write(tmp_path / "images/train/y.png", image())
    write(tmp_path / "masks/train/x.png", mask(0, 1).astype(bool))
    indexed = Image.fromarray(mask(1, 0), "P")
    indexed.putpalette([10, 20, 30, 40, 50, 60])
    indexed.save(tmp_path / "masks/train/y.png")
    data = open_two(tmp_path)
    assert data[0][1][:2, 0].tolist() == [0, 1] and data[1][1][:2, 0].tolist() == [1, 0]


def test_messages_name_the_file(folder: Path):
    root = folder
    with pytest.raises(
        ValueError, match=r"--data\.root: expected the directory of the data set folder"
    ):
        SegmentationData("folder").splits()
    with pytest.raises(ValueError, match=r"leftImg8bit.* does not exist|gtFine.* does not exist"):
        SegmentationData("cityscapes", str(root)).splits()
    with pytest.raises(ValueError, match=r"b.png: expected 4 channels \(--data.channels\), got 3"):
        open_folder(root, "train", channels=4)[1]
    write(root / "masks/train/b.png", mask(7, height=4, width=5))
    with pytest.raises(ValueError, match=r"masks/train/b.png: label values \[7\] are not those of"):
        open_folder(root, "train")[1]
    write(root / "masks/train/b.png", mask(1))
    data = open_folder(root, "train")
    for read in (data.__getitem__, data.read_labels):
        with pytest.raises(ValueError, match=r"b.png: expected the size of its image, \(4, 5\)"):
            read(1)
    write(root / "masks/train/b.png", image(4, 5))
    with pytest.raises(ValueError, match=r"b.png: expected one channel of integer labels"):
        open_folder(root, "train")[1]
    (root / "masks/train/a/1.png").unlink()
    with pytest.raises(ValueError, match=r"masks/train/a/1.png does not exist: the mask of .*jpg"):
        open_folder(root, "train")
    (root / "classes.txt").unlink()
    with pytest.raises(ValueError, match=r"classes.txt does not exist: write the name"):
        open_folder(root, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Straße\nthing".encode("latin-1"), r"classes.txt: expected UTF-8, got .* byte 0xdf"),
        ("a\nb".encode("utf-16"), r"classes.txt: expected UTF-8"),
        (b"\n \n", r"classes.txt is empty: expected the name of a class on each line"),
        (b"a\nb\na\n", r"classes.txt: expected each name once, got again: a$"),
        (b"a\n", r"classes.txt: expected 2 classes or more, got 1"),
    ],
)
def test_names_of_classes_that_cannot_be(content: bytes, message: str, folder: Path):
    (folder / "classes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_folder(folder, "train")


def test_links_to_folders_are_followed(folder: Path, tmp_path: Path):
    for kind, content in (("images", image()), ("masks", mask(0))):
        write(tmp_path / f"elsewhere/{kind}/c.png", content)
        (folder / kind / "train/more").symlink_to(tmp_path / "elsewhere" / kind)
    assert len(open_folder(folder, "train")) == 3
    (folder / "images/train/itself").symlink_to(folder / "images")
    with pytest.raises(ValueError, match=r"train/itself is a link to a folder that contains it"):
        open_folder(folder, "train")


def test_files_of_a_folder_that_do_not_pair(folder: Path):
    write(folder / "images/train/.hidden/b.jpg", image())
    (folder / "images/train/a/._1.jpg").write_bytes(b"of macOS")
    (folder / "masks/train/._b.png").write_bytes(b"of macOS")
    assert len(open_folder(folder, "train")) == 2
    write(folder / "masks/train/c.png", mask(0))
    with pytest.raises(ValueError, match=r"masks/train/c.png has no image in .*images/train"):
        open_folder(folder, "train")
    write(folder / "images/train/c.png", image())
    write(folder / "images/train/c.jpg", image())
    with pytest.raises(ValueError, match=r"train/c.png is next to .*train/c.jpg: expected one"):
        open_folder(folder, "train")
    (folder / "images/train/c.jpg").unlink()
    write(folder / "masks/train/c.tif", mask(0))
    with pytest.raises(ValueError, match=r"masks/train/c.tif is next to .*c.png: expected one"):
        open_folder(folder, "train")


def test_image_with_a_nan(tmp_path: Path):
    values = np.zeros((6, 9), np.float32)
    values[:] = np.nan
    write(tmp_path / "images/train/x.tif", values)
    write(tmp_path / "masks/train/x.png", mask(0, 1))
    with pytest.raises(ValueError, match=r"x.tif cannot be read: expected finite values, .* 100 %"):
        open_two(tmp_path)[0]


def oriented(path: Path, array: np.ndarray, orientation: int | None) -> np.ndarray:
    """Write a file, and return what PIL shows of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        extra = [(0x112, "H", 1, orientation or 1, True)]
        tifffile.imwrite(path, array, extratags=extra, metadata=None)
    else:
        stored = Image.fromarray(array)
        exif = stored.getexif()
        if orientation:
            exif[0x112] = orientation
        stored.save(path, exif=exif, **({"quality": 100} if path.suffix == ".jpg" else {}))
    with Image.open(path) as file:
        return np.asarray(ImageOps.exif_transpose(file))


@pytest.mark.parametrize("ending", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_both_files(orientation: int, ending: str, tmp_path: Path):
    """As in the pictures of a phone."""
    shown = oriented(tmp_path / f"images/train/x{ending}", image(), orientation)
    labels = oriented(tmp_path / "masks/train/x.png", mask(0, 1, 0), orientation)
    data = open_two(tmp_path)
    pixels, read = data[0]
    assert torch.equal(data.read_labels(0), read)
    assert pixels.permute(1, 2, 0).tolist() == shown.tolist() and read.tolist() == labels.tolist()


@pytest.mark.parametrize("orientation", range(5, 9))
def test_orientation_that_the_sizes_tell(orientation: int, tmp_path: Path):
    """A mask of the upright image, and one of the stored pixels: both are shown upright."""
    shown = oriented(tmp_path / "images/train/x.png", image(), orientation)
    drawn = np.arange(9 * 6, dtype=np.uint8).reshape(9, 6) % 2
    write(tmp_path / "masks/train/x.png", drawn)
    pixels, read = open_two(tmp_path)[0]
    assert pixels.permute(1, 2, 0).tolist() == shown.tolist() and read.tolist() == drawn.tolist()
    stored = mask(0, 1, 0)
    upright = oriented(tmp_path / "masks/train/y.png", stored, orientation)
    (tmp_path / "masks/train/y.png").unlink()
    write(tmp_path / "masks/train/x.png", stored)
    data = open_two(tmp_path)
    pixels, read = data[0]
    assert torch.equal(data.read_labels(0), read)
    assert pixels.permute(1, 2, 0).tolist() == shown.tolist() and read.tolist() == upright.tolist()


@pytest.mark.parametrize(("orientation", "size"), [(3, (6, 9)), (2, (6, 9)), (6, (8, 8))])
def test_orientation_that_nothing_tells(orientation: int, size: tuple[int, int], tmp_path: Path):
    oriented(tmp_path / "images/train/x.jpg", image(*size), orientation)
    write(tmp_path / "masks/train/x.png", mask(0, 1, height=size[0], width=size[1]))
    expected = rf"x.jpg: the EXIF orientation is {orientation}, that of .*x.png is 1, and the sizes"
    data = open_two(tmp_path)
    for read in (data.__getitem__, data.read_labels):
        with pytest.raises(ValueError, match=expected):
            read(0)


def test_orientation_after_the_pixels_of_a_png_image(tmp_path: Path):
    path = tmp_path / "x.png"
    oriented(path, image(), 6)
    content = path.read_bytes()
    start = content.find(b"eXIf") - 4
    (length,) = struct.unpack(">I", content[start : start + 4])
    moved = content[start : start + length + 12]
    kept = content.replace(moved, b"")
    end = kept.index(b"IEND") - 4
    path.write_bytes(kept[:end] + moved + kept[end:])
    assert read_size(path, (6, 9)) == ((6, 9), 6) and read_image(path, (6, 9))[1] == 6


@pytest.mark.parametrize("shape", [(6, 9), (6, 9, 5), (7, 6, 9), (9, 6, 3)])
def test_size_in_the_header_of_a_tiff_image(shape: tuple[int, ...], tmp_path: Path):
    write(tmp_path / "x.tif", np.zeros(shape, np.uint8))
    for size in ((6, 9), (9, 6)):
        stored, _ = read_image(tmp_path / "x.tif", size)
        assert read_size(tmp_path / "x.tif", size) == (stored.shape[1:], 1)


def test_cityscapes(tmp_path: Path):
    for split, city in (("train", "ulm"), ("val", "lindau")):
        stem = f"{split}/{city}/{city}_0_0"
        write(tmp_path / f"leftImg8bit/{stem}_leftImg8bit.png", image())
        write(tmp_path / f"gtFine/{stem}_gtFine_labelIds.png", mask(7, 0, 33, 3, 11, 31))
        write(tmp_path / f"gtFine/{stem}_gtFine_color.png", image())
    train, _ = SegmentationData("cityscapes", str(tmp_path)).splits()
    assert len(train) == 1 and len(train.classes) == 19
    assert train[0][1][:, 0].tolist() == [0, -1, 18, -1, 2, 16]


def test_ade20k(tmp_path: Path):
    for split in ("training", "validation"):
        write(tmp_path / f"images/{split}/ADE_1.jpg", image())
        write(tmp_path / f"annotations/{split}/ADE_1.png", mask(0, 1, 150))
    _, val = SegmentationData("ade20k", str(tmp_path)).splits()
    assert len(val.classes) == 150 and val[0][1][:3, 0].tolist() == [-1, 0, 149]


def test_pascal_context(tmp_path: Path):
    for split, name in (("train", "2008_1"), ("val", "2008_2")):
        write(tmp_path / f"JPEGImages/{name}.jpg", image())
        write(tmp_path / f"SegmentationClassContext/{name}.png", mask(0, 1, 59))
        lists = tmp_path / "ImageSets/SegmentationContext"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text(f"{name}\n")
    train, _ = SegmentationData("pascal-context", str(tmp_path)).splits()
    assert len(train.classes) == 59 and train[0][1][:3, 0].tolist() == [-1, 0, 58]
    (lists / "val.txt").write_text("2008_3\n")
    with pytest.raises(ValueError, match=r"2008_3.jpg does not exist"):
        SegmentationData("pascal-context", str(tmp_path)).splits()


def test_coco_stuff(tmp_path: Path):
    (tmp_path / "imageLists").mkdir()
    for split, name in (("train", "COCO_1"), ("test", "COCO_2")):
        write(tmp_path / f"images/{name}.jpg", image())
        write(tmp_path / f"annotations/{name}.mat", mask(0, 1, 13, 182, 12))
        (tmp_path / f"imageLists/{split}.txt").write_text(name)
    train, _ = SegmentationData("coco-stuff-10k", str(tmp_path)).splits()
    assert len(train.classes) == 171
    assert train[0][1][:5, 0].tolist() == [-1, 0, 11, 170, -1]
    for year in ("train2017", "val2017"):
        write(tmp_path / f"images/{year}/1.jpg", image())
        write(tmp_path / f"annotations/{year}/1.png", mask(255, 0, 12, 181, 11))
    train, _ = SegmentationData("coco-stuff-164k", str(tmp_path)).splits()
    assert train[0][1][:5, 0].tolist() == [-1, 0, 11, 170, -1]


def test_camvid(tmp_path: Path):
    """The folders of the SegNet tutorial; 11 is void."""
    for number, split in enumerate(("train", "val", "test")):
        for name in range(number + 1):
            write(tmp_path / f"{split}/000{name}TP.png", image())
            write(tmp_path / f"{split}annot/000{name}TP.png", mask(0, 10, 11))
    train, val = SegmentationData("camvid", str(tmp_path)).splits()
    _, test = SegmentationData("camvid", str(tmp_path), split="test").splits()
    assert (len(train), len(val), len(test)) == (1, 2, 3) and len(train.classes) == 11
    assert train.classes[10] == "bicyclist" and test[2][1][:3, 0].tolist() == [0, 10, -1]


def test_split_of_a_validation(folder: Path):
    for kind in ("images", "masks"):
        (folder / kind / "val").rename(folder / kind / "test")
    data = SegmentationData("folder", str(folder), split="test")
    assert len(data.splits()[1]) == 2
    with pytest.raises(ValueError, match=r"--data\.split: cityscapes has train, val, got test"):
        open_published("cityscapes", folder, "test")
    with pytest.raises(ValueError, match=r"--data\.split: digits has train, val, got test"):
        SegmentationData(split="test").splits()
