"""The directory of a run: its configuration, its state, its log, and that one process trains in it.
Files are either complete or absent. Runs are compared by their logs."""

import csv
import fcntl
import io
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from . import ranks
from .options import FREE, Options, as_in_file, expect, flat, same

CONFIG, DATA, LOCK, METRICS = "config.yaml", "data.yaml", "run.lock", "metrics.csv"
LAST, BEST = "last.ckpt", "best.ckpt"
TOLD = ("--accumulate", "ranks")  # may differ where a run goes on, which then has other bits
COLUMNS = ["val/miou", "val/head", "val/body", "val/tail", "val/macc"]  # of a comparison
COLUMNS += ["seconds_per_step", "memory_mb"]
GO_ON = "go on with the same command and --resume"
STOPPING = (signal.SIGTERM, signal.SIGINT)


def save_atomically(state: Any, path: Path) -> None:
    """Write text, bytes, or any other object with torch.save: to a file beside `path`, which is
    flushed to the disk and then renamed. If this fails (a full disk), it is removed, and the old
    file at `path` is kept. Raises OSError."""
    part = path.with_name(f"{path.name}.part")
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
        reason = error.__context__ if isinstance(error, RuntimeError) else error
        raise OSError(f"{path} could not be written: {reason}; earlier files are intact") from error


@contextmanager
def only_process(run: Path) -> Iterator[None]:
    """Raises ValueError if another process trains in the directory, which only the first rank uses.
    A killed process holds nothing, nor do its workers, which end later than it: they would inherit
    what flock gives. What this creates is removed at the end if nothing else was written."""
    if ranks.rank() > 0:
        yield
        return
    created = [path for path in (run, *run.parents) if not path.exists()]
    run.mkdir(parents=True, exist_ok=True)
    with open(run / LOCK, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink == 0:  # its process has removed it just now
                raise BlockingIOError
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"another process trains in {run}: give this one its own directory (--run, of a "
                "demo --out)"
            ) from None
        except OSError as error:
            ranks.say(f"{run} cannot be locked ({error}): start no second process")
        try:
            yield
        finally:
            with suppress(OSError):  # another process may have begun to write
                if os.listdir(run) == [LOCK]:
                    (run / LOCK).unlink()
                    for path in created:
                        path.rmdir()


def read_yaml(
    path: Path, *needed: str, load: Callable[[str], Any] = yaml.safe_load
) -> dict[str, Any]:
    """Raises ValueError for a file that is damaged or that lacks a name."""
    try:
        content = load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({shorten(str(error), 200)})") from None
    if not isinstance(content, dict) or not {*needed} <= content.keys():
        raise ValueError(f"{path} is damaged (it has no {' or no '.join(needed) or 'options'})")
    return content


def check_run(run: Path, options: Options, resume: bool) -> bool:
    """Whether there is a state, from which the run goes on. Raises ValueError if the directory has
    another run, if its state is missing, or if it would go on with other options."""
    last, best, config = run / LAST, run / BEST, run / CONFIG
    lines = read_metrics(run / METRICS) if (run / METRICS).exists() else {}
    before = flat(read_yaml(config)) if config.exists() else {}
    # before its first state a run has no validation, and no step after this one
    late = max(lines, default=0) > before.get("--save_every", math.inf)
    saved = late or any("val/miou" in line for line in lines.values())
    if last.exists() or best.exists() or saved:
        if not resume:
            raise ValueError(f"{run} holds a run: --resume goes on with it, --run names another")
        for path in (config, last):
            expect(path.exists(), "--resume", f"{path}, which the run has saved", "no such file")
        check_same(run, flat(as_in_file(options)), before)
    elif resume or lines:
        ranks.say(f"{run} has no state: the run starts at step 0")
    return last.exists()


def describe(run: Path, options: Options, found: Mapping[str, Any]) -> None:
    """Write what a run is. Raises ValueError if it would go on with other data. found: what tells
    the data from others, and the number of ranks."""
    if (run / LAST).exists():
        check_same(run, found, read_yaml(run / DATA))
    else:
        (run / METRICS).unlink(missing_ok=True)
    for name, content in ((DATA, found), (CONFIG, as_in_file(options))):
        text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
        save_atomically(text, run / name)


