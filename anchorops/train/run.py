"""The directory of a run: its configuration, its state, its log, and that one process trains in it.
Files are either complete or absent."""

import csv
import fcntl
import io
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from types import FrameType
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from . import ranks
from .options import FREE, flat

CONFIG, DATA, LOCK, METRICS = "config.yaml", "data.yaml", "run.lock", "metrics.csv"
LAST, BEST = "last.ckpt", "best.ckpt"
EARLIER = "seed_everything"  # an option that only the runs of an earlier version have
PART = ".part"  # the suffix of a file that is being written
STOPPING = (signal.SIGTERM, signal.SIGINT)
OWN_RUN = (
    "give this run its own directory with --run (the default name has the preset, the methods and "
    "the seed, no other option)"
)


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


@contextmanager
def only_process(run: Path, advice: str = OWN_RUN) -> Iterator[None]:
    """Raises ValueError, with advice, if another process trains in the directory. A killed process
    holds nothing, nor do its workers, which end later than it: they would inherit what flock
    gives."""
    run.mkdir(parents=True, exist_ok=True)
    with open(run / LOCK, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another process trains in {run}: {advice}") from None
        except OSError as error:
            print(f"{run} cannot be locked ({error}): start no second process", file=sys.stderr)
        yield


def going_on(run: Path) -> str:
    """The command that goes on with a run, on as many ranks."""
    program, per_node = "anchorops-train", os.environ.get("LOCAL_WORLD_SIZE", "1")
    if ranks.world() > 1:
        one = ranks.world() == int(per_node)
        where = f"--standalone --nproc-per-node {per_node}" if one else "…"
        program = f"torchrun {where} -m anchorops.train --"
    return f"{program} fit --run {shlex.quote(str(run))} --resume"


def read_yaml(path: Path) -> dict[str, Any]:
    """Raises ValueError for a file that is damaged, or not there."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path.parent}: expected the directory of a run, with {path.name}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({shorten(str(error), 200)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it has no options)")
    return content


def read_config(run: Path) -> dict[str, Any]:
    """The configuration of a run; of one of an earlier version, what its weights need."""
    options = read_yaml(run / CONFIG)
    for group in ("model", "data"):
        if not isinstance(options.get(group), dict):
            raise ValueError(f"{run / CONFIG} is damaged (it has no {group})")
    if EARLIER in options:
        old = ("seed", "images", "allow_changes", "class_weights")
        kept = {x: {k: v for k, v in options[x].items() if k not in old} for x in ("model", "data")}
        return kept | {"seed": options[EARLIER]}
    return options


def check_same(run: Path, options: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises ValueError if a run would go on with other options or other data, and therefore to
    other numbers. found: what tells the data from others."""
    if EARLIER in read_yaml(run / CONFIG):
        raise ValueError(
            f"{run} holds a run of an earlier version, which cannot go on: start another one, in "
            "another directory, with --model.weights from its weights"
        )
    saved, data = flat(read_config(run)), read_yaml(run / DATA)
    keep = (
        "Leave it as it was, or start a run in another directory (--run, of a demo --out; with "
        "--model.weights from this one's weights)"
    )
    for name, value in flat(options).items():
        if name not in FREE and saved.get(name) != value:
            raise ValueError(
                f"--{name} is {value}, {run / CONFIG} has {saved.get(name)}: the numbers would not "
                f"be those of the run without a stop. {keep}"
            )
    for name, value in found.items():
        if data.get(name) != value:
            raise ValueError(f"the data are not those of the run: other {name}. {keep}")


class Log:
    """metrics.csv and the events of TensorBoard: a line for each step at which something was
    logged, on the first rank.

    Args:
        run: directory of the run.
        step: the last step of a run that goes on; later lines are cut.
    """

    def __init__(self, run: Path, step: int) -> None:
        self.path, self._lines = run / METRICS, dict[int, dict[str, float]]()
        if step and self.path.exists():
            self._lines = {k: line for k, line in read_metrics(self.path).items() if k <= step}
        self.events = SummaryWriter(str(run), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Add values, floats as float32, to the line of a step."""
        for name, value in values.items():
            if not isinstance(value, int):
                value = torch.as_tensor(value, dtype=torch.float32).item()
            self._lines.setdefault(step, {})[name] = value
            self.events.add_scalar(name, value, step)
        names = dict.fromkeys(name for line in self._lines.values() for name in line)
        file = io.StringIO()
        writer = csv.DictWriter(file, ["step", *names], lineterminator="\n")
        writer.writeheader()
        for step in sorted(self._lines):
            writer.writerow({"step": step, **self._lines[step]})
        save_atomically(file.getvalue(), self.path)
        self.events.flush()


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """The values that were logged at each step. Raises ValueError for a damaged file."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return {
                int(line.pop("step")): {name: float(x) for name, x in line.items() if x}
                for line in csv.DictReader(file)
            }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r})") from None


class Stopped(Exception):
    """A command was asked to stop, or its time is over, and it has saved what it can."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class Stop:
    """In its block, SIGTERM and Ctrl-C only ask to stop.

    hours: after which it stops. advice: the command that goes on. where: what is done.
    """

    def __init__(self, hours: float | None = None, advice: str = "") -> None:
        self.where, self.advice = "", f"; go on with: {advice}" if advice else ""
        self._end = math.inf if hours is None else time.monotonic() + 3600 * hours
        self._received = 0

    def __enter__(self) -> "Stop":
        self._before = {signum: signal.getsignal(signum) for signum in STOPPING}
        for signum, handler in self._before.items():
            if handler != signal.SIG_IGN:  # as by `nohup`, or by a script's shell
                signal.signal(signum, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received = signum

    def asked(self, *, in_time: bool = True) -> Stopped | None:
        """Whether a rank was asked to stop: the same on all ranks, which call this together."""
        reason = self._received or int(in_time and time.monotonic() > self._end)
        reason = ranks.largest(reason)
        if not reason:
            return None
        by = "--max_hours" if reason == 1 else signal.Signals(reason).name
        status = 0 if reason == 1 else 128 + reason
        return Stopped(f"stopped by {by} {self.where}{self.advice}", status)

    def check(self) -> None:
        """Raises Stopped if a rank got a signal. --max_hours does not end a validation: else a run
        whose time is shorter than its validation would never get beyond it."""
        if stopped := self.asked(in_time=False):
            raise stopped
