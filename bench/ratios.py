"""Prints the results of `make bench` as ratios: python bench/ratios.py [ROWS.json …]

For each case there is a line with the time of every rival, divided by our time. For each network
there are the time and the memory of a training step with each method, divided by those of the plain
step with torch's cross-entropy.
"""

import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from conftest import key


def of_cases(rows: list[dict]) -> Iterator[str]:
    for _, group in groupby(rows, key):
        members = sorted(group, key=lambda row: row["median"])
        ours = next((row for row in members if row["ours"]), None)
        if ours is None:
            continue
        ratios = [f"{row['ratio']:.1f}× {row['name']}" for row in members if row is not ours]
        case = ", ".join(ours[name] for name in ("operation", "direction", "shape", "dtype"))
        time = f"{ours['median'] * 1e3:,.2f} ms"
        yield f"{case}, {ours['labels']} labels: {time}; {'; '.join(ratios) or 'no rival'}"


def of_steps(rows: list[dict]) -> Iterator[str]:
    for network, group in groupby(rows, lambda row: row["network"]):
        yield f"{network}, to plain with torch's cross-entropy:"
        for row in group:
            text = (
                f"  {row['methods']}, {row['cross_entropy']}: {1 + row['added_time']:.0%} of time"
            )
            if row["added_memory"] is not None:
                text += f", {1 + row['added_memory']:.0%} of memory"
            yield text


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        run = json.loads(path.read_text())
        print(f"\n{path}: {run['device']}, torch {run['torch']}, commit {run['commit']}")
        lines = of_steps if "network" in run["rows"][0] else of_cases
        print(*lines(run["rows"]), sep="\n")


if __name__ == "__main__":
    main()
