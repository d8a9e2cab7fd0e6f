"""Tables and pictures of the runs of evidence.py: evidence.md and evidence-*.png, next to
evidence.json."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from record import grouped, json_of, markdown_table
from trainings.plan import BALANCED, PUBLISHED

from anchorops.train.options import CLASSES
from anchorops.train.run import save_atomically

MEASURES = {"miou": "mIoU", "head": "head", "body": "body", "tail": "tail"}  # and their titles
NETWORKS = {
    "hrnet-w18-small": "HRNet-W18-small",
    "segformer-b0": "SegFormer-B0",
    "efficientnet-lite0": "DeepLabV3+ on EfficientNet-Lite0",
}
CONVERGED = 1.0  # converged: the next schedule adds less than these points of mIoU
COLORS = {"plain": "black", "cr": "tab:gray", "sar": "tab:blue", "cbp": "tab:olive"} | {
    BALANCED: "tab:purple",
    "occl": "tab:orange",
    "cbp+occl": "tab:brown",
    "ceco": "tab:green",
    "mvsc": "tab:red",
}
Row = dict[str, Any]


class DataSet(NamedTuple):
    """name: in a sentence. about: how networks are trained on it. scenes: the titles of its
    variants, by a row's `scenes`. plan: about its runs. steps: of the runs of the first
    variant whose gradients are shown."""

    name: str
    about: str
    scenes: dict[str, str]
    plan: str
    steps: int


DATA_SETS = [
    DataSet(
        "digit scenes",
        "On digit scenes (handwritten digits with Zipf frequencies, 64×64 pixels, 11 classes) the\n"
        "networks are trained from random weights. Head: the four most frequent classes; body:\n"
        "the next four; tail: the three rarest.",
        {
            "digits": "Digit scenes",
            "few": "Few scenes: 500 training scenes, the same for all seeds",
            "steep": "More long-tailed: frequencies (d + 1)⁻² of digit d in the training scenes",
        },
        "",
        steps=1_500,
    ),
    DataSet(
        "photographs",
        "On photographs of streets (CamVid: 367 for training, 101 for validation, 233 for test;\n"
        "480×360 pixels, the 11 classes of the SegNet tutorial, JPEG of quality 85) the backbone\n"
        "starts from ImageNet weights. The recipe, preset `camvid`, was tried on the validation\n"
        "split with the baseline alone. Tail: fence, sign, pole, pedestrian and bicyclist, each\n"
        "0.3 to 1.2 % of the training pixels. The columns of classes are their mean IoU in %.",
        {"camvid": "Photographs"},
        "A single run, with the files named in [evidence.py](../bench/evidence.py):\n\n"
        "```sh\n"
        "anchorops-train fit --config camvid --data.dataset folder --data.root data/camvid \\\n"
        "    --model.backbone_weights data/tf_efficientnet_lite0-imagenet-fp16.pth \\\n"
        "    --model.methods '[sar]' --seed 1\n"
        "```",
        steps=1_000,
    ),
]

INTRODUCTION = """# The methods by training schedule

{machines}; {count} runs of `{command}`, at {commits}
([rows](evidence.json)).

{about}

A schedule is a separate training of so many steps, whose learning rate decays to 0 at its end.
The baseline is the network without a [method](methods.md). Its mIoU, of all classes and of the
tail, is given in %; that of a method as the difference to the baseline of the same seeds, in
points. Figures are mean ± standard deviation (in pictures a band) over {seeds} seeds, or over n;
those without ± are of one seed, which does not show whether a method helps. "From scratch" is
`--config from-scratch`; the others have the published weights. A network has converged at a
schedule if the next one adds less than {converged:g} point to the baseline's mIoU.

{missing}
"""
GRADIENTS = """## Gradient on the features

The norm of the method's gradient on the features, divided by that of the cross-entropy, every 100
steps: median (smallest–largest) of the runs of {runs}.

{table}
"""


def write(evidence: dict[str, Any], directory: Path) -> None:
    """evidence.json, evidence.md, and a picture of each network's learning curves."""
    save_atomically(json_of(evidence), directory / "evidence.json")
    save_atomically(page(evidence), directory / "evidence.md")
    for (scenes, model), rows in grouped(evidence["rows"], "scenes", "model").items():
        if any(row["curve"] for row in rows):
            curves(rows).savefig(directory / _picture(scenes, model), dpi=80)


