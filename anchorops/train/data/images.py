"""Images and masks in files: decoded, as they are stored or as a viewer shows them, and upright."""

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
import torch
from PIL import Image, UnidentifiedImageError
from tifffile import COMPRESSION, PHOTOMETRIC, PLANARCONFIG
from torch import Tensor

ORIENTATION = 0x112  # the tag in EXIF and TIFF: how to turn the stored pixels
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_BITS = 24  # the place of the bits per sample in a PNG file
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Pillow reduces some other formats to 8 bits without a word
LABEL_FORMATS = ("PNG", "GIF", "BMP")
IMAGE_FORMATS = (*LABEL_FORMATS, "JPEG", "MPO", "WEBP")
JPEG_IN_TIFF = (COMPRESSION.OJPEG, COMPRESSION.JPEG, COMPRESSION.ALT_JPEG, COMPRESSION.JPEG_LOSSY)
LOSSLESS = (
    *(COMPRESSION.NONE, COMPRESSION.LZW, COMPRESSION.ADOBE_DEFLATE, COMPRESSION.DEFLATE),
    *(COMPRESSION.PACKBITS, COMPRESSION.LZMA, COMPRESSION.ZSTD, COMPRESSION.PNG),
    *(COMPRESSION.CCITTRLE, COMPRESSION.CCITT_T4, COMPRESSION.CCITT_T6),
)


def upright(x: Tensor, orientation: int) -> Tensor:
    """(…, H, W), stored with this EXIF orientation, 1 to 8, as a viewer shows it."""
    x = x.mT if orientation >= 5 else x
    axes = {2: [-1], 3: [-2, -1], 4: [-2], 6: [-1], 7: [-2, -1], 8: [-2]}.get(orientation, [])
    return x.flip(axes).contiguous()


def read_image(path: Path, channels: int, size: Sequence[int] = ()) -> tuple[Tensor, int]:
    """(C, H, W), as a viewer shows it but not yet upright, and its EXIF orientation. uint8; float32
    in 0..1 for 9 to 16 bits; unchanged float32 for floating-point files. Palettes and CMYK become
    RGB; a grey image gets three equal channels, if three are expected. A TIFF file may also be
    (C, H, W): if this matches the size (H, W) of its mask, or of its mask turned by 90°; without a
    mask, if it has the channels. Raises ValueError that names the file."""
    array, orientation = _decoded(path, IMAGE_FORMATS)
    (first, *_, last), expected = array.shape, (1, channels)
    if size:
        sizes = (tuple(size), tuple(size)[::-1])
        channels_first = array.shape[1:] in sizes and array.shape[:2] not in sizes
    else:  # in other formats than TIFF the last axis has up to 4 channels
        channels_first = first in expected and last not in expected and last > 4
    if channels_first:
        array = np.moveaxis(array, 0, 2)
    found = array.shape[2]
    if found not in ((1, 3) if channels == 3 else (channels,)):
        alpha = channels in (1, 3) and found in (2, 4)
        change = "save the image without its alpha channel" if alpha else "convert the images"
        raise ValueError(
            f"{path}: expected {channels} channels, got {found}: {change}, or train a network for "
            f"them (fit --data.channels {found})"
        )
    image = torch.from_numpy(np.moveaxis(array, 2, 0).copy())
    return image.expand(channels, -1, -1), orientation


def read_upright(path: Path, channels: int) -> Tensor:
    """An upright image (C, H, W) without a mask."""
    return upright(*read_image(path, channels))


