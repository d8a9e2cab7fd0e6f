"""Options out of range, or that a run cannot have, end with one line that names them."""

import inspect
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from image_files import image, write
from lightning.pytorch import Trainer
from PIL import Image
from tiny_runs import TINY, figures
from torch import nn

from anchorops.train.callbacks import MaskWriter, Saving
from anchorops.train.cli import main, train, with_presets
from anchorops.train.data.module import SegmentationData
from anchorops.train.evaluation import predict
from anchorops.train.module import SegmentationModule
from anchorops.train.options import TRAINER, check

MODEL_VALUES = {
    "auxiliary_weight": [-0.4, math.inf],
    "dropout": [-0.1, 1.0],
    "classifier_std": [-0.01, math.nan],
    "methods": [["sar", "sar"]],
    "focal_gamma": [-1.0],
    "ohem_threshold": [0.0, 1.1],
    "ohem_min_kept": [0],
    "lr": [-1.0, math.nan, "fast", None],
    "weight_decay": [-1.0],
    "head_lr_factor": [-1.0],
    "warmup": [-3, 1.5],
    "power": [-0.9],
    "window_stride": [(0, 8), (8,)],
    "eval_scales": [[], [0.0], [1.0, math.inf], 1.0],
}
DATA_VALUES = {
    "steps": [0],
    "batch_size": [0],
    "eval_batch_size": [0],
    "workers": [-1],
    "crop": [(50, 64), (0, 32), (32,)],
    "head_tail": [(0.001, 0.01), (1.1, 0.1), (0.1, -0.1)],
    "train_images": [0],
    "val_images": [0],
    "zipf": [-1.0],
    "data_seed": [-1],
    "channels": [0],
    "short_side": [0],
    "long_side": [0],
    "scale": [(0.0, 0.0), (2.0, 0.5), (1.0, math.inf)],
    "cat_max_ratio": [0.0, 1.5],
}
TRAINER_VALUES = {
    "num_nodes": [0],
    "fast_dev_run": [True, 2],
    "max_epochs": [2, 0, -1, None],
    "min_epochs": [2],
    "max_steps": [0, -2],
    "min_steps": [-1],
    "limit_train_batches": [2, 1, 0.5],
    "overfit_batches": [2, 0.5],
    "val_check_interval": [0, 0.0, -1, 1.5, "00:00:00:01", {"minutes": 5}],
    "check_val_every_n_epoch": [0, 2],
    "num_sanity_val_steps": [-2],
    "log_every_n_steps": [0],
    "enable_checkpointing": [False],
    "accumulate_grad_batches": [0],
    "gradient_clip_val": [-1.0],
    "use_distributed_sampler": [True],
    "barebones": [True],
    "sync_batchnorm": [True],
    "default_root_dir": ["elsewhere"],
}


def cases(values: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, wrong in values.items() for value in wrong]


@pytest.mark.parametrize(("name", "value"), cases(MODEL_VALUES))
def test_options_of_the_model(name: str, value: Any):
    with pytest.raises(ValueError, match=rf"^--model.{name}: expected .*, got [^\n]*$"):
        SegmentationModule(**{name: value})


@pytest.mark.parametrize(("name", "value"), cases(DATA_VALUES))
def test_options_of_the_data(name: str, value: Any):
    with pytest.raises(ValueError, match=rf"^--data.{name}: expected .*, got [^\n]*$"):
        SegmentationData(**{name: value})


@pytest.mark.parametrize(("name", "value"), cases(TRAINER_VALUES))
def test_options_of_the_trainer(name: str, value: Any):
    parameters = inspect.signature(Trainer).parameters.values()
    options = {x.name: x.default for x in parameters} | {
        "max_epochs": 1,
        "use_distributed_sampler": False,
    }
    for interval in (1, 500, 0.5, 1.0, None):
        check("trainer", options | {"val_check_interval": interval}, TRAINER)
    with pytest.raises(ValueError, match=rf"^--trainer.{name}: expected .*, got [^\n]*$"):
        check("trainer", options | {name: value}, TRAINER)


