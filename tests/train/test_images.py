"""Formats of images and masks, written by their specifications or by libraries; damaged files."""

import io
import os
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from anchorops.train.data.images import has_data, read_image, read_mask
from tests.helpers.image_files import chunk, png, tiff, write

BINARY = np.array([[0, 1, 1, 0], [1, 1, 0, 0]])
GREY = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
WIDE = np.array([[0, 1, 4660, 65_535]])
RGBA = np.arange(24).reshape(2, 3, 4) * 2849
OPAQUE = np.array([[[3, 65_535], [700, 65_535]]])
TRANSPARENT = np.array([[[7, 255], [9, 254]]])
CMYK = np.array([[[255, 0, 0, 0], [0, 51, 255, 0], [0, 128, 0, 128]]] * 2)
FROM_CMYK = np.array([[[0, 255, 255], [255, 204, 0], [127, 63, 127]]] * 2)
PLANES = np.arange(7 * 6 * 9).reshape(7, 6, 9) % 256
GREEN = np.full((16, 16, 3), [10, 200, 90])  # which JPEG keeps
PALETTE = np.array([[9, 8, 7], [0, 0, 200], [5, 5, 5], [255, 0, 0]], np.uint8)
BLACK_IS_ZERO, WHITE_IS_ZERO, IN_RGB, IN_PALETTE, IN_CMYK, IN_LAB = 1, 0, 2, 3, 5, 8

NO_LABELS = r": expected one channel of integer labels, .* --data\.label_map .*, got \w+ of shape"
NOT_OPAQUE = ": expected an opaque mask, got transparent pixels"
LOSSY = "cannot be read: .*{}.* may change labels: save the mask with another one"
UNKNOWN = "cannot be read: expected PNG, .* TIFF"


def by_pillow(samples: np.ndarray, dtype: str, palette: Any = None, **options: Any) -> bytes:
    picture = Image.fromarray(samples.astype(dtype))
    if palette is not None:
        picture.putpalette(palette.tobytes())
    file = io.BytesIO()
    picture.save(file, **{"format": "TIFF", **options})
    return file.getvalue()


def by_tifffile(samples: np.ndarray, dtype: str = "uint8", **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, samples.astype(dtype), **options)
    return file.getvalue()


