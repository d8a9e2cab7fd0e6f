"""Formats of images and masks, written by their specifications or by Pillow; damaged files."""

import io
import struct
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.io import savemat

from anchorops.train.data.images import read_image, read_mask, read_upright
from tests.helpers.image_files import image, mask, png, tiff, write

GREY = [[0, 1, 2, 3], [3, 2, 1, 0]]
BINARY = [[0, 1, 1, 0], [1, 1, 0, 0]]
WIDE = [[0, 1, 4660, 65_535]]
RGB = [[[0, 1, 65_535], [256, 257, 4660]]] * 2
RGBA = [[[0, 1, 65_535, 9], [256, 257, 4660, 0]]] * 2
OPAQUE = [[[3, 65_535], [700, 65_535]]] * 2
OPAQUE_8 = [[[7, 255], [9, 255]]]
CMYK = [[[0, 0, 0, 0], [255, 0, 0, 0], [0, 51, 255, 0], [0, 0, 0, 255], [0, 128, 0, 128]]] * 2
FROM_CMYK = [[[255, 255, 255], [0, 255, 255], [255, 204, 0], [0, 0, 0], [127, 63, 127]]] * 2
PLANES = [[[0, 1, 2, 3, 4]] * 2, [[5, 6, 7, 8, 9]] * 2, [[10, 11, 12, 13, 255]] * 2]
FROM_PLANES = [[[0, 5, 10], [1, 6, 11], [2, 7, 12], [3, 8, 13], [4, 9, 255]]] * 2
PALETTE = [[9, 8, 7], [0, 0, 200], [5, 5, 5], [255, 0, 0]]
PALETTE_BYTES = bytes(x for colour in PALETTE for x in colour)
PALETTE_16 = [x << 8 for channel in zip(*PALETTE, strict=True) for x in (*channel, *[0] * 12)]
BLACK_IS_ZERO, WHITE_IS_ZERO, IN_RGB, IN_PALETTE, IN_CMYK, IN_LAB = 1, 0, 2, 3, 5, 8

CHANNELS = r": expected one channel of integer labels, got \w+ of shape .* --data\.label_map"
TRANSPARENT = ": expected an opaque mask, got 1 transparent"


def by_pillow(samples: list, kind: str, compression: str | None = None, ending="TIFF") -> bytes:
    dtype = {"palette": "uint8", "YCbCr": "uint8", "bits": "bool"}.get(kind, kind)
    picture = Image.fromarray(np.array(samples, dtype))
    if kind == "palette":
        picture.putpalette(PALETTE_BYTES)
    if kind == "YCbCr":
        picture = picture.convert(kind)
    file = io.BytesIO()
    picture.save(file, ending, compression=compression)
    return file.getvalue()


def by_tifffile(samples: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, samples, **options)
    return file.getvalue()


def times(factor: int, samples: list) -> list:
    return [[[factor * sample] for sample in row] for row in samples]


def share(white: int, samples: list) -> list:
    values = np.array(samples, np.float32) / white
    return (values if values.ndim == 3 else values[..., None]).tolist()


def coloured(samples: list) -> list:
    return [[PALETTE[sample] for sample in row] for row in samples]


