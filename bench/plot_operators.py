"""The pictures and the tables of operators, for bench/plot.py."""

import matplotlib.pyplot as plt
from charts import OTHER, OURS, bars, machine, medians, number
from markdown_table import markdown_table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from record import by_case

BOTH, TRAINING = "class moments with anchors", "forward + backward"
DIRECTIONS = "forward", TRAINING
# operation, shape, title, and the formulas that are shown in addition to the fastest alternative
HEADLINES = (
    (
        "cross-entropy",
        "SegFormer, ADE20K",
        "Cross-entropy at full resolution",
        {
            "interpolate + cross_entropy": "interpolate + cross_entropy",
            "interpolate + cross_entropy, kept pages": "the same, malloc keeps memory",
        },
    ),
    (
        BOTH,
        "HRNet-W48, Cityscapes",
        "Class sums and squared distances to anchors",
        {"index_add": "index_add", "class loop": "class loop"},
    ),
)


def quick_cases(run: dict) -> list[list[dict]]:
    """The rows of each case without the full grid, which is for tables."""
    return by_case(row for row in run["operators"] if row["quick"])


def caption(run: dict) -> str:
    text = medians(run)
    if "copy_gbps" in run:
        text += f"; copies {run['copy_gbps']:,.0f} GB/s, reads {run['read_gbps']:,.0f} GB/s"
    return text


def headline_groups(run: dict, operation: str, shape: str) -> list[list[dict]]:
    """A headline's case forward, and forward and backward."""
    dtype = "bf16" if run["device_type"] == "cuda" else "fp32"
    by_direction = {
        row["direction"]: group
        for group in quick_cases(run)
        if (row := group[0])["operation"] == operation
        and (row["shape"], row["dtype"], row["labels"]) == (shape, dtype, "coherent")
    }
    return [by_direction[direction] for direction in DIRECTIONS if direction in by_direction]


def headlines(run: dict) -> Figure | None:
    """Ours, the fastest alternative, the usual formula and the published formula."""
    drawn = [(headline_groups(run, *headline[:2]), *headline[2:]) for headline in HEADLINES]
    drawn = [headline for headline in drawn if headline[0]]
    if not drawn:
        return None
    figure = plt.figure(figsize=(10, 2.6 * len(drawn)), layout="constrained")
    parts = figure.subfigures(len(drawn), 1, squeeze=False)[:, 0]
    for part, (groups, what, formulas) in zip(parts, drawn, strict=True):
        axes = part.subplots(1, len(groups), squeeze=False, sharey=True)[0]
        for axis, group in zip(axes, groups, strict=True):
            draw_headline(axis, group, formulas)
        axes[0].invert_yaxis()
        row = groups[0][0]
        text = f"{what}, {row['dtype']}\n{row['shape']}: {row['sizes']}"
        part.suptitle(text, x=0.01, ha="left", fontsize=10)
    return figure


def draw_headline(axis: Axes, group: list[dict], formulas: dict[str, str]) -> None:
    ours = next(row for row in group if row["ours"])
    rows = {row["name"]: row for row in group}
    shown = {"anchorops": ours}
    fastest = next((row for row in group if "anchorops" not in row["name"]), None)
    if fastest and fastest["name"] not in formulas:
        shown["fastest alternative"] = fastest
    for name, label in formulas.items():
        if name in rows:
            shown[label] = rows[name]
    times = {label: row["median"] * 1e3 for label, row in shown.items()}
    texts = [
        f"{number(row['median'] * 1e3)} ms" + ("" if row is ours else f", {row['ratio']:.0f}×")
        for row in shown.values()
    ]
    if fastest and "fastest alternative" in shown:
        texts[1] += f" ({fastest['name']})"
    bars(axis, times, texts, [OURS, *[OTHER] * (len(shown) - 1)], group[0]["direction"])
    axis.set_xlabel("milliseconds")


def table(run: dict) -> str:
    """The README's tables, verbatim: the headline cases by every implementation."""
    lines = [f"{machine(run)}.", ""]
    for operation, shape, what, _ in HEADLINES:
        groups = headline_groups(run, operation, shape)
        if len(groups) < len(DIRECTIONS):
            continue
        forward, training = groups
        forward_times = {row["name"]: row for row in forward}
        header = ["forward, ms", "forward + backward, ms", "memory beyond inputs and outputs, MiB"]
        rows = []
        for row in training:
            times = (forward_times.get(row["name"]), row)
            cells = [f"{number(r['median'] * 1e3)} ({r['ratio']:.1f}×)" if r else "" for r in times]
            memory = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:,.0f}"
            rows.append([row["name"], *cells, memory])
        row = training[0]
        sizes = f"{row['shape']}: {row['sizes']}, {row['dtype']}, {row['labels']} labels"
        lines += [f"{what}. {sizes}.", ""]
        lines += [markdown_table(["", *header], rows), ""]
        if operation == BOTH:
            share = next(row["read_share"] for row in forward if row["ours"])
            lines += [f"Forward, at {share:.0%} of the bandwidth at which torch sums the features."]
            lines.append("")
    return "\n".join(lines).rstrip()
