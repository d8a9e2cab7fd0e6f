"""Draws the rows of a machine, or counted memory:

    python bench/plot.py bench/results/amd-epyc-avx512-2-threads.json

The picture, of every option of the pixel losses or of the memory of training steps, is written next
to the rows.
"""

import argparse
from math import nan
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from cases.listed import IMAGES, VOLUMES
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from record import BASELINE, BOTH, OWN, by_case, compared, gain, load, machine, variant_of

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
OURS, PALE, OTHER, GREY = "#1f6f54", "#9ecae1", "#b9c2bd", "#555555"
COUNTED = {  # name of a row: colour, and text of the legend
    BASELINE: (OTHER, "torch's cross-entropy"),
    OWN: (PALE, "our cross-entropy"),
    BOTH: (OURS, "our cross-entropy and late upsampling"),
}


def options(run: dict) -> Figure | None:
    """The time of the fastest alternative over ours."""
    cases = [case for case in by_case(run["operators"]) if case[0]["shape"] in (IMAGES, VOLUMES)]
    if not cases:
        return None
    gains: dict[str, dict[tuple, float]] = {"classes": {}, "channels": {}, "classes\n3-D": {}}
    for case in cases:
        row = case[0]
        what = "channels" if "sigmoid" in row["operation"] else "classes"
        what += "\n3-D" * (row["shape"] == VOLUMES)
        gains[what][variant_of(row), row["num_classes"], row["stride"]] = gain(case)
    heights = [len({name for name, *_ in group}) for group in gains.values()]
    figure, axes = plt.subplot_mosaic(
        [["classes", "classes"], ["channels", "classes\n3-D"], ["channels", "."]],
        figsize=(10, 8.4),
        layout="constrained",
        height_ratios=[heights[0], heights[2], max(heights[1] - heights[2], 1)],
        width_ratios=(4, 1),
    )
    for what, group in gains.items():
        axis = axes[what]
        names = list(dict.fromkeys(name for name, *_ in group))
        columns = sorted({(number, stride) for _, number, stride in group})
        table = [[group.get((name, *column), nan) for column in columns] for name in names]
        axis.imshow(table, norm=LogNorm(1 / 40, 40), cmap="BrBG", aspect="auto")
        for (name, *column), value in group.items():
            digits = 2 if value < 1 else 1 if value < 10 else 0
            axis.text(
                columns.index(tuple(column)),
                names.index(name),
                f"{value:.{digits}f}",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if value > 10 or value < 0.1 else "black",
            )
        heads = [f"{k} {what if k > 1 else 'channel'}\nstride {ratio}" for k, ratio in columns]
        axis.set_yticks(range(len(names)), names)
        axis.set_xticks(range(len(columns)), heads)
        axis.tick_params(length=0, labelsize=7)
    figure.suptitle(
        "Time of the fastest alternative divided by ours, forward and backward "
        "(pseudo-labels: forward)\nstride 4: logits of output stride 4",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    return figure


def counted_memory(run: dict) -> Figure:
    """Of networks that were counted with and without checkpointing. The methods are in the
    tables."""
    groups = compared(run["rows"], "network", "sizes", "checkpointing")
    networks = [key[:2] for key in groups if key[2]]
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.75 * len(networks) + 1), layout="constrained")
    for axis, checkpointing in zip(axes, (False, True), strict=True):
        for y, network in enumerate(networks):
            rows = groups[(*network, checkpointing)]
            drawn = [name for name in COUNTED if name in rows]
            for i, name in enumerate(drawn):
                size, baseline = (rows[x]["peak_bytes"] for x in (name, BASELINE))
                at = y + 0.26 * (i - (len(drawn) - 1) / 2)
                bar = axis.barh(at, size / 1e9, 0.24, color=COUNTED[name][0])
                share = "" if name == BASELINE else f" ({size / baseline:.0%})"
                axis.bar_label(bar, [f"{size / 1e9:.1f} GB{share}"], padding=4, fontsize=7)
        axis.set_title(f"with{'' if checkpointing else 'out'} activation checkpointing", loc="left")
        axis.set_yticks(
            range(len(networks)), [" ".join(x) for x in networks] if axis is axes[0] else []
        )
        axis.invert_yaxis()
        axis.set_xlim(0, 1.3 * axis.dataLim.x1)
        axis.set_xlabel("GB at the peak of a training step, bf16 autocast")
    figure.legend(
        handles=[Patch(color=colour, label=text) for colour, text in COUNTED.values()],
        loc="outside upper left",
        ncols=3,
        frameon=False,
    )
    return figure


def caption(run: dict) -> str:
    if "rows" in run:
        return (
            "counted on fake tensors, not measured: parameters, Adam's state, gradients, "
            f"activations, loss; torch {run['torch']}, commit {run['commit']}"
        )
    return f"{machine(run)}; medians"


def draw(path: Path) -> None:
    """The pictures of the sections that the file has."""
    run = load(path)
    picture = options if "operators" in run else counted_memory
    if figure := picture(run):
        figure.supxlabel(caption(run), fontsize=7.5, color=GREY, ha="left", x=0.01)
        file = path.with_suffix(".png")
        figure.savefig(file, dpi=150)
        plt.close(figure)
        print(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path)
    draw(parser.parse_args().rows)


if __name__ == "__main__":
    main()
