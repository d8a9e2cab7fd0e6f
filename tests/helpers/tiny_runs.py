"""Runs of a few steps on small digit scenes, and the files that they write."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anchorops.train.commands import fit
from anchorops.train.networks import Segmenter, load_backbone
from anchorops.train.options import Model
from anchorops.train.run import read_metrics

TINY = (
    "--config digits --model.methods [sar] --model.warmup 0 --model.channels_last false "
    "--data.crop [32,32] --data.train_images 64 --data.val_images 10 --data.batch_size 4 "
    "--data.eval_batch_size 5 --data.steps 6 --val_every 3 --save_every 2 --log_every 2 "
    "--device cpu"
)
FOLDER = (
    "--config folder --model.network segformer-b0 --data.crop [32,32] --data.steps 2 "
    "--data.batch_size 2 --data.workers 0 --device cpu"
)
MEASURED = ("seconds_per_step", "memory_mb")  # columns that no two runs share


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3, stride=4, padding=1), nn.BatchNorm2d(16))
        self.unused = nn.Parameter(torch.zeros(1))  # as in some networks of the libraries

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images).relu()


def small_network(options: Model, num_classes: int, channels: int = 3) -> Segmenter:
    """In place of build_model."""
    model = Segmenter(Body(), 16, num_classes, dropout=options.dropout, frozen=options.frozen)
    if options.backbone_weights:
        load_backbone(model, options.backbone_weights)
    return model


def fitted(words: str) -> Path:
    """The directory of the run that `anchorops-train fit` trains with these words."""
    return fit(words.split())


def state(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / f"{name}.ckpt", weights_only=True)


def figures(run: Path) -> dict[int, dict[str, float]]:
    """The lines of metrics.csv, without measured times and memory."""
    return {
        step: {name: x for name, x in line.items() if not name.startswith(MEASURED)}
        for step, line in read_metrics(run / "metrics.csv").items()
    }


def assert_same_run(run: Path, other: Path) -> None:
    """The whole states, the best weights and all figures are equal, bit for bit."""
    assert figures(run) == figures(other)
    for name in ("last", "best"):
        torch.testing.assert_close(state(run, name), state(other, name), rtol=0, atol=0)
