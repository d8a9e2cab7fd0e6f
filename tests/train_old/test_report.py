"""The curves of the report: nothing is hidden."""

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

import anchorops as ao
from anchorops.train.report.features import Features
from anchorops.train.report.page import MEANINGS, PANELS, _curves, _headline, _samples, _training


@pytest.fixture
def metrics() -> list[dict[str, Any]]:
    """Of five methods together."""
    methods = ("sar", "cr", "occl", "ceco", "mvsc")
    terms = {f"{method}.{name}": 0.5 for method in methods for name in ("first", "second")}
    lines: list[dict[str, Any]] = []
    for step, factor in ((1, 0.0), (100, 1.0), (200, 30.0)):
        ratios = {f"{method}.gradient_ratio": 0.1 * factor for method in methods}
        logged = {"loss": 2.0, "ce": 1.0, "accuracy": 0.75, "sar.gate": 1.0, "mvsc.present": 9}
        lines.append({"step": step, **logged, **terms, **ratios, "val_miou": 0.5})
    return lines


def test_legends_are_below_the_curves(metrics: list[dict[str, Any]]):
    figure = _curves(metrics)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    assert [axis.get_title() for axis in figure.axes] == list(PANELS)
    for axis in figure.axes:
        legend = axis.get_legend()
        assert legend is not None
        box = legend.get_window_extent(renderer)
        assert box.y1 < axis.bbox.y0 and box.y0 >= -1
    terms = figure.axes[0]
    assert len({str(line.get_color()) for line in terms.lines}) == len(terms.lines) == 12


def heights(axis: Axes) -> list[list[float]]:
    return [np.asarray(line.get_ydata(), float).tolist() for line in axis.lines]


def test_scales_of_curves(metrics: list[dict[str, Any]]):
    """Shares are in %. Ratios from 0 and 0.1 to 3 are all visible, and 1 is marked."""
    _, percent, ratios, _ = _curves(metrics).axes
    assert heights(percent) == [[75] * 3, [50] * 3] and percent.get_ylim()[1] > 78
    assert ratios.get_yscale() == "symlog" and ratios.get_ylim()[0] == 0 < 3 < ratios.get_ylim()[1]
    first, *_, mark = heights(ratios)
    assert first == pytest.approx([0, 0.1, 3]) and mark == [1, 1]


def test_classes_without_pixels_have_no_star():
    """The second class of three."""
    centroids = torch.tensor([[5.0, 1.0], [0.0, 0.0], [9.0, 3.0]])
    labels = torch.tensor([0, 2, 2, 0])
    samples = centroids[labels] + 0.1 * torch.randn(4, 2), labels
    nothing = torch.zeros(1, 1, 1)
    counts = torch.tensor([2, 0, 2])
    figure = _samples(Features(centroids, counts, samples, (nothing,) * 3), ["a", "b", "c"])
    pixels, stars = figure.axes[0].collections
    assert np.asarray(pixels.get_array()).tolist() == [0, 1, 1, 0]
    assert len(np.asarray(stars.get_offsets())) == 2
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "c"]


def test_curves_of_a_method_without_gradient():
    """CBP's ratio is 0."""
    line = {"step": 1, "loss": 1.0, "cbp.gradient_ratio": 0.0}
    figure = _curves([line, {**line, "step": 2}])
    figure.draw_without_rendering()
    assert [axis.get_title() for axis in figure.axes] == [PANELS[0], PANELS[2]]


def test_miou_is_visible_where_all_classes_are_in_one_group():
    """The curve of that group is the same: it is narrower, and above."""
    lines = [{"step": step, "val_miou": 0.1 * step, "val_head": 0.1 * step} for step in (1, 2)]
    miou, head = _curves(lines).axes[0].lines
    assert heights(_curves(lines).axes[0]) == [[10, 20]] * 2
    assert miou.get_zorder() < head.get_zorder()
    assert miou.get_linewidth() > 3 * head.get_linewidth()
    assert miou.get_markersize() > 2 * head.get_markersize()


def test_a_ratio_that_was_measured_once_is_no_curve():
    line = {"step": 1, "loss": 1.0, "sar.gradient_ratio": 0.25}
    lines = [line, {"step": 2, "loss": 1.0}]
    assert [axis.get_title() for axis in _curves(lines).axes] == [PANELS[0]]
    assert "measured once, in the first step: sar 0.25" in _training(lines, "sar")
    assert "measured once" not in _training([line, {**line, "step": 101}], "sar")


@pytest.mark.filterwarnings("ignore:CBP")  # it is not attached
def test_every_term_of_a_method_is_explained():
    labels, features = torch.zeros(2, 4, 4, dtype=torch.int64), torch.randn(2, 3, 4, 4)
    makes = [ao.SAR, ao.OCCL, ao.CeCo, ao.MVSC, ao.CBP]
    losses = [*(make(2, 3) for make in makes), ao.CBP(2, 3, update="penalty")]
    for loss in losses:
        loss(features, labels, torch.nn.Conv2d(3, 2, 1))
        assert loss.terms and loss.terms.keys() <= MEANINGS.keys()
    page = _training([{"step": 1, "loss": 1.0, "mvsc.present": 2.0}], "sar+mvsc")
    assert "<b>mvsc.present</b>: MVSC: number of classes" in page


def test_the_groups_of_classes_are_explained():
    groups = ["head", "head", "body"]
    classes = [{"group": group} for group in groups]
    results = {"classes": classes, "miou": 0.5, "head": 0.6, "body": 0.3, "tail": None, "macc": 0.5}
    text = _headline(results, (0.01, 0.001))
    assert "head at least 1 % (2 of 3 classes), tail less than 0.1 % (0), body between (1)" in text
