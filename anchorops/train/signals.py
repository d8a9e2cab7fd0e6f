"""SIGTERM and Ctrl-C. During the training, the program finishes the step and saves; in its first
step nothing is saved and nothing deleted. Before and after the training there is nothing to save,
and the program ends immediately.
"""

import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from .run.checkpoint import latest_checkpoint


def launched() -> bool:
    """Whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ


def is_first() -> bool:
    """Whether this is the first rank; also before the process group is created."""
    return os.environ.get("RANK", "0") == "0"


STOPPING = (signal.SIGTERM, signal.SIGINT)


def handle(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Handle signals, except those that are ignored: by `nohup`, or because a script's shell has
    started the program in the background. Returns the handlers that it replaces."""
    heard = [s for s in STOPPING if signal.getsignal(s) != signal.SIG_IGN]
    return {signum: signal.signal(signum, handler) for signum in heard}


NOT_BEGUN = "it has not begun: start it again"


class Interrupted(Exception):
    """The run was asked to stop and has saved its state. run: None if it has not begun."""

    def __init__(self, signum: int, run: Path | None, step: int) -> None:
        after = f" after step {step}; continue with: {resume_command(run)}" if run else ""
        super().__init__(f"stopped by {signal.Signals(signum).name}{after or f'; {NOT_BEGUN}'}")
        self.exit_status = 128 + signum


def resume_command(run: Path) -> str:
    program = "torchrun … -m anchorops.train" if launched() else "anchorops-train"
    return f"{program} resume {shlex.quote(str(run))}"


class EndAtOnce:
    """The reaction outside the training steps, and to a second Ctrl-C within them: the program
    prints one line and ends. It does not raise an exception, because an import or the clean-up of a
    library could catch it, and because it would wait for threads that read masks."""

    def __init__(self) -> None:
        self.run: Path | None = None
        """The directory of the run, if it has been created."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle signals inside the block."""
        before = handle(self)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        try:
            if is_first():
                message = self._message(signal.Signals(signum).name)
                # not through Python's buffers: the interrupted code may hold their locks
                os.write(2, f"\nanchorops-train: {message}\n".encode())
        finally:
            os._exit(128 + signum)

    def _message(self, name: str) -> str:
        if self.run is None:
            return f"stopped by {name}; {NOT_BEGUN}"
        saved = latest_checkpoint(self.run)
        if saved is None:
            return f"stopped by {name}; there is no checkpoint yet: start it again"
        if (self.run / "results.json").exists():
            there = "results.json is there, make the report with"
        else:
            there = f"the last checkpoint is {saved.name}, continue with"
        return f"stopped by {name}; {there}: {resume_command(self.run)}"


end_at_once = EndAtOnce()


class StopSignals:
    """Records SIGTERM and Ctrl-C until the end of a step. A second Ctrl-C has the previous effect:
    it raises KeyboardInterrupt, or ends the training program immediately."""

    ECHO = 1.0  # seconds in which torchrun forwards a Ctrl-C that its ranks have also received

    def __enter__(self) -> "StopSignals":
        self.received: int | None = None
        self._first = 0.0
        self._old = handle(self._receive)
        return self

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received == signal.SIGINT == signum and now > self._first + self.ECHO:
            before = self._old[signal.SIGINT]
            if callable(before):
                before(signum, frame)
            raise KeyboardInterrupt
        if self.received is None:
            self._first = now
        self.received = signum

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)