def check_same(run: Path, now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Raises ValueError for options or data that would lead to other numbers."""
    for name, value in now.items():
        if same(value, then := before.get(name)) or name in FREE:
            continue
        change = f"{name}: {shorten(str(value), 200)}, {run} has {shorten(str(then), 200)}"
        if name not in TOLD:
            raise ValueError(
                f"{change}: the numbers would not be those of the run without a stop. Leave it as "
                "it was, or start a run in another directory, with --model.weights from this one's "
                "weights"
            )
        ranks.say(f"{change}: the bits will not be those of the run without a stop")


class Log:
    """metrics.csv and the events of TensorBoard, which the first rank writes: a line for each step
    at which something was logged. Of a run that goes on after a step, later lines are cut. All
    ranks have the lines that the first one has found."""

    def __init__(self, run: Path, step: int) -> None:
        self.path = run / METRICS
        found = ranks.on_first(lambda: read_metrics(self.path) if self.path.exists() else {})
        self.lines = {number: line for number, line in found.items() if number <= step}
        self.names = dict[str, None]()  # the file's columns, once this process has written it
        self.events = SummaryWriter(str(run), purge_step=step + 1) if ranks.rank() == 0 else None

    def write(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Add values, as float32, to the line of a step. New lines are appended, for speed."""
        if self.events is None or not values:
            return
        appended = step not in self.lines and values.keys() <= self.names.keys()
        line = self.lines.setdefault(step, {})
        for name, value in values.items():
            line[name] = torch.as_tensor(value, dtype=torch.float32).item()
            self.events.add_scalar(name, line[name], step)
        if not appended:
            self.names = dict.fromkeys(name for line in self.lines.values() for name in line)
        text = io.StringIO()
        writer = csv.DictWriter(text, ["step", *self.names], lineterminator="\n")
        if appended:
            writer.writerow({"step": step, **line})
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(text.getvalue())
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise OSError(f"{self.path} could not be written: {error}") from error
        else:
            writer.writeheader()
            writer.writerows({"step": step, **self.lines[step]} for step in sorted(self.lines))
            save_atomically(text.getvalue(), self.path)
        self.events.flush()


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """The values that were logged at each step; of a last line without an end, whose process was
    killed, nothing. Raises ValueError for a file that is damaged."""
    try:
        lines = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8").rpartition("\n")[0]))
        if "step" not in (lines.fieldnames or ()):
            raise KeyError("step")
        return {
            int(line.pop("step")): {name: float(x) for name, x in line.items() if x}
            for line in lines
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r})") from None


def save_confusion(run: Path, split: str, classes: Sequence[str], matrix: Tensor) -> None:
    """Write confusion.csv, of test confusion-test.csv: a row for each true class, a column for each
    predicted one, in pixels."""
    table = io.StringIO()
    rows = ([name, *row] for name, row in zip(classes, matrix.tolist(), strict=True))
    csv.writer(table, lineterminator="\n").writerows([["true class", *classes], *rows])
    name = "confusion.csv" if split == "val" else f"confusion-{split}.csv"
    save_atomically(table.getvalue(), run / name)


def comparison(runs: Sequence[Path]) -> str:
    """A table of the last figures of runs; – for a group without classes. Raises ValueError for a
    run that has not ended."""
    rows = [["run", *COLUMNS]]
    for run in runs:
        lines = read_metrics(run / METRICS)
        steps = flat(read_yaml(run / CONFIG)).get("--data.steps")
        if steps not in lines or "val/miou" not in lines[steps]:
            raise ValueError(f"{run} has not ended: {max(lines)} of {steps} steps are in {METRICS}")
        last = {name: x for line in lines.values() for name, x in line.items()}
        figures = [f"{last[name]:.3f}" if name in last else "–" for name in COLUMNS]
        rows.append([run.resolve().name, *figures])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


class Stopped(Exception):
    """A command was asked to stop, or its time is over, and it has saved what it can."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class Stop:
    """In its block, SIGTERM and Ctrl-C only ask to stop. advice: how to go on."""

    def __init__(self, advice: str) -> None:
        self.advice, self._received = advice, 0

    def __enter__(self) -> "Stop":
        # ignored ones stay ignored: `nohup` or a script's shell has asked for it
        handled = [x for x in STOPPING if signal.getsignal(x) != signal.SIG_IGN]
        self._before = {x: signal.signal(x, self._receive) for x in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, _: object) -> None:
        self._received = signum

    def asked(self, *, late: bool = False) -> Stopped | None:
        """Whether a rank was asked to stop, or is late: all ranks call this, with one answer."""
        reason = ranks.largest(self._received or int(late))
        if not reason:
            return None
        by = "--max_hours" if reason == 1 else signal.Signals(reason).name
        status = 0 if reason == 1 else 128 + reason
        return Stopped(f"stopped by {by}; {self.advice}", status)

    def until_asked(self, batches: Any) -> Iterator[Any]:
        """The batches of this rank. Raises Stopped before a batch, on all ranks together."""
        for batch, _ in zip_longest(batches, range(ranks.largest(len(batches)))):
            if stopped := self.asked():
                raise stopped
            if batch is not None:
                yield batch
