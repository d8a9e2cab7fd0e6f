"""Draws the rows of a benchmark run: python bench/plot.py bench/results/RUN.json OUT.png"""

import json
import sys

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt


def main(rows_file: str, picture: str) -> None:
    with open(rows_file) as file:
        run = json.load(file)
    cases = dict.fromkeys(row["case"] for row in run["rows"])
    groups = [[row for row in run["rows"] if row["case"] == case] for case in cases]
    groups = [sorted(group, key=lambda row: row["median"]) for group in groups if len(group) > 1]
    figure, axes = plt.subplots(
        len(groups),
        figsize=(9, 0.24 * sum(map(len, groups)) + 0.55 * len(groups)),
        squeeze=False,
        height_ratios=[len(group) + 1 for group in groups],
        layout="constrained",
    )
    for axis, group in zip(axes[:, 0], groups, strict=True):
        times = [row["median"] * 1e3 for row in group]
        colours = ["#1f6f54" if row["name"] == "anchorops" else "#b9c2bd" for row in group]
        bars = axis.barh([row["name"] for row in group], times, color=colours)
        ours = next(row["median"] * 1e3 for row in group if row["name"] == "anchorops")
        labels = [f"{time:.0f} ms   {time / ours:.1f}×" for time in times]
        axis.bar_label(bars, labels, padding=4, fontsize=8)
        axis.set_title(group[0]["case"], fontsize=9, loc="left")
        axis.margins(x=0.18)
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel(
        f"milliseconds (median); {run['device']}, torch {run['torch']}", fontsize=8
    )
    figure.savefig(picture, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
