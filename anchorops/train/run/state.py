"""The contents of a checkpoint, and what follows from a run's progress: when it logs, saves,
evaluates and ends; and its learning rate."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..config import Config
from .checkpoint import load_checkpoint, save_checkpoint
from .journal import Averages


@dataclass
class Progress:
    """The progress of a run."""

    step: int = 0
    evaluated: int = 0
    """The last step with an evaluation."""
    best: float = -1.0
    """The best mIoU."""
    stale: int = 0
    """Evaluations since the best mIoU."""
    seconds: float = 0.0
    """Of training."""
    logged_seconds: float = 0.0
    """The same at the last log line."""


class DataSummary(NamedTuple):
    """The data of a run: numbers of images, names of the classes, and their training pixels."""

    training_images: int
    validation_images: int
    classes: list[str]
    pixels: list[int]


@dataclass
class State:
    """Everything that the next step depends on, except the configuration.

    Random numbers and the position in the data are functions of (seed, step): see the training step
    and BatchSampler. The model's state includes the state of the methods.
    """

    model: nn.Module
    optimizer: Optimizer
    lr: LRScheduler
    config: Config
    data: DataSummary
    ranks: int
    averages: Averages = field(default_factory=Averages)
    progress: Progress = field(default_factory=Progress)

    def save(self, run: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.lr.state_dict(),
            "averages": self.averages.state(),
            "ranks": self.ranks,
            "options": self.config.decisive,
            "data": self.data._asdict(),
            **asdict(self.progress),
        }
        save_checkpoint(run, self.progress.step, state)

    def restore(self, path: Path) -> int:
        """Load a checkpoint; returns the number of ranks that wrote it. Raises ValueError if it
        does not match, or was written with other options or data."""
        state = load_checkpoint(path)
        with _fitting(path):
            options, data, ranks = dict(state["options"]), dict(state["data"]), int(state["ranks"])
        self._compare_options(path, options, state.get("step"))
        self._compare_data(path, data)
        with _fitting(path):
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.lr.load_state_dict(state["schedule"])
            self.averages.restore(state["averages"])
            types = {name: type(value) for name, value in asdict(Progress()).items()}
            self.progress = Progress(**{name: kind(state[name]) for name, kind in types.items()})
        return ranks

    def _compare_options(self, path: Path, saved: dict[str, Any], step: Any) -> None:
        now = self.config.decisive
        if isinstance(step, int) and now["steps"] <= step:  # a run may be ended where it is
            saved = saved | {"steps": now["steps"]}
        for name in now:
            if name not in saved or saved[name] != now[name]:
                raise ValueError(
                    f"checkpoint {path} was written with --{name.replace('_', '-')} "
                    f"{saved.get(name)}, config.json now has {now[name]}: the numbers would not be "
                    "those of the run without a stop. Change it back, or start a new run with "
                    f"--weights {path}"
                )

    def _compare_data(self, path: Path, saved: dict[str, Any]) -> None:
        now = self.data._asdict()
        others = [name for name in now if saved.get(name) != now[name]]
        if others:
            name = others[0]
            values = [shorten(str(x[name]), 80, placeholder=" …") for x in (saved, now)]
            raise ValueError(
                f"checkpoint {path} was written with other data ({name.replace('_', ' ')}: "
                f"{values[0]}, now {values[1]}): the numbers would not be those of the run without "
                f"a stop. Give --root the same data, or start a new run with --weights {path}"
            )


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """An error inside means that the checkpoint's contents do not fit: raises ValueError."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"checkpoint {path} does not fit this run: it is of another model, data set or "
            f"version ({shorten(reason, 300, placeholder=' …')})"
        ) from error


class Schedule:
    def __init__(self, config: Config) -> None:
        self.options, self.running = config.optimization, config.running

    def lr_factor(self, step: int) -> float:
        """Linear warm-up, then polynomial decay to zero."""
        options = self.options
        warmup = min(1.0, (step + 1) / options.warmup) if options.warmup else 1.0
        return warmup * max(0.0, 1 - step / options.steps) ** options.power

    def logs(self, progress: Progress) -> bool:
        return _every(self.running.log_every, progress.step)

    def compares_gradients(self, progress: Progress) -> bool:
        """Whether the next step measures the gradients of the methods."""
        return _every(self.running.gradient_ratio_every, progress.step)

    def saves(self, progress: Progress) -> bool:
        return _every(self.running.save_every, progress.step)

    def evaluates(self, progress: Progress) -> bool:
        last = progress.step >= self.options.steps
        due = last or _every(self.running.eval_every, progress.step)
        return due and progress.evaluated < progress.step

    def ended(self, progress: Progress) -> bool:
        patience = self.running.patience
        return progress.step >= self.options.steps or (  # config.json may have been edited
            patience is not None and progress.stale >= patience
        )


def _every(steps: int, step: int) -> bool:
    return steps > 0 and step % steps == 0
