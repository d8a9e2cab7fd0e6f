"""The picture of a run's predictions."""

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn

from ...plots import plain
from .. import IGNORED
from ..data.loading import Segmentation, network_input
from ..evaluation import as_weights, predict, prediction_of
from ..options import Options

LEGEND_NAMES = 23  # in a legend
IGNORED_COLOR = (255, 255, 255)


def palette(num_classes: int) -> np.ndarray:
    """Colours uint8 [K + 1, 3] of the labels. Class 0 is black; the last row, which label −1
    selects, is white."""
    places = np.arange(num_classes) * 0.61803 % 1  # neighbours differ most by the golden ratio
    hues = matplotlib.colormaps["hsv"](places)[:, :3]
    colors = np.concatenate([255 * hues, [IGNORED_COLOR]]).astype(np.uint8)
    colors[0] = 0
    return colors


@torch.no_grad()
def draw_predictions(
    model: nn.Module, dataset: Segmentation, options: Options, count: int, *, title: str
) -> Figure:
    """The first validation images; under each its labels, and under these its prediction."""
    parts = "image", "labels", "prediction"
    colors, columns, seen = palette(len(dataset.classes)), [], set[int]()
    training, how = model.training, prediction_of(options)
    model.eval()
    for index in range(min(count, len(dataset))):
        image, labels = dataset[index]
        images = network_input(image, options.data)[None]
        images = as_weights(model, images, options.model.channels_last)
        (classes,) = predict(model, images, labels.shape, **how)
        seen |= {*labels.unique().tolist(), *classes.unique().tolist()}
        columns.append((_rgb(image), colors[labels.numpy()], colors[classes.cpu().numpy()]))
    model.train(training)

    height, width = columns[0][0].shape[:2]
    size = 1.6 * len(columns), 1.6 * len(parts) * height / width + 1
    figure = Figure(figsize=size, layout="constrained")
    no_ticks = {"xticks": [], "yticks": []}
    axes = figure.subplots(len(parts), len(columns), squeeze=False, subplot_kw=no_ticks)
    for x, column in enumerate(columns):
        for axis, picture in zip(axes[:, x], column, strict=True):
            axis.imshow(picture, interpolation="nearest")
    for axis, part in zip(axes[:, 0], parts, strict=True):
        axis.set_ylabel(part, fontsize=8)
    figure.suptitle(plain(title, longest=int(14 * figure.get_figwidth())), fontsize=10)
    names = {k: plain(dataset.classes[k]) for k in sorted(seen - {IGNORED})[:LEGEND_NAMES]}
    handles = [
        Patch(facecolor=colors[label] / 255, edgecolor="0.5", label=name)
        for label, name in (names | {IGNORED: "ignored"}).items()
    ]
    longest = max(map(len, names.values()), default=1)
    columns = max(1, int(figure.get_figwidth() / (0.6 + 0.07 * longest)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def _rgb(image: Tensor) -> np.ndarray:
    """uint8 (H, W, 3) of the first three channels, or the only one."""
    channels = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    if channels.is_floating_point():
        channels = (255 * channels.clamp(0, 1)).byte()
    return channels.permute(1, 2, 0).numpy()
