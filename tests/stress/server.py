"""Imports the training program once, and forks a process for every run.

A line of standard input is a JSON object. It contains `arguments` of the program; `messages`, the
file for its output; whether to draw `pictures`, which takes nine tenths of a run; and a
disturbance: `place`, `call`, `event` and `signum` (see watch), or `limit`, the largest file in
bytes. The answer is the exit status.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anchorops.train import __main__, commands
from anchorops.train.networks.models import Segmenter
from anchorops.train.report import evaluate, finish
from anchorops.train.run import checkpoint, loop, parts, state

# the places that are disturbed: functions, with the module in which their caller finds them
PLACES: dict[str, tuple[Any, str]] = {
    "parse": (commands, "_train"),
    "count": (parts, "class_counts"),
    "build": (parts, "build_model"),
    "step": (loop._Run, "_train_step"),
    "checkpoint": (state, "save_checkpoint"),
    "write": (checkpoint, "save_atomically"),
    "log": (loop._Run, "_log"),
    "evaluation": (evaluate, "evaluate"),
    "best": (loop, "save_atomically"),
    "results": (finish, "save_atomically"),
    "cost": (finish, "cost_of_regularizer"),
    "predictions": (finish, "draw_predictions"),
    "report": (finish, "write_report"),
}


class Body(nn.Module):
    """A network that takes a millisecond."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(channels, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout2d(0.1)
        )
        self.mix = nn.Conv2d(16, 16, 3, 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.mix(self.backbone(images))


def build_model(name: str, num_classes: int, *, channels: int, **_: object) -> Segmenter:
    return Segmenter(Body(channels), 16, num_classes)


def watch(place: str | None, call: int, event: int, signum: int) -> dict[str, list[int]]:
    """Send the signal to this process at the event-th call of a function, in Python or C, within
    the call-th call of a place. Without a place: the number of such events in each call of each
    place."""
    events: dict[str, list[int]] = {name: [] for name in PLACES}
    active: list[str] = []

    def count(frame: object, kind: str, argument: object) -> None:
        for name in active if kind in ("call", "c_call") else ():
            events[name][-1] += 1
            if name == place and events[name][-1] == event:
                sys.setprofile(None)
                os.kill(os.getpid(), signum)

    def watched(name: str, function: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            events[name].append(0)
            if place is not None and (name, len(events[name])) != (place, call):
                return function(*args, **kwargs)
            active.append(name)
            sys.setprofile(count)
            try:
                return function(*args, **kwargs)
            finally:
                active.remove(name)
                if not active:
                    sys.setprofile(None)

        return run

    for name, (owner, attribute) in PLACES.items():
        setattr(owner, attribute, watched(name, getattr(owner, attribute)))
    return events


def run_program(order: dict[str, Any]) -> None:
    messages = os.open(order["messages"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(messages, 1)
    os.dup2(messages, 2)
    if limit := order.get("limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    parts.build_model = build_model
    if not order["pictures"]:
        finish.draw_predictions = lambda *_, **__: b""
        finish.write_report = lambda run, *_: (run / "report.html").touch()
    place = order.get("place")
    events = watch(place, *(order.get(name, 0) for name in ("call", "event", "signum")))
    try:
        __main__.main(order["arguments"])
    finally:
        if place is None and "events" in order:
            Path(order["events"]).write_text(json.dumps(events))


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have ignored it
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run_program(json.loads(line))
                status = 0
            except SystemExit as error:
                if isinstance(error.code, str):
                    os.write(2, f"{error.code}\n".encode())
                status = error.code if isinstance(error.code, int) else int(bool(error.code))
            except BaseException:
                import traceback

                traceback.print_exc()
                status = 70
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