def grey(samples: np.ndarray, bits: int) -> np.ndarray:
    """What is shown: all of 0 to 255, or the values of more bits."""
    if bits > 8:
        return np.atleast_3d(samples.astype(np.float32))
    return np.atleast_3d(255 // (2**bits - 1) * samples)


# files; what an image shows, and what a mask stores, or errors
FORMATS: dict[str, tuple[bytes, Any, Any]] = {
    "grey_alpha_16.png": (png(OPAQUE, 16, 4), grey(OPAQUE, 16), OPAQUE[..., 0]),
    "transparent.png": (png(TRANSPARENT, 8, 4), TRANSPARENT, NOT_OPAQUE),
    "rgb_alpha_16.png": (png(RGBA, 16, 6), grey(RGBA, 16), NO_LABELS),
    "misnamed.png": (tiff(RGBA[..., :3], 16, IN_RGB), grey(RGBA[..., :3], 16), NO_LABELS),
    "grey_12.tif": (tiff(GREY, 12, BLACK_IS_ZERO), grey(GREY, 12), GREY),
    "tiled.tif": (tiff(WIDE, 16, BLACK_IS_ZERO, tile=16), grey(WIDE, 16), WIDE),
    "white_8.tif": (tiff(GREY, 8, WHITE_IS_ZERO), 255 - grey(GREY, 8), GREY),
    "white_16.tif": (tiff(WIDE[:, ::3], 16, WHITE_IS_ZERO), [[[65_535.0], [0.0]]], WIDE[:, ::3]),
    "cmyk_16.tif": (tiff(CMYK, 16, IN_CMYK), "expected grey or RGB of more than 8", NO_LABELS),
    "palette_1.tif": (
        tiff(BINARY, 1, IN_PALETTE, palette=[0, 65_535, 0, 256, 0, 0]),
        BINARY[..., None] * [255, 1, 0],
        BINARY,
    ),
    "cmyk.tif": (tiff(CMYK, 8, IN_CMYK), FROM_CMYK, NO_LABELS),
    "lab.tif": (tiff(CMYK, 8, IN_LAB), r"lab.tif cannot be read: ", NO_LABELS),
    "float.tif": (by_pillow(WIDE / -2, "float32"), WIDE[..., None] / -2, NO_LABELS),
    "inf.tif": (
        by_pillow(np.full((1, 4), np.inf), "float32"),
        f"(finite values|{NO_LABELS})",
        NO_LABELS,
    ),
    "int16.tif": (by_tifffile(GREY - 1024, "int16"), GREY[..., None] - 1024.0, GREY - 1024),
    "int32.tif": (by_pillow(WIDE * 2, "int32"), r"8 to 16 bits or floats", WIDE * 2),
    "jpeg.tif": (
        by_pillow(GREEN, "uint8", compression="jpeg", quality=100),
        GREEN,
        LOSSY.format("JPEG"),
    ),
    # of 16 bits, which Pillow reduces to 8
    "ppm.png": (b"P5 1 1 65535\n\x12\x34", UNKNOWN, UNKNOWN),
}
for bits, samples in ((1, BINARY), (2, GREY), (4, GREY), (8, GREY), (16, WIDE)):
    FORMATS[f"grey_{bits}.png"] = png(samples, bits, 0), grey(samples, bits), samples
    FORMATS[f"grey_{bits}.tif"] = tiff(samples, bits, BLACK_IS_ZERO), grey(samples, bits), samples
for bits in (2, 4, 8):
    FORMATS[f"palette_{bits}.png"] = png(GREY, bits, 3, PALETTE.tobytes()), PALETTE[GREY], GREY
for name in ("GIF", "BMP"):
    FORMATS[f"palette.{name}"] = by_pillow(GREY, "uint8", PALETTE, format=name), PALETTE[GREY], GREY
for name in ("tiff_lzw", "tiff_adobe_deflate", "zstd", "packbits"):
    FORMATS[f"{name}.tif"] = by_pillow(GREY, "uint8", compression=name), grey(GREY, 8), GREY
for name in ("jpeg2000", "lerc", "jpegxl"):
    content = by_tifffile(GREY, compression=name)
    FORMATS[f"{name}.tif"] = content, grey(GREY, 8), LOSSY.format(name.upper())
for name, options in (("JPEG", {"quality": 100}), ("WEBP", {"lossless": True})):
    content = by_pillow(GREEN, "uint8", format=name, exif=b"Exif\0\0neither II nor MM", **options)
    FORMATS[f"damaged_exif.{name}"] = content, GREEN, UNKNOWN
for planes in (PLANES, PLANES.reshape(7, 9, 6)):
    FORMATS[f"{planes.shape}.tif"] = by_tifffile(planes), np.moveaxis(planes, 0, 2), NO_LABELS
for shape in ((1, 6, 9), (6, 9, 1), (1, 1, 54), (54, 1, 1)):  # an axis of one
    samples = PLANES[0].reshape((6, 9) if 6 in shape else (shape[0], -1))
    for options in ({}, {"metadata": None}, {"compression": "zlib"}):
        content = by_tifffile(PLANES[0].reshape(shape), **options)
        FORMATS[f"{shape}_{options}.tif"] = content, grey(samples, 8), samples
for columns in (1, 3, 4, 5):  # as many as there are planes, or channels with alpha
    planes = PLANES[:3, :, :columns]
    content = by_tifffile(planes, photometric="rgb", planarconfig="separate")
    FORMATS[f"{columns}_columns.tif"] = content, np.moveaxis(planes, 0, 2), NO_LABELS


def assert_read(expected: Any, read: Callable[..., Any], *args: Any) -> None:
    """expected: what is read, or the error."""
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            read(*args)
    else:
        np.testing.assert_array_equal(read(*args), expected)


def codes(shown: Any) -> Any:
    """The colours in a mask that shows this, R·2¹⁶ + G·2⁸ + B, or the error."""
    pixels = np.array(shown)
    if pixels.dtype.kind == "U":
        return shown
    if pixels.dtype.kind == "f" or pixels.shape[2] not in (1, 3):
        return f"({NO_LABELS}|{NOT_OPAQUE})"
    return (pixels * [2**16, 2**8, 1]).sum(2)


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, tmp_path: Path):
    content, shown, stored = FORMATS[name]
    path = tmp_path / name
    path.write_bytes(content)
    planes = shown if isinstance(shown, str) else np.moveaxis(shown, 2, 0)
    channels, *_ = np.shape(planes) or (1,)

    assert_read(planes, read_image, path, channels)
    assert_read(stored, read_mask, path)
    unreadable = isinstance(stored, str) and "cannot be read" in stored
    assert_read(stored if unreadable else codes(shown), partial(read_mask, colours=True), path)


