"""Runs of a few steps on small digit scenes, and the files that they write."""

from pathlib import Path

import torch

from anchorops.train.metrics import read_metrics

TINY = (
    *("--config", "digits", "--model.methods", "[sar]", "--model.warmup", "0"),
    *("--model.channels_last", "false", "--data.crop", "[32, 32]", "--data.train_images", "64"),
    *("--data.val_images", "10", "--data.batch_size", "4", "--data.eval_batch_size", "5"),
    *("--data.steps", "6", "--trainer.val_check_interval", "3", "--saving.every", "2"),
    *("--trainer.log_every_n_steps", "2", "--trainer.accelerator", "cpu"),
    *("--trainer.enable_progress_bar", "false"),
)
MEASURED = ("seconds_per_step", "memory_mb", "cost/")  # columns that no two runs share


def state(run: Path, name: str = "last") -> dict:
    return torch.load(run / f"{name}.ckpt", weights_only=True)


def figures(run: Path) -> dict[int, dict[str, float]]:
    """The lines of metrics.csv, without measured times and memory."""
    return {
        step: {name: x for name, x in line.items() if not name.startswith(MEASURED)}
        for step, line in read_metrics(run / "metrics.csv").items()
    }


def assert_same_run(run: Path, other: Path) -> None:
    """Weights, the optimizer's state, the best weights and all figures are equal, bit for bit."""
    assert figures(run) == figures(other)
    for name, part in (("last", "state_dict"), ("best", "state_dict")):
        assert_equal(state(run, name)[part], state(other, name)[part])
    first, second = (state(x)["optimizer_states"][0]["state"] for x in (run, other))
    assert first.keys() == second.keys()
    for key in first:
        assert_equal(first[key], second[key])


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