# files; what an image shows, and what a mask stores, or errors
FORMATS: dict[str, tuple[bytes, Any, Any]] = {
    "grey_1.png": (png(BINARY, 1, 0), times(255, BINARY), BINARY),
    "grey_2.png": (png(GREY, 2, 0), times(85, GREY), GREY),
    "grey_4.png": (png(GREY, 4, 0), times(17, GREY), GREY),
    "grey_8.png": (png(GREY, 8, 0), times(1, GREY), GREY),
    "grey_16.png": (png(WIDE, 16, 0), share(65_535, WIDE), WIDE),
    "grey_alpha_16.png": (png(OPAQUE, 16, 4), share(65_535, OPAQUE), [[3, 700]] * 2),
    "palette_1.png": (png(BINARY, 1, 3, PALETTE_BYTES[:6]), coloured(BINARY), BINARY),
    "palette_2.png": (png(GREY, 2, 3, PALETTE_BYTES), coloured(GREY), GREY),
    "palette_4.png": (png(GREY, 4, 3, PALETTE_BYTES), coloured(GREY), GREY),
    "palette_8.png": (png(GREY, 8, 3, PALETTE_BYTES), coloured(GREY), GREY),
    "alpha_8.png": (png(OPAQUE_8, 8, 4), OPAQUE_8, [[7, 9]]),
    "transparent.png": (png([[[7, 255], [9, 254]]], 8, 4), [[[7, 255], [9, 254]]], TRANSPARENT),
    "rgb_8.png": (png(FROM_CMYK, 8, 2), FROM_CMYK, CHANNELS),
    "rgb_16.png": (png(RGB, 16, 2), share(65_535, RGB), CHANNELS),
    "rgb_alpha_16.png": (png(RGBA, 16, 6), share(65_535, RGBA), CHANNELS),
    "misnamed.png": (tiff(RGB, 16, IN_RGB), share(65_535, RGB), CHANNELS),
    "grey_1.tif": (tiff(BINARY, 1, BLACK_IS_ZERO), times(255, BINARY), BINARY),
    "grey_2.tif": (tiff(GREY, 2, BLACK_IS_ZERO), times(85, GREY), GREY),
    "grey_4.tif": (tiff(GREY, 4, BLACK_IS_ZERO), times(17, GREY), GREY),
    "grey_12.tif": (tiff(GREY, 12, BLACK_IS_ZERO), share(4095, GREY), GREY),
    "grey_16.tif": (tiff(WIDE, 16, BLACK_IS_ZERO), share(65_535, WIDE), WIDE),
    "tiled.tif": (tiff(WIDE, 16, BLACK_IS_ZERO, tile=16), share(65_535, WIDE), WIDE),
    "white_1.tif": (
        tiff(BINARY, 1, WHITE_IS_ZERO),
        times(255, [[1, 0, 0, 1], [0, 0, 1, 1]]),
        BINARY,
    ),
    "white_8.tif": (tiff([[0, 250]], 8, WHITE_IS_ZERO), [[[255], [5]]], [[0, 250]]),
    "white_16.tif": (tiff([[0, 65_535]], 16, WHITE_IS_ZERO), [[[1.0], [0.0]]], [[0, 65_535]]),
    "palette_1.tif": (
        tiff(BINARY, 1, IN_PALETTE, palette=[0, 65_535, 0, 256, 0, 0]),
        [[[0, 0, 0] if sample == 0 else [255, 1, 0] for sample in row] for row in BINARY],
        BINARY,
    ),
    "palette_4.tif": (tiff(GREY, 4, IN_PALETTE, palette=PALETTE_16), coloured(GREY), GREY),
    "rgb_16.tif": (tiff(RGB, 16, IN_RGB), share(65_535, RGB), CHANNELS),
    "planes.tif": (tiff(PLANES, 8, IN_RGB, in_planes=True), FROM_PLANES, CHANNELS),
    "cmyk.tif": (tiff(CMYK, 8, IN_CMYK), FROM_CMYK, CHANNELS),
    "lab.tif": (tiff(CMYK, 8, IN_LAB), r"lab.tif cannot be read: .* got CIELAB", CHANNELS),
    "ycbcr.tif": (by_pillow(FROM_CMYK, "YCbCr"), r"cannot be read: .* got YCBCR", CHANNELS),
    "float.tif": (by_pillow([[0.5, -2]], "float32", "tiff_lzw"), [[[0.5], [-2]]], CHANNELS),
    "int32.tif": (by_pillow([[5, 70_000]], "int32"), r"8 to 16 bits or floats", [[5, 70_000]]),
    "palette.gif": (by_pillow(GREY, "palette", ending="GIF"), coloured(GREY), GREY),
    "palette.bmp": (by_pillow(GREY, "palette", ending="BMP"), coloured(GREY), GREY),
    "palette_lzw.tif": (by_pillow(GREY, "palette", "tiff_lzw"), coloured(GREY), GREY),
}
for name in ("tiff_lzw", "tiff_adobe_deflate", "zstd", "packbits"):
    FORMATS[f"{name}.tif"] = by_pillow(GREY, "uint8", name), times(1, GREY), GREY
for name in ("group3", "group4", "tiff_ccitt") if sys.version_info >= (3, 11) else ():
    FORMATS[f"{name}.tif"] = by_pillow(BINARY, "bits", name), times(255, BINARY), BINARY


def assert_read(read: Callable[[], np.ndarray], expected: Any) -> None:
    """expected: what is read, or the error."""
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            read()
    else:
        assert read().tolist() == expected


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, tmp_path: Path):
    content, shown, stored = FORMATS[name]
    path = tmp_path / name
    path.write_bytes(content)
    *size, channels = np.shape(shown) or (1,)
    read = partial(read_image, path, channels, size)
    assert_read(lambda: read()[0].permute(1, 2, 0).numpy(), shown)
    assert_read(lambda: read_mask(path)[0].astype(int), stored)
    # the header tells the shape, or the same error
    assert_read(
        lambda: np.array(read(header=True)[0].shape),
        shown if isinstance(shown, str) else [channels, *size],
    )