def test_other_options_that_are_refused():
    with pytest.raises(ValueError, match=r"^--saving.every: expected an int of at least 1, got 0"):
        Saving(every=0)
    with pytest.raises(ValueError, match=r"^--model.loss: expected ce, .* --model.ohem_min_kept"):
        SegmentationModule(loss="dice", ohem_min_kept=9)
    with pytest.raises(ValueError, match=r"^--model.focal_gamma: expected .* focal, got ce with 5"):
        SegmentationModule(focal_gamma=5.0)


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("root", "data", "with files"),
        ("short_side", 512, "with files"),
        ("scale", (0.5, 2.0), "with files"),
        ("channels", 1, "folder"),
        ("label_map", {1: 0}, "folder"),
    ],
)
def test_options_that_digits_would_ignore(option: str, value: Any, kind: str):
    message = rf"^--data.{option}: expected a --data.dataset {kind}, got digits$"
    with pytest.raises(ValueError, match=message):
        SegmentationData(**{option: value}).splits()


def test_options_that_other_data_sets_would_ignore():
    for dataset, option in (("folder", "zipf"), ("ade20k", "val_images"), ("ade20k", "channels")):
        data = SegmentationData(dataset, "data", **{option: 2})  # pyright: ignore
        with pytest.raises(ValueError, match=rf"^--data.{option}: expected .*, got {dataset}$"):
            data.splits()


def trained_by(ranks: int) -> Any:
    strategy = SimpleNamespace(broadcast=lambda x: x)
    return SimpleNamespace(
        world_size=ranks, global_rank=0, is_global_zero=True, strategy=strategy, datamodule=None
    )


def test_images_of_several_sizes_in_a_batch(folder: Path):
    data = SegmentationData("folder", str(folder), eval_batch_size=2)
    data.trainer = trained_by(1)
    message = (
        r"^--data.eval_batch_size: expected 1 for images of several sizes: "
        r".*/images/val/a/1.jpg has \(6, 9\), .*/images/val/b.png \(4, 5\)$"
    )
    with pytest.raises(ValueError, match=message):
        data.setup("validate")
    (folder / "images/val/b.png").unlink()
    (folder / "masks/val/b.png").unlink()
    data.setup("validate")


def test_more_ranks_than_images():
    data = SegmentationData(val_images=1, images=["a.png"], train_images=9)
    data.trainer = trained_by(2)
    with pytest.raises(ValueError, match=r"^validation: expected at least one .* of 2 ranks .* 1$"):
        data.setup("validate")
    with pytest.raises(
        ValueError, match=r"^predict: expected at least one .* of 2 ranks .* got 1$"
    ):
        data.predict_dataloader()


