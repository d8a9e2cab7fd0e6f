"""Diagnostics compared with direct computations; every figure can be drawn."""

import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
from torchmetrics import CalibrationError, MetricCollection

from anchorops import diagnostics, plots

K, D = 5, 7


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for images in (2, 3):
        features = torch.randn(images, D, 4, 6, generator=generator) + 2
        labels = torch.randint(0, K - 1, (images, 4, 6), generator=generator)  # the last is absent
        labels[:, 0] = 255
        labels[0, labels[0] == 3] = 2
        made.append((features, labels))
    return made


def cosine_pairs(rows: np.ndarray) -> list[float]:
    return [
        float(rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j]))
        for i in range(len(rows))
        for j in range(i)
    ]


def test_measures_of_vectors() -> None:
    vectors = torch.randn(K, D, dtype=torch.float64)
    rows = vectors.numpy()
    close: Callable[[Tensor, float], None] = lambda got, want: torch.testing.assert_close(  # noqa: E731
        got, torch.tensor(want, dtype=torch.float64)
    )
    close(diagnostics.class_separability(vectors[..., None, None]), sum(cosine_pairs(rows)))
    pairs = cosine_pairs(rows - rows.mean(0))
    close(diagnostics.equiangularity(vectors), statistics.pstdev(pairs))
    close(diagnostics.maximal_angle(vectors), statistics.mean(abs(c + 1 / (K - 1)) for c in pairs))
    assert diagnostics.maximal_angle(vectors[:1]).isnan()
    counts = torch.tensor([10, 0, 3, 7, 5])
    close(diagnostics.imbalance_factor(counts), 10 / 3)
    norms = np.linalg.norm(rows, axis=1)
    expected = float(np.corrcoef(norms, counts.numpy())[0, 1])
    close(diagnostics.norm_correlation(vectors, counts), expected)


def test_no_correlation_with_equal_lengths() -> None:
    """Up to rounding, as those of CBP's rows."""
    rows = ao.anchors.category_basis(19, 64, 2.0)
    assert diagnostics.norm_correlation(rows, torch.arange(19)).isnan()
    assert diagnostics.pearson(torch.full((7,), 0.1), torch.rand(7)).isnan()
    assert diagnostics.pearson(10**9 + torch.arange(5), torch.arange(5)) == pytest.approx(1)


ANCHORS = torch.full((K, D), 2.0)
COLLECTIONS: dict[str, tuple[Callable[..., Any], tuple[dict[str, Any], ...]]] = {
    "MeanIoU": (partial(ao.MeanIoU, K), ({"ignore_index": 2}, {"align_corners": True})),
    "CentroidGeometry": (
        partial(diagnostics.CentroidGeometry, K, D),
        ({"ignore_index": 2}, {"anchors": ANCHORS}),
    ),
    "LabelImbalance": (partial(diagnostics.LabelImbalance, K), ({"ignore_index": 2},)),
    "CalibrationError": (
        partial(diagnostics.CalibrationError, K),
        ({"ignore_index": 2}, {"align_corners": True}, {"n_bins": 4}),
    ),
}


@pytest.mark.parametrize("name", COLLECTIONS)
def test_a_collection_joins_metrics_of_equal_arguments_alone(name: str) -> None:
    """After the first batch, of which all is ignored, their states are the same."""
    make, others = COLLECTIONS[name]
    made = {"plain": {}, "same": {}} | {f"other {i}": x for i, x in enumerate(others)}
    collection = MetricCollection({metric: make(**options) for metric, options in made.items()})
    alone = {metric: make(**options) for metric, options in made.items()}
    features, labels = batches()[0]
    of_logits = dict.fromkeys(("MeanIoU", "CalibrationError"), (features[:, :K],))
    inputs = (of_logits | {"CentroidGeometry": (features,)}).get(name, ())
    for y in (torch.full_like(labels, 255), labels):
        for metric in (collection, *alone.values()):
            metric.update(*inputs, y)
    groups = [sorted(group) for group in collection.compute_groups.values()]
    assert sorted(groups) == [*([x] for x in made if "other" in x), ["plain", "same"]]
    for metric, right in alone.items():
        torch.testing.assert_close(collection[metric].compute(), right.compute())


