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
from matplotlib.ticker import MaxNLocator
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
    groups = settings(run)
    networks = list(dict.fromkeys(key[:2] for key in groups))
    figure, axes = plt.subplots(
        len(networks), 2, figsize=(10, 1.55 * len(networks) + 0.6), layout="constrained"
    )
    for line, (network, sizes) in zip(axes, networks, strict=True):
        both = [groups[network, sizes, "bf16", checkpointing] for checkpointing in (False, True)]
        for axis, rows in zip(line, both, strict=True):
            bars(axis, rows)
            axis.set_xlim(0, 1.8 * both[0][0]["peak_bytes"] / 1e9)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        line[0].set_title(f"{network}, {sizes}", loc="left", fontsize=9, fontweight="bold")
        line[1].set_title("with activation checkpointing", loc="left", fontsize=9)
        line[1].set_yticklabels([])
    for axis in axes[-1]:
        axis.set_xlabel("GB at the peak of a step, bf16 autocast")
    text = (
        f"counted on fake tensors, not measured: parameters, Adam's state, gradients, activations, "
        f"loss; torch {run['torch']}, commit {run['commit']}"
    )
    figure.supxlabel(text, fontsize=7.5, color="#555555", ha="left", x=0.01)
    return figure


def bars(axis: Axes, rows: list[dict]) -> None:
    colours = [OTHER if row["loss"] == "torch" else OURS for row in rows]
    drawn = axis.barh(range(len(rows)), [row["peak_bytes"] / 1e9 for row in rows], color=colours)
    plain = rows[0]["peak_bytes"]
    texts = [
        f"{gigabytes(row)} GB, {row['peak_bytes'] / plain:.0%}; "
        f"{row['largest_batches']['24 GB']} images fit 24 GB"
        for row in rows
    ]
    axis.bar_label(drawn, texts, padding=4, fontsize=7.5)
    axis.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
    axis.invert_yaxis()


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
