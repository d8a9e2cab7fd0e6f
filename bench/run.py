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
begin on a machine whose cores other processes use. Rows that other processes disturbed, and rows
that contradict each other, are taken out of the file; then the exit status is 1, and the next call
measures them again. ATEN_CPU_CAPABILITY=avx2 measures without AVX-512.
"""

import argparse
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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

HERE = Path(__file__).parent
THREADS, WATCH = 2, 5.0  # seconds before the start
LEAST = 20.0  # seconds: with fewer left nothing is begun
MISSING, OLD, DONE = range(3)
# Operation or direction -> those that it contains.
PARTS = {
    "cross-entropy + Dice": ("cross-entropy", "Dice"),
    "class moments with anchors": ("class moments",),
    "forward + backward": ("forward", "backward"),
}


class Item(NamedTuple):
    """What is measured together. rows: those that are known before, with the fields of their cases.
    limit: in seconds."""

    name: str
    section: str
    command: list[str]
    limit: float
    rows: Sequence[dict[str, Any]] = ()


class Plan(NamedTuple):
    """device: the type that is measured. dry: on the CPU."""

    path: Path
    device: str
    dry: bool

    def rows(self, item: str) -> Path:
        """In a dry run items run at the same time, so each has a file."""
        return self.path.with_stem(item) if self.dry else self.path

    def script(self, name: str, item: str, *options: str) -> list[str]:
        command = [sys.executable, str(HERE / name), "--rows", str(self.rows(item)), *options]
        command += ["--device", "cpu" if self.dry else self.device]
        return [*command, *(["--dry-run"] if self.dry else [])]

    def operators(self, cases: Iterable[Any], limit: float) -> Item:
        kinds = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}[self.device]
        cases, device = list(cases), torch.device(self.device)
        rows = [
            {**case._replace(shape=case.shape.on(device)).fields, "name": one.name}
            for case in cases
            for one in operator_times.implementations(self.device, case, kinds)
        ]
        script = partial(self.script, "operator_times.py", "operators", "--cases-of", self.device)
        if self.dry:
            return Item("operators", "operators", script(), limit, rows)
        names = [name for case in cases for name in ("--case", str(case))]
        return Item(str(cases[0]), "operators", script(*names), limit, rows)

    def steps(self, section: str, limit: float, compiled: bool = False) -> list[Item]:
        """An item for each network; in a dry run one for all."""
        name = f"compiled {section}" if compiled else section
        script = partial(self.script, "training_step.py", name, "--section", section)
        if compiled:
            script = partial(script, "--compiled")
        if self.dry:
            return [Item(name, section, script("--networks-of", self.device), limit)]
        return [
            Item(
                f"{name} of {network}",
                section,
                script("--network", network.name),
                limit,
                [{"network": str(network), "compiled": compiled, "name": name} for name in names],
            )
            for network, names in training_step.plan(self.device, section, compiled)
        ]

    def of_cpu(self) -> list[Item]:
        """An item for all cases of an operation."""
        every = sorted(cases_on("cpu"), key=lambda case: case.operation)
        grouped = itertools.groupby(every, lambda case: case.operation)
        return [
            *(self.operators(cases, 7200) for _, cases in grouped),
            *self.steps("training_steps", 3600),
            *self.steps("training_steps", 3600, compiled=True),
            *self.steps("inference", 3600),
            Item("export", "export", self.script("export.py", "export"), 3600),
            *(Item(x, x, self.script("masks.py", x, "--section", x), 3600) for x in masks.SECTIONS),
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
        compiled = self.steps("training_steps", 150, compiled=True)
        return [
            Item("verify", "verify", verify, 150),
            *operators[:7],
            *steps,
            *operators[7:20],
            *compiled,
            *operators[20:],
        ]

    def items(self) -> list[Item]:
        if not self.dry:
            return self.of_cpu() if self.device == "cpu" else self.of_gpu()
        return [
            self.operators(cases_on(self.device, tiny=True), 600),
            *self.steps("training_steps", 600),
            *self.steps("training_steps", 600, compiled=True),
            *(self.steps("inference", 600) if self.device == "cpu" else []),
        ]


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


def measure(item: Item, limit: float, environment: dict[str, str]) -> str | None:
    """Runs the item. Why it did not end well, or None."""
    process = subprocess.Popen(
        item.command, cwd=ROOT, env=os.environ | environment, start_new_session=True
    )
    try:
        status = process.wait(limit)
        return f"exit {status}" if status else None
    except subprocess.TimeoutExpired:
        return f"over the limit of {limit:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def rehearsed(items: Sequence[Item]) -> str | None:
    """Runs all items, two at a time. What went wrong, or None."""
    threads = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    with ThreadPoolExecutor(2) as pool:
        reasons = pool.map(lambda item: measure(item, item.limit, threads), items)
        wrong = [f"{item.name}: {why}" for item, why in zip(items, reasons, strict=True) if why]
    return "\n".join(wrong) or None


def measure_missing(
    items: Sequence[Item], path: Path, device: torch.device, minutes: float | None
) -> list[str]:
    """Runs what is not done, and gives the reasons of what failed."""
    now, start, failed = commit(), time.monotonic(), []
    threads = {"OMP_NUM_THREADS": str(THREADS)}
    states = {item.name: state(item, load(path), now) for item in items}
    for item in sorted(items, key=lambda item: states[item.name]):  # stable
        left = 60 * minutes - (time.monotonic() - start) if minutes else item.limit
        if states[item.name] == DONE or left < LEAST:
            continue
        print(f"\n{item.name}", flush=True)
        reason = measure(item, min(left, item.limit), threads)
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


def contradictions(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[dict, dict]]:
    """Pairs of rows, a part and what contains it, where even the fastest call of the part took
    longer than most calls of the whole. What is compiled is another program for each of the two."""
    names = ("operation", "direction", "shape", "sizes", "dtype", "labels", "name")
    found = {tuple(row[name] for name in names): row for row in rows if "q80" in row}
    for key, whole in found.items():
        for place in (0, 1):
            for part in PARTS.get(key[place], ()):
                row = found.get((*key[:place], part, *key[place + 1 :]))
                if row is None or row["name"].startswith("compiled "):
                    continue
                if row["minimum"] > whole["q80"]:
                    yield row, whole


def take_out_wrong_rows(path: Path) -> list[str]:
    """Those that other processes disturbed, and those that contradict each other: which."""
    run, wrong = load(path), []
    pairs = contradictions(run.get("operators", []))
    contradicting = {id(row) for pair in pairs for row in pair}
    for section, fields in CASES.items():
        kept = []
        for row in run.get(section, []):
            disturbed = (row.get("others") or 0) > DISTURBED
            if disturbed or id(row) in contradicting:
                why = "disturbed" if disturbed else "contradicts another row"
                what = ", ".join(str(row[name]) for name in (*fields, "name"))
                wrong.append(f"{section}: {what}: {why}")
            else:
                kept.append(row)
        if section in run:
            run[section] = kept
    path.write_text(json_of(run))
    return wrong


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
    dry = options.dry_run
    if options.device == "cuda" and not (dry or options.list or torch.cuda.is_available()):
        sys.exit(
            "run.py --device cuda: expected a GPU, torch sees none (--list and --dry-run need none)"
        )
    torch.set_num_threads(THREADS)
    usual = Path(tempfile.mkdtemp()) if dry else Path("build/bench")
    out: Path = (options.out or usual).resolve()
    on_cpu = dry or options.device == "cpu" or options.list
    device = torch.device("cpu" if on_cpu else "cuda")
    path = out / file_name(device)
    items = [
        item
        for item in Plan(path, options.device, dry).items()
        if options.only is None or item.section in options.only
    ]
    if options.list:
        for item in items:
            print(f"{item.name}: {', '.join(row['name'] for row in item.rows) or item.section}")
        return
    if dry:
        sys.exit(rehearsed(items))
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
        failed += take_out_wrong_rows(path)
    if failed:
        sys.exit("measure again:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
