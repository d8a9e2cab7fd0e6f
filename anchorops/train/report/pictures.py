"""The picture of a run's predictions."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor
from torchvision import tv_tensors

from ...plots import plain
from .. import IGNORED
from ..data.folders import class_histogram
from ..data.loading import Segmentation
from .evaluate import predict

if TYPE_CHECKING:
    from ..module import SegmentationModule

LEGEND_NAMES = 23  # in a legend
IGNORED_COLOR = (255, 255, 255)


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
def draw_predictions(module: "SegmentationModule", indices: Sequence[int], *, title: str) -> Figure:
    """These validation images, their labels and predictions, from left to right in three rows."""
    dataset = module.data.validation_set
    colors = palette(len(dataset.classes))
    rows, seen = [], set[int]()
    for index in indices:
        image, labels = dataset[index]
        seen |= set(labels.unique().tolist())
        network_input = module.data.transform(tv_tensors.Image(image)).as_subclass(Tensor)
        images = network_input[None].to(module.device, memory_format=module.layout)
        (classes,) = predict(module.network, images, labels.shape, **module.prediction)
        rows.append((_rgb(image), colors[labels.numpy()], colors[classes.cpu().numpy()]))

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
    return figure


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
