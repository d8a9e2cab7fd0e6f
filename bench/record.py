"""The results of one machine in one file: its head, and rows in sections.

{"device": …, "torch": …, "operators": [row, …], "training_steps": [row, …], …}

A row has the fields of its case, the `name` of the implementation, its measurements, and the
commit. An implementation that could not be measured has `absent`, the reason, instead of
measurements.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from cases.listed import GRID, OF_USERS

from anchorops.measure import environment, in_turns, peak_extra_bytes

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where nothing else is chosen
CASES = {  # what identifies a case: its rows are measured together
    "operators": ("case",),
    "training_steps": ("network", "compiled"),
    "inference": ("network",),
    "export": ("volume", "dtype"),
    "windows": ("windows",),
    "masks": ("masks", "threads"),
    "masks_in_frameworks": ("case",),
}
# names of training steps, measured or counted
BASELINE, OWN = "baseline, torch's cross-entropy", "baseline, ours"
LATE, BOTH = "late upsampling alone", "late upsampling, ours (both)"
STEP_NAMES = {  # whether with our cross-entropy, and with late upsampling
    (False, False): BASELINE,
    (True, False): OWN,
    (False, True): LATE,
    (True, True): BOTH,
}


def parser_of(doc: str | None, devices: Sequence[str] = ("cpu", "cuda")) -> argparse.ArgumentParser:
    """The options of every program that measures."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter)
    here = [x for x in devices if x == "cpu" or torch.cuda.is_available()]
    usual = DEVICE if DEVICE in here else here[0]
    parser.add_argument("--device", choices=here, default=usual)
    parser.add_argument("--rows", type=Path, help="write the rows to this JSON file")
    parser.add_argument("--dry-run", action="store_true", help="tiny, only to test the code")
    return parser


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


def head_of(device: torch.device) -> dict[str, Any]:
    """Machine and versions."""
    return dict(environment(device))


Ways = dict[str, Callable[[], object]]


def rows_of_ways(
    case: dict[str, Any], ways: Ways, device: torch.device, rounds: int, seconds: float = 0
) -> Iterator[dict[str, Any]]:
    """The least time of calls that take turns, and what each needs at most beyond its inputs and
    outputs."""
    memory = [peak_extra_bytes(run, device) for run in ways.values()]
    times, others = in_turns([*ways.values()], device, seconds=seconds, rounds=rounds)
    for i, name in enumerate(ways):
        row = {"name": name, "seconds": min(times[i]), "memory": memory[i], "others": others}
        yield case | row


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def finish(arguments: argparse.Namespace, section: str, rows: list[dict]) -> None:
    """Prints the rows of a program, and saves them where its options say."""
    print(*rows, sep="\n", flush=True)
    if arguments.rows:
        save(arguments.rows, section, head_of(torch.device(arguments.device)), rows)


def save(path: Path, section: str, head: dict[str, Any], rows: list[dict]) -> None:
    """Writes rows, with the present commit unless they have one, instead of earlier ones of the
    same cases. All others stay.

    Raises:
        ValueError: the file has rows of another machine or version of torch.
    """
    run = load(path)
    for name in ("device", "torch"):
        if name in run and run[name] != head[name]:
            raise ValueError(
                f"{path} has rows of {name} {run[name]}, and this run is of {head[name]}: remove "
                "it, or choose another file"
            )
    cases = CASES.get(section, ())
    measured = grouped(rows, *cases)
    kept = [row for row in run.get(section, []) if tuple(row[x] for x in cases) not in measured]
    now = commit()
    path.parent.mkdir(parents=True, exist_ok=True)
    run |= {**head, section: [*kept, *({**row, "commit": row.get("commit", now)} for row in rows)]}
    path.write_text(json_of(run))


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


def parser_of_counts(doc: str | None, name: str) -> argparse.ArgumentParser:
    """name: of the file of committed rows."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / f"bench/results/{name}.json")
    return parser


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
    """The rows of operators that are compared, the fastest first; operations in the order of the
    cases, whatever was measured again, without those that are no longer cases."""
    operations = [*dict.fromkeys(case.operation for case in (*OF_USERS, *GRID))]
    measured = [x for x in rows if "absent" not in x and x["operation"] in operations]
    groups = grouped(measured, *CASES["operators"]).values()
    in_order = sorted(groups, key=lambda case: operations.index(case[0]["operation"]))
    return [sorted(case, key=lambda row: row["median"]) for case in in_order]


def ours_and_other(case: list[dict]) -> tuple[dict | None, dict | None]:
    """The rows of our fastest backend and of the fastest alternative."""
    ours = next((row for row in case if row["name"].startswith("anchorops")), None)
    other = next((row for row in case if not row["name"].startswith("anchorops")), None)
    return ours, other


def spread(values: Iterable[float]) -> dict[str, float]:
    """Minimum, quartiles and median."""
    values = sorted(values)
    q1, middle, q3 = quantiles(values if len(values) > 1 else 2 * values, n=4, method="inclusive")
    return {"minimum": values[0], "q1": q1, "median": middle, "q3": q3}


def gain(case: list[dict]) -> float:
    """The time of the fastest alternative, divided by ours."""
    ours, other = ours_and_other(case)
    assert ours and other
    return other["median"] / ours["median"]


def variant_of(row: dict) -> str:
    """The option of a row of the grid."""
    labels, dtype = row["labels"], row["dtype"]
    text = row["operation"] + (f", {labels}" if labels != "coherent" else "")
    return text + (f", {dtype}" if dtype != "fp32" else "")


def machine(run: dict) -> str:
    """Where the rows were measured, and with which versions."""
    cuda = f", CUDA {run['cuda']}" if run["device_type"] == "cuda" else ""
    commits = dict.fromkeys(
        row["commit"] for rows in run.values() if isinstance(rows, list) for row in rows
    )
    return (
        f"{run['device']}; torch {run['torch']}{cuda}, anchorops {run['anchorops']} at commit "
        f"{', '.join(commits)}"
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
