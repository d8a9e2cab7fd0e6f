"""Measures on this machine what the README and the documentation show.

    python bench/run.py [--device cuda] [--minutes N] [--out bench/results] [--only SECTION]
    python bench/run.py --device cuda --list       # the rows that would be written
    python bench/run.py --device cuda --dry-run    # the same lines on the CPU, with tiny sizes

What was never measured comes first, in the order of its worth, then what was measured at another
commit; what was measured at this commit is left out. So it goes on where it stopped, also on
another day. Each item is a process of its own with a limit of time; its rows are written at once.
An implementation that fails, takes too long or is not installed has a row that says so. The rows
are in one file, named after the device, beside its pictures; at the end tables are printed.

On two threads of a CPU all needs more than an hour, in which nothing else may run: it does not
begin on a machine whose cores other processes use. Rows that other processes disturbed are taken
out of the file; then the exit status is 1, and the next call measures them again.
ATEN_CPU_CAPABILITY=avx2 measures without AVX-512.
"""

import argparse
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cost_tables
import masks
import operator_times
import plot
import torch
import training_step
from cases.listed import cases_on
from record import CASES, DEVICE, ROOT, commit, file_name, head_of, json_of, load, save

from anchorops.measure import DISTURBED, OtherProcesses

HERE, NNUNET = Path(__file__).parent, ROOT / "build/nnunet/bin/python"
THREADS, WATCH = 2, 5.0  # seconds before the start
LEAST = 20.0  # seconds: with fewer left nothing is begun
MISSING, OLD, DONE = range(3)


class Item(NamedTuple):
    """What is measured together. rows: those that are known before, with the fields of their cases.
    limit: in seconds."""

    name: str
    section: str
    command: list[str]
    limit: float
    rows: Sequence[dict[str, Any]] = ()


class Plan(NamedTuple):
    """device: the type that is measured."""

    path: Path
    device: str

    def script(self, name: str, *options: str, python: str = sys.executable) -> list[str]:
        command = [python, str(HERE / name), "--rows", str(self.path)]
        return [*command, "--device", self.device, *options]

    def operators(self, cases: Iterable[Any], limit: float) -> Item:
        kinds = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}[self.device]
        cases, device = list(cases), torch.device(self.device)
        rows = [
            {**case._replace(shape=case.shape.on(device)).fields, "name": one.name}
            for case in cases
            for one in operator_times.implementations(self.device, case, kinds)
        ]
        names = [name for case in cases for name in ("--case", str(case))]
        command = self.script("operator_times.py", *names)
        return Item(str(cases[0]), "operators", command, limit, rows)

    def steps(self, section: str, limit: float, *compiled: str) -> list[Item]:
        """An item for each network. compiled: "--compiled" for the steps that are."""
        return [
            Item(
                " ".join([section, *compiled, "of", str(network)]),
                section,
                self.script(
                    "training_step.py", "--section", section, "--network", network.name, *compiled
                ),
                limit,
                [{"network": str(network), "compiled": bool(compiled), "name": x} for x in names],
            )
            for network, names in training_step.plan(self.device, section, bool(compiled))
        ]

    def of_cpu(self) -> list[Item]:
        """An item for all cases of an operation."""
        every = sorted(cases_on("cpu"), key=lambda case: case.operation)
        grouped = itertools.groupby(every, lambda case: case.operation)
        with_nnunet = str(NNUNET) if NNUNET.exists() else sys.executable
        return [
            *(self.operators(cases, 7200) for _, cases in grouped),
            *self.steps("training_steps", 3600),
            *self.steps("training_steps", 3600, "--compiled"),
            *self.steps("inference", 3600),
            Item("export", "export", self.script("export.py", python=with_nnunet), 3600),
            Item("windows", "windows", self.script("windows.py"), 3600),
            *(Item(x, x, self.script("masks.py", "--section", x), 3600) for x in masks.SECTIONS),
        ]

    def of_gpu(self) -> list[Item]:
        """In the order of worth for one day of 15 minutes: 1 for the check, 5 for operators, 4 for
        steps, and then the rest."""
        verified = self.path.with_name(f"verified-{self.path.name}")
        verify = [sys.executable, "-m", "anchorops.doctor", "--verify", "--all"]
        verify += ["--json", str(verified)]
        cases = cases_on("cuda")
        operators = [self.operators([case], 90) for case in cases]
        steps = self.steps("training_steps", 90)
        compiled = self.steps("training_steps", 150, "--compiled")
        return [
            Item("verify", "verify", verify, 150),
            *operators[:7],
            *steps,
            *operators[7:20],
            *compiled,
            *operators[20:],
        ]


def rehearsed(device: str, out: Path) -> list[str]:
    """Runs what measures operators and steps on this device, with tiny inputs on the CPU, two at a
    time, each with a file of rows. What went wrong."""
    steps = ["training_step.py", "--networks-of", device]
    programs = {
        "operators": ["operator_times.py", "--cases-of", device],
        "steps": steps,
        "compiled": [*steps, "--compiled"],
    }
    if device == "cpu":
        programs["inference"] = [*steps, "--section", "inference"]

    def run(name: str) -> str | None:
        program, *options = programs[name]
        options += ["--rows", str(out / f"{name}.json"), "--device", "cpu", "--dry-run"]
        return measure([sys.executable, str(HERE / program), *options], limit=600, threads=1)

    with ThreadPoolExecutor(2) as pool:
        reasons = zip(programs, pool.map(run, programs), strict=True)
        return [f"{name}: {why}" for name, why in reasons if why]


