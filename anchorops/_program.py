"""Ctrl-C and SIGTERM while the training program imports torch, which takes seconds.

`python -m anchorops.train` and `anchorops-train` import this package before any code of the program
runs. In every other process the signals stay as they are.
"""

import sys

PROGRAM = ("anchorops.train", "anchorops-train")


def is_program() -> bool:
    """Whether the interpreter was started to run the training program: what stands before the
    program's arguments is the module of `-m`, or the path of a script."""
    started = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    return len(started) > 1 and started[-1].endswith(PROGRAM)


if is_program():
    from .train.signals import end_at_once, handle

    handle(end_at_once)