def test_geometry_in_a_module_of_bfloat16() -> None:
    features, labels = batches()[0]
    metric = diagnostics.CentroidGeometry(K, D)
    torch.nn.ModuleList([metric]).to(torch.bfloat16)
    metric.update(features, labels)
    assert {x.dtype for x in metric.compute().values()} == {torch.float64}


def test_gradient_ratio() -> None:
    features = (torch.randn(6, D, requires_grad=True) * 1).bfloat16()
    loss, other = features.sum() * 3, features.sum() * 2
    for _ in range(2):  # graphs stay
        torch.testing.assert_close(
            diagnostics.gradient_ratio(features, loss, other), torch.tensor(1.5)
        )
    independent = torch.ones((), requires_grad=True) * 2
    assert diagnostics.gradient_ratio(features, independent, other) == 0
    assert diagnostics.gradient_ratio(features, torch.zeros(()), other) == 0
    for arguments, message in (
        ((features.detach(), loss, other), "gradient_ratio: features: expected a tensor that req"),
        ((features, features, other), "gradient_ratio: loss: expected a scalar tensor"),
        ((features, loss, independent), "gradient_ratio: other: expected a loss that depends on"),
    ):
        with pytest.raises(ValueError, match=message):
            diagnostics.gradient_ratio(*arguments)


@pytest.mark.parametrize("mean", ["classes", "pixels"])
@pytest.mark.parametrize("near", [False, True])
def test_centroid_geometry_accumulates(mean: str, near: bool) -> None:
    anchors = torch.full((K, D), 2.0) if near else None
    metric = diagnostics.CentroidGeometry(K, D, mean=mean, anchors=anchors)
    for features, labels in batches():
        metric.update(features, labels)
    rows = np.concatenate([f.movedim(1, -1).reshape(-1, D).double().numpy() for f, _ in batches()])
    labels = np.concatenate([y.flatten().numpy() for _, y in batches()])
    present = range(K - 1)
    centroids = np.stack([rows[labels == k].mean(0) for k in present])
    middle = centroids.mean(0) if mean == "classes" else rows[labels < K].mean(0)
    pairs = cosine_pairs(centroids - middle)
    distances = [
        float(np.linalg.norm(centroids[i] - centroids[j])) for i in present for j in range(i)
    ]
    within = sum(((rows[labels == k] - centroids[k]) ** 2).sum() for k in present)
    expected = {
        "equiangularity": statistics.pstdev(pairs),
        "maximal_angle": statistics.mean(abs(c + 1 / (len(present) - 1)) for c in pairs),
        "compactness": within / (labels < K).sum(),
        "min_distance": min(distances),
        "mean_distance": statistics.mean(distances),
    }
    got = metric.compute()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert float(got[name]) == pytest.approx(float(value), rel=1e-5), name
    got_centroids, counts = metric.centroids()
    np.testing.assert_allclose(got_centroids[:-1].numpy(), centroids, rtol=1e-5)
    assert counts.tolist() == [int((labels == k).sum()) for k in range(K)]
    counts.zero_()  # the caller's
    assert metric.centroids()[1].any()
    metric.reset()
    assert all(math.isnan(value) for value in metric.compute().values())


def test_label_imbalance() -> None:
    metric = diagnostics.LabelImbalance(K)
    for _, labels in batches():
        metric.update(labels)
    images = [image for _, labels in batches() for image in labels]
    pixels = [sum(int((image == k).sum()) for image in images) for k in range(K)]
    containing = [sum(bool((image == k).any()) for image in images) for k in range(K)]
    assert metric.pixels.tolist() == pixels and metric.images.tolist() == containing
    got = metric.compute()
    assert float(got["pixel_imbalance"]) == pytest.approx(max(pixels) / min(pixels[:-1]))
    assert float(got["center_imbalance"]) == pytest.approx(max(containing) / min(containing[:-1]))
    torch.testing.assert_close(
        metric.prior(), torch.tensor([c / sum(containing) for c in containing])
    )


