"""The program anchorops-train. It handles signals before it imports the libraries of training."""

import os
import sys

from .signals import end_at_once, handle


def main() -> None:
    handle(end_at_once)
    if sys.flags.optimize > 1:
        sys.exit(
            "anchorops-train: expected an interpreter that keeps docstrings, which are needed "
            "to import segmentation-models-pytorch: start it without -OO and PYTHONOPTIMIZE=2"
        )
    from .cli import main

    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Python's own exit sends SIGTERM to the workers of an interrupted loader, which do not see it
    # (data/loading.py), and waits for them. They end when they notice the end of this process.
    os._exit(status)


if __name__ == "__main__":
    main()
