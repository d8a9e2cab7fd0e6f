"""Vectors for the methods from files: `--method-options sar.anchors @clip.npy`.

A run keeps a copy in its directory and only reads this copy, so resuming does not need the file.
"""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .config import Config

PREFIX = "vectors-"  # of a copy's name, before METHOD.ARGUMENT.npy


def vector_files(options: Mapping[str, str]) -> dict[str, Path]:
    """The options whose value is @FILE, and their files."""
    return {option: Path(text[1:]) for option, text in options.items() if text.startswith("@")}


def vector_copies(config: Config) -> dict[Path, bytes]:
    """The contents of the copies. Raises ValueError if a file cannot be read."""
    copies: dict[Path, bytes] = {}
    for option, path in vector_files(config.model.method_options).items():
        file = io.BytesIO()
        np.save(file, read_vectors(option, path).numpy())
        copies[_copy(config.run, option)] = file.getvalue()
    return copies


def with_copies(config: Config) -> dict[str, str]:
    """The options of the methods, with the copies instead of the files."""
    options = config.model.method_options
    copies = {option: f"@{_copy(config.run, option)}" for option in vector_files(options)}
    return {**options, **copies}


def _copy(run: Path, option: str) -> Path:
    return run / f"{PREFIX}{option}.npy"


def read_vectors(option: str, path: Path) -> Tensor:
    """float32 [K, D] from a file of numpy.save. No code in the file is run. Raises ValueError, with
    the names of option and file, unless the file contains finite floating-point numbers in two
    dimensions."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"--method-options {option}: {path} cannot be read: {error}") from error
    if not isinstance(array, np.ndarray):  # the file is an .npz
        array.close()
        found = "several arrays"
    elif array.dtype.kind != "f" or array.ndim != 2:
        found = f"{array.dtype} of shape {array.shape}"
    else:
        with np.errstate(over="ignore"):  # a number too large for float32 becomes infinite
            rows = array.astype(np.float32)
        if np.isfinite(rows).all():
            return torch.from_numpy(rows)
        found = "NaN, infinity or numbers too large for float32"
    raise ValueError(
        f"--method-options {option}: {path}: expected one array [K, D] of finite floating numbers "
        f"(numpy.save), got {found}"
    )
