"""Figures of features, centroids, classifiers and calibration; each function returns a matplotlib
Figure."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import (
    check_anchors,
    check_count,
    check_features,
    check_ignore_index,
    check_labels,
    describe,
    fail,
    missing_extra,
    rows_of_classes,
)
from ._shared.pixels import feature_rows, resize_labels

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.transforms import Bbox
except ModuleNotFoundError as error:
    raise missing_extra("plots", error) from error

LONGEST = 24  # characters of a class's name in a figure


def plain(name: str, longest: int = LONGEST) -> str:
    """A name for matplotlib: without markup, and with its middle omitted if it is long."""
    if len(name) > longest:
        end = longest // 3
        name = f"{name[: longest - end - 1]}…{name[-end:]}"
    return name.replace("$", r"\$")


def _check_names(function: str, names: Sequence[str] | None, classes: int) -> None:
    if names is not None and len(names) != classes:
        fail(function, "names", f"one for each of {classes} classes", len(names))


def cosine_map(
    vectors: Tensor,
    names: Sequence[str] | None = None,
    *,
    centered: bool = False,
    title: str = "cosine similarity",
) -> Figure:
    """Cosines between the rows of a classifier's weight, or between centroids, [K, D]. If centered,
    the mean of the rows is subtracted first."""
    rows = rows_of_classes("cosine_map", "vectors", vectors).float().cpu()
    _check_names("cosine_map", names, len(rows))
    unit = F.normalize(rows - rows.mean(0) if centered else rows, dim=1)
    shown = [plain(name) for name in names or []]
    size = max(3.5, min(10.0, 0.25 * len(unit)))
    margin = 0.075 * max(map(len, shown), default=0)  # inches of a name in 10 points
    figure = Figure(figsize=(size + margin + 1, size + margin), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow((unit @ unit.T).numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
    figure.colorbar(image, ax=axes, shrink=0.8)
    if names is not None:
        axes.set_xticks(range(len(shown)), shown, rotation=90)
        axes.set_yticks(range(len(shown)), shown)
    axes.set_title(title)
    return figure


def _annotate(axes: Axes, points: Sequence[tuple[tuple[float, float], str]]) -> None:
    """Write names beside points, in the given order, if they do not overlap earlier ones."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout
    renderer = FigureCanvasAgg(figure).get_renderer()
    taken: list[Bbox] = []
    for position, name in points:
        for x, y in ((4, 3), (4, -3), (-4, 3), (-4, -3)):
            text = axes.annotate(
                plain(name),
                position,
                xytext=(x, y),
                textcoords="offset points",
                ha="left" if x > 0 else "right",
                va="bottom" if y > 0 else "top",
                fontsize=7,
            )
            box = text.get_window_extent(renderer)
            inside = figure.bbox.count_contains([box.min, box.max]) == 2
            if inside and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()


def _principal_components(points: Tensor) -> Tensor:
    """The first two: [N, D] → [N, 2]. A second one that does not exist is 0."""
    centered = points - points.mean(0)
    _, _, axes = torch.linalg.svd(centered, full_matrices=False)
    components = centered @ axes[:2].T
    return F.pad(components, (0, 2 - components.shape[1]))