BLACK_AND_WHITE = [[0, 0xFFFFFF]]
FROM_PLANES_CODES = [[0x00050A, 0x01060B, 0x02070C, 0x03080D, 0x0409FF]] * 2
COLOURS: dict[str, tuple[bytes, Any]] = {
    "rgb.png": (png([[[0] * 3, [255] * 3]], 8, 2), BLACK_AND_WHITE),
    "grey.png": (png([[0, 1]], 1, 0), BLACK_AND_WHITE),
    "palette.png": (png([[1, 0]], 8, 3, b"\xff\xff\xff\0\0\0"), BLACK_AND_WHITE),
    "white.tif": (tiff([[1, 0]], 1, WHITE_IS_ZERO), BLACK_AND_WHITE),
    "planes.tif": (tiff(PLANES, 8, IN_RGB, in_planes=True), FROM_PLANES_CODES),
    "alpha.png": (png([[[1, 2, 3, 255], [0, 0, 0, 255]]], 8, 6), [[0x010203, 0]]),
    "transparent.png": (png([[[7, 255], [9, 254]]], 8, 4), TRANSPARENT),
    "wide.png": (png(RGB, 16, 2), "wide.png: expected colours of 8 bits, .* got float32"),
}


@pytest.mark.parametrize("name", COLOURS)
def test_colours(name: str, tmp_path: Path):
    content, expected = COLOURS[name]
    (tmp_path / name).write_bytes(content)
    assert_read(lambda: read_mask(tmp_path / name, colours=True)[0], expected)


RED = np.full((16, 16, 3), [255, 0, 0], np.uint8)
LOSSY: dict[str, tuple[bytes, str]] = {
    "jpeg.tif": (by_pillow(RED.tolist(), "uint8", "jpeg"), "JPEG may change labels: save the mask"),
    "x.jpg": (by_pillow(RED.tolist(), "uint8", ending="JPEG"), "expected PNG, .* TIFF, got JPEG"),
    "x.png": (b"P5 1 1 65535\n\x12\x34", "expected PNG, GIF, BMP or TIFF, got PPM"),
}
for name in ("jpeg2000", "lerc", "jpegxl"):
    content = by_tifffile(mask(0, 1, 2), compression=name)
    LOSSY[f"{name}.tif"] = content, f"{name.upper()} may change labels"


@pytest.mark.parametrize("name", LOSSY)
def test_formats_that_change_values(name: str, tmp_path: Path):
    """JPEG shows what was saved, but with small errors; PPM of 16 bits becomes one of 8."""
    path, (content, reason) = tmp_path / name, LOSSY[name]
    path.write_bytes(content)
    for colours in (False, True):
        with pytest.raises(ValueError, match=f"{name} cannot be read: {reason}"):
            read_mask(path, colours=colours)
    if name in ("jpeg.tif", "x.jpg"):
        picture = read_upright(path, 3).permute(1, 2, 0)
        assert np.abs(picture.numpy().astype(int) - RED).max() <= 2
    elif name == "x.png":
        with pytest.raises(ValueError, match=r"x.png cannot be read: expected .* TIFF, got PPM"):
            read_upright(path, 1)


@pytest.mark.parametrize("size", [(5, 1), (5, 3), (5, 4), (2, 3)])
def test_planes(size: tuple[int, int], tmp_path: Path):
    """An image of three or four columns that is stored as three planes."""
    planes = np.arange(3 * size[0] * size[1], dtype=np.uint8).reshape(3, *size)
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, planes, photometric="rgb", planarconfig="separate")
    red, green, blue = planes.astype(int)
    assert read_mask(path, colours=True)[0].tolist() == (red << 16 | green << 8 | blue).tolist()
    for masked in ((), size):
        assert read_image(path, 3, masked)[0].tolist() == planes.tolist()
        assert read_image(path, 3, masked, header=True)[0].shape == planes.shape


