"""Images and masks in files: decoded, as they are stored or as a viewer shows them, and upright."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
import torch
from PIL import Image, UnidentifiedImageError
from tifffile import COMPRESSION, PHOTOMETRIC, PLANARCONFIG
from torch import Tensor

ORIENTATION = 0x112  # the tag in EXIF and TIFF: how to turn the stored pixels
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


def upright_size(size: Sequence[int], orientation: int) -> tuple[int, ...]:
    """(H, W) of what `upright` returns."""
    return tuple(size)[::-1] if orientation >= 5 else tuple(size)


def read_size(path: Path, size: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """(H, W) of the image that read_image would return for a mask of this size, and its EXIF
    orientation, both from the header of the file."""
    with _errors_of(path):
        if not _is_tiff(path):
            with Image.open(path) as image:
                return (image.height, image.width), _orientation(image)
        with tifffile.TiffFile(path) as file:
            shape = _series(file).shape
            first = _channels_first(shape, size)
            return shape[1:] if first else shape[:2], _tiff_orientation(file)


def read_image(path: Path, size: Sequence[int]) -> tuple[Tensor, int]:
    """(C, H, W), as a viewer shows it but not yet upright, and its EXIF orientation. uint8; float32
    in 0..1 for 9 to 16 bits; unchanged float32 for floating-point files. Palettes and CMYK become
    RGB. The file is (H, W), (H, W, C), or (C, H, W) if this matches the size (H, W) of its mask, or
    of its mask turned by 90°. Raises ValueError that names the file."""
    array, orientation = _decoded(path, stored=False, formats=IMAGE_FORMATS)
    if array.ndim == 2:
        array = array[..., None]
    if _channels_first(array.shape, size):
        array = np.moveaxis(array, 0, 2)
    if array.ndim != 3:
        raise ValueError(f"{path}: expected an image, got an array of shape {array.shape}")
    return torch.from_numpy(np.moveaxis(array, 2, 0).copy()), orientation


def read_upright(path: Path, channels: int) -> Tensor:
    """An upright image (C, H, W) without a mask. Raises ValueError for other channels."""
    image, orientation = read_image(path, ())
    is_first = len(image) not in (1, channels) and image.shape[1] in (1, channels)
    if is_first and _is_tiff(path):  # (C, H, W) was read as (H, W, C)
        image = image.movedim(0, 2)
    return upright(with_channels(image, channels, path), orientation)


def with_channels(image: Tensor, channels: int, path: Path) -> Tensor:
    """The image; a grey one with three equal channels, if three are expected."""
    if image.shape[0] == 1 and channels == 3:
        return image.expand(3, -1, -1)
    if image.shape[0] != channels:
        raise ValueError(
            f"{path}: expected {channels} channels (--data.channels), got {image.shape[0]}"
        )
    return image


def read_values(path: Path) -> tuple[np.ndarray, int]:
    """The integers (H, W) that a mask stores, or its palette indices, never scaled or inverted, and
    its EXIF orientation. Raises ValueError that names the file, also for lossy compression, several
    channels and an alpha channel that is not opaque."""
    array, orientation = _decoded(path, stored=True, formats=LABEL_FORMATS)
    if array.ndim == 3 and array.shape[2] == 2 and array.dtype.kind == "u":
        array = _without_alpha(array, path)[..., 0]
    if array.ndim != 2 or array.dtype.kind not in "uib":
        raise ValueError(
            f"{path}: expected one channel of integer labels, got {array.dtype} of shape "
            f"{array.shape}; for colours, give --data.label_map '{{\"R,G,B\": CLASS, …}}'"
        )
    return array, orientation


def read_colours(path: Path) -> tuple[np.ndarray, int]:
    """The colours of a mask as a viewer shows them, R·2¹⁶ + G·2⁸ + B, uint32 (H, W), and its EXIF
    orientation. Raises ValueError as read_values does."""
    array, orientation = _decoded(path, stored=False, formats=LABEL_FORMATS)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] in (2, 4) and array.dtype == np.uint8:
        array = _without_alpha(array, path)
    if array.ndim != 3 or array.shape[2] not in (1, 3) or array.dtype != np.uint8:
        raise ValueError(
            f"{path}: expected colours of 8 bits, as in --data.label_map, got {array.dtype} of "
            f"shape {array.shape}"
        )
    red, green, blue = np.moveaxis(np.broadcast_to(array, (*array.shape[:2], 3)), 2, 0)
    return red.astype(np.uint32) << 16 | green.astype(np.uint32) << 8 | blue, orientation


def _without_alpha(array: np.ndarray, path: Path) -> np.ndarray:
    opaque = array[..., -1] == np.iinfo(array.dtype).max
    if not opaque.all():
        raise ValueError(
            f"{path}: expected an opaque mask, got {(~opaque).sum()} transparent pixels"
        )
    return array[..., :-1]


def _decoded(path: Path, *, stored: bool, formats: Sequence[str]) -> tuple[np.ndarray, int]:
    """The array in the file, and its EXIF orientation. stored: values and palette indices as they
    are in the file; otherwise what a viewer shows, uint8 or float32."""
    with _errors_of(path), path.open("rb") as file:
        if path.suffix == ".mat":
            from scipy.io import loadmat

            variables = loadmat(file, variable_names=["S"])
            if "S" not in variables:
                raise ValueError("expected a variable S")
            return variables["S"], 1
        start = file.read(PNG_BITS + 1)
        if start.startswith(TIFF_STARTS):
            return _decoded_tiff(path, stored=stored, of_mask="JPEG" not in formats)
        with Image.open(file) as image:
            if image.format not in formats:
                raise ValueError(f"expected {', '.join(formats)} or TIFF, got {image.format}")
            orientation = _orientation(image)
            bits = start[PNG_BITS] if image.format == "PNG" else 8
            if bits == 16 and image.mode != "I;16":  # which Pillow reduces to 8
                array = imagecodecs.png_decode(path.read_bytes())
            elif not stored and image.mode in ("P", "CMYK"):
                array = np.asarray(image.convert("RGB"))
            else:
                array = np.asarray(image)
        if not stored:
            array = _scaled(array, 1 if array.dtype == bool else 8 * array.itemsize)
        elif bits in (2, 4) and image.mode == "L":  # Pillow has scaled them to 0..255
            array = array // (255 // (2**bits - 1))
        return array, orientation


def _decoded_tiff(path: Path, *, stored: bool, of_mask: bool) -> tuple[np.ndarray, int]:
    with tifffile.TiffFile(path) as file:
        series, page = _series(file), file.pages.first
        if of_mask and page.compression not in LOSSLESS:
            name = getattr(page.compression, "name", page.compression)
            raise ValueError(f"{name} may change labels: save the mask with another compression")
        if page.compression in JPEG_IN_TIFF:
            ends = [max(np.add(x.dataoffsets, x.databytecounts)) for x in series if x is not None]
            if max(ends) > file.filehandle.size:  # the decoder makes what is missing grey
                raise ValueError("the file is truncated")
        array = file.asarray()
        if page.planarconfig == PLANARCONFIG.SEPARATE and array.ndim == 3:  # (C, H, W)
            array = np.moveaxis(array, 0, 2)
        if not stored:
            array = _shown(array, page)
        elif array.size == page.imagelength * page.imagewidth:  # (1, H, W) or (H, W, 1)
            array = array.reshape(page.imagelength, page.imagewidth)
        elif array.shape[-1] == 1:  # each row is a page
            array = array[..., 0]
        return array, _tiff_orientation(file)


def _shown(array: np.ndarray, page: tifffile.TiffPage) -> np.ndarray:
    """What a viewer shows of the values in a TIFF file, uint8 or float32."""
    meaning = page.tags.valueof("PhotometricInterpretation", PHOTOMETRIC.MINISBLACK)
    if meaning == PHOTOMETRIC.PALETTE and page.colormap is not None:
        colours = page.colormap.T  # [2^bits, 3], of 16 bits, in some files of 8
        return np.take(colours >> 8 if colours.max() > 255 else colours, array, 0).astype(np.uint8)
    scaled = _scaled(array, page.bitspersample)
    white = 255 if scaled.dtype == np.uint8 else 1
    is_rgb = meaning == PHOTOMETRIC.YCBCR and page.compression in JPEG_IN_TIFF  # as decoded
    if is_rgb or meaning in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB):
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
    except Image.DecompressionBombError:
        limit = round(2e-6 * (Image.MAX_IMAGE_PIXELS or 0))
        raise ValueError(
            f"{path} has more pixels than Pillow reads ({limit} megapixels): save it as TIFF, "
            "which has no limit, or cut it into smaller images"
        ) from None
    except UnidentifiedImageError:
        raise ValueError(f"{path} cannot be read: it is no image of a known format") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason}") from error


def _is_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in TIFF_STARTS


def _series(file: tifffile.TiffFile) -> tifffile.TiffPageSeries:
    """The first image, which may have several pages."""
    if not file.series or not file.pages.first.dataoffsets:
        raise ValueError("it has no image, or is truncated")
    return file.series[0]


def _tiff_orientation(file: tifffile.TiffFile) -> int:
    tag = file.pages.first.tags.get(ORIENTATION)
    return _valid(1 if tag is None else int(tag.value))


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG":
        image.load()  # the metadata may follow the pixels
    return _valid(image.getexif().get(ORIENTATION, 1))


def _valid(orientation: int) -> int:
    return orientation if orientation in range(1, 9) else 1


def _channels_first(shape: tuple[int, ...], size: Sequence[int]) -> bool:
    sizes = (tuple(size), tuple(size)[::-1])
    return len(shape) == 3 and shape[1:] in sizes and shape[:2] not in sizes
