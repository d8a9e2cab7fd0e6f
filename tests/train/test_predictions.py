"""`anchorops-train predict`: the masks of images, by the weights of a run with its best mIoU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import image, write
from PIL import Image

import anchorops as ao
from anchorops.train.cli import Program, train, with_presets
from anchorops.train.metrics import read_metrics

OPTIONS = (
    *("--config", "folder", "--model.network", "segformer-b0", "--data.crop", "[32, 32]"),
    *("--data.steps", "2", "--data.batch_size", "2", "--data.workers", "0"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.val_check_interval", "1"),
)


def predict(run: Path, images: list[Path], out: Path) -> Program:
    words = ["predict", "--run", str(run), "--trainer.enable_progress_bar", "false", "--out"]
    return Program(*with_presets([*words, str(out), "--data.images", *map(str, images)]))


@pytest.mark.parametrize(
    "options",
    [
        ["--model.methods", "[cbp, sar]"],  # CBP removes the classifier's bias
        [
            *("--model.evaluation", "sliding", "--model.window_stride", "[16, 24]"),
            *("--data.short_side", "40"),
        ],
        [
            *("--model.eval_scales", "[1, 2]", "--model.eval_flip", "true"),
            *("--model.auxiliary_weight", "0.4", "--model.dropout", "0.1"),
        ],
    ],
)
def test_predictions_are_those_of_the_evaluation(folder: Path, options: list[str]) -> None:
    place = ["--data.root", str(folder)]
    run = train(*OPTIONS, *place, "--run", str(folder / "run"), *options)
    images = [folder / "images/val/a/1.jpg", folder / "images/val/b.png"]
    program = predict(run, images, folder / "new/predictions")
    assert any("_forward_changes" in vars(x) for x in program.model.network.modules())  # late
    matrix = torch.zeros(2, 2, dtype=torch.int64)
    for path in images:
        name = path.relative_to(folder / "images/val").with_suffix(".png")
        mask, made = folder / "masks/val" / name, folder / "new/predictions" / name
        predicted, labels = (np.array(Image.open(x)) for x in (made, mask))
        assert predicted.dtype == np.uint8 and predicted.shape == labels.shape
        predicted, labels = (torch.tensor(x).long()[None] for x in (predicted, labels))
        matrix += ao.confusion(predicted, labels, 2)
    hits = matrix.diag()
    miou = (hits / (matrix.sum(0) + matrix.sum(1) - hits)).mean()
    lines = read_metrics(run / "metrics.csv").values()
    best = max(line["val/miou"] for line in lines if "val/miou" in line)
    assert miou.item() == pytest.approx(best)


def test_images_that_can_and_cannot_be_predicted(straight: Path, tmp_path: Path) -> None:
    grey, four = tmp_path / "grey.png", tmp_path / "four.tif"
    write(grey, image()[..., 0])
    write(four, np.zeros((5, 6, 4), np.uint8))
    out = tmp_path / "out"
    predict(straight, [grey], out)
    assert np.array(Image.open(out / "grey.png")).shape == (6, 9)
    first, grey_first, low = (tmp_path / f"{x}.tif" for x in ("first", "grey_first", "low/first"))
    write(first, np.moveaxis(image(), 2, 0).copy())
    write(grey_first, image()[None, ..., 0])
    write(low, image(3)[..., 0])  # three pixels high
    predict(straight, [first, grey_first, low], out)
    for path, height in ((first, 6), (grey_first, 6), (low, 3)):
        mask = out / path.relative_to(tmp_path).with_suffix(".png")
        assert np.array(Image.open(mask)).shape == (height, 9)
    for run, images, message in (
        (straight, [grey], "predict: --out: .*out/grey.png exists: give another directory"),
        (straight, [four, four], "four.png would be written twice"),
        (straight, [four], "four.tif: expected 3 channels .*, got 4"),
        (straight, [tmp_path / "absent.png"], "absent.png"),
        (straight, [], "predict: --data.images: expected files of images, got none"),
        (tmp_path, [grey], r"--ckpt_path best: .* has no best.ckpt"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(run, images, out)