def state(item: Item, run: dict[str, Any], now: str) -> int:
    """MISSING, OLD (of another commit) or DONE. A check is never done."""
    if item.section == "verify":
        return MISSING
    wanted = {identity(item, row) for row in item.rows}
    rows = [row for row in run.get(item.section, []) if not wanted or identity(item, row) in wanted]
    if not rows or len(rows) < len(wanted):
        return MISSING
    return DONE if all(row["commit"] == now for row in rows) else OLD


def identity(item: Item, row: dict[str, Any]) -> tuple[Any, ...]:
    """Of a row in the item's section."""
    return tuple(row[name] for name in (*CASES.get(item.section, ()), "name"))


def measure(command: Sequence[str], limit: float, threads: int) -> str | None:
    """Runs an item's command. Why it did not end well, or None."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(limit)
        return f"exit {status}" if status else None
    except subprocess.TimeoutExpired:
        return f"over the limit of {limit:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def measure_missing(
    items: Sequence[Item], path: Path, device: torch.device, minutes: float | None
) -> list[str]:
    """Runs what is not done, and gives the reasons of what failed."""
    now, start, failed = commit(), time.monotonic(), []
    states = {item.name: state(item, load(path), now) for item in items}
    for item in sorted(items, key=lambda item: states[item.name]):  # stable
        left = 60 * minutes - (time.monotonic() - start) if minutes else item.limit
        if states[item.name] == DONE or left < LEAST:
            continue
        print(f"\n{item.name}", flush=True)
        reason = measure(item.command, min(left, item.limit), THREADS)
        cut = reason is not None and reason.startswith("over") and left < item.limit
        if not cut:
            mark_absent(item, path, device, reason or "cannot be measured here")
            failed += [f"{item.name}: {reason}"] if reason else []
    return failed


def mark_absent(item: Item, path: Path, device: torch.device, reason: str) -> None:
    """Gives the item's rows that do not exist the reason."""
    fields = CASES.get(item.section, ())
    cases = {tuple(row[name] for name in fields) for row in item.rows}
    rows = load(path).get(item.section, [])
    rows = [row for row in rows if tuple(row[name] for name in fields) in cases]
    there = {identity(item, row) for row in rows}
    absent = [row for row in item.rows if identity(item, row) not in there]
    if absent:
        added = [row | {"absent": reason} for row in absent]
        save(path, item.section, head_of(device), [*rows, *added])


def take_out_disturbed(path: Path) -> list[str]:
    """The rows that other processes disturbed leave the file: which they are."""
    run, names = load(path), []
    for section, fields in CASES.items():
        rows = run.get(section, [])
        disturbed = [row for row in rows if (row.get("others") or 0) > DISTURBED]
        for row in disturbed:
            rows.remove(row)
            names.append(", ".join(str(row[x]) for x in (*fields, "name")) + ": disturbed")
    path.write_text(json_of(run))
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default=DEVICE)
    parser.add_argument("--minutes", type=float, help="begin nothing later, and end by then")
    parser.add_argument("--out", type=Path, help="a directory (default build/bench)")
    parser.add_argument("--only", choices=("verify", *CASES), action="append")
    parser.add_argument("--list", action="store_true", help="the rows that would be written")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    options = parser.parse_args()
    if options.dry_run:
        out = options.out or Path(tempfile.mkdtemp())
        sys.exit("\n".join(rehearsed(options.device, out.resolve())) or None)
    if options.device == "cuda" and not (options.list or torch.cuda.is_available()):
        sys.exit(
            "run.py --device cuda: expected a GPU, torch sees none (--list and --dry-run need none)"
        )
    torch.set_num_threads(THREADS)
    device = torch.device("cpu" if options.list else options.device)
    path = (options.out or Path("build/bench")).resolve() / file_name(device)
    plan = Plan(path, options.device)
    items = plan.of_cpu() if plan.device == "cpu" else plan.of_gpu()
    items = [x for x in items if options.only is None or x.section in options.only]
    if options.list:
        for item in items:
            print(f"{item.name}: {', '.join(row['name'] for row in item.rows) or item.section}")
        return
    others = OtherProcesses(device)
    time.sleep(WATCH if device.type == "cpu" else 0)
    if (busy := others.cores() or 0) > DISTURBED:
        sys.exit(f"other processes keep {busy:.1f} cores busy: stop them, then measure")
    failed = measure_missing(items, path, device, options.minutes)
    run = load(path)
    if "operators" in run:
        plot.draw(path)
    print(f"\nRows: {path}\n")
    for section, table in cost_tables.OF_A_MACHINE.items():
        if section in run:
            print(table(run), end="\n\n")
    if device.type == "cpu":
        failed += take_out_disturbed(path)
    if failed:
        sys.exit("measure again:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
