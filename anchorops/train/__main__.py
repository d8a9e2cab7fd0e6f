"""The program anchorops-train. It handles signals before it imports the libraries of training."""

import os
import sys
import traceback

from .signals import end_at_once, handle

USAGE = """usage: anchorops-train fit --config PRESET [OPTIONS]      train (fit --help: the options)
       anchorops-train fit --run RUN --ckpt_path last     go on with an interrupted run
       anchorops-train validate --run RUN                 the figures of its best weights
       anchorops-train predict --run RUN --data.images IMAGE … --out DIRECTORY
       anchorops-train compare RUN …                      compare finished runs
       anchorops-train presets                            the presets, with published results
       anchorops-train demo [--steps N]                   both networks, plain and with SAR

A preset is a file of the package, or your own YAML file. A RUN is the directory of a run."""


def main() -> None:
    handle(end_at_once)
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(USAGE)
        return
    from .cli import main

    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Python's own exit sends SIGTERM to the workers of an interrupted loader, which do not see it
    # (data/loading.py), and waits for them. They end when they notice the end of this process.
    os._exit(status)


if __name__ == "__main__":
    main()
