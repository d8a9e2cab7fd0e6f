"""The picture and the tables of training steps, for bench/plot.py: time and memory of each
candidate, relative to the baseline with torch's loss."""

import matplotlib.pyplot as plt
from charts import GREY, OTHER, OURS, bars
from markdown_table import markdown_table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from record import grouped

NAMES = {"cr": "CR", "sar": "SAR", "cbp": "CBP", "occl": "OCCL", "ceco": "CeCo", "mvsc": "MVSC"}


def label(row: dict) -> str:
    ours = row["cross_entropy"] == "anchorops"
    if row["methods"] != "plain":
        text = " + ".join(NAMES[method] for method in row["methods"].split("+"))
        return f"{text}, {'both' if row.get('late') else 'ours'}"
    if row.get("compiled"):
        return "baseline, torch.compile"
    if row.get("late"):
        return "late upsampling, ours (both)" if ours else "late upsampling alone"
    return "baseline, ours" if ours else "baseline, torch's cross-entropy"


def draw(run: dict) -> Figure:
    networks = grouped(run["training_steps"], "network")
    figure, axes = plt.subplots(
        len(networks), 2, figsize=(10, 2.9 * len(networks)), squeeze=False, layout="constrained"
    )
    for line, ((network,), rows) in zip(axes, networks.items(), strict=True):
        times = [row["ratio"]["median"] for row in rows]
        texts = [f"{1e3 * row['seconds']['median']:,.0f} ms" for row in rows]
        shares_of(line[0], rows, times, texts, f"{network}: time")
        if all(row["peak_bytes"] for row in rows):
            memory = [row["peak_bytes"] / rows[0]["peak_bytes"] for row in rows]
            texts = [f"{row['peak_bytes'] / 2**20:,.0f} MiB" for row in rows]
            shares_of(line[1], rows, memory, texts, "memory of a step, at most")
        line[1].set_yticklabels([])
    return figure


def shares_of(
    axis: Axes, rows: list[dict], shares: list[float], texts: list[str], title: str
) -> None:
    plain = [row["cross_entropy"] == "torch" and not row.get("late") for row in rows]
    colours = [OTHER if other else OURS for other in plain]
    labels = [f"{share:.0%}, {text}" for share, text in zip(shares, texts, strict=True)]
    bars(axis, dict(zip(map(label, rows), shares, strict=True)), labels, colours, title)
    axis.invert_yaxis()
    axis.axvline(1, color=GREY, linewidth=1, linestyle="--", zorder=0)
    axis.xaxis.set_major_formatter(PercentFormatter(1))


def table(run: dict) -> str:
    """Time and memory of every candidate, as shares of the first: the ratio of the medians, and of
    the quartiles to the first's median."""
    networks = grouped(run["training_steps"], "network")
    heads = ["a training step"]
    for (name,) in networks:
        heads += [f"{name}: time", "memory"]
    lines = []
    for name in dict.fromkeys(map(label, run["training_steps"])):
        cells = [name]
        for rows in networks.values():
            row = {label(row): row for row in rows}.get(name)
            if row is None:  # nothing could run later
                cells += ["", ""]
                continue
            milliseconds = 1e3 * row["seconds"]["median"]
            ratio = row["ratio"]
            between = f"{100 * ratio['q1']:.0f}–{100 * ratio['q3']:.0f}"
            cells.append(f"{milliseconds:,.0f} ms ({ratio['median']:.0%}; {between})")
            peak, plain = row["peak_bytes"], rows[0]["peak_bytes"]
            cells.append(f"{peak / 2**20:,.0f} MiB ({peak / plain:.0%})" if peak else "")
        lines.append(cells)
    head = f"{run['device']}; torch {run['torch']}, commit {run['commit']}."
    return f"{head}\n\n{markdown_table(heads, lines)}"


def inference(run: dict) -> str:
    """Time of a forward pass without gradients. Rows without this measurement give no table."""
    rows = run.get("inference", [])
    if not rows:
        return "Not measured yet."
    lines = []
    for (network,), group in grouped(rows, "network").items():
        times = {
            row["name"]: f"{1e3 * row['seconds']['median']:,.0f} ms ({row['ratio']['median']:.0%})"
            for row in group
        }
        names = ("plain", "late", "late, exported")
        lines.append([network, *(times.get(name, "") for name in names)])
    return markdown_table(["inference", "baseline", "late upsampling", "exported"], lines)
