"""metrics.csv: one line for each step at which something was logged."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from .saving import save_atomically

METRICS = "metrics.csv"


class Metrics(Logger):
    """Lightning's CSVLogger deletes the file of a run that goes on.

    Args:
        run: directory of the run.
        continued: the step after which a run goes on, whose earlier lines are kept.
    """

    def __init__(self, run: Path, continued: int | None = None) -> None:
        super().__init__()
        self.path = run / METRICS
        self._lines: dict[int, dict[str, float]] = {}
        if continued is not None and self.path.exists():
            lines = read_metrics(self.path)
            self._lines = {step: x for step, x in lines.items() if step <= continued}

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._lines.setdefault(step or 0, {}).update(metrics)

    @rank_zero_only
    def save(self) -> None:
        names = dict.fromkeys(name for line in self._lines.values() for name in line)
        file = io.StringIO()
        writer = csv.DictWriter(file, ["step", *names], lineterminator="\n")
        writer.writeheader()
        for step in sorted(self._lines):
            writer.writerow({"step": step, **self._lines[step]})
        save_atomically(file.getvalue(), self.path)


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """The values that were logged at each step. Raises ValueError if the file is damaged."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            text = file.read()
        lines = list(csv.DictReader(io.StringIO(text)))
        if not text.endswith("\n") or any(None in line.values() for line in lines):
            raise ValueError("a line is not complete")
        return {
            int(line.pop("step")): {name: float(x) for name, x in line.items() if x}
            for line in lines
        }
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
