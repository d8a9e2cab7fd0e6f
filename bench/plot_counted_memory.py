"""Draws counted memory: python bench/plot_counted_memory.py bench/results/counted-memory.json
With --table it prints a short table for the README instead. `full_table` is for docs/cost.md.
"""

import argparse
import json
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from plot_operators import OTHER, OURS

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
PRECISIONS = {"bf16": "bf16 autocast", "float32": "float32"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    run = json.loads(options.rows.read_text())
    if options.table:
        print(table(run))
        return
    picture = options.rows.with_suffix(".png")
    draw(run).savefig(picture, dpi=150)
    print(picture)


def gigabytes(row: dict) -> str:
    return f"{row['peak_bytes'] / 1e9:.1f}"


def settings(run: dict) -> dict[tuple[str, str, str, bool], list[dict]]:
    """The rows of each network, its sizes, a precision and checkpointing: plain, ours, methods."""
    names = ("network", "sizes", "precision", "checkpointing")
    groups = groupby(run["rows"], lambda row: tuple(row[name] for name in names))
    return {key: list(rows) for key, rows in groups}  # type: ignore[misc]


def label(row: dict) -> str:
    if row["loss"] == "torch":
        return "plain, torch's cross-entropy"
    return f"{row['method'] or 'plain'}, ours"


def draw(run: dict) -> Figure:
    """Plain and ours with bf16 autocast. The methods are in the tables: most add less than 1 %."""
    groups = settings(run)
    networks = list(dict.fromkeys(key[:2] for key in groups))
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.62 * len(networks) + 1), layout="constrained")
    for axis, checkpointing in zip(axes, (False, True), strict=True):
        for y, (network, sizes) in enumerate(networks):
            plain, ours = groups[network, sizes, "bf16", checkpointing][:2]
            bars(axis, y, plain, ours)
        axis.set_title(f"with{'' if checkpointing else 'out'} activation checkpointing", loc="left")
        axis.set_yticks(
            range(len(networks)), [" ".join(x) for x in networks] if axis is axes[0] else []
        )
        axis.invert_yaxis()
        axis.set_xlim(0, 1.3 * axis.dataLim.x1)
        axis.set_xlabel("GB at the peak of a training step, bf16 autocast")
    figure.legend(
        handles=[
            Patch(color=OTHER, label="torch's cross-entropy"),
            Patch(color=OURS, label="ours"),
        ],
        loc="outside upper left",
        ncols=2,
        frameon=False,
    )
    text = (
        f"counted on fake tensors, not measured: parameters, Adam's state, gradients, activations, "
        f"loss; torch {run['torch']}, commit {run['commit']}"
    )
    figure.supxlabel(text, fontsize=7.5, color="#555555", ha="left", x=0.01)
    return figure


def bars(axis: Axes, y: int, plain: dict, ours: dict) -> None:
    for row, at, colour in ((plain, y - 0.2, OTHER), (ours, y + 0.2, OURS)):
        drawn = axis.barh(at, row["peak_bytes"] / 1e9, 0.38, color=colour)
        text = share(row, plain).replace(" (", " GB (") if row is ours else f"{gigabytes(row)} GB"
        axis.bar_label(drawn, [text], padding=4, fontsize=7.5)


def change(rows: list[dict], capacity: str) -> str:
    """The largest batches, plain and ours."""
    return " → ".join(str(row["largest_batches"][capacity]) for row in rows[:2])


def share(row: dict, plain: dict) -> str:
    return f"{gigabytes(row)} ({row['peak_bytes'] / plain['peak_bytes']:.0%})"


def table(run: dict) -> str:
    """For each network with bf16 autocast: memory without and with checkpointing, and batches."""
    lines = [
        "| bf16 autocast, GB | plain | ours | with any method | images in 24 GB "
        "| checkpointing: plain | ours | with any method | images in 24 GB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    groups = settings(run)
    for network, sizes in dict.fromkeys(key[:2] for key in groups):
        cells = [f"{network}, {sizes}"]
        for checkpointing in (False, True):
            rows = groups[network, sizes, "bf16", checkpointing]
            plain, ours, *methods = rows
            most = max(methods, key=lambda row: row["peak_bytes"])
            cells += [gigabytes(plain), share(ours, plain), f"≤ {share(most, plain)}"]
            cells.append(change(rows, "24 GB"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def full_table(run: dict) -> str:
    """Every row: memory in GB, and the largest batches, plain and ours."""
    groups = settings(run)
    first = next(iter(groups.values()))
    capacities = list(first[0]["largest_batches"])
    heads = ["a training step", "", *map(label, first), *(f"images in {gb}" for gb in capacities)]
    lines = [f"| {' | '.join(heads)} |", "|---|---" + "|--:" * (len(heads) - 2) + "|"]
    for (network, sizes, precision, checkpointing), rows in groups.items():
        how = PRECISIONS[precision] + (", checkpointing" if checkpointing else "")
        memory = [gigabytes(rows[0]), *(share(row, rows[0]) for row in rows[1:])]
        cells = [f"{network}, {sizes}", how, *memory, *(change(rows, gb) for gb in capacities)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
