"""The directory of a run. Only one program writes to it at a time, and files that a run did not
write are never deleted."""

import dataclasses
import fcntl
import json
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import Config
from ..networks.learner import PREFIX, vector_copies
from .checkpoint import CHECKPOINT, PART, latest_checkpoint, save_together

MARKER = ".anchorops-run"
CONFIG = "config.json"
# the files that a run writes, in addition to its marker; it does not own any other file
WRITTEN = re.compile(
    r"(config\.json|metrics\.jsonl|results\.json|predictions\.png|report\.html|best\.pt"
    rf"|centroids\.npz|{PREFIX}[a-z]+\.[a-z]+\.npy|{CHECKPOINT.pattern})({re.escape(PART)})?"
    r"|events\.out\.tfevents\..+"
)


@contextmanager
def new_run(config: Config) -> Iterator[None]:
    """Creates and locks the directory of a run, with its marker. An earlier run there is not
    changed before begin_run.

    Raises ValueError for an invalid --name, if there is an earlier run and no --overwrite, if
    --weights is a file of the run that would be deleted, and if there are files but no marker or a
    config.json that is not of a run.
    """
    run, name = config.run, config.running.name
    if name is not None and (
        name in ("", ".", "..") or re.search(r"[/\\]", name) or not name.isprintable()
    ):
        raise ValueError(
            f"--name: expected a directory's name inside --out, without separators, got {name!r}"
        )
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run} is a file: give this run a --name")
    if run.exists() and any(run.iterdir()) and not (run / MARKER).exists():
        raise ValueError(
            f"{run} contains files but no {MARKER}: they do not belong to a run. Remove them "
            "yourself, or give this run a --name"
        )
    if (run / CONFIG).exists() and not _is_of_a_run(run / CONFIG):
        raise ValueError(
            f"{run / CONFIG} was not written by a run, although {MARKER} is next to it: remove "
            "them yourself, or give this run a --name"
        )
    run.mkdir(parents=True, exist_ok=True)
    with held(run):
        earlier, weights = _earlier_run(run), config.model.weights
        if earlier and not config.running.overwrite:
            raise ValueError(
                f"{run} contains an earlier run: {_offer(run)}give this one a --name, or "
                "--overwrite, which deletes the earlier one"
            )
        if weights and weights.resolve() in {path.resolve() for path in earlier}:
            raise ValueError(
                f"--weights {weights} is a file of the run that --overwrite deletes: give this run "
                "a --name"
            )
        yield


def begin_run(config: Config) -> None:
    """Deletes the files of an earlier run, and no others, and writes config.json and copies of the
    methods' vectors. A run calls this after its first step, when nothing of what usually fails at
    the start has failed.

    Raises ValueError if the vectors cannot be read, and OSError if the files cannot be written; an
    earlier run is then unchanged.
    """
    run = config.run
    for path in run.iterdir():
        if _is_run_file(path) and path.name.endswith(PART):
            path.unlink()  # of a process that was killed
    earlier = _earlier_run(run)
    files: dict[Path, str | bytes] = {**vector_copies(config), run / CONFIG: config.to_json()}
    save_together(files, lambda: _delete(run, earlier))


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Locks the run's directory. Raises ValueError if another process has locked it."""
    with open(run / MARKER, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{run}: another process is training in this directory") from None
        except OSError:
            pass  # a file system without locks
        yield


def _is_of_a_run(config: Path) -> bool:
    """Whether a config.json has the sections of ours. A marker alone proves nothing: it may have
    been copied into the directory of a model."""
    try:
        sections = json.loads(config.read_text()).keys()
    except (ValueError, AttributeError):
        return False
    return sections >= {section.name for section in dataclasses.fields(Config)}


def _offer(run: Path) -> str:
    """The advice to continue the existing run, if this is possible."""
    if not (run / CONFIG).exists() or latest_checkpoint(run) is None:
        return ""
    return f"continue it with `anchorops-train resume {shlex.quote(str(run))}`, or "


def _earlier_run(run: Path) -> list[Path]:
    """The files that an earlier run wrote; none if only its start wrote any."""
    run_files = [path for path in sorted(run.iterdir()) if _is_run_file(path)]
    return [] if all(path.name.startswith((CONFIG, PREFIX)) for path in run_files) else run_files


def _is_run_file(path: Path) -> bool:
    return WRITTEN.fullmatch(path.name) is not None and path.is_file()


def _delete(run: Path, earlier: list[Path]) -> None:
    if not earlier:
        return
    size = sum(path.stat().st_size for path in earlier) / 2**20
    for path in sorted(earlier, key=lambda path: path.name != CONFIG):  # without it, no resume
        path.unlink()
    others = [
        path for path in sorted(run.iterdir()) if path.name != MARKER and not _is_run_file(path)
    ]
    left = f"; left alone: {_names(others)}" if others else ""
    print(
        f"--overwrite: deleted the earlier run in {run} ({_names(earlier)}; {size:.1f} MB){left}",
        file=sys.stderr,
    )


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths)
