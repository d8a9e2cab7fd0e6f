"""Images and masks on disk, for data sets that the tests make."""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from scipy.io import savemat


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, array)
    elif path.suffix == ".mat":
        savemat(path, {"S": array})
    else:
        Image.fromarray(array).save(path)


def image(height: int = 6, width: int = 9) -> np.ndarray:
    return np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)


def mask(*values: int, height: int = 6, width: int = 9) -> np.ndarray:
    """Rows of the given values, in turn."""
    rows = np.resize(np.array(values, np.uint8), height)
    return np.repeat(rows[:, None], width, 1)


def png(samples: list, bits: int, colour: int, palette: bytes = b"") -> bytes:
    """A PNG file by its specification. samples: (H, W) or (H, W, C); colour: 0 grey, 2 RGB,
    3 palette, 4 and 6 with alpha."""
    pixels = np.array(samples)
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    scanlines = b"".join(b"\0" + packed(row, bits) for row in rows)  # each without a filter
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(scanlines))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in [*chunks, (b"IEND", b"")]
        if data or kind == b"IEND"
    )


def tiff(
    samples: list,
    bits: int,
    meaning: int,
    *,
    in_planes: bool = False,
    tile: int = 0,
    palette: Sequence[int] = (),
) -> bytes:
    """A big-endian TIFF file by its specification. samples: (H, W) or (H, W, C), in_planes:
    (C, H, W); meaning: the tag PhotometricInterpretation; tile: its side, at least H and W;
    palette: all reds, all greens, all blues, of 16 bits."""
    pixels = np.array(samples)
    planes = list(pixels) if in_planes else [pixels]
    height, width, *channels = planes[0].shape
    if tile:
        margin = [(0, tile - height), (0, tile - width), *[(0, 0)] * len(channels)]
        planes = [np.pad(plane, margin) for plane in planes]
    pieces = [b"".join(packed(row.ravel(), bits) for row in plane) for plane in planes]
    counts = [len(piece) for piece in pieces]
    places = [8 + sum(counts[:i]) for i in range(len(counts))]
    samples_per_pixel = channels[0] if channels else len(planes)
    tags = {256: [width], 257: [height], 258: [bits] * samples_per_pixel, 259: [1]}
    tags |= {262: [meaning], 277: [samples_per_pixel], 284: [1 + in_planes]}
    if tile:
        tags |= {322: [tile], 323: [tile], 324: places, 325: counts}
    else:
        tags |= {273: places, 278: [height], 279: counts}
    if palette:
        tags |= {320: list(palette)}
    data = b"".join(pieces) + b"\0" * (sum(counts) % 2)
    end = 8 + len(data) + 2 + 12 * len(tags) + 4
    directory, behind = struct.pack(">H", len(tags)), b""
    for tag, values in sorted(tags.items()):
        content = struct.pack(f">{len(values)}H", *values)
        if len(content) > 4:
            behind, content = behind + content, struct.pack(">I", end + len(behind))
        directory += struct.pack(">HHI", tag, 3, len(values)) + content.ljust(4, b"\0")
    start = struct.pack(">2sHI", b"MM", 42, 8 + len(data))
    return start + data + directory + bytes(4) + behind


def packed(row: np.ndarray, bits: int) -> bytes:
    """Samples one after another, the first in the highest bits, up to a whole byte."""
    digits = "".join(f"{sample:0{bits}b}" for sample in row.tolist())
    digits += "0" * (-len(digits) % 8)
    return int(digits, 2).to_bytes(len(digits) // 8, "big")
