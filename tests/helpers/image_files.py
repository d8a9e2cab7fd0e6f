"""Images and masks on disk, for data sets that the tests make."""

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
