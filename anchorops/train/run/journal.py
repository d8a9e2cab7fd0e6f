"""The output of a run: a progress bar, metrics.jsonl, TensorBoard, and failures after training."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from .checkpoint import save_atomically

METRICS = "metrics.jsonl"
RATIO = "gradient_ratio"  # METHOD.gradient_ratio is the value of a method
WRONG_LABELS, IGNORED_LABELS = "labels_out_of_range", "labels_ignored"  # terms of pixel losses
Result = TypeVar("Result")


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MB: of the GPU's tensors, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class Journal:
    """Records a run from `first_step`. If run is None (on every rank except the first), it does
    nothing. Raises ValueError if TensorBoard is not installed."""

    def __init__(
        self,
        run: Path | None,
        first_step: int,
        steps: int,
        *,
        tensorboard: bool = False,
    ) -> None:
        self.path = None if run is None else run / METRICS
        self.events, self._writer, self._warned = None, None, False
        self.bar = tqdm(
            total=steps,
            initial=first_step,
            desc=run.name if run else None,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,
            disable=run is None,
        )
        if run is not None and tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError as error:
                raise ValueError(f"--tensorboard: {error}: pip install tensorboard") from None

            self._writer = SummaryWriter

    def open(self, first_step: int, evaluated: int) -> None:
        """Prepare the files. Lines that an interrupted run wrote after `first_step`, or after
        `evaluated`, the last step with an evaluation, are removed."""
        if self.path is None:
            return
        if self.path.exists():
            kept = [
                line
                for line in read_metrics(self.path)
                if line["step"] <= (evaluated if "val_miou" in line else first_step)
            ]
            save_atomically("".join(json.dumps(line) + "\n" for line in kept), self.path)
        if self._writer:
            self.events = self._writer(str(self.path.parent), purge_step=first_step + 1)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        if self.events:
            self.events.close()

    def step(self) -> None:
        self.bar.update()

    def record(self, step: int, values: dict[str, Any]) -> None:
        if self.path is None:
            return
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:  # its message names no file
            raise OSError(f"{self.path} could not be written: {error}") from error
        if self.events:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)

    def show(self, values: dict[str, float]) -> None:
        shown = {
            k: f"{value:.3g}"
            for k, value in values.items()
            if k != IGNORED_LABELS and (k != WRONG_LABELS or value != 0)
        }
        self.bar.set_postfix(shown, refresh=False)

    def warn_of_labels(self, count: float) -> None:
        """Once, if labels were out of range. count: their mean number in a step."""
        if count > 0 and not self._warned:
            self._warned = True
            self.write(
                f"warning: {count:.3g} labels per step are neither a class nor ignored; they are "
                f"left out of the loss. {METRICS} counts them as {WRONG_LABELS}"
            )

    def write(self, text: str) -> None:
        if self.path is not None:
            self.bar.write(text, file=sys.stderr)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last line that a crash has truncated."""
    try:
        lines = path.read_text().splitlines(keepends=True)
        metrics = [json.loads(line) for line in lines if line.endswith("\n")]
        if not all(isinstance(line, dict) and type(line.get("step")) is int for line in metrics):
            raise ValueError("a line without a step")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    return metrics


def attempt(what: str, make: Callable[[], Result]) -> Result | None:
    """The result of `make`, or None if it fails; then one line on stderr says so. After the
    training the results are already written, and the other files can still be made."""
    try:
        return make()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"anchorops-train: {what} could not be made: {reason}", file=sys.stderr)
        return None


class Averages:
    """Means of loss terms between two log lines, summed on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._passes = 0

    def add(self, terms: dict[str, Tensor], passes: int) -> None:
        """Terms of one of the `passes` passes of a step."""
        self._passes += 1
        for name, value in terms.items():
            value = value.detach().float() / passes
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def not_finite(self) -> list[str]:
        return [name for name, value in self._sums.items() if not math.isfinite(value)]

    def take(self, passes: int) -> tuple[dict[str, float], int]:
        """The means since the last call, and their number of steps."""
        steps = self._passes // passes
        means = {name: value.item() / steps for name, value in self._sums.items()}
        self._sums, self._passes = {}, 0
        return means, steps

    def state(self) -> dict[str, Any]:
        return {"sums": self._sums, "passes": self._passes}

    def restore(self, state: dict[str, Any]) -> None:
        self._sums, self._passes = dict(state["sums"]), state["passes"]
