"""The curves of the report: nothing is hidden."""

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from anchorops.train.report.features import Features
from anchorops.train.report.page import PANELS, _curves, _samples


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
