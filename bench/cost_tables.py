"""Writes the tables of docs/cost.md and docs/frameworks.md from committed rows and counts.

    python bench/cost_tables.py [--check]

A table stands between `<!-- rows: NAME -->` and `<!-- end of rows -->`. With --check nothing is
written, and the exit status is 1 if a table differs from its rows.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import plot_counted_memory
import plot_operators
import plot_training_step
import statistics_of_ranks
from charts import number
from markdown_table import markdown_table

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs/cost.md", ROOT / "docs/frameworks.md")
RESULTS = ROOT / "bench/results"
MARKED = re.compile(r"(<!-- rows: (\w+) -->\n).*?(?=<!-- end of rows -->)", re.S)
RUN = RESULTS / "intel-xeon-avx512-2-threads.json"  # of `make bench BENCH=bench/results`
STEPS = RESULTS / "amd-epyc-avx2-2-threads.json"  # of `bench/run.py --only training_steps`
COUNTED_MEMORY = RESULTS / "counted-memory.json"
COUNTED_OPERATIONS = RESULTS / "counted-operations.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for page in PAGES:
        written = page.read_text()
        expected = with_tables(written)
        if not options.check:
            page.write_text(expected)
        elif written != expected:
            sys.exit(f"{page}: a table differs from its rows: python bench/cost_tables.py")


def with_tables(page: str) -> str:
    """The text of a page, with its tables made anew from the rows."""
    return MARKED.sub(lambda marked: f"{marked[1]}\n{TABLES[marked[2]]()}\n\n", page)


def run() -> dict:
    return json.loads(RUN.read_text())


def headlines() -> str:
    return plot_operators.table(run())


def milliseconds(row: dict) -> str:
    return number(row["median"] * 1e3)


def mebibytes(row: dict) -> str:
    return "" if row["extra_bytes"] is None else number(row["extra_bytes"] / 2**20)


def cases() -> str:
    """Every case: ours and the fastest other implementation."""
    lines = []
    for rows in plot_operators.grouped(plot_operators.quick(run())).values():
        ours = next((row for row in rows if row["ours"]), None)
        other = next((row for row in rows if not row["name"].startswith("anchorops")), None)
        if ours is None or other is None:
            continue
        share = "" if ours["copy_share"] is None else f"{ours['copy_share']:.0%}"
        ratio = f"{other['median'] / ours['median']:.1f}"
        least, most = other["q20"] / ours["q80"], other["q80"] / ours["q20"]
        ratio += f" ({least:.1f}–{most:.1f})"
        cells = [
            *plot_operators.title(ours).split("\n"),
            milliseconds(ours),
            mebibytes(ours),
            share,
            other["name"],
            milliseconds(other),
            ratio,
            mebibytes(other),
        ]
        lines.append(cells)
    header = ["operation", "sizes", "anchorops, ms", "MiB", "of copies", "fastest other", "ms", "×"]
    return markdown_table([*header, "MiB"], lines, words=(0, 1, 5))


def training_steps() -> str:
    return plot_training_step.table(json.loads(STEPS.read_text()))


def inference() -> str:
    return plot_training_step.inference(json.loads(STEPS.read_text()))


def counted_operations() -> str:
    lines = []
    for row in json.loads(COUNTED_OPERATIONS.read_text())["rows"]:
        baseline, late = row["plain"], row["late"]
        changed = f"{late / 1e9:.1f} ({late / baseline:.0%})" if late else "nothing to move"
        lines.append(
            [row["network"], row["library"], row["size"], f"{baseline / 1e9:.1f}", changed]
        )
    header = ["network", "of", "image", "baseline, GFLOP", "late upsampling"]
    return markdown_table(header, lines, words=(0, 1, 2))


def counted_memory() -> str:
    return plot_counted_memory.full_table(json.loads(COUNTED_MEMORY.read_text()))


TABLES = {
    "headlines": headlines,
    "cases": cases,
    "training_steps": training_steps,
    "statistics_of_ranks": statistics_of_ranks.table,
    "inference": inference,
    "counted_memory": counted_memory,
    "counted_operations": counted_operations,
}


if __name__ == "__main__":
    main()
