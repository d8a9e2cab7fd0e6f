"""What is drawn and printed of runs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms.v2.functional import to_dtype

from .data.loading import Segmentation, network_input
from .evaluation import predict
from .options import Options, flat
from .run import CONFIG, METRICS, read_metrics, read_yaml

PICTURES, SIZE = 8, (192, 192)  # validation images in predictions.png, and their pixels
COLUMNS = ["val/miou", "val/head", "val/body", "val/tail", "val/macc"]  # of a comparison
COLUMNS += ["seconds_per_step", "memory_mb"]


def comparison(runs: Sequence[Path]) -> str:
    """A table of the last figures of runs; – for a group without classes. Raises ValueError for a
    run that has not ended."""
    rows = [["run", *COLUMNS]]
    for run in runs:
        lines = read_metrics(run / METRICS)
        steps = flat(read_yaml(run / CONFIG)).get("data.steps")
        if steps not in lines or "val/miou" not in lines[steps]:
            raise ValueError(f"{run} has not ended: {max(lines)} of {steps} steps are in {METRICS}")
        last = {name: x for line in lines.values() for name, x in line.items()}
        figures = [f"{last[name]:.3f}" if name in last else "–" for name in COLUMNS]
        rows.append([run.resolve().name, *figures])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


@torch.no_grad()
def draw_predictions(model: nn.Module, dataset: Segmentation, options: Options) -> Image.Image:
    """The first validation images; under each its labels, and under these its prediction. Class 0
    is black, ignored pixels are white, and the other classes have colours at random."""
    size = (len(dataset.classes) + 1, 3)
    colors = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    colors[0] = 0
    colors[-1] = 255  # that of label −1
    columns = []
    for index in range(min(PICTURES, len(dataset))):
        image, labels = dataset[index]
        images = network_input(image, options.data)[None].to(next(model.parameters()).device)
        (classes,) = predict(model, images, labels.shape, options)
        three = image[[0, 1, 2] if len(image) >= 3 else [0, 0, 0]]
        pixels = to_dtype(three, torch.uint8, scale=True).permute(1, 2, 0).numpy()
        parts = pixels, colors[labels.numpy()], colors[classes.cpu().numpy()]
        tiles = [ImageOps.pad(Image.fromarray(x), SIZE, Image.Resampling.NEAREST) for x in parts]
        columns.append(np.vstack([np.asarray(tile) for tile in tiles]))
    return Image.fromarray(np.hstack(columns))
