"""`anchorops-train predict`: the masks of images, by the weights of a run with its best mIoU."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import anchorops as ao
from anchorops.train import commands
from anchorops.train.commands import fit, predict_masks
from anchorops.train.networks.models import upsample_late
from anchorops.train.run import read_metrics
from tests.helpers.image_files import image, write
from tests.helpers.tiny_runs import FOLDER


def predict(run: Path, images: list[Path], out: Path, *options: str) -> None:
    predict_masks(["--run", str(run), "--out", str(out), "--images", *map(str, images), *options])


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
    words = [*FOLDER, *options, "--val_every", "1", "--data.root", str(folder)]
    run = fit([*words, "--run", str(folder / "run")])
    images = [folder / "images/val/a/1.jpg", folder / "images/val/b.png"]
    with mock.patch.object(commands, "upsample_late", wraps=upsample_late) as late:
        predict(run, images, folder / "new/predictions")
    assert late.called
    # an option that a message names for other images, but not of this network
    with pytest.raises(ValueError, match=r"^weights .* --data.channels: .* mismatch"):
        predict(run, images, folder / "other", "--data.channels", "4")
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
        (straight, [grey], "--out: expected another directory, or --resume .*out/grey.png"),
        (straight, [four], "four.tif: expected 3 channels, got 4: save the image"),
        (straight, [tmp_path / "absent.png"], "absent.png"),
        (tmp_path, [grey], "expected the directory of a run"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(run, images, out)
    best, config = straight / "best.ckpt", straight / "config.yaml"
    words = ["--config", str(config), "--model.weights", str(best), "--images", str(grey)]
    predict_masks([*words, "--out", str(tmp_path / "again")])
    assert (tmp_path / "again/grey.png").read_bytes() == (out / "grey.png").read_bytes()