@pytest.mark.parametrize("options", [{}, {"metadata": None}, {"compression": "zlib"}])
@pytest.mark.parametrize("shape", [(1, 6, 9), (6, 9, 1), (1, 1, 54), (54, 1, 1)])
def test_mask_with_an_axis_of_one(shape: tuple[int, ...], options: Any, tmp_path: Path):
    tifffile.imwrite(tmp_path / "x.tif", mask(0, 1, 2).reshape(shape), **options)
    values, _ = read_mask(tmp_path / "x.tif")
    assert values.ndim == 2 and values.flatten().tolist() == mask(0, 1, 2).flatten().tolist()


def test_images_above_pillows_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 25)
    for ending in ("png", "tif"):
        write(tmp_path / f"x.{ending}", mask(0, 1))
    limited = r"png cannot be read: .* \(54 pixels\) exceeds .* save it as TIFF"
    for name, expected in (("x.png", limited), ("x.tif", mask(0, 1).tolist())):
        assert_read(lambda path=tmp_path / name: read_upright(path, 1)[0].numpy(), expected)
        assert_read(lambda path=tmp_path / name: read_mask(path)[0], expected)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) * 2 // 3],
    "empty": lambda _: b"",
    "page": lambda _: b"<html>\nnot found\n</html>",
    "zeros": lambda content: content[:40] + bytes(len(content) - 40),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif", "lzw.tif", "jpeg.tif", "x.mat"])
def test_damaged_file(name: str, damage: str, tmp_path: Path):
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(256, size=(64, 64), dtype=np.uint8)
    if path.suffix == ".tif":
        tifffile.imwrite(path, noise, compression=path.stem if path.stem != "x" else None)
    else:
        write(path, noise)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    for read in (lambda: read_upright(path, 1), lambda: read_mask(path)):
        with pytest.raises(ValueError) as raised:
            read()
        message = str(raised.value)
        assert message.startswith(f"{path} cannot be read: ") and "\n" not in message


def chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", checksum)


LARGE = zlib.compress(bytes(3_000_000))
METADATA = {
    "short pHYs": chunk(b"pHYs", b"123"),
    "short gAMA": chunk(b"gAMA", b"1"),
    "short sRGB": chunk(b"sRGB", b""),
    "wrong checksum": chunk(b"pHYs", b"123456789")[:-1] + b"?",
    "large profile": chunk(b"iCCP", b"x\0\0" + LARGE),
    "damaged profile": chunk(b"iCCP", b"x\0?"),
    "large text": chunk(b"zTXt", b"x\0\0" + LARGE),
    "large international text": chunk(b"iTXt", b"x\0\1\0\0\0" + LARGE),
    "damaged text": chunk(b"zTXt", b"x\0?"),
    "damaged EXIF in a text": chunk(b"tEXt", b"Raw profile type exif\0\n\n\nno digits"),
    "damaged EXIF": chunk(b"eXIf", b"neither II nor MM"),
}


@pytest.mark.parametrize("name", METADATA)
def test_damaged_or_large_metadata_of_a_png_file(name: str, tmp_path: Path):
    """Before and behind the pixels. The orientation in intact EXIF is kept."""
    path, metadata = tmp_path / "x.png", METADATA[name]
    exif = Image.Exif()
    exif[0x112] = 6
    intact = b"" if "EXIF" in name else chunk(b"eXIf", exif.tobytes()[6:])
    start, content = png(WIDE, 16, 0)[:33], png(WIDE, 16, 0)[33:-12]
    for parts in ((intact, metadata, content), (content, metadata, intact)):
        path.write_bytes(start + b"".join(parts) + chunk(b"IEND", b""))
        assert read_mask(path)[0].tolist() == WIDE
        picture = read_upright(path, 1)
        assert picture.flatten().tolist() == np.ravel(share(65_535, WIDE)).tolist()
        assert picture.shape == ((1, 4, 1) if intact else (1, 1, 4))


@pytest.mark.parametrize("ending", ["jpg", "tif", "webp"])
def test_damaged_exif_of_other_files(ending: str, tmp_path: Path):
    path = tmp_path / f"x.{ending}"
    if ending == "tif":
        path.write_bytes(by_tifffile(image(), extratags=[(0x112, "H", 2, (6, 6), True)]))
    else:
        Image.fromarray(image()).save(path, exif=b"Exif\0\0neither II nor MM")
    assert read_upright(path, 3).shape == (3, 6, 9)


def test_mat_file_without_labels(tmp_path: Path):
    savemat(tmp_path / "x.mat", {"other": mask(0, 1)})
    with pytest.raises(ValueError, match=r"x.mat cannot be read: expected a variable S"):
        read_mask(tmp_path / "x.mat")
