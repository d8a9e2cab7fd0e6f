"""Images and masks in files: upright, and as they are stored or as a viewer shows them."""

import io
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any

import imagecodecs
import numpy as np
import tifffile
import torch
from PIL import Image, UnidentifiedImageError
from scipy.io import loadmat
from tifffile import PHOTOMETRIC, PLANARCONFIG
from torch import Tensor

from ..options import expect

ORIENTATION = 0x112  # the tag in EXIF and TIFF: how to turn the stored pixels
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_BITS = 24  # the place of the bits per sample in a PNG file
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Pillow reduces some other formats to 8 bits without a word
LABEL_FORMATS = ("PNG", "GIF", "BMP")
IMAGE_FORMATS = (*LABEL_FORMATS, "JPEG", "WEBP")
Image.MAX_IMAGE_PIXELS = None  # the files are the user's own
LOSSY = ("JPEG", "JP2000", "WEBP", "LERC")  # parts of the names of compressions in TIFF


def read_image(path: Path, channels: int, nodata: float | None = None) -> Tensor:
    """(C, H, W), as a viewer shows it: uint8, fewer bits scaled to 0..255; float32 with the file's
    values for more bits and for floats. Palettes and CMYK become RGB; a grey image gets three equal
    channels, if three are expected. A TIFF file may also be (C, H, W). Raises ValueError that names
    the file, also for a value that is neither finite nor `nodata`."""
    array = _decoded(path, IMAGE_FORMATS)
    first, *_, last = array.shape
    # in other formats than TIFF the last axis has up to 4 channels
    if first in (1, channels) and last not in (1, channels) and last > 4:
        array = np.moveaxis(array, 0, 2)
    found = array.shape[2]
    if found != channels and (found, channels) != (1, 3):
        raise ValueError(
            f"{path}: expected {channels} channels, got {found}: save the image with {channels}, "
            "without an alpha channel, or train a network for them "
            f"(fit --data.channels {found})"
        )
    image = torch.from_numpy(np.moveaxis(array, 2, 0).copy())
    if image.is_floating_point():
        finite = image.isfinite().all(0) | ~has_data(image, nodata)
        expect(bool(finite.all()), path, "finite values, or --data.nodata", "NaN or infinity")
    return image.expand(channels, -1, -1)


def has_data(image: Tensor, nodata: float | None) -> Tensor:
    """bool (H, W): where no channel of an image (C, H, W) has this value, which may be NaN."""
    if nodata is None:
        return torch.ones(image.shape[1:], dtype=torch.bool)
    value = torch.tensor(nodata, dtype=torch.float32)
    return ~(image.isnan() if value.isnan() else image == value).any(0)


def read_mask(path: Path, *, colours: bool = False) -> np.ndarray:
    """The integers (H, W) that a mask stores, or its palette indices, never scaled or inverted;
    colours: the colours that a viewer shows, R·2¹⁶ + G·2⁸ + B, uint32. Raises ValueError that names
    the file, also for lossy compression and for an alpha channel that is not opaque."""
    array = _decoded(path, LABEL_FORMATS, stored=not colours)
    if array.dtype.kind == "u" and array.shape[2] in ((2, 4) if colours else (2,)):
        if (array[..., -1] < np.iinfo(array.dtype).max).any():
            raise ValueError(f"{path}: expected an opaque mask, got transparent pixels")
        array = array[..., :-1]
    right = array.dtype == np.uint8 if colours else array.dtype.kind in "uib"
    if not right or array.shape[2] not in ((1, 3) if colours else (1,)):
        raise ValueError(
            f"{path}: expected one channel of integer labels, or colours of 8 bits and "
            f"--data.label_map '{{\"R,G,B\": CLASS, …}}', got {array.dtype} of shape {array.shape}"
        )
    if not colours:
        return array[..., 0]
    return (array * np.array([2**16, 2**8, 1], np.uint32)).sum(2, dtype=np.uint32)


def _decoded(path: Path, formats: tuple[str, ...], *, stored: bool = False) -> np.ndarray:
    """The upright array (H, W, C) in the file, in some TIFF files (C, H, W): what a viewer shows,
    uint8 or float32; stored: the values and palette indices. Raises ValueError of one line that
    names the file."""
    orientation: Any = None
    try:
        if not S_ISREG(path.stat().st_mode):  # whose end may never come
            raise ValueError("expected a file, got a directory, a pipe or a device")
        content = path.read_bytes()
        if path.suffix == ".mat":
            array = loadmat(path)["S"]
        else:
            decoded = _decoded_tiff if content.startswith(TIFF_STARTS) else _decoded_by_pillow
            array, orientation = decoded(content, formats, stored)
        array = np.atleast_3d(array)
        if array.ndim > 3:
            raise ValueError(f"expected an image, got an array of shape {array.shape}")
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason}") from error
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    axes = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}
    return np.flip(array, axes.get(orientation, ()))


