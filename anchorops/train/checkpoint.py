"""Checkpoints that are either complete or not there."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

PATTERN = "checkpoint-*.pt"
KEPT = 2


def save_atomically(state: Any, path: Path) -> None:
    """Write (text, or anything through torch.save) to a temporary file, flush it to the disk,
    rename. On failure (a full disk) the
    temporary file is removed and what was at `path` stays. Raises OSError."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            file.write(state.encode()) if isinstance(state, str) else torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(path.parent).free / 2**20
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{path} could not be written: {error} ({free:.1f} MB free); earlier files are intact"
        ) from error
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def save_checkpoint(run: Path, step: int, state: dict[str, Any]) -> Path:
    """Save the state after `step` steps and keep the latest two checkpoints."""
    path = run / f"checkpoint-{step:08d}.pt"
    save_atomically({"step": step, **state}, path)
    for old in sorted(run.glob(PATTERN))[:-KEPT]:
        old.unlink()
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Raises ValueError where the file is damaged, naming an earlier checkpoint if there is one."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        earlier = [other for other in sorted(path.parent.glob(PATTERN)) if other < path]
        advice = f"; delete it to resume from {earlier[-1]}" if earlier else ""
        raise ValueError(f"checkpoint {path} is damaged ({error}){advice}") from error


def latest_checkpoint(run: Path) -> Path | None:
    return max(run.glob(PATTERN), default=None)