def page(evidence: dict[str, Any]) -> str:
    """evidence.md. A network whose rows have figures of the test split has a second table."""
    machine = {name: evidence[name] for name in ("device", "torch")}
    rows = [machine | row for row in evidence["rows"]]
    known = {row["scenes"] for row in rows} | {scenes for scenes, *_ in evidence["planned"]}
    data_sets = [data for data in DATA_SETS if known & data.scenes.keys()]
    titles = {name: title for data in data_sets for name, title in data.scenes.items()}
    commits = ", ".join(f"`{commit}`" for commit in dict.fromkeys(row["commit"] for row in rows))
    machines = dict.fromkeys(f"{row['device']}; torch {row['torch']}" for row in rows)
    names = "scenes", "model", "methods", "setting", "steps"
    seeds = max(map(len, grouped(rows, *names).values()))  # that anything was run with, at most
    parts = [
        INTRODUCTION.format(
            command=evidence["command"],
            machines=" and ".join(machines),
            count=len(rows),
            commits=commits,
            converged=CONVERGED,
            seeds=seeds,
            about="\n\n".join(data.about for data in data_sets),
            missing="\n\n".join(
                f"{_not_run(evidence, data)}\n{data.plan}".rstrip() for data in data_sets
            ),
        )
    ]
    for (scenes, model), group in grouped(rows, "scenes", "model").items():
        parts.append(f"## {titles[scenes]}, {NETWORKS[model]}\n\n{_baseline_by_schedule(group)}\n")
        if any(row["curve"] for row in group):
            parts.append(f"![Learning curves]({_picture(scenes, model)})\n")
        parts.append(table(group, seeds))
        if tested := [row | row["test"] for row in group if "test" in row]:
            parts.append(f"The same on the test split:\n\n{table(tested, seeds)}")
    if ratios := _gradient_ratios(rows, data_sets):
        parts.append(ratios)
    return "\n".join(parts)


def table(rows: Sequence[Row], seeds: int) -> str:
    """Markdown: a row for each choice of methods; for each schedule columns of mIoU and the tail.
    If the rows have classes: a row for each choice and schedule, and their columns too. rows: of
    one network. seeds: how many a figure usually has."""
    schedules = [
        (steps, runs)
        for (steps,), runs in sorted(grouped(rows, "steps").items())
        if {row["methods"] for row in runs} != {"plain"}
    ]
    if classes := rows[0].get("classes"):
        header = ["", "steps", "mIoU", "tail", *classes]
        lines = []
        for steps, runs in schedules:
            for choice, chosen in grouped(runs, "methods", "setting").items():
                means = (fmean(run["classes"][name] for run in chosen) for name in classes)
                cells = [label(*choice), f"{steps:,}", *_spreads(choice, runs, seeds)]
                lines.append([*cells, *(f"{100 * mean:.1f}" for mean in means)])
    else:
        header = ["", *(x for steps, _ in schedules for x in (f"{steps:,} steps: mIoU", "tail"))]
        lines = [
            [label(*choice), *(x for _, runs in schedules for x in _spreads(choice, runs, seeds))]
            for choice in grouped(rows, "methods", "setting")
        ]
    return markdown_table(header, lines) + "\n"


def _spreads(choice: tuple[str, ...], runs: Sequence[Row], seeds: int) -> list[str]:
    """mIoU and tail of the runs of a choice of methods, among those of a schedule: the differences
    to the baseline of the same seed."""
    plain = choice[0] == "plain"
    baseline = {row["seed"]: row for row in runs if row["methods"] == "plain"}
    chosen = grouped(runs, "methods", "setting").get(choice, [])
    pairs = [(run, same) for run in chosen if (same := baseline.get(run["seed"]))]
    return [
        _spread([run[name] - same[name] * (not plain) for run, same in pairs], plain, seeds)
        for name in ("miou", "tail")
    ]


def _spread(values: Sequence[float], plain: bool, seeds: int) -> str:
    """Mean and standard deviation in percent, with a sign unless plain. Their number is added if it
    is neither 1 nor seeds."""
    if not values:
        return ""
    percent = [100 * value for value in values]
    spread = f" ± {stdev(percent):.1f}" if len(percent) > 1 else ""
    number = f" (n = {len(values)})" if len(values) not in (1, seeds) else ""
    return f"{_signed(fmean(percent), '' if plain else '+')}{spread}{number}"


def _signed(value: float, sign: str = "+") -> str:
    return f"{round(value, 1) + 0.0:{sign}.1f}".replace("-", "−")  # not −0


def label(methods: str, setting: str) -> str:
    names = {**CLASSES, "cr": "CR", "plain": "baseline", BALANCED: "balanced class weights"}
    name = " + ".join(names.get(method, method) for method in methods.split("+"))
    return name if setting == PUBLISHED else f"{name}, {setting.replace('-', ' ')}"