def _decoded_by_pillow(
    content: bytes, formats: tuple[str, ...], stored: bool
) -> tuple[np.ndarray, Any]:
    bits, orientation = None, None
    if content.startswith(PNG_START):
        content, bits = _only_pixels(content), content[PNG_BITS]
    try:
        image = Image.open(io.BytesIO(content), formats=formats)
    except UnidentifiedImageError:
        raise ValueError(f"expected {', '.join(formats)} or TIFF") from None
    with suppress(Exception):  # Pillow has no common one for damaged EXIF
        orientation = image.getexif().get(ORIENTATION)
    if bits == 16 and image.mode != "I;16":  # which Pillow reduces to 8
        array = imagecodecs.png_decode(content)
    elif not stored and image.mode in ("P", "CMYK"):
        array = np.asarray(image.convert("RGB"))
    else:
        array = np.asarray(image)
    if not stored:
        array = _scaled(array, 1 if array.dtype == bool else 8 * array.itemsize)
    elif bits in (2, 4) and image.mode == "L":  # Pillow has scaled them to 0..255
        array = array // (255 // (2**bits - 1))
    return array, orientation


def _only_pixels(content: bytes) -> bytes:
    """A PNG file without metadata other than EXIF: Pillow refuses damaged and large metadata."""
    kept, place = [PNG_START], len(PNG_START)
    while place + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        chunk = content[place : place + 12 + length]
        intact = chunk.endswith(struct.pack(">I", zlib.crc32(chunk[4:-4])))
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND") or (kind == b"eXIf" and intact):
            kept.append(chunk)
        place += len(chunk)
    return b"".join(kept)


def _decoded_tiff(content: bytes, formats: tuple[str, ...], stored: bool) -> tuple[np.ndarray, Any]:
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        if not file.series or not file.pages.first.dataoffsets:
            raise ValueError("it has no image, or is truncated")
        series, page = file.series[0], file.pages.first  # the first image may have several pages
        compression = repr(page.compression)
        if "JPEG" not in formats and any(name in compression for name in LOSSY):
            raise ValueError(f"{compression} may change labels: save the mask with another one")
        ends = [max(np.add(x.dataoffsets, x.databytecounts)) for x in series if x is not None]
        if max(ends) > len(content):  # the decoder of JPEG makes what is missing grey
            raise ValueError("the file is truncated")
        array = file.asarray()
        if page.planarconfig == PLANARCONFIG.SEPARATE and array.ndim == 3:  # (C, H, W)
            array = np.moveaxis(array, 0, 2)
        if array.size == page.imagelength * page.imagewidth:  # (1, H, W) or (H, W, 1)
            array = array.reshape(page.imagelength, page.imagewidth)
        if not stored:
            array = _shown(array, page, content)
        return array, page.tags.valueof(ORIENTATION)


def _shown(array: np.ndarray, page: tifffile.TiffPage, content: bytes) -> np.ndarray:
    """What a viewer shows of the values in a TIFF file, uint8 or float32."""
    meaning = page.tags.valueof("PhotometricInterpretation", PHOTOMETRIC.MINISBLACK)
    as_rgb = meaning == PHOTOMETRIC.YCBCR and "JPEG" in repr(page.compression)
    if as_rgb or meaning in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB):
        return _scaled(array, page.bitspersample)
    if meaning == PHOTOMETRIC.MINISWHITE and array.dtype.kind in "ub" and page.samplesperpixel == 1:
        scaled = _scaled(array, page.bitspersample)
        return (255 if scaled.dtype == np.uint8 else 2**page.bitspersample - 1) - scaled
    if page.bitspersample not in (1, 2, 4, 8):  # which Pillow would reduce to 8
        raise ValueError(f"expected grey or RGB of more than 8 bits, got {meaning!r}")
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def _scaled(array: np.ndarray, bits: int | tuple[int, ...]) -> np.ndarray:
    """uint8, fewer bits scaled to 0..255; for more bits and floats, the values as float32."""
    if array.dtype.kind == "f" or array.dtype == np.int16:
        return array.astype(np.float32)
    if array.dtype.kind not in "ub" or bits not in (1, 2, 4, *range(8, 17)):
        raise ValueError(f"expected 1, 2, 4, 8 to 16 bits or floats, got {array.dtype}")
    if bits > 8:
        return array.astype(np.float32)
    return array if bits == 8 else array.astype(np.uint8) * np.uint8(255 // (2**bits - 1))
