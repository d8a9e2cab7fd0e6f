"""Checkpoints that are either complete or absent."""

import os
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

CHECKPOINT = re.compile(r"checkpoint-(?P<step>\d{8,})\.pt")
PART = ".part"  # the suffix of a file that is being written
KEPT = 2


def save_atomically(state: Any, path: Path) -> None:
    """Write text, bytes, or any other object with torch.save: to a temporary file, which is flushed
    to the disk and then renamed. If this fails (a full disk), the temporary file is removed and the
    old file at `path` is kept. Raises OSError."""
    save_together({path: state})


def save_together(
    states: Mapping[Path, Any], make_way: Callable[[], object] = lambda: None
) -> None:
    """As save_atomically, for several files of one directory. `make_way` is called when all of them
    are on the disk, before they are renamed."""
    parts = {path: path.with_name(path.name + PART) for path in states}
    path = next(iter(states))
    try:
        for path, state in states.items():
            with open(parts[path], "wb") as file:
                if isinstance(state, str | bytes):
                    file.write(state.encode() if isinstance(state, str) else state)
                else:
                    torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        make_way()
        for path, part in parts.items():
            part.replace(path)
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(path.parent).free / 2**20
        for part in parts.values():
            part.unlink(missing_ok=True)
        raise OSError(
            f"{path} could not be written: {_cause(error)} ({free:.1f} MB free); earlier files are "
            "intact"
        ) from error
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def _cause(error: BaseException) -> BaseException:
    """The error of the disk. torch's writer fails a second time when it is closed."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or error


def save_checkpoint(run: Path, step: int, state: dict[str, Any]) -> Path:
    """Save the state after `step` steps and keep the latest two checkpoints."""
    path = run / f"checkpoint-{step:08d}.pt"
    save_atomically({"step": step, **state}, path)
    unfinished = re.compile(CHECKPOINT.pattern + re.escape(PART))  # of a process that was killed
    parts = [part for part in run.iterdir() if unfinished.fullmatch(part.name)]
    for old in (*checkpoints(run)[:-KEPT], *parts):
        old.unlink()
    return path


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, in the order of their steps."""
    steps = {
        int(match["step"]): path
        for path in run.iterdir()
        if (match := CHECKPOINT.fullmatch(path.name)) and path.is_file()
    }
    return [steps[step] for step in sorted(steps)]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Raises ValueError if the file is damaged; the message names an earlier checkpoint, if any."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes checksums, but does not check them
            if broken := archive.testzip():
                raise ValueError(f"the checksum of {broken} does not fit")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it contains a {type(state).__name__}")
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"checkpoint {path} is damaged ({reason}){_advice(path)}") from error
    return state


def _advice(path: Path) -> str:
    earlier = list(takewhile(lambda other: other != path, checkpoints(path.parent)))
    return f"; delete it to resume from {earlier[-1]}" if earlier else ""


def latest_checkpoint(run: Path) -> Path | None:
    return next(reversed(checkpoints(run)), None)
