"""Measures everything that the README and the documentation show, on this machine's CPU.

    python bench/run.py [--out bench/results] [--only SECTION] [--tiny]

The sections are operators, training_steps, options and export. All need about an hour on two
threads, in which nothing else may run: it does not begin on a machine whose cores other
processes use, and it fails if other processes disturbed a row. The rows are in one file, named
after the processor and its instruction set, beside its pictures. At the end it prints the tables
for the README. ATEN_CPU_CAPABILITY=avx2 measures without AVX-512.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import plot
import torch
from record import file_name

from anchorops.measure import DISTURBED, OtherProcesses

HERE, CPU = Path(__file__).parent, torch.device("cpu")
THREADS, WATCH = 2, 5.0  # seconds before the start
SECTIONS = ("operators", "training_steps", "options", "export")


def commands(path: Path, tiny: bool) -> dict[str, list[str]]:
    """What measures each section."""
    options, steps = HERE / "bench_options.py", HERE / "training_step.py"
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rows", str(path)]
    pytest += ["--tiny"] if tiny else []
    return {
        "operators": [*pytest, str(HERE), "--ignore", str(options)],
        "training_steps": [
            *(sys.executable, str(steps), "--out", str(path), "--minutes", "0"),
            *(["--dry-run", "--rounds", "1"] if tiny else []),
        ],
        "options": [*pytest, str(options), "--seconds", "0.25"],
        "export": [
            *(sys.executable, str(HERE / "export.py"), "--out", str(path)),
            *(["--quick"] if tiny else []),
        ],
    }


def disturbed(path: Path) -> list[str]:
    """The rows that were measured while other processes used the cores."""
    run = json.loads(path.read_text())
    names = (
        *("operation", "direction", "shape", "network", "option", "num_classes", "ratio", "name"),
        *("volume", "dtype", "way"),
    )
    return [
        f"{section}: {', '.join(str(row[name]) for name in names if name in row)}"
        for section in (*SECTIONS, "inference")
        for row in run.get(section, [])
        if (row["others"] or 0) > DISTURBED
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="a directory")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="measure this section")
    parser.add_argument("--tiny", action="store_true", help="small tensors, only to test the code")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    others = OtherProcesses(CPU)
    time.sleep(0 if options.tiny else WATCH)
    busy = others.cores()
    if busy is not None and busy > DISTURBED and not options.tiny:
        sys.exit(f"other processes keep {busy:.1f} cores busy: stop them, then measure")
    path: Path = options.out / file_name(CPU)
    if options.only is None:
        path.unlink(missing_ok=True)
    start, environment = time.monotonic(), os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    for section, command in commands(path, options.tiny).items():
        if options.only is None or section in options.only:
            print(f"\n{section}", flush=True)
            if status := subprocess.run(command, env=environment).returncode:
                sys.exit(f"{section}: exit {status}")
    plot.draw(path)
    print(f"\n{(time.monotonic() - start) / 60:.0f} minutes. Rows: {path}\n")
    print(plot.tables(json.loads(path.read_text())), end="\n\n")
    if names := disturbed(path):
        sys.exit("disturbed by other processes, so measure again:\n" + "\n".join(names))


if __name__ == "__main__":
    main()
