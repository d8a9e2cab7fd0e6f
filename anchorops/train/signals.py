"""Stopping on request, at the end of a step."""

import shlex
import signal
import time
from pathlib import Path
from types import FrameType

from .ranks import launched


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""

    def __init__(self, signum: int, run: Path, step: int) -> None:
        program = "torchrun … -m anchorops.train" if launched() else "anchorops-train"
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; continue with: "
            f"{program} resume {shlex.quote(str(run))}"
        )
        self.exit_status = 128 + signum


class StopSignals:
    """Remembers SIGTERM and Ctrl-C for the end of a step; a second Ctrl-C interrupts at once."""

    ECHO = 1.0  # seconds: torchrun passes on the Ctrl-C that its ranks have heard themselves

    def __enter__(self) -> "StopSignals":
        self.received: int | None = None
        self._first = 0.0
        self._old = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received == signal.SIGINT == signum and now > self._first + self.ECHO:
            raise KeyboardInterrupt
        if self.received is None:
            self._first = now
        self.received = signum

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)