def read_mask(path: Path, *, colours: bool = False) -> tuple[np.ndarray, int]:
    """The integers (H, W) that a mask stores, or its palette indices, never scaled or inverted;
    colours: the colours that a viewer shows, R·2¹⁶ + G·2⁸ + B, uint32. And its EXIF orientation.
    Raises ValueError that names the file, also for lossy compression, for several channels of
    values, for colours of other than 8 bits and for an alpha channel that is not opaque."""
    array, orientation = _decoded(path, LABEL_FORMATS, stored=not colours)
    if array.dtype.kind == "u" and array.shape[2] in ((2, 4) if colours else (2,)):
        opaque = array[..., -1] == np.iinfo(array.dtype).max
        if not opaque.all():
            raise ValueError(
                f"{path}: expected an opaque mask, got {(~opaque).sum()} transparent pixels"
            )
        array = array[..., :-1]
    if not colours:
        if array.shape[2] != 1 or array.dtype.kind not in "uib":
            raise ValueError(
                f"{path}: expected one channel of integer labels, got {array.dtype} of shape "
                f"{array.shape}; for colours, give --data.label_map '{{\"R,G,B\": CLASS, …}}'"
            )
        return array[..., 0], orientation
    if array.shape[2] not in (1, 3) or array.dtype != np.uint8:
        raise ValueError(
            f"{path}: expected colours of 8 bits, as in --data.label_map, got {array.dtype} of "
            f"shape {array.shape}"
        )
    red, green, blue = np.moveaxis(np.broadcast_to(array, (*array.shape[:2], 3)), 2, 0)
    return red.astype(np.uint32) << 16 | green.astype(np.uint32) << 8 | blue, orientation


def _decoded(path: Path, formats: Sequence[str], *, stored: bool = False) -> tuple[np.ndarray, int]:
    """The array (H, W, C) in the file, in some TIFF files (C, H, W), and its EXIF orientation: what
    a viewer shows, uint8 or float32; stored: the values and palette indices."""
    with _errors_of(path), path.open("rb") as file:
        start = file.read(PNG_BITS + 1)
        if path.suffix == ".mat":
            from scipy.io import loadmat

            variables, orientation = loadmat(path, variable_names=["S"]), 1
            if "S" not in variables:
                raise ValueError("expected a variable S")
            array = variables["S"]
        elif start.startswith(TIFF_STARTS):
            array, orientation = _decoded_tiff(path, "JPEG" in formats, stored)
        else:
            bits = start[PNG_BITS] if start.startswith(PNG_START) else None
            array, orientation = _decoded_by_pillow(path, bits, formats, stored)
        array = np.atleast_3d(array)
        if array.ndim > 3:
            raise ValueError(f"expected an image, got an array of shape {array.shape}")
        return array, orientation


def _decoded_by_pillow(
    path: Path, bits: int | None, formats: Sequence[str], stored: bool
) -> tuple[np.ndarray, int]:
    """bits: of a sample, if it is a PNG file."""
    with _open_png(path) if bits else Image.open(path) as image:
        if image.format not in formats:
            raise ValueError(f"expected {', '.join(formats)} or TIFF, got {image.format}")
        orientation = _orientation(image)
        if bits == 16 and image.mode != "I;16":  # which Pillow reduces to 8
            array = imagecodecs.png_decode(_only_pixels(path.read_bytes()))
        elif not stored and image.mode in ("P", "CMYK"):
            array = np.asarray(image.convert("RGB"))
        else:
            array = np.asarray(image)
    if not stored:
        array = _scaled(array, 1 if array.dtype == bool else 8 * array.itemsize)
    elif bits in (2, 4) and image.mode == "L":  # Pillow has scaled them to 0..255
        array = array // (255 // (2**bits - 1))
    return array, orientation


def _open_png(path: Path) -> Image.Image:
    """All of it, because metadata may follow the pixels. Pillow refuses damaged and large metadata:
    such a file is read without them, except for its EXIF."""
    try:
        image = Image.open(path)
        image.load()
    except Exception:
        image = Image.open(io.BytesIO(_only_pixels(path.read_bytes())))
        image.load()
    return image


def _only_pixels(content: bytes) -> bytes:
    """A PNG file without metadata other than EXIF."""
    kept, place = content[: len(PNG_START)], len(PNG_START)
    while place + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        chunk = content[place : place + 12 + length]
        intact = chunk.endswith(struct.pack(">I", zlib.crc32(chunk[4:-4])))
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND") or (kind == b"eXIf" and intact):
            kept += chunk
        place += len(chunk)
    return kept