def curves(rows: Sequence[Row]) -> Figure:
    """A row of axes for each schedule, a column for each measure that has classes: mean over the
    seeds and, as a band, their standard deviation."""
    schedules = sorted(grouped([row for row in rows if row["curve"]], "steps").items())
    titles = [title for name, title in MEASURES.items() if rows[0][name] is not None]
    places = [1 + list(MEASURES.values()).index(title) for title in titles]  # in a curve's points
    figure = Figure(figsize=(14, 3 * len(schedules) + 0.6), layout="constrained")
    grid = figure.subplots(len(schedules), len(titles), squeeze=False, sharey="col")
    lines: dict[str, Any] = {}
    for axes, ((steps,), schedule_rows) in zip(grid, schedules, strict=True):
        for (methods, setting), runs in grouped(schedule_rows, "methods", "setting").items():
            style = "-" if setting == PUBLISHED else "--"
            length = min(len(run["curve"]) for run in runs)
            points = np.array([run["curve"][:length] for run in runs], float)  # None: NaN
            x, means = points[0, :, 0], 100 * points.mean(0)
            for place, axis in zip(places, axes, strict=True):
                y, color = means[:, place], COLORS[methods]
                (lines[label(methods, setting)],) = axis.plot(
                    x, y, style, color=color, linewidth=1.3
                )
                if len(runs) > 1:
                    spread = 100 * points[:, :, place].std(0, ddof=1)
                    axis.fill_between(
                        x, y - spread, y + spread, color=color, alpha=0.12, linewidth=0
                    )
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(f"{title}, {steps:,} steps", fontsize=10)
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("IoU on validation scenes, %")
    for axis in grid[-1]:
        axis.set_xlabel("step")
    columns = math.ceil(len(lines) / math.ceil(len(lines) / 6))  # of rows of equal length
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _picture(scenes: str, model: str) -> str:
    return f"evidence-{scenes}-{model}.png"


def _baseline_by_schedule(rows: Sequence[Row]) -> str:
    """What a longer schedule adds to the mIoU of the baseline, and where it has converged."""
    baseline = sorted(grouped([r for r in rows if r["methods"] == "plain"], "steps").items())
    by_seed = [{run["seed"]: run["miou"] for run in runs} for _, runs in baseline]
    added, converged = [], []
    for ((steps,), _), ((more,), _), here, there in zip(
        baseline, baseline[1:], by_seed, by_seed[1:], strict=False
    ):
        gains = [there[seed] - here[seed] for seed in here.keys() & there.keys()]
        if not gains:
            continue
        seeds = " (one seed)" if len(gains) == 1 else ""
        added.append(f"{_signed(100 * fmean(gains))} from {steps:,} to {more:,} steps{seeds}")
        if 100 * fmean(gains) < CONVERGED:
            converged.append(f"{steps:,}")
    if not added:
        return "Whether the baseline has converged is not known."
    state = f"converged at {' and '.join(converged)} steps" if converged else "not converged"
    return f"Baseline: {', '.join(added)}; {state}."


def _gradient_ratios(rows: Sequence[Row], data_sets: Sequence[DataSet]) -> str:
    """A table of the methods' gradients on the features, relative to the cross-entropy's. The ratio
    changes during a training, so it is that of one schedule."""
    shown = {(next(iter(data.scenes)), data.steps): data.name for data in data_sets}
    single = [
        row
        for row in rows
        if (row["scenes"], row["steps"]) in shown
        and any(row["gradient_ratios"].values())
        and "+" not in row["methods"]
    ]
    if not single:
        return ""
    columns = list(grouped(single, "scenes", "model"))
    lines = []
    for choice, runs in grouped(single, "methods", "setting").items():
        by_column = grouped(runs, "scenes", "model")
        lines.append([label(*choice), *(_range(by_column.get(column, [])) for column in columns)])
    present = grouped(single, "scenes", "steps")
    return GRADIENTS.format(
        runs=" and ".join(f"{key[1]:,} steps on {shown[key]}" for key in present),
        table=markdown_table(["", *(NETWORKS[model] for _, model in columns)], lines),
    )


def _range(runs: Sequence[Row]) -> str:
    """Median, smallest and largest gradient ratio of runs with one method."""
    ratios = [ratio for run in runs for of in run["gradient_ratios"].values() for ratio in of]
    if not ratios:
        return ""
    return f"{median(ratios):.2g} ({min(ratios):.2g}–{max(ratios):.2g})"


def _not_run(evidence: dict[str, Any], data: DataSet) -> str:
    names = ("scenes", "model", "methods", "setting", "steps", "seed")
    done = {tuple(row[name] for name in names) for row in evidence["rows"]}
    planned = {tuple(run) for run in evidence["planned"] if run[0] in data.scenes}
    if planned <= done:
        return f"All {len(planned)} runs planned on {data.name} are here."
    return f"{len(planned - done)} of the {len(planned)} runs planned on {data.name} are missing."
