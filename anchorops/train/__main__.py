"""The program anchorops-train. Ctrl-C ends it without a traceback, also while it imports."""

import signal
import sys

USAGE = """usage: anchorops-train fit --config PRESET [OPTIONS]      train (fit --help: the options)
       anchorops-train fit --run RUN --resume             go on with an interrupted run
       anchorops-train validate --run RUN                 the figures of its best weights
       anchorops-train predict --run RUN --images IMAGE ... --out DIRECTORY
       anchorops-train compare RUN ...                    compare finished runs
       anchorops-train presets                            the presets, with published results
       anchorops-train demo [--steps N]                   both networks, plain and with SAR

A preset is a file of the package, or your own YAML file. A RUN is the directory of a run."""


def main() -> int:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(USAGE)
        return 0
    from .commands import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
