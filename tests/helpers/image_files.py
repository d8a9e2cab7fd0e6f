"""Images and masks on disk, for data sets that the tests make."""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from scipy.io import savemat


def write(path: Path, content: np.ndarray | bytes | None) -> None:
    """An array in the format of the file's name, or bytes; None: no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, content)
    elif path.suffix == ".mat":
        savemat(path, {"S": content})
    else:
        Image.fromarray(content).save(path)


def image(height: int = 6, width: int = 9) -> np.ndarray:
    return np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)


def mask(*values: int, height: int = 6, width: int = 9) -> np.ndarray:
    """Rows of the given values, in turn."""
    rows = np.resize(np.array(values, np.uint8), height)
    return np.repeat(rows[:, None], width, 1)


def png(samples: np.ndarray, bits: int, colour: int, palette: bytes = b"") -> bytes:
    """A PNG file by its specification. samples: (H, W) or (H, W, C); colour: 0 grey, 2 RGB,
    3 palette, 4 and 6 with alpha."""
    height, width = samples.shape[:2]
    rows = samples.reshape(height, -1)
    scanlines = b"".join(b"\0" + packed(row, bits) for row in rows)  # each without a filter
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    colours = chunk(b"PLTE", palette) if palette else b""
    pixels = chunk(b"IDAT", zlib.compress(scanlines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + colours + pixels + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG file."""
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", checksum)


def tiff(
    samples: np.ndarray,
    bits: int,
    meaning: int,
    *,
    tile: int = 0,
    palette: Sequence[int] = (),
) -> bytes:
    """A big-endian TIFF file by its specification. samples: (H, W) or (H, W, C); meaning: the
    tag PhotometricInterpretation; tile: its side, at least H and W; palette: all reds, all greens,
    all blues, of 16 bits."""
    height, width, *channels = samples.shape
    if tile:
        margin = [(0, tile - height), (0, tile - width), *[(0, 0)] * len(channels)]
        samples = np.pad(samples, margin)
    data = b"".join(packed(row.ravel(), bits) for row in samples)
    of_a_pixel = channels[0] if channels else 1
    tags = {256: [width], 257: [height], 258: [bits] * of_a_pixel, 259: [1]}
    tags |= {262: [meaning], 277: [of_a_pixel]}
    if tile:
        tags |= {322: [tile], 323: [tile], 324: [8], 325: [len(data)]}
    else:
        tags |= {273: [8], 278: [height], 279: [len(data)]}
    if palette:
        tags |= {320: list(palette)}
    data += b"\0" * (len(data) % 2)
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
