"""Measures everything that the README and the documentation show, on this machine.

    python bench/run.py [--device cpu] [--out bench/results] [--only SECTION] [--tiny]

The device is the GPU, where there is one. The sections are operators, with rows of every usable
backend, training_steps, options, and, for the CPU alone, export and masks. On two threads of a CPU
all need about an hour, in which nothing else may run: it does not begin on a machine whose cores
other processes use, and it fails if other processes disturbed a row. Rows that contradict each
other are measured again; if they still do, they are not recorded, and it fails. The rows are in one
file, named after the device, beside its pictures. At the end it prints the main tables.
ATEN_CPU_CAPABILITY=avx2 measures without AVX-512.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cost_tables
import plot
import torch
from record import DEVICE, ROOT, add_ratios, file_name, json_of

from anchorops.measure import DISTURBED, OtherProcesses

HERE = Path(__file__).parent
THREADS, WATCH = 2, 5.0  # seconds before the start
SECTIONS = ("operators", "training_steps", "options", "export", "masks")
ATTEMPTS = 3  # to measure rows that contradict each other
# What identifies a row of a section.
CASES = {
    "operators": (
        *("operation", "direction", "shape", "sizes", "num_classes", "dtype", "labels", "name"),
    ),
    "options": ("option", "num_classes", "ratio", "axes", "batch"),
}
# Operation, option or direction -> those that it contains.
PARTS = {
    "cross-entropy + Dice": ("cross-entropy", "Dice"),
    "class moments with anchors": ("class moments",),
    "forward + backward": ("forward", "backward"),
}


def commands(path: Path, device: str, tiny: bool) -> dict[str, list[str]]:
    """What measures each section on the device."""
    options, steps = HERE / "bench_options.py", HERE / "training_step.py"
    python, on_device = sys.executable, ("--device", device)
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rows", str(path)]
    pytest += [*on_device, *(["--tiny"] if tiny else [])]
    every = {
        "operators": [*pytest, str(HERE), "--ignore", str(options)],
        "training_steps": [
            *(python, str(steps), "--out", str(path), "--minutes", "0", *on_device),
            *(["--dry-run", "--rounds", "1"] if tiny else []),
        ],
        "options": [*pytest, str(options), "--seconds", "0.25"],
    }
    if device == "cpu":
        for section in ("export", "masks"):
            command = [python, str(HERE / f"{section}.py"), "--out", str(path)]
            every[section] = [*command, *(["--quick"] if tiny else [])]
    return every


def measure_again(tests: list[str], path: Path, device: str) -> None:
    """Rows of operators or options, by their tests, into a file of their own."""
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    command += ["--rows", str(path), "--device", device]
    if status := subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(f"measured again: exit {status}")


def timings(row: dict) -> Iterator[tuple[str, float, float]]:
    """Each implementation in a row of an operator or an option, the seconds of its fastest call,
    and the seconds that most of its calls need at most."""
    if "name" in row:
        yield row["name"], row["minimum"], row["q80"]
    else:
        for name, fastest in row["minimum"].items():
            yield name, fastest, row["quartiles"][name][1]


def contradictions(run: dict) -> Iterator[tuple[str, dict, dict]]:
    """Pairs of rows, a part and what contains it, where even the fastest call of the part took
    longer than most calls of the whole; and a text that says so."""
    for section, names in CASES.items():
        rows = {tuple(row[name] for name in names): row for row in run.get(section, [])}
        for key, whole in rows.items():
            most_of = {name: most for name, _, most in timings(whole)}
            for place, value in enumerate(key):
                kind, *variant = str(value).split(", ")
                for part_kind in PARTS.get(kind, ()):
                    part_value = ", ".join((part_kind, *variant))
                    part = rows.get((*key[:place], part_value, *key[place + 1 :]))
                    for name, fastest, _ in timings(part) if part else ():
                        most = most_of.get(name, fastest)
                        if part and fastest > most:
                            case = ", ".join(
                                f"{name} {x}" for name, x in zip(names, key, strict=True)
                            )
                            text = (
                                f"{section}, {case}, by {name}: {part_value} took at least "
                                f"{1e3 * fastest:.1f} ms, the whole mostly {1e3 * most:.1f} or less"
                            )
                            yield text, part, whole


def make_consistent(path: Path, measure: Callable[[list[str], Path], None]) -> None:
    """Measures rows that contradict each other again, close in time. If they still do after
    ATTEMPTS, it takes them out of the file and exits with an error.

    measure: of tests, into a file.
    """
    run, again = json.loads(path.read_text()), path.with_suffix(".again.json")

    def replace_rows(new: dict[str, dict | None]) -> None:
        """new: by test; None removes the row."""
        for section in CASES.keys() & run.keys():
            rows = [new.get(row["test"], row) for row in run[section]]
            run[section] = [row for row in rows if row is not None]
        add_ratios(run.get("operators", []))
        path.write_text(json_of(run))

    def wrong() -> list[str]:
        pairs = (pair for _, *pair in contradictions(run))
        return list(dict.fromkeys(row["test"] for pair in pairs for row in pair))

    for _ in range(ATTEMPTS):
        if not (tests := wrong()):
            return
        measure(tests, again)
        measured = json.loads(again.read_text())
        again.unlink()
        rows = (row for section in CASES for row in measured.get(section, []))
        replace_rows({row["test"]: row for row in rows})
    if texts := [text for text, *_ in contradictions(run)]:
        replace_rows(dict.fromkeys(wrong()))
        sys.exit(
            f"rows contradict each other, measured {ATTEMPTS} times again, so they are not "
            "recorded:\n" + "\n".join(texts)
        )


def disturbed(path: Path) -> list[str]:
    """The rows that were measured while other processes used the cores."""
    run = json.loads(path.read_text())
    names = (
        *("operation", "direction", "shape", "network", "option", "num_classes", "ratio", "name"),
        *("volume", "dtype", "masks", "threads"),
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
    parser.add_argument("--device", choices=("cpu", "cuda"), default=DEVICE)
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="a directory")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="measure this section")
    parser.add_argument("--tiny", action="store_true", help="small tensors, only to test the code")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(THREADS)
    others = OtherProcesses(device)
    time.sleep(0 if options.tiny else WATCH)
    busy = others.cores()
    if busy is not None and busy > DISTURBED and not options.tiny:
        sys.exit(f"other processes keep {busy:.1f} cores busy: stop them, then measure")
    path: Path = options.out.resolve() / file_name(device)
    if options.only is None:
        path.unlink(missing_ok=True)
    start = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    for section, command in commands(path, options.device, options.tiny).items():
        if options.only is None or section in options.only:
            print(f"\n{section}", flush=True)
            if status := subprocess.run(command).returncode:
                sys.exit(f"{section}: exit {status}")
    if not options.tiny:  # calls of microseconds
        make_consistent(path, partial(measure_again, device=options.device))
    plot.draw(path)
    run = json.loads(path.read_text())
    print(f"\n{(time.monotonic() - start) / 60:.0f} minutes. Rows: {path}\n")
    for section, table in cost_tables.OF_A_MACHINE.items():
        if section in run:
            print(table(run), end="\n\n")
    if not options.tiny and (names := disturbed(path)):
        sys.exit("disturbed by other processes, so measure again:\n" + "\n".join(names))


if __name__ == "__main__":
    main()
