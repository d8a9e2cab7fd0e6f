"""Draws training steps: python bench/plot_training_step.py ROWS.json
With --table it prints the README's table instead.

ROWS.png, next to ROWS.json, shows time and memory of each candidate, relative to the plain network
with torch's loss.
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
from matplotlib.ticker import PercentFormatter
from plot import OTHER, OURS

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
NAMES = {"cr": "CR", "sar": "SAR", "cbp": "CBP", "occl": "OCCL", "ceco": "CeCo", "mvsc": "MVSC"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    run = json.loads(options.rows.read_text())
    if options.table:
        print(table(run))
        return
    figure = draw(run)
    figure.savefig(options.rows.with_suffix(".png"), dpi=150)
    print(options.rows.with_suffix(".png"))


def by_network(run: dict) -> list[tuple[str, list[dict]]]:
    return [(name, list(rows)) for name, rows in groupby(run["rows"], lambda row: row["network"])]


def label(row: dict) -> str:
    if row["cross_entropy"] == "torch":
        return "plain, torch's cross-entropy"
    if row["methods"] == "plain":
        return "plain, ours"
    return " + ".join(NAMES[method] for method in row["methods"].split("+")) + ", ours"


def draw(run: dict) -> Figure:
    networks = by_network(run)
    figure, axes = plt.subplots(
        len(networks), 2, figsize=(10, 2.9 * len(networks)), squeeze=False, layout="constrained"
    )
    for line, (network, rows) in zip(axes, networks, strict=True):
        times = [1 + row["added_time"] for row in rows]
        texts = [f"{1e3 * row['seconds']['median']:,.0f} ms" for row in rows]
        bars(line[0], rows, times, texts, f"{network}: time of a step")
        if all(row["peak_bytes"] for row in rows):
            memory = [row["peak_bytes"] / rows[0]["peak_bytes"] for row in rows]
            texts = [f"{row['peak_bytes'] / 2**20:,.0f} MiB" for row in rows]
            bars(line[1], rows, memory, texts, "most memory in a step")
        line[1].set_yticklabels([])
    text = f"{run['device']}; torch {run['torch']}, commit {run['commit']}"
    figure.supxlabel(text, fontsize=7.5, color="#555555", ha="left", x=0.01)
    return figure


def bars(axis: Axes, rows: list[dict], shares: list[float], texts: list[str], title: str) -> None:
    colours = [OTHER if row["cross_entropy"] == "torch" else OURS for row in rows]
    drawn = axis.barh(range(len(rows)), shares, color=colours)
    labels = [f"{share:.0%}, {text}" for share, text in zip(shares, texts, strict=True)]
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axis.bar_label(drawn, labels, padding=4, fontsize=8, bbox=clear)
    axis.set_yticks(range(len(rows)), [label(row) for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.35 * max(shares))
    axis.axvline(1, color="#555555", linewidth=1, linestyle="--")
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.set_title(title, loc="left", fontsize=9, fontweight="bold")


def table(run: dict) -> str:
    """Time and memory of every candidate, as shares of the first."""
    networks = by_network(run)
    heads = ["a training step"]
    for name, _ in networks:
        heads += [f"{name}: time", "memory"]
    lines = [
        f"{run['device']}; torch {run['torch']}, commit {run['commit']}.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for column in zip(*(rows for _, rows in networks), strict=True):
        cells = [label(column[0])]
        for row, (_, rows) in zip(column, networks, strict=True):
            milliseconds = 1e3 * row["seconds"]["median"]
            cells.append(f"{milliseconds:,.0f} ms ({1 + row['added_time']:.0%})")
            peak, plain = row["peak_bytes"], rows[0]["peak_bytes"]
            cells.append(f"{peak / 2**20:,.0f} MiB ({peak / plain:.0%})" if peak else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
