"""After training: confusion matrices, features of a split, pictures."""

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

import anchorops as ao
from anchorops.train.data.digits import DigitScenes
from anchorops.train.networks.models import build_model
from anchorops.train.report.evaluate import evaluate
from anchorops.train.report.features import collect_features
from anchorops.train.report.page import choose_images, draw_legend, palette


class Threshold(nn.Module):
    """Logits at stride 4 that say whether the first channel is positive."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = nn.functional.avg_pool2d(images[:, :1], 4)
        return torch.cat([-x, x], 1)


def test_confusion_of_images_of_any_size_and_windows():
    image = torch.ones(1, 3, 40, 56)
    image[..., 24:] = -1
    truth = (image[:, 0] > 0).long()
    truth[:, 3] = -1
    for window in (None, (16, 24), (64, 64)):
        confusion = evaluate(Threshold(), [(image, truth)], 2, torch.device("cpu"), window)
        assert confusion.tolist() == [[39 * 32, 0], [0, 39 * 24]], window


def test_pictures():
    colors = palette(11)
    assert len({tuple(color) for color in colors[:11].tolist()}) == 11 and colors[-1].min() == 255
    many = palette(200)
    assert len({tuple(color) for color in many[:200].tolist()}) > 190
    for width, length in ((2.2, 5), (5.4, 20), (13.4, 8)):
        figure = Figure((width, 6))
        names = {k: f"class {k}".ljust(length, "x") for k in range(24)}
        foot = draw_legend(figure, names, many)
        (legend,) = figure.legends
        extent = legend.get_window_extent(FigureCanvasAgg(figure).get_renderer())
        assert extent.x0 >= 0 and extent.x1 <= figure.bbox.width, (width, length)
        assert extent.y1 <= foot * figure.bbox.height
    scenes = DigitScenes("val", 60, (64, 64), seed=0)
    chosen = choose_images(scenes, 8)
    shown = {x for i in chosen for x in scenes[i][1].unique().tolist()}
    assert len(set(chosen)) == 8 and shown >= set(range(11))


def test_features_of_a_split():
    torch.manual_seed(0)
    model = build_model("hrnet-w18-small", 11).eval()
    scenes = DigitScenes("val", 6, (32, 32), seed=0)
    stacked = [torch.stack(x) for x in zip(*(scenes[i] for i in range(6)), strict=True)]
    images, labels = stacked[0].float() / 255, stacked[1]
    batches = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    collected = collect_features(model, batches, 11, torch.device("cpu"))
    with torch.no_grad():
        features = model.body(images)
    centroids, counts = ao.class_centroids(features, labels.long(), 11)
    assert torch.equal(collected.counts, counts)
    torch.testing.assert_close(collected.centroids, centroids)
    samples, sampled = collected.samples
    assert samples.shape == (len(sampled), 240)
    pixels = features.permute(0, 2, 3, 1).flatten(0, 2)
    keys = labels[:, ::4, ::4].flatten()
    for sample, label in zip(samples[::9], sampled[::9], strict=True):
        assert keys[(pixels - sample).square().sum(1).argmin()] == label
