"""SIGTERM and Ctrl-C outside the training steps: the program ends at once, with one line."""

import os
import signal
from collections.abc import Callable
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT)


def handle(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    """Handle the signals, except those that are ignored: by `nohup`, or because a script's shell
    has started the program in the background."""
    for signum in STOPPING:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, handler)


def end_at_once(signum: int, frame: FrameType | None) -> None:
    """No exception, because an import or the clean-up of a library could catch it."""
    try:
        # not through Python's buffers: the interrupted code may hold their locks
        name = signal.Signals(signum).name
        os.write(2, f"\nanchorops-train: ended by {name}, without saving\n".encode())
    finally:
        os._exit(128 + signum)