def _decoded_tiff(path: Path, lossy: bool, stored: bool) -> tuple[np.ndarray, int]:
    """lossy: whether lossy compression is permitted."""
    with tifffile.TiffFile(path) as file:
        if not file.series or not file.pages.first.dataoffsets:
            raise ValueError("it has no image, or is truncated")
        series, page = file.series[0], file.pages.first  # the first image may have several pages
        orientation = _valid(page.tags.valueof(ORIENTATION))
        if not lossy and page.compression not in LOSSLESS:
            name = getattr(page.compression, "name", page.compression)
            raise ValueError(f"{name} may change labels: save the mask with another compression")
        if page.compression in JPEG_IN_TIFF:
            ends = [max(np.add(x.dataoffsets, x.databytecounts)) for x in series if x is not None]
            if max(ends) > file.filehandle.size:  # the decoder makes what is missing grey
                raise ValueError("the file is truncated")
        array = file.asarray()
        if page.planarconfig == PLANARCONFIG.SEPARATE and array.ndim == 3:  # (C, H, W)
            array = np.moveaxis(array, 0, 2)
        if array.size == page.imagelength * page.imagewidth:  # (1, H, W) or (H, W, 1)
            array = array.reshape(page.imagelength, page.imagewidth)
        return array if stored else _shown(array, page), orientation


def _shown(array: np.ndarray, page: tifffile.TiffPage) -> np.ndarray:
    """What a viewer shows of the values in a TIFF file, uint8 or float32."""
    meaning = page.tags.valueof("PhotometricInterpretation", PHOTOMETRIC.MINISBLACK)
    if meaning == PHOTOMETRIC.PALETTE and page.colormap is not None:
        colours = page.colormap.T  # [2^bits, 3], of 16 bits, in some files of 8
        return np.take(colours >> 8 if colours.max() > 255 else colours, array, 0).astype(np.uint8)
    scaled = _scaled(array, page.bitspersample)
    white = 255 if scaled.dtype == np.uint8 else 1
    as_rgb = meaning == PHOTOMETRIC.YCBCR and page.compression in JPEG_IN_TIFF
    if as_rgb or meaning in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB):
        return scaled
    if array.dtype.kind != "f" and meaning == PHOTOMETRIC.MINISWHITE and page.samplesperpixel == 1:
        return white - scaled
    if array.dtype.kind != "f" and meaning == PHOTOMETRIC.SEPARATED and array.shape[-1] == 4:
        cmyk = scaled.astype(np.float32) / white
        rgb = white * (1 - cmyk[..., :3]) * (1 - cmyk[..., 3:])
        return np.rint(rgb).astype(scaled.dtype) if white == 255 else rgb
    raise ValueError(f"expected grey, RGB, CMYK or a palette, got {PHOTOMETRIC(meaning).name}")


def _scaled(array: np.ndarray, bits: int | tuple[int, ...]) -> np.ndarray:
    """uint8, fewer bits scaled to 0..255; float32 in 0..1 for more; floats as float32."""
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
        if not (finite := np.isfinite(array)).all():
            share = 100 - 100 * finite.mean()
            raise ValueError(f"expected finite values, got NaN or infinity in {share:.3g} %")
        return array
    if array.dtype.kind not in "ub" or bits not in (1, 2, 4, *range(8, 17)):
        raise ValueError(f"expected 1, 2, 4, 8 to 16 bits or floats, got {array.dtype}")
    white = 2**bits - 1
    if bits > 8:
        return array.astype(np.float32) / white
    return array if bits == 8 else array.astype(np.uint8) * np.uint8(255 // white)


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Any error in the block as a ValueError of one line that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # of which Pillow gives no file name
            reason = "it is no image of a known format"
        if isinstance(error, Image.DecompressionBombError):
            reason += ": save it as TIFF, which has no limit, or cut it into smaller images"
        raise ValueError(f"{path} cannot be read: {reason}") from error


def _orientation(image: Image.Image) -> int:
    try:
        return _valid(image.getexif().get(ORIENTATION))
    except Exception:  # Pillow has no common one for damaged EXIF
        return 1


def _valid(orientation: Any) -> int:
    return int(orientation) if orientation in range(1, 9) else 1
