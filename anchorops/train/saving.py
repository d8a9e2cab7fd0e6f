"""Files that are either complete or absent."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

PART = ".part"  # the suffix of a file that is being written


def save_atomically(state: Any, path: Path) -> None:
    """Write text, bytes, or any other object with torch.save: to a file beside `path`, which is
    flushed to the disk and then renamed. If this fails (a full disk), it is removed, and the old
    file at `path` is kept. Raises OSError."""
    part = path.with_name(path.name + PART)
    try:
        with open(part, "wb") as file:
            if isinstance(state, str | bytes):
                file.write(state.encode() if isinstance(state, str) else state)
            else:
                torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer turns the first into the second
        with suppress(OSError):
            part.unlink()
        hidden = isinstance(error, RuntimeError) and isinstance(error.__context__, OSError)
        reason = error.__context__ if hidden else error
        raise OSError(f"{path} could not be written: {reason}; earlier files are intact") from error
