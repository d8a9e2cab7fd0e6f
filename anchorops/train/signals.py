"""SIGTERM and Ctrl-C: the training ends its step and saves; before and after it there is nothing to
save, and the program ends at once."""

import os
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from .checkpoint import latest_checkpoint
from .ranks import is_first, launched

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""

    def __init__(self, signum: int, run: Path, step: int) -> None:
        stopped = f"stopped by {signal.Signals(signum).name} after step {step}"
        super().__init__(f"{stopped}; continue with: {resume_command(run)}")
        self.exit_status = 128 + signum


def resume_command(run: Path) -> str:
    program = "torchrun … -m anchorops.train" if launched() else "anchorops-train"
    return f"{program} resume {shlex.quote(str(run))}"


class EndAtOnce:
    """What the program does outside the training steps, and at a second Ctrl-C within them: one
    line, and no more. No exception, which an import or a library's clean-up could swallow, and
    whose way out would wait for threads that read masks."""

    def __init__(self) -> None:
        self.run: Path | None = None
        """The directory of the run, where one has been made."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """For the time of the block; what the shell had the program ignore, it ignores."""
        heard = [s for s in STOPPING if signal.getsignal(s) != signal.SIG_IGN]
        before = {signum: signal.signal(signum, self) for signum in heard}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        try:
            if is_first():
                message = self._message(signal.Signals(signum).name)
                # past Python's buffers, whose locks the interrupted code may hold
                os.write(2, f"\nanchorops-train: {message}\n".encode())
        finally:
            os._exit(128 + signum)

    def _message(self, name: str) -> str:
        if self.run is None or (saved := latest_checkpoint(self.run)) is None:
            return f"stopped by {name}; there is no checkpoint yet: start it again"
        if (self.run / "results.json").exists():
            there = "results.json is there, make the report with"
        else:
            there = f"the last checkpoint is {saved.name}, continue with"
        return f"stopped by {name}; {there}: {resume_command(self.run)}"


end_at_once = EndAtOnce()


class StopSignals:
    """Remembers SIGTERM and Ctrl-C for the end of a step; a second Ctrl-C does what it did before:
    it raises KeyboardInterrupt, and in the program it ends at once."""

    ECHO = 1.0  # seconds: torchrun passes on the Ctrl-C that its ranks have heard themselves

    def __enter__(self) -> "StopSignals":
        self.received: int | None = None
        self._first = 0.0
        self._old = {s: signal.signal(s, self._receive) for s in STOPPING}
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
