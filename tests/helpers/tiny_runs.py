"""A run of six steps on small digit scenes, and the files that it writes."""

import json
from pathlib import Path

import torch

from anchorops.train.presets import DIGITS
from anchorops.train.run import checkpoint

TINY = DIGITS.replace(
    crop=(32, 32),
    train_images=64,
    val_images=10,
    batch_size=4,
    steps=6,
    eval_batch_size=5,
    log_every=2,
    save_every=2,
    eval_every=3,
    warmup=0,
    threads=1,
    methods=("sar",),
    device="cpu",
)


def weights(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return checkpoint.load_checkpoint(run / f"checkpoint-{step:08d}.pt")["model"]


def metrics(run: Path, name: str = "step") -> list[dict]:
    """The lines of the journal that contain this name."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if name in line]


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["p2a"]) for line in metrics(run, "loss")]


def assert_same_run(run: Path, other: Path, step: int = 6) -> None:
    assert losses(run) == losses(other)
    first, second = weights(run, step), weights(other, step)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
