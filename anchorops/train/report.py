"""What is drawn and printed of runs."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import to_dtype

from .data.loading import Segmentation, evaluation_transform
from .evaluation import predict
from .options import Options, flat
from .run import CONFIG, METRICS, read_metrics, read_yaml

PICTURES, SIDE = 8, 192  # validation images in predictions.png, and their pixels
# of a row of a comparison: names in the results, units and decimals
FIGURES = {name: (name.lower(), 100, 1) for name in ("mIoU", "head", "body", "tail", "mAcc")}
FIGURES |= {"s/step": ("seconds_per_step", 1, 3), "MB": ("memory_mb", 1, 0)}


def load_results(run: Path) -> dict[str, Any]:
    """The results of a run: the last figures in its metrics.csv. Raises ValueError if it has not
    ended."""
    options, path = flat(read_yaml(run / CONFIG)), run / METRICS
    lines = read_metrics(path) if path.exists() else {}
    step, steps = max(lines, default=0), options.get("data.steps", 0)
    if "val/miou" not in (last := lines.get(steps, {})):
        raise ValueError(f"{run} has not ended: {step} of {steps} steps are in its {METRICS}")
    logged = [line for line in lines.values() if "loss" in line]
    return {
        "run": run.resolve().name,
        "network": options["model.network"],
        "methods": "+".join(options["model.methods"]) or "plain",
        "seconds_per_step": fmean(x["seconds_per_step"] for x in logged) if logged else None,
        "memory_mb": max((x["memory_mb"] for x in logged), default=None),
        **{name: last.get(f"val/{name}") for name in ("miou", "head", "body", "tail", "macc")},
    }


def comparison(results: Sequence[dict[str, Any]]) -> str:
    """A table with a row for each run, IoU and accuracies in %; – for a group without classes."""
    words = ["run", "network", "methods"]
    rows = [[*words, *FIGURES]]
    for run in results:
        figures = [
            "–" if run[name] is None else f"{unit * run[name]:.{digits}f}"
            for name, unit, digits in FIGURES.values()
        ]
        rows.append([*(run[word] for word in words), *figures])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


@torch.no_grad()
def draw_predictions(model: nn.Module, dataset: Segmentation, options: Options) -> Image.Image:
    """The first validation images; under each its labels, and under these its prediction. Class 0
    is black, ignored pixels are white, and the other classes have colours at random."""
    count, size = min(PICTURES, len(dataset)), (len(dataset.classes) + 1, 3)
    colors = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    colors[0], colors[-1] = 0, 255  # the last is that of label −1
    picture = Image.new("RGB", (SIDE * count, SIDE * 3))
    transform = evaluation_transform(options.data)
    for column in range(count):
        image, labels = dataset[column]
        images = transform(tv_tensors.Image(image)).as_subclass(Tensor)[None]
        images = images.to(next(model.parameters()).device)
        (classes,) = predict(model, images, labels.shape, options)
        three = image[[0, 1, 2] if len(image) >= 3 else [0, 0, 0]]
        pixels = to_dtype(three, torch.uint8, scale=True).permute(1, 2, 0).numpy()
        parts = pixels, colors[labels.numpy()], colors[classes.cpu().numpy()]
        for row, part in enumerate(parts):
            tile = ImageOps.pad(
                Image.fromarray(part), (SIDE, SIDE), Image.Resampling.NEAREST, "gray"
            )
            picture.paste(tile, (SIDE * column, SIDE * row))
    return picture
