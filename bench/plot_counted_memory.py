"""The picture and the tables of counted memory, for bench/plot.py and docs/cost.md."""

from collections.abc import Callable

import matplotlib.pyplot as plt
from charts import OTHER, OURS, PALE
from markdown_table import markdown_table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from record import grouped


def gigabytes(row: dict) -> str:
    return f"{row['peak_bytes'] / 1e9:.1f}"


def settings(run: dict) -> dict[tuple, dict[str, dict]]:
    """The rows of each network, its sizes, a precision and checkpointing, by label."""
    names = ("network", "sizes", "precision", "checkpointing")
    groups = grouped(run["rows"], *names).items()
    return {key: {label(row): row for row in rows} for key, rows in groups}


BASELINE, OWN, LATE, BOTH = "baseline", "our cross-entropy", "late upsampling", "both"


def label(row: dict) -> str:
    if row["method"]:
        return row["method"]
    if row["late"]:
        return LATE if row["loss"] == "torch" else BOTH
    return BASELINE if row["loss"] == "torch" else OWN


def draw(run: dict) -> Figure:
    """With bf16 autocast. The methods are in the tables."""
    groups = settings(run)
    networks = list(dict.fromkeys(key[:2] for key in groups))
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.75 * len(networks) + 1), layout="constrained")
    for axis, checkpointing in zip(axes, (False, True), strict=True):
        for y, network in enumerate(networks):
            bars(axis, y, groups[(*network, "bf16", checkpointing)])
        axis.set_title(f"with{'' if checkpointing else 'out'} activation checkpointing", loc="left")
        axis.set_yticks(
            range(len(networks)), [" ".join(x) for x in networks] if axis is axes[0] else []
        )
        axis.invert_yaxis()
        axis.set_xlim(0, 1.3 * axis.dataLim.x1)
        axis.set_xlabel("GB at the peak of a training step, bf16 autocast")
    figure.legend(
        handles=[Patch(color=colour, label=LEGEND[name]) for name, colour in COLOURS.items()],
        loc="outside upper left",
        ncols=3,
        frameon=False,
    )
    return figure


def caption(run: dict) -> str:
    return (
        f"counted on fake tensors, not measured: parameters, Adam's state, gradients, activations, "
        f"loss; torch {run['torch']}, commit {run['commit']}"
    )


COLOURS = {BASELINE: OTHER, OWN: PALE, BOTH: OURS}
LEGEND = {
    BASELINE: "torch's cross-entropy",
    OWN: "our cross-entropy",
    BOTH: "our cross-entropy and late upsampling",
}


def bars(axis: Axes, y: int, rows: dict[str, dict]) -> None:
    drawn = [name for name in COLOURS if name in rows]
    for number, name in enumerate(drawn):
        row, at = rows[name], y + 0.26 * (number - (len(drawn) - 1) / 2)
        bar = axis.barh(at, row["peak_bytes"] / 1e9, 0.24, color=COLOURS[name])
        text = f"{gigabytes(row)} GB"
        if name != BASELINE:
            text = share(row, rows[BASELINE]).replace(" (", " GB (")
        axis.bar_label(bar, [text], padding=4, fontsize=7)


def arrows(rows: dict[str, dict], cell: Callable[[dict], object]) -> str:
    """Baseline, with our cross-entropy, and with late upsampling too."""
    return " → ".join(str(cell(rows[name])) for name in COLOURS if name in rows)


def share(row: dict, baseline: dict) -> str:
    return f"{gigabytes(row)} ({row['peak_bytes'] / baseline['peak_bytes']:.0%})"


def table(run: dict) -> str:
    """For each network and checkpointing, with bf16: memory in GB and the largest batches. "→" as
    in `arrows`."""
    groups = settings(run)
    capacities = ("24 GB", "80 GB")
    header = ["network", "bf16 autocast, GB", "with a method, at most"]
    header += [f"images in {gb}" for gb in capacities]
    lines = []
    seen = ""
    for (network, sizes, precision, checkpointing), rows in groups.items():
        if precision != "bf16":
            continue
        name = f"{network}, {sizes}"
        most = max((row for row in rows.values() if row["method"]), key=lambda r: r["peak_bytes"])
        cells = [
            "checkpointing" if checkpointing and name == seen else name,
            arrows(rows, gigabytes),
            gigabytes(most),
            *(arrows(rows, lambda row, gb=gb: row["largest_batches"][gb]) for gb in capacities),
        ]
        lines.append(cells)
        seen = name
    return markdown_table(header, lines)
