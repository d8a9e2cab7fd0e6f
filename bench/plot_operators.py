"""The pictures and the tables of operators, for bench/plot.py."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS, OTHER = "#1f6f54", "#b9c2bd"
BOTH, TRAINING = "class moments with anchors", "forward + backward"
DIRECTIONS = "forward", TRAINING
# operation, shape, title, and the formulas that are shown in addition to the fastest rival
HEADLINES = (
    (
        "cross-entropy",
        "SegFormer, ADE20K",
        "Cross-entropy at the labels' size",
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


def quick(run: dict) -> list[dict]:
    """The rows without the full grid, which is for tables."""
    return [row for row in run["operators"] if row["quick"]]


def machine(run: dict) -> str:
    cuda = f", CUDA {run['cuda']}" if run["device_type"] == "cuda" else ""
    return (
        f"{run['device']}; torch {run['torch']}{cuda}, anchorops {run['anchorops']} at commit "
        f"{run['commit']}"
    )


def grouped(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Comparable rows, by (operation, direction, shape, dtype, labels); CUDA graphs separately."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        fields = ("operation", "direction", "shape", "num_classes", "dtype", "labels")
        graph = row["name"].endswith(", CUDA graph")
        groups.setdefault((*(row[field] for field in fields), graph), []).append(row)
    return {key: sorted(group, key=lambda row: row["median"]) for key, group in groups.items()}


def title(row: dict) -> str:
    graph = ", CUDA graph" if row["name"].endswith("CUDA graph") else ""
    what = f"{row['operation']}, {row['direction']}{graph}"
    if row["shape"] == "centroids":
        return f"{what}\n{row['sizes']}, {row['dtype']}"
    return f"{what}\n{row['shape']}: {row['sizes']}, {row['dtype']}, {row['labels']} labels"


def headline_groups(run: dict, operation: str, shape: str) -> list[list[dict]]:
    """A headline's case forward, and forward and backward."""
    dtype = "bf16" if run["device_type"] == "cuda" else "fp32"
    found = {
        row["direction"]: group
        for group in grouped(quick(run)).values()
        if (row := group[0])["operation"] == operation
        and (row["shape"], row["dtype"], row["labels"]) == (shape, dtype, "coherent")
    }
    return [found[direction] for direction in DIRECTIONS if direction in found]


def headlines(run: dict) -> Figure | None:
    """Ours, the fastest rival, the usual formula and the published formula."""
    found = [(headline_groups(run, *headline[:2]), *headline[2:]) for headline in HEADLINES]
    found = [headline for headline in found if headline[0]]
    if not found:
        return None
    figure = plt.figure(figsize=(10, 2.6 * len(found)), layout="constrained")
    parts = figure.subfigures(len(found), 1, squeeze=False)[:, 0]
    for part, (groups, what, formulas) in zip(parts, found, strict=True):
        axes = part.subplots(1, len(groups), squeeze=False, sharey=True)[0]
        for axis, group in zip(axes, groups, strict=True):
            draw_headline(axis, group, formulas)
        axes[0].invert_yaxis()
        row = groups[0][0]
        text = f"{what}, {row['dtype']}\n{row['shape']}: {row['sizes']}"
        part.suptitle(text, x=0.01, ha="left", fontsize=10)
    return figure


def draw_headline(axis: Axes, group: list[dict], formulas: dict[str, str]) -> None:
    own = next(row for row in group if row["ours"])
    rows = {row["name"]: row for row in group}
    bars = {"anchorops": own}
    fastest = next((row for row in group if "anchorops" not in row["name"]), None)
    if fastest and fastest["name"] not in formulas:
        bars["fastest rival"] = fastest
    for name, label in formulas.items():
        if name in rows:
            bars[label] = rows[name]
    times = [row["median"] * 1e3 for row in bars.values()]
    drawn = axis.barh([*bars], times, color=[OURS, *[OTHER] * (len(bars) - 1)])
    labels = [
        f"{number(row['median'] * 1e3)} ms" + ("" if row is own else f", {row['ratio']:.0f}×")
        for row in bars.values()
    ]
    if fastest and "fastest rival" in bars:
        labels[1] += f" ({fastest['name']})"
    axis.bar_label(drawn, labels, padding=4)
    axis.set_title(group[0]["direction"], loc="left", fontweight="bold")
    axis.set_xlim(0, 1.3 * max(times))
    axis.set_xlabel("milliseconds")


def table(run: dict) -> str:
    """The README's tables, verbatim: the headline cases by every implementation."""
    lines = []
    for operation, shape, what, _ in HEADLINES:
        groups = headline_groups(run, operation, shape)
        if len(groups) < len(DIRECTIONS):
            continue
        forward, training = groups
        forward_times = {row["name"]: row for row in forward}
        lines += [
            f"{what}. {title(training[0]).splitlines()[1]}. {machine(run)}.",
            "",
            "| | forward, ms | forward + backward, ms | memory beyond inputs and outputs, MiB |",
            "|---|---|---|---|",
        ]
        for row in training:
            times = (forward_times.get(row["name"]), row)
            cells = [f"{number(r['median'] * 1e3)} ({r['ratio']:.1f}×)" if r else "" for r in times]
            memory = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:,.0f}"
            lines.append(f"| {' | '.join([row['name'], *cells, memory])} |")
        lines.append("")
        if operation == BOTH:
            share = next(row["read_share"] for row in forward if row["ours"])
            lines += [f"Forward, at {share:.0%} of the bandwidth at which torch sums the features."]
            lines.append("")
    return "\n".join(lines).rstrip()


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