def features_with_anchors(
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    *,
    names: Sequence[str] | None = None,
    ignore_index: int | None = None,
    max_points: int = 2000,
) -> Figure:
    """Two principal components of features, coloured by class, and of anchors or centroids: stars.

    features: (B, D, H, W), with labels (B, H', W') that are resized to H×W by nearest-neighbour
    interpolation; or (N, D) and (N,). At most max_points features are drawn, evenly spaced.
    anchors: [K, D]. A row of zeros, the centroid of an absent class, is not drawn.
    """
    function = "features_with_anchors"
    stars = rows_of_classes(function, "anchors", anchors).float().cpu()
    _check_names(function, names, len(stars))
    check_features(function, features)
    check_labels(function, labels, features)
    check_anchors(function, stars.to(features.device), features)
    ignored = check_ignore_index(function, ignore_index, len(stars))
    keys = resize_labels(labels, features).flatten().cpu()
    valid = ((keys >= 0) & (keys < len(stars)) & (keys != ignored)).nonzero().flatten()
    if len(valid) == 0:
        fail(function, "labels", "at least one valid pixel", "none")
    most = check_count(function, "max_points", max_points)
    valid = valid[:: max(1, -(-len(valid) // most))]
    rows = feature_rows(features.detach().cpu())[valid].float()
    drawn = stars.any(1).nonzero().flatten()
    points = _principal_components(torch.cat([rows, stars[drawn]]))
    longest = max((len(plain(name)) for name in names or []), default=0)
    figure = Figure(figsize=(6 + 0.05 * longest, 4.5), layout="constrained")
    axes = figure.subplots()
    palette = {"cmap": "tab20", "vmin": 0, "vmax": max(19, len(stars) - 1)}
    dot = {"s": 4, "alpha": 0.5} | palette
    star = {"s": 140, "marker": "*", "edgecolors": "black"} | palette
    dots = axes.scatter(*points[: len(rows)].T.numpy(), c=keys[valid].numpy(), **dot)
    axes.scatter(*points[len(rows) :].T.numpy(), c=drawn.numpy(), **star)
    axes.set(xticks=[], yticks=[], title="features and anchors")
    if names is not None:
        colors = dots.to_rgba(torch.arange(len(names)).numpy(), alpha=1)  # also of absent classes
        of_classes = [Line2D([], [], color=color, marker="o", linestyle="") for color in colors]
        shown, columns = [plain(name) for name in names], -(-len(names) // 20)
        figure.legend(of_classes, shown, loc="outside right upper", fontsize=7, ncols=columns)
        labelled = zip(points[len(rows) :].tolist(), map(int, drawn), strict=True)
        _annotate(axes, [((x, y), names[k]) for (x, y), k in labelled])
    return figure


def centroid_similarity(features: Tensor, centroids: Tensor, image: Tensor | None = None) -> Figure:
    """A map of the cosine between every pixel's feature and the centroid of a class.

    features: (D, H, W) of one image; centroids: [D], or [G, D] for one panel each;
    image: (3, H', W') or (H', W'), values 0 to 1, shown as the first panel.
    """
    if not isinstance(features, Tensor) or features.dim() != 3:
        fail("centroid_similarity", "features", "a tensor (D, H, W)", describe(features))
    vectors = torch.atleast_2d(centroids.detach().float().cpu())
    if vectors.dim() != 2 or vectors.shape[1] != features.shape[0]:
        expected = f"[{features.shape[0]}] or [G, {features.shape[0]}]"
        fail("centroid_similarity", "centroids", expected, describe(centroids))
    unit = F.normalize(features.detach().float().cpu(), dim=0)
    maps = torch.einsum("gd,dhw->ghw", F.normalize(vectors, dim=1), unit)
    panels = len(maps) + (image is not None)
    figure = Figure(figsize=(3 * panels + 0.8, 3), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if image is not None:
        pixels = image.detach().float().cpu()
        axes[0].imshow(
            (pixels if pixels.dim() == 2 else pixels.movedim(0, -1)).numpy(), cmap="gray"
        )
    shown = [
        axis.imshow(similarity.numpy(), vmin=float(maps.min()), vmax=1, cmap="viridis")
        for axis, similarity in zip(axes[panels - len(maps) :], maps, strict=True)
    ]
    for axis in axes:
        axis.set_axis_off()
    figure.colorbar(shown[-1], ax=list(axes), shrink=0.8, label="cosine")
    return figure


def reliability(
    counts: Tensor, hits: Tensor, confidence_sums: Tensor, *, title: str = "reliability"
) -> Figure:
    """The accuracy of predictions beside their confidence in each bin that has pixels, and the
    share of the pixels that it has. A line from a point to the diagonal is the bin's gap.

    counts, hits, confidence_sums: [N], the states of `diagnostics.CalibrationError`; for those of
    all ranks call it inside `with metric.sync_context():`.
    """
    bins = {"counts": counts, "hits": hits, "confidence_sums": confidence_sums}
    for name, values in bins.items():
        real = isinstance(values, Tensor) and not values.is_complex()
        if not real or values.dim() != 1 or values.shape != counts.shape:
            fail("reliability", name, "a real tensor [N], as counts", describe(values))
    table = torch.stack([values.detach().double().cpu() for values in bins.values()])
    pixels, right, sums = table[:, table[0] > 0]
    if len(pixels) == 0:
        fail("reliability", "counts", "at least one pixel", "none")
    confidence, accuracy, shares = (
        x.numpy() for x in (sums / pixels, right / pixels, pixels / pixels.sum())
    )
    figure = Figure(figsize=(4.5, 5.5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    upper.axline((0, 0), slope=1, color="grey", linestyle="--", linewidth=1)
    upper.vlines(confidence, confidence, accuracy, color="tab:red")
    upper.plot(confidence, accuracy, "o")
    upper.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="accuracy", title=title)
    lower.bar(confidence, shares, width=0.02)
    lower.set(yscale="log", ylim=(shares.min() / 2, 1.2))  # shares of some bins are small
    lower.set(xlabel="confidence", ylabel="share of pixels")
    return figure
