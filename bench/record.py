"""The results of one machine in one file: its head, and rows in sections.

{"device": …, "torch": …, "commit": …, "operators": [row, …], "training_steps": […], "options": […]}

A row has the fields of its case, the `name` of the implementation, and its measurements. Only rows
of options have several implementations, which took turns: their measurements are by name.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from anchorops.measure import environment

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where nothing else is chosen
GRAPH = ", CUDA graph"  # of names: the implementation is replayed
# names of training steps, measured or counted
BASELINE, OWN = "baseline, torch's cross-entropy", "baseline, ours"
LATE, BOTH = "late upsampling alone", "late upsampling, ours (both)"
STEP_NAMES = {  # whose cross-entropy, and whether with late upsampling
    ("torch", False): BASELINE,
    ("anchorops", False): OWN,
    ("torch", True): LATE,
    ("anchorops", True): BOTH,
}


def file_name(device: torch.device) -> str:
    """As amd-epyc-avx512-2-threads.json."""
    name = re.sub(r"\((R|TM)\)|Processor", "", environment(device)["device"] or "", flags=re.I)
    return "-".join(re.findall(r"[a-z0-9]+", name.lower())) + ".json"


def commit() -> str:
    """The commit of the checkout, with "-dirty" if more than the committed results was changed;
    without git, $ANCHOROPS_COMMIT."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, text=True, capture_output=True).stdout.strip()

    told = ""
    if shutil.which("git"):
        told = git("rev-parse", "--short", "HEAD")
        if told and git("status", "--porcelain", "-uno", "--", ".", ":!bench/results"):
            told += "-dirty"
    return told or os.environ.get("ANCHOROPS_COMMIT", "unknown")


def head_of(device: torch.device) -> dict[str, object]:
    """Machine, versions and commit."""
    return {**environment(device), "commit": commit()}


def save(path: Path, section: str, head: dict, rows: list[dict]) -> None:
    """Replaces the rows of a section, and keeps those of the others.

    Raises:
        ValueError: the file has rows of another machine, version of torch, or commit.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    run = json.loads(path.read_text()) if path.exists() else {}
    for name in ("device", "torch", "commit"):
        if name in run and run[name] != head[name]:
            raise ValueError(
                f"{path} has rows of {name} {run[name]}, and this run is of {head[name]}: remove "
                "it, or choose another file"
            )
    path.write_text(json_of({**run, **head, section: rows}))


def json_of(run: dict[str, Any]) -> str:
    """A line for each entry, and for each row of an entry that is a list."""
    entries = []
    for name, value in run.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list):
            rows = (f"\n  {json.dumps(row, ensure_ascii=False)}" for row in value)
            text = f"[{','.join(rows)}\n ]"
        entries.append(f"\n {json.dumps(name)}: {text}")
    return f"{{{','.join(entries)}\n}}\n"


def save_counts(path: Path, rows: list[dict[str, Any]]) -> None:
    """Counted rows, which do not depend on a machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_of({"torch": torch.__version__, "commit": commit(), "rows": rows}))


def grouped(rows: Iterable[dict], *names: str) -> dict[tuple, list[dict]]:
    """The rows by their values of these names."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def compared(rows: Iterable[dict], *case: str) -> dict[tuple, dict[str, dict]]:
    """The rows of each case by the name of the implementation."""
    groups = grouped(rows, *case).items()
    return {key: {row["name"]: row for row in group} for key, group in groups}


def by_case(rows: Iterable[dict]) -> list[list[dict]]:
    """The rows of operators that are compared, the fastest first; CUDA graphs separately."""
    names = ("operation", "direction", "shape", "sizes", "num_classes", "dtype", "labels")
    cases = [
        [row for row in group if row["name"].endswith(GRAPH) == graph]
        for group in grouped(rows, *names).values()
        for graph in (False, True)
    ]
    return [sorted(case, key=lambda row: row["median"]) for case in cases if case]


def add_ratios(rows: list[dict]) -> None:
    """To rows of operators: whether it is the one of our fastest backend in the same case, and the
    time divided by that of this backend."""
    for case in by_case(rows):
        base = next((row for row in case if row["name"].startswith("anchorops")), None)
        for row in case:
            row["ours"] = row is base
            row["ratio"] = row["median"] / base["median"] if base else None


def spread(values: Iterable[float]) -> dict[str, float]:
    """Minimum, quartiles and median."""
    values = sorted(values)
    q1, middle, q3 = quantiles(values if len(values) > 1 else 2 * values, n=4, method="inclusive")
    return {"minimum": values[0], "q1": q1, "median": middle, "q3": q3}


def gain(option: dict) -> float:
    """Of a row of options: the time of the fastest alternative, divided by ours."""
    seconds = option["seconds"]
    return min(value for name, value in seconds.items() if name != "ours") / seconds["ours"]


def machine(run: dict) -> str:
    """Where the rows were measured, and with which versions."""
    cuda = f", CUDA {run['cuda']}" if run["device_type"] == "cuda" else ""
    return (
        f"{run['device']}; torch {run['torch']}{cuda}, anchorops {run['anchorops']} at commit "
        f"{run['commit']}"
    )


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, words: Collection[int] = (0,)
) -> str:
    """words: the columns that contain words; the others contain numbers, at the right."""

    def line(cells: Sequence[object]) -> str:
        return f"| {' | '.join(map(str, cells))} |"

    aligned = ("---" if column in words else "--:" for column in range(len(header)))
    return "\n".join([line(header), f"|{'|'.join(aligned)}|", *map(line, rows)])
