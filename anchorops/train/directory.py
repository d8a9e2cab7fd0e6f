"""The directory of a run: made once, written by one program at a time."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .config import Config
from .journal import METRICS


def make_directory(config: Config) -> None:
    """A new directory with its config.json. Raises ValueError where there is an earlier run that
    came to its first log line."""
    run = config.run
    if (run / "config.json").exists():
        if (run / METRICS).exists() and not config.running.overwrite:
            raise ValueError(
                f"{run} holds an earlier run: continue it with `anchorops-train resume {run}`, or "
                "give this one a --name, or --overwrite"
            )
        with held(run):
            shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    config.save(run / "config.json")


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Keeps others out of the run's directory. Raises ValueError where one of them is in it."""
    with open(run / "config.json", "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{run}: another process is training in this directory") from None
        except OSError:
            pass  # a file system without locks
        yield
