"""The picture of options, for bench/plot.py: the time of the fastest alternative over ours."""

from math import isnan, nan

import matplotlib.pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure


def gain(row: dict) -> float:
    """The time of the fastest alternative, divided by ours."""
    seconds = row["seconds"]
    return min(value for name, value in seconds.items() if name != "ours") / seconds["ours"]


def draw(run: dict) -> Figure:
    images = [row for row in run["options"] if row["axes"] == 2]
    groups = {
        "classes": [row for row in images if "sigmoid" not in row["option"]],
        "channels": [row for row in images if "sigmoid" in row["option"]],
        "classes\n3-D": [row for row in run["options"] if row["axes"] == 3],
    }
    heights = [len({row["option"] for row in rows}) for rows in groups.values()]
    figure, axes = plt.subplot_mosaic(
        [["classes", "classes"], ["channels", "classes\n3-D"], ["channels", "."]],
        figsize=(10, 8.4),
        layout="constrained",
        height_ratios=[heights[0], heights[2], max(heights[1] - heights[2], 1)],
        width_ratios=(4, 1),
    )
    for what, rows in groups.items():
        axis = axes[what]
        names = list(dict.fromkeys(row["option"] for row in rows))
        columns = sorted({(row["num_classes"], row["ratio"]) for row in rows})
        gains = {(row["option"], row["num_classes"], row["ratio"]): gain(row) for row in rows}
        table = [[gains.get((name, *column), nan) for column in columns] for name in names]
        axis.imshow(table, norm=LogNorm(1 / 40, 40), cmap="BrBG", aspect="auto")
        for i, line in enumerate(table):
            for j, value in enumerate(line):
                if isnan(value):  # was not measured
                    continue
                digits = 2 if value < 1 else 1 if value < 10 else 0
                dark = value > 10 or value < 0.1
                colour = "white" if dark else "black"
                axis.text(
                    j, i, f"{value:.{digits}f}", ha="center", va="center", fontsize=9, color=colour
                )
        axis.set_yticks(range(len(names)), names)
        axis.set_xticks(
            range(len(columns)),
            [
                f"{number} {what if number > 1 else 'channel'}\nstride {ratio}"
                for number, ratio in columns
            ],
        )
        axis.tick_params(length=0, labelsize=7)
    figure.suptitle(
        "Time of the fastest alternative divided by ours, forward and backward "
        "(pseudo-labels: forward)\nstride 4: logits of output stride 4",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    return figure
