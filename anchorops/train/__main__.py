"""The program anchorops-train. It handles signals before it imports the libraries of training."""

import sys
from collections.abc import Sequence

from .signals import end_at_once


def main(arguments: Sequence[str] | None = None) -> None:
    with end_at_once.installed():
        if sys.flags.optimize > 1:
            sys.exit(
                "anchorops-train: expected an interpreter that keeps docstrings, which are needed "
                "to import segmentation-models-pytorch: start it without -OO and PYTHONOPTIMIZE=2"
            )
        from . import commands

        commands.main(arguments)


if __name__ == "__main__":
    main()
