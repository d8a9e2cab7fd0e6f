"""Stopping on request, at the end of a step."""

import signal
from pathlib import Path
from types import FrameType


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""

    def __init__(self, signum: int, run: Path, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; continue with: "
            f"anchorops-train resume {run}"
        )
        self.exit_status = 128 + signum


class StopSignals:
    """Remembers SIGTERM and Ctrl-C for the end of a step; a second Ctrl-C interrupts at once."""

    def __enter__(self) -> "StopSignals":
        self.received: int | None = None
        self._old = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == signum:
            raise KeyboardInterrupt
        self.received = signum

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)
