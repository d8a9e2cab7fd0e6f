"""usage: anchorops-train fit --config PRESET [OPTIONS]      train (fit --help: the options)
       anchorops-train fit --run RUN --resume             go on with an interrupted run
       anchorops-train validate --run RUN                 the figures of its best weights
       anchorops-train predict --run RUN --images IMAGE ... --out DIRECTORY
       anchorops-train compare RUN ...                    compare finished runs
       anchorops-train presets                            the presets, with published results
       anchorops-train demo [--steps N]                   both networks, plain and with SAR

A preset is a file of the package, or your own YAML file. A RUN is the directory of a run."""

import signal
import sys


def main() -> int:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the program imports
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(__doc__)
        return 0
    from .commands import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