def test_stride_that_leaves_gaps_is_found_before_the_training():
    for evaluation in ("whole", "sliding"):
        module = SegmentationModule(evaluation=evaluation, window_stride=(32, 40))
        module._trainer = trained_by(1)
        module._trainer.datamodule = SegmentationData(crop=(32, 32))  # pyright: ignore
        if evaluation == "whole":
            module.setup("fit")
        else:
            with pytest.raises(ValueError, match=r"^--model.window_stride: expected 1 to the crop"):
                module.setup("fit")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (
            ["trian"],
            1,
            "expected one of the commands fit, validate, predict, demo, compare, presets",
        ),
        ([], 1, "expected one of the commands fit, "),
        (["fit", "--data.crop", "[3, 4]"], 1, "--data.crop: expected two multiples of 32"),
        (["fit", "--model.lr", "a"], 2, 'Parser key "model.lr": Expected a'),
        (["fit", "--model.lrr", "1"], 2, "nrecognized arguments: --model.lrr"),
        (["fit", "--seed_everything", "-1"], 1, "--seed_everything: expected 0 to 4294967295, got"),
        (
            ["fit", "--trainer.max_epochs", "2"],
            1,
            "--trainer.max_epochs: expected 1, got 2: --data",
        ),
        (["fit", "--trainer.profiler", "foo"], 1, "parameter of `Trainer`, it can only be one of"),
    ],
)
def test_messages_have_one_line(
    words: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(words) == status
    said = capsys.readouterr().err.removeprefix("Seed set to 0\n")
    assert said.startswith("anchorops-train: ") and message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("files", "parsed"),
    [
        (["[a].jpg"], '["[a].jpg"]'),
        (["[a].jpg", "ö😀.jpg"], '["[a].jpg", "ö😀.jpg"]'),
        (["[x]"], '["[x]"]'),  # exists
        (["[a.jpg, b.jpg]"], "[a.jpg, b.jpg]"),
        ([], "[]"),
    ],
)
def test_files_to_predict(
    files: list[str], parsed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("[x]").touch()
    expected = ["predict", "--data.images", parsed, "--out", "o"]
    assert with_presets(["predict", "--data.images", *files, "--out", "o"])[0] == expected
    if files:
        joined = f"--data.images={files[0]}"
        assert with_presets(["predict", joined, *files[1:], "--out", "o"])[0] == expected


def test_images_to_predict_exist(tmp_path: Path):
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=r"^predict: --data.images: .*/b.png is not a file$"):
        MaskWriter(tmp_path / "out", [str(tmp_path / "a.png"), str(tmp_path / "b.png")])
    assert not (tmp_path / "out").exists()


def test_a_warm_up_that_is_longer_than_the_run(capsys: pytest.CaptureFixture[str]):
    module = SegmentationModule(warmup=1500)
    module._trainer = trained_by(1)
    for steps, told in ((1501, ""), (1500, "--model.warmup 1500 is not shorter than --data.steps")):
        module._trainer.datamodule = SegmentationData(steps=steps)  # pyright: ignore
        module.setup("fit")
        assert capsys.readouterr().err.startswith(told) and bool(told) == (steps == 1500)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_predictions_in_the_precision_of_the_weights(dtype: torch.dtype):
    """Lightning's plugins for it also change the default dtype."""
    model = nn.Conv2d(3, 5, 4, 4)
    images = torch.randn(1, 3, 64, 64)
    options: dict[str, Any] = {"window": (32, 64), "scales": (1.0, 0.5)}
    with torch.no_grad():
        expected = predict(model, images, (64, 64), **options)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            classes = predict(model.to(dtype), images.to(dtype), (64, 64), **options)
        finally:
            torch.set_default_dtype(before)
    assert (classes == expected).float().mean() > (0.97 if dtype == torch.bfloat16 else 0.9999)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_gradients_are_clipped_under_autocast(optimizer: str, tmp_path: Path):
    options = ["--trainer.precision", "bf16-mixed", "--trainer.gradient_clip_val", "1.0"]
    options += ["--model.optimizer", optimizer, "--data.steps", "1", "--data.val_images", "2"]
    run = train(*TINY, *options, "--run", str(tmp_path / "run"))
    assert (run / "last.ckpt").exists()


def test_run_in_bfloat16(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Also with a validation after each half of the run."""
    run = str(tmp_path / "run")
    options = ["--trainer.precision", "bf16-true", "--trainer.val_check_interval", "0.5"]
    options += ["--data.steps", "2", "--data.val_images", "2"]
    train(*TINY, *options, "--model.eval_scales", "[1.0, 0.5]", "--run", run)
    assert "could not be made" not in capsys.readouterr().err
    lines = figures(Path(run))
    assert [step for step, line in lines.items() if "val/miou" in line] == [1, 2]
    best = max(line.get("val/miou", 0) for line in lines.values())
    assert main(["validate", "--run", run]) == 0
    assert f"{best:.6f}"[:7] in capsys.readouterr().out
    write(tmp_path / "[a].png", image(20, 30))
    words = [f"--data.images={tmp_path / '[a].png'}", "--out", str(tmp_path / "masks")]
    assert main(["predict", "--run", run, *words]) == 0
    assert Image.open(tmp_path / "masks/[a].png").size == (30, 20)