KINDS = {  # channels and size of logits, size of labels, sigmoid
    "softmax": ((K, 5, 7), (20, 21), False),
    "volume": ((K, 3, 4, 5), (6, 8, 10), False),
    "one sigmoid": ((1, 5, 7), (20, 21), True),
    "sigmoids": ((3, 5, 7), (20, 21), True),
}


def predictions(kind: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Two batches of logits and labels, some of them ignored. In the first image of each, 1 is
    predicted with certainty, and mostly right."""
    low, size, sigmoid = KINDS[kind]
    shape = (2, low[0], *size) if sigmoid else (2, *size)
    for _ in range(2):
        logits, labels = 2 * torch.randn(2, *low), torch.randint(0, 2 if sigmoid else K, shape)
        logits[0, slice(None) if sigmoid else 1] = 200
        labels[0, ..., 3:] = 1
        labels[..., 2] = 255
        yield logits, labels


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("n_bins", [1, 15])
@pytest.mark.parametrize("kind", KINDS)
def test_calibration_error(kind: str, n_bins: int, norm: Any) -> None:
    (channels, *low), size, sigmoid = KINDS[kind]
    options: dict[str, Any] = {"n_bins": n_bins, "norm": norm}
    task: Any = {"task": "binary"} if sigmoid else {"task": "multiclass", "num_classes": K}
    theirs = CalibrationError(**task, **options, ignore_index=255)
    ours = diagnostics.CalibrationError(channels, sigmoid=sigmoid, **options)
    valid = 0
    for logits, labels in predictions(kind):
        ours.update(logits, labels)
        z = F.interpolate(logits, size, mode="trilinear" if len(low) > 2 else "bilinear")
        theirs.update(z, labels)
        valid += int((labels != 255).sum())
    assert ours.counts.sum() == valid and ours.counts.shape == (n_bins + 1,)
    assert 0 < ours.hits[-1] < ours.counts[-1] == ours.confidence_sums[-1]  # certain pixels
    torch.testing.assert_close(ours.compute().float(), theirs.compute())


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_calibration_that_is_not_known(norm: str) -> None:
    """Of no pixel, or with a logit that is not finite where a label is valid."""
    metric = diagnostics.CalibrationError(K, norm=norm)
    logits, labels = torch.randn(2, K, 4, 4), torch.full((2, 8, 8), 255)
    logits[1] = torch.nan
    for y in (labels, labels - 256, labels[:, :0]):
        metric.update(logits, y)
    assert metric.compute().isnan() and not metric.counts.any()
    labels[0] = 1
    metric.update(logits, labels)
    assert metric.compute().isfinite()
    metric.update(logits.flip(0), labels)
    assert metric.compute().isnan()


def test_sums_of_many_confidences() -> None:
    """One more batch counts as much as the first, also in a module of bfloat16."""
    logits, labels = torch.randn(2, K, 4, 4), torch.zeros(2, 8, 8).long()
    first, later = (diagnostics.CalibrationError(K, n_bins=1) for _ in range(2))
    torch.nn.ModuleList([later]).to(torch.bfloat16)
    later.counts = later.counts + 2**40
    later.confidence_sums = later.confidence_sums.double() + 2**40
    for metric in (first, later):
        metric.update(logits, labels)
    assert torch.equal(later.counts - 2**40, first.counts)
    torch.testing.assert_close(
        later.confidence_sums - 2**40, first.confidence_sums, rtol=1e-5, atol=0
    )


def test_plot_of_metrics() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    features, labels = batches()[0]
    for metric, batch in (
        (ao.MeanIoU(K, average="none"), (features[:, :K], labels)),
        (diagnostics.CentroidGeometry(K, D), (features, labels)),
        (diagnostics.LabelImbalance(K), (labels,)),
        (diagnostics.CalibrationError(K), (features[:, :K], labels)),
    ):
        metric.update(*batch)
        figure, _ = metric.plot()
        assert draws(figure).std() > 0
        pyplot.close(figure)


def draws(figure: Any) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def test_figures_draw_their_data() -> None:
    features, labels = batches()[0]
    centroids, _ = ao.class_centroids(features, labels, K)
    names = [f"class {k}" for k in range(K)]
    figure = plots.cosine_map(centroids[:-1], names[:-1])
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_allclose(drawn[1, 0], cosine_pairs(centroids[:2].numpy())[0], rtol=1e-5)
    assert draws(figure).std() > 0

    figure = plots.features_with_anchors(features, labels, centroids, names=names, max_points=20)
    points, stars = figure.axes[0].collections
    assert 10 <= len(points.get_offsets()) <= 20
    assert np.asarray(stars.get_array()).tolist() == list(range(K - 1))  # the last is absent
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    colours = np.array([line.get_color() for line in legend.get_lines()])
    np.testing.assert_array_equal(colours[:-1], stars.to_rgba(np.arange(K - 1)))
    assert draws(figure).std() > 0

    counts, hits = torch.tensor([10, 0, 30, 4]), torch.tensor([2, 0, 21, 4])
    figure = plots.reliability(counts, hits, torch.tensor([1.5, 0.0, 24.0, 4.0]).double())
    _, points = figure.axes[0].lines  # the diagonal is the first
    drawn = np.asarray(points.get_xydata())
    np.testing.assert_allclose(drawn, [[0.15, 0.2], [0.8, 0.7], [1, 1]])
    bars: Any = figure.axes[1].patches
    heights = [bar.get_height() for bar in bars]
    np.testing.assert_allclose(heights, [10 / 44, 30 / 44, 4 / 44])
    assert figure.axes[1].get_ylim()[0] < min(heights)
    assert draws(figure).std() > 0

    groups = torch.randn(3, D)
    figure = plots.centroid_similarity(features[0], groups, image=torch.rand(3, 16, 24))
    assert len(figure.axes) == 1 + 3 + 1  # image, groups, colour bar
    drawn = np.asarray(figure.axes[1].images[0].get_array())
    expected = F.cosine_similarity(features[0], groups[0, :, None, None], dim=0)
    np.testing.assert_allclose(drawn, expected.numpy(), rtol=1e-4, atol=1e-6)
    assert draws(figure).std() > 0


def test_names_are_no_markup_and_do_not_overlap() -> None:
    markup = ["$", "a$b$", r"$\frac$", r"\$", "_under", "<b>&amp;"]
    names = [*markup, *(f"a class whose name is very long, number {k}" for k in range(K))]
    vectors = torch.randn(len(names), D)
    for figure in (
        plots.cosine_map(vectors, names),
        plots.features_with_anchors(torch.randn(50, D), torch.arange(50), vectors, names=names),
    ):
        draws(figure)
        (axes, *_) = figure.axes
        tick_labels = [*axes.get_xticklabels(), *axes.get_yticklabels()]
        legends = [text for legend in figure.legends for text in legend.get_texts()]
        assert max(len(text.get_text()) for text in [*tick_labels, *legends]) <= plots.LONGEST + 1
        texts = [text for text in axes.texts if text.get_text()]
        boxes = [text.get_window_extent() for text in texts]
        assert not any(box.count_overlaps(boxes) > 1 for box in boxes)
        assert axes.get_window_extent().height > 0.5 * figure.bbox.height
    assert [plots.plain(name) for name in markup[:2]] == [r"\$", r"a\$b\$"]
    assert plots.plain(names[-1]) == "a class whose n…number 4"


def test_principal_components() -> None:
    points = torch.randn(30, D, dtype=torch.float64) * torch.arange(1, D + 1) ** 2
    projected = plots._principal_components(points)
    variances = torch.linalg.eigvalsh(points.T.cov())[-2:].flip(0)
    torch.testing.assert_close(projected.T.var(dim=1), variances)


def test_points_of_one_channel_are_on_a_line() -> None:
    """Their second component is 0; that of a single point as well."""
    for features in (torch.randn(7, 1), torch.randn(1, 1)):
        points = plots._principal_components(features)
        assert points.shape == (len(features), 2) and not points[:, 1].any()