@pytest.mark.parametrize("nodata", [np.nan, np.inf])
def test_pixels_without_data(nodata: float, tmp_path: Path):
    """They may have another value in other channels, which must be finite in all other pixels."""
    path, samples = tmp_path / "x.tif", np.array([[[nodata, 1], [2, nodata], [3, 4]]], np.float32)
    path.write_bytes(by_tifffile(samples, "float32", planarconfig="contig"))
    image = read_image(path, 2, nodata)
    assert has_data(image, nodata).tolist() == [[False, False, True]]
    assert_read("x.tif: expected finite values, or --data.nodata", read_image, path, 2, 4.0)


def test_a_pipe_has_no_end(tmp_path: Path):
    os.mkfifo(tmp_path / "x.png")
    assert_read("x.png cannot be read: expected a file, got", read_image, tmp_path / "x.png", 3)


@pytest.mark.parametrize("damage", ["cut", "empty", "page", "zeros"])
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif", "lzw.tif", "jpeg.tif", "x.mat"])
def test_damaged_file(name: str, damage: str, tmp_path: Path):
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(256, size=(64, 64), dtype=np.uint8)
    if path.suffix == ".tif":
        tifffile.imwrite(path, noise, compression=path.stem if path.stem != "x" else None)
    else:
        write(path, noise)
    whole = path.read_bytes()
    zeros = whole[:40] + bytes(len(whole) - 40)
    cut, page = whole[: len(whole) * 2 // 3], b"<html>\nnot found\n</html>"
    path.write_bytes({"cut": cut, "empty": b"", "page": page, "zeros": zeros}[damage])
    one_line = rf"^{path} cannot be read: [^\n]*$"
    assert_read(one_line, read_image, path, 1)
    assert_read(one_line, read_mask, path)


LARGE = zlib.compress(bytes(3_000_000))
METADATA = {
    "short": chunk(b"pHYs", b"123") + chunk(b"gAMA", b"1") + chunk(b"sRGB", b""),
    "large profile": chunk(b"iCCP", b"x\0\0" + LARGE),
    "damaged profile": chunk(b"iCCP", b"x\0?"),
    "large texts": chunk(b"zTXt", b"x\0\0" + LARGE) + chunk(b"iTXt", b"x\0\1\0\0\0" + LARGE),
    "damaged texts": chunk(b"zTXt", b"x\0?") + chunk(b"tEXt", b"Raw profile type exif\0\n\n\n?"),
    "damaged EXIF": chunk(b"eXIf", b"neither II nor MM"),
    "EXIF with a wrong checksum": chunk(b"eXIf", b"MM\0*")[:-1] + b"?",
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
        assert_read(np.rot90(WIDE, -1) if intact else WIDE, read_mask, path)
