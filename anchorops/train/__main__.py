"""The program anchorops-train. It handles signals before it imports the libraries of training."""

import sys

from .signals import end_at_once, handle

USAGE = """usage: anchorops-train fit --config PRESET [OPTIONS]      train (fit --help: the options)
       anchorops-train fit --run RUN --resume             go on with an interrupted run
       anchorops-train validate --run RUN                 the figures of its best weights
       anchorops-train predict --run RUN --images IMAGE ... --out DIRECTORY
       anchorops-train compare RUN ...                    compare finished runs
       anchorops-train presets                            the presets, with published results
       anchorops-train demo [--steps N]                   both networks, plain and with SAR

A preset is a file of the package, or your own YAML file. A RUN is the directory of a run."""


def main() -> int:
    handle(end_at_once)
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(USAGE)
        return 0
    from .commands import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
