"""One self-contained HTML page about a run, and the picture of its predictions."""

import base64
import html
import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from ...plots import (
    BLUE,
    centroid_similarity,
    cosine_map,
    features_with_anchors,
    iou_against_frequency,
    plain,
)
from ..config import IGNORED, Config
from ..data.folders import class_histogram
from ..data.loading import Segmentation
from ..networks.learner import CLASSES
from ..run.checkpoint import save_atomically
from ..run.directory import CONFIG
from ..run.journal import IGNORED_LABELS, METRICS, RATIO, WRONG_LABELS, attempt, read_metrics
from .compare import MEASURES, comparison
from .cost import Complexity, Cost
from .evaluate import predict
from .features import (
    ACCURACY_AND_IMAGES,
    ACCURACY_AND_PIXELS,
    CENTROIDS,
    CLASSIFIER,
    COLLAPSE,
    EQUIANGULARITY,
    MAXIMAL_ANGLE,
    Features,
)

LEGEND_NAMES = 23  # in a legend
IGNORED_COLOR = (255, 255, 255)
PERCENT = ("accuracy", "val_miou", "val_head", "val_body", "val_tail")
NOT_CURVES = ("step", "lr", "images_per_second", "memory_mb", IGNORED_LABELS)
# of the section on training
PANELS = (
    "loss and its terms",
    "training accuracy and\nvalidation IoU, %",
    "gradient on the features,\nthat of the loss of the logits = 1",
    "counts, and SAR's gate",
)
# what losses log in addition to their terms
COUNTS = ("gate", "unsure", "present", WRONG_LABELS)
CURVES = {"accuracy": "training accuracy", "val_miou": "mIoU"}  # names in legends
# of the curves, as a sentence for those that a run has; {} is the name of the method
MEANINGS = {
    "loss": "the loss that is minimised, the sum of all terms",
    "ce": "the cross-entropy, or the other loss of the logits",
    "aux": "{}: cross-entropy of the anchors that the classifier does not recognise yet",
    "p2a": "{}: squared distance of the pixels to the anchors of their classes",
    "gate": "{}: share of the classes whose pixels are pulled to their anchors, because the "
    "classifier recognises these anchors (the gate is open)",
    "unsure": "{}: number of anchors that the classifier recognises with a probability of at most "
    "tau",
    "basis": "{}: always 0, because this method changes the classifier and has no loss",
    "penalty": "{}: squared cosines between the classifier's rows",
    "centroid": "{}: contrast between the centroids of two random views of each class",
    "category": "{}: contrast between these centroids and the classifier's rows",
    "center": "{}: cross-entropy of the class centers",
    "fca": "{}: contrast between groups of a class's pixels and the learnable centroids",
    "cos": "{}: 1 − cosine between halves of a class's learnable centroids",
    "visual": "{}: cross-entropy of the learnable centroids",
    "present": "{}: number of classes of a batch that enter its loss",
    WRONG_LABELS: "number of labels that are neither a class nor ignored; they count as ignored",
    RATIO: "the norm of the method's gradient on the features, divided by that of the loss of the "
    "logits; above 1 the method's gradient is the larger one",
}
COLUMNS = 2  # of a legend
RAREST = 10
MOST_NAMES = 40  # classes whose names fit into a figure
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.5rem }
img { max-width: 100%; height: auto } pre { background: #f6f6f6; padding: .8rem; overflow-x: auto }
table { border-collapse: collapse } td, th { padding: .2rem .8rem; text-align: right }
td:first-child, th:first-child { text-align: left } tr + tr { border-top: 1px solid #ddd }
.figures { display: flex; flex-wrap: wrap; gap: 2rem }
.figures b { display: block; font-size: 1.6rem }
.figures img { width: 47% }
"""


def palette(num_classes: int) -> np.ndarray:
    """Colours uint8 [K + 1, 3] of the labels. With few classes, class 0 is black. The last row,
    which label −1 selects, is white."""
    colors = np.zeros((num_classes + 1, 3), np.uint8)
    few = num_classes <= 21
    hues = matplotlib.colormaps["tab20" if few else "hsv"]
    for index in range(num_classes):
        # 0, 2, 4 … and then 1, 3, 5 … of tab20: the strong colours first
        place = (2 * (index - 1) % 20 + (index > 10)) if few else (index * 0.61803) % 1.0
        colors[index] = np.multiply(hues(place)[:3], 255)
    if few:
        colors[0] = 0
    colors[IGNORED] = IGNORED_COLOR
    return colors


def choose_images(dataset: Segmentation, count: int) -> list[int]:
    """Those of the first hundred images that together show every class, the rarest class first."""
    counts = [
        class_histogram(dataset[index][1], len(dataset.classes))
        for index in range(min(100, len(dataset)))
    ]
    present = (torch.stack(counts) > 0).double()
    worth = 1 / present.sum(0).clamp(min=1)
    chosen: list[int] = []
    while len(chosen) < min(count, len(counts)):
        value = present @ worth
        value[chosen] = -1
        best = int(value.argmax())
        chosen.append(best)
        worth = torch.where(present[best] > 0, worth / 4, worth)
    return chosen


@torch.inference_mode()
def draw_predictions(
    model: nn.Module,
    dataset: Segmentation,
    indices: Sequence[int],
    *,
    transform: v2.Transform,
    title: str,
    device: torch.device,
    **prediction: Any,
) -> bytes:
    """A PNG file with each image, its labels and its prediction; prediction: see `predict`."""
    model.eval()
    colors = palette(len(dataset.classes))
    rows, seen = [], set[int]()
    for index in indices:
        image, labels = dataset[index]
        seen |= set(labels.unique().tolist())
        network_input = transform(tv_tensors.Image(image)).as_subclass(Tensor)[None].to(device)
        (classes,) = predict(model, network_input, labels.shape, **prediction)
        rows.append((_rgb(image), colors[labels.numpy()], colors[classes.cpu().numpy()]))

    # images from left to right, in three rows
    height, width = rows[0][0].shape[:2]
    figure = Figure(figsize=(1.6 * len(rows) + 0.6, 1.6 * 3 * height / width + 0.8))
    no_ticks = {"xticks": [], "yticks": []}
    axes = figure.subplots(3, len(rows), squeeze=False, subplot_kw=no_ticks)
    for column, pictures in zip(axes.T, rows, strict=True):
        for axis, picture in zip(column, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
    for axis, name in zip(axes[:, 0], ("image", "truth", "prediction"), strict=True):
        axis.set_ylabel(name)
    figure.suptitle(plain(title, longest=int(14 * figure.get_figwidth())), fontsize=10)
    names = {k: plain(dataset.classes[k]) for k in sorted(seen - {IGNORED})[:LEGEND_NAMES]}
    bottom = draw_legend(figure, names | {IGNORED: "ignored"}, colors)
    figure.tight_layout(rect=(0, bottom, 1, 1))
    return _png_file(figure, dpi=110)


def draw_legend(figure: Figure, names: Mapping[int, str], colors: np.ndarray) -> float:
    """Draw the names of labels at the bottom of the figure, in as many columns as fit. Returns the
    share of its height that they need."""
    width, height = figure.get_size_inches()
    columns = max(1, int(width / (0.6 + 0.07 * max(map(len, names.values())))))
    handles = [
        Patch(facecolor=colors[label] / 255, edgecolor="0.5", label=name)
        for label, name in names.items()
    ]
    figure.legend(
        handles=handles, loc="lower center", ncols=min(columns, 12), fontsize=8, frameon=False
    )
    return (0.1 + 0.18 * -(-len(names) // min(columns, 12))) / height


def _rgb(image: Tensor) -> np.ndarray:
    """uint8 (H, W, 3) of the first three channels, or the only one."""
    channels = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    return channels.permute(1, 2, 0).numpy()


def write_report(
    run: Path,
    results: dict[str, Any],
    predictions: bytes | None,
    features: Features | None,
    classifier: Tensor,
    costs: tuple[Cost, Cost] | None,
    complexity: Complexity | None,
) -> None:
    """Write report.html into the run's directory. A section that fails is omitted, with a message;
    so is one whose argument is None.

    predictions: a picture. features: of the validation split. classifier: weight [K, D]. costs:
    without and with the regulariser.
    """
    classes, summary = results["classes"], comparison([results])
    config = Config.load(run / CONFIG)
    sections: dict[str, Callable[[], str]] = {"": lambda: _headline(results, config.data.head_tail)}
    if predictions:
        sections["Predictions"] = lambda: _image(predictions)
    sections |= {
        "Training": lambda: _training(read_metrics(run / METRICS), results["methods"]),
        "Classes by frequency": lambda: _png(_iou_by_frequency(classes)),
        "F1 by frequency": lambda: _f1_section(results["f1_by_frequency"], len(classes)),
        f"The {min(RAREST, len(classes))} rarest classes": lambda: _rarest(classes),
    }
    if config.running.collapse_images:
        sections["Neural collapse"] = lambda: (
            "<p>As in CeCo's figures; validation images, training pixels and images.</p>"
            + _png(_collapse(read_metrics(run / METRICS)))
        )
    if features:
        sections |= _feature_sections(features, classifier, classes)
    if costs:
        sections["Cost of the regulariser"] = lambda: _cost_table(costs)
    if complexity:
        sections["Size and speed of the network"] = lambda: _complexity_table(complexity)
    sections["Summary"] = lambda: f"<pre>{html.escape(summary)}</pre>"
    sections["Configuration"] = lambda: f"<pre>{html.escape((run / CONFIG).read_text())}</pre>"
    made = {title: attempt(f"report.html: {title}", make) for title, make in sections.items()}
    body = "\n".join(
        f"<h2>{html.escape(title)}</h2>\n{content}" if title else content
        for title, content in made.items()
        if content is not None
    )
    title = html.escape(run.name)
    save_atomically(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>\n{body}\n</body></html>\n",
        run / "report.html",
    )


def _feature_sections(
    features: Features, classifier: Tensor, classes: list[dict[str, Any]]
) -> dict[str, Callable[[], str]]:
    names = [c["name"] for c in classes]
    sections = {"Cosines between classes": lambda: _cosine_maps(features, classifier, names)}
    present = [k for k in features.example[2].unique().tolist() if 0 <= k < len(classes)]
    if present:
        rarest = min(present, key=lambda k: classes[k]["frequency"])
        title = f"Cosine to the centroid of “{names[rarest]}”"
        sections[title] = lambda: (
            f"<p>The first validation image; {html.escape(names[rarest])} is its rarest class.</p>"
            + _similarity(features, rarest)
        )
    sections["Features"] = lambda: (
        "<p>Pixels of the validation images, if possible equally many of each class, and the "
        "classes' centroids (stars).</p>" + _png(_samples(features, names))
    )
    return sections


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _headline(results: dict[str, Any], head_tail: tuple[float, float]) -> str:
    figures = "".join(
        f"<div>{label} %<b>{_percent(results[name])}</b></div>" for label, name in MEASURES.items()
    )
    members = Counter(c["group"] for c in results["classes"])
    head, tail = (f"{100 * share:g} %" for share in head_tail)
    note = (
        "Of the validation images. mIoU: mean over the classes of IoU (intersection over union). "
        "Head, body and tail: the same mean over frequent, less frequent and rare classes, by "
        f"their share of the training pixels: head at least {head} ({members['head']} of "
        f"{len(results['classes'])} classes), tail less than {tail} ({members['tail']}), body "
        f"between ({members['body']}); --head-tail sets these shares. mAcc: mean over the classes "
        "of the share of their pixels that are predicted correctly."
    )
    return f'<div class="figures">{figures}</div><p>{note}</p>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _rarest(classes: list[dict[str, Any]]) -> str:
    rows = [
        [
            c["name"],
            c["group"],
            f"{100 * c['frequency']:.3g}",
            *(_percent(c[x]) for x in ("iou", "accuracy", "f1")),
        ]
        for c in sorted(classes, key=lambda c: c["frequency"])[:RAREST]
    ]
    return _table(["class", "group", "% of pixels", "IoU %", "accuracy %", "F1 %"], rows)


def _cost_table(costs: tuple[Cost, Cost]) -> str:
    def memory(cost: Cost) -> str:
        return "–" if cost.memory_mb is None else f"{cost.memory_mb:.0f}"

    plain, full = costs
    rows = [
        ["cross-entropy only", f"{1e3 * plain.seconds:.1f}", "", memory(plain)],
        [
            "with the regulariser",
            f"{1e3 * full.seconds:.1f}",
            f"{100 * (full.seconds / plain.seconds - 1):+.1f} %",
            memory(full),
        ],
    ]
    header = ["one forward and backward", "ms (median)", "", "GPU memory, MB"]
    return _table(header, rows)


def _complexity_table(complexity: Complexity) -> str:
    parameters, trained, (height, width), flops, frames_per_second = complexity
    rows = [
        ["parameters, M", f"{parameters / 1e6:.2f}"],
        ["with what is for training only, M", f"{trained / 1e6:.2f}"],
        [f"FLOPs of an image {height}×{width}, G", f"{flops / 1e9:.3g}"],
        ["half of it: multiplications with their addition, G", f"{flops / 2e9:.3g}"],
        [f"images {height}×{width} per second, one by one", f"{frames_per_second:.3g}"],
    ]
    note = "Papers mostly print the multiplications, and call them FLOPs."
    return f"{_table(['prediction', ''], rows)}<p>{note}</p>"


def _image(png: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _png_file(figure: Figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _png(figure: Figure) -> str:
    return _image(_png_file(figure, dpi=120))


def _training(metrics: list[dict[str, Any]], methods: str) -> str:
    """The curves, what they mean, and the gradient ratios if they were measured only once."""
    titles = {**CLASSES, "cr": "CR"}
    meanings: dict[str, str] = {}
    for name in dict.fromkeys(name for line in metrics for name in line):
        method, _, term = name.rpartition(".")
        shown = term != WRONG_LABELS or any(line.get(name) for line in metrics)
        if (text := MEANINGS.get(term)) and shown:
            text = text.format(titles.get(method or methods, "")).removeprefix(": ")
            meanings[term if term == RATIO else name] = text
    if once := _measured_once(metrics):
        values = ", ".join(f"{name} {value:.3g}" for name, value in once.items())
        meanings[RATIO] += f". It was measured once, in the first step: {values}"
    lines = (f"<li><b>{name.replace('_', ' ')}</b>: {x}</li>" for name, x in meanings.items())
    return f"{_png(_curves(metrics))}<ul>{''.join(lines)}</ul>"


def _measured_once(metrics: list[dict[str, Any]]) -> dict[str, float]:
    """The ratio of each method, if there is only one of each: no curve."""
    lines = [line for line in metrics if any(name.endswith(RATIO) for name in line)]
    if len(lines) != 1:
        return {}
    ratios = {name: value for name, value in lines[0].items() if name.endswith(RATIO)}
    return {name.removesuffix(f".{RATIO}"): value for name, value in ratios.items()}


def _curves(metrics: list[dict[str, Any]]) -> Figure:
    terms, percent, ratios, counts = PANELS
    panels: dict[str, list[str]] = {title: [] for title in PANELS}
    for name in dict.fromkeys(name for line in metrics for name in line):
        if name == WRONG_LABELS and not any(line.get(name) for line in metrics):
            continue
        if name.rpartition(".")[2] in COUNTS:
            panels[counts].append(name)
        elif name.rpartition(".")[2] == RATIO:
            panels[ratios].append(name)
        elif name in PERCENT:
            panels[percent].append(name)
        elif name not in (*NOT_CURVES, *COLLAPSE) and not name.startswith("val_"):
            panels[terms].append(name)
    if _measured_once(metrics):
        panels[ratios] = []
    panels = {title: names for title, names in panels.items() if names}
    most = max(map(len, panels.values()), default=1)
    size = max(8, 3 * len(panels)), 3 + 0.17 * math.ceil(most / COLUMNS)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        if len(names) > 10:  # the usual colours are ten
            axis.set_prop_cycle(color=matplotlib.colormaps["tab20"](range(20)))
        for name in names:
            scale = 100 if name in PERCENT else 1
            line = [(m["step"], scale * m[name]) for m in metrics if name in m]
            style: dict[str, Any] = {"linewidth": 1.2}
            if name == "val_miou":  # wide and below the others: one of them may have its values
                style = {"linewidth": 5, "markersize": 14, "color": "0.75", "zorder": 1.5}
            marker = "." if len(line) < 30 else ""
            label = name.removeprefix("val_").removesuffix(f".{RATIO}")
            label = CURVES.get(name, label)
            axis.plot(*zip(*line, strict=True), label=label, marker=marker, **style)
        _over_steps(axis, title)
        if title == ratios:  # from 0.01 to 10 and more; 0 before SAR's gate opens
            axis.set_yscale("symlog", linthresh=0.01)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.axhline(1, color="0.5", linewidth=0.8, linestyle="--")
        highest = axis.dataLim.y1
        axis.set_ylim(0, 1.05 * highest if highest > 0 else 1)
        axis.legend(fontsize=7, ncols=COLUMNS, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


def _over_steps(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step")
    axis.locator_params(axis="x", integer=True)
    axis.grid(alpha=0.3)


def _collapse(metrics: list[dict[str, Any]]) -> Figure:
    """CeCo's Figs. 2, 5 and 7, over the steps."""
    panels = {
        "Std of cosines (Fig. 2)": {f"{x}.{EQUIANGULARITY}": x for x in (CENTROIDS, CLASSIFIER)},
        "mean |cosine + 1/(K − 1)| (Fig. 5)": {
            f"{x}.{MAXIMAL_ANGLE}": x for x in (CENTROIDS, CLASSIFIER)
        },
        "correlation of accuracy (Fig. 7)": {
            ACCURACY_AND_PIXELS: "with training pixels",
            ACCURACY_AND_IMAGES: "with training images",
        },
    }
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name, label in names.items():
            line = [(m["step"], m[name]) for m in metrics if name in m]
            if line:
                axis.plot(*zip(*line, strict=True), label=label, linewidth=1.2, marker=".")
        if ACCURACY_AND_PIXELS not in names:
            axis.set_ylim(bottom=0)  # which collapse reaches
        _over_steps(axis, title)
        if axis.lines:  # none where no measure is defined: a class alone
            axis.legend(fontsize=8)
    return figure


def _iou_by_frequency(classes: list[dict[str, Any]]) -> Figure:
    known = [c for c in classes if c["iou"] is not None]
    iou, share = (torch.tensor([c[name] for c in known]) for name in ("iou", "frequency"))
    names = [c["name"] for c in known] if len(known) <= MOST_NAMES else None
    return iou_against_frequency(iou, share, names)


def _samples(features: Features, names: list[str]) -> Figure:
    """Pixels and centroids in two dimensions; the centroid of a class without pixels is zero, and
    is not drawn."""
    present = features.counts > 0
    pixels, labels = features.samples
    shown = [name for name, there in zip(names, present.tolist(), strict=True) if there]
    figure = features_with_anchors(
        pixels,
        (present.cumsum(0) - 1)[labels],
        features.centroids[present],
        names=shown if len(shown) <= MOST_NAMES else None,
        ignore_index=IGNORED,
    )
    (axis,) = figure.axes
    axis.set_title(axis.get_title().replace("anchors", "centroids"))
    return figure


def _similarity(features: Features, k: int) -> str:
    """The first image and the cosines of its pixels to the centroid of class k."""
    image, maps, _ = features.example
    shown = image[:3] if len(image) >= 3 else image[0]
    shown = (shown - shown.min()) / (shown.max() - shown.min()).clamp(min=1e-6)
    return _png(centroid_similarity(maps, features.centroids[k], shown))


def _f1_section(means: list[float | None], num_classes: int) -> str:
    """F1 of groups of classes; a group without a value has no bar, but a dash."""
    figure = Figure(figsize=(5.5, 2.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(1, len(means) + 1), [100 * (mean or 0.0) for mean in means], color=BLUE)
    for place, mean in enumerate(means, 1):
        if mean is None:
            axes.text(place, 0, "–", ha="center", va="bottom")
    groups = "classes" if num_classes == len(means) else "groups of classes"
    axes.set(xlabel=f"{groups}, the most frequent first", ylabel="mean F1, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, axis="y")
    note = "F1 of a class: 2·hits / (its pixels + pixels that are predicted as this class)."
    return f"<p>{note}</p>{_png(figure)}"


def _cosine_maps(features: Features, classifier: Tensor, names: list[str]) -> str:
    present = (features.counts > 0).nonzero().flatten()
    labels = [names[k] for k in present.tolist()] if len(present) <= MOST_NAMES else None
    figures = "".join(
        _png(cosine_map(rows[present], labels, centered=True, title=title))
        for title, rows in (("centroids", features.centroids), ("classifier", classifier))
    )
    return (
        "<p>Cosines between the rows minus their mean, without classes that have no validation "
        "pixels.</p>"
        f'<div class="figures">{figures}</div>'
    )
