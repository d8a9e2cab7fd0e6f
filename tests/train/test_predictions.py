"""`anchorops-train predict`: the masks of images, by the weights of a run with its best mIoU."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import anchorops as ao
from anchorops.train import commands
from anchorops.train.run import read_metrics
from tests.helpers.image_files import image, write
from tests.helpers.tiny_runs import FOLDER, fitted


def predict(run: Path, words: str, images: list[Path]) -> None:
    command = f"--run {run} {words} --images {' '.join(map(str, images))}"
    commands.predict_masks(command.split())


def array(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


@pytest.mark.parametrize(
    "options",
    [
        "--model.methods [cbp,sar]",  # CBP removes the classifier's bias
        "--model.evaluation sliding --model.window_stride [16,24] --data.short_side 40",
        "--model.eval_scales [1,2] --model.eval_flip true --model.auxiliary_weight 0.4",
    ],
)
def test_predictions_are_those_of_the_evaluation(folder: Path, options: str) -> None:
    run = fitted(f"{FOLDER} {options} --val_every 1 --data.root {folder} --run {folder}/run")
    images = [folder / "images/val/a/1.jpg", folder / "images/val/b.png"]
    with mock.patch.object(ao, "late_upsampling", wraps=ao.late_upsampling) as late:
        predict(run, f"--out {folder}/new/out", [folder / "images/val"])
    assert late.called
    # an option that a message names for other images, but not of this network
    with pytest.raises(ValueError, match=r"^weights .* --data.channels: .* mismatch"):
        predict(run, f"--out {folder}/other --data.channels 4", images)
    matrix = torch.zeros(2, 2, dtype=torch.int64)
    for name in ("a/1.png", "b.png"):
        predicted, labels = (array(folder / x / name) for x in ("new/out", "masks/val"))
        assert predicted.dtype == np.uint8 and predicted.shape == labels.shape
        classes, truth = (torch.tensor(x).long()[None] for x in (predicted, labels))
        matrix += ao.confusion(classes, truth, 2)
    hits = matrix.diag()
    miou = (hits / (matrix.sum(0) + matrix.sum(1) - hits)).mean()
    lines = read_metrics(run / "metrics.csv").values()
    assert miou.item() == pytest.approx(max(line.get("val/miou", 0) for line in lines))


def test_images_of_any_kind(straight: Path, tmp_path: Path) -> None:
    files = {
        "ö😀.png": image()[..., 0],
        "first.tif": np.moveaxis(image(), 2, 0).copy(),
        "grey_first.tif": image()[None, ..., 0],
        "low/[first].tif": image(3)[..., 0],  # three pixels high
    }
    for name, content in files.items():
        write(tmp_path / name, content)
    images = [tmp_path / name for name in files]
    predict(straight, f"--out {tmp_path}/out", images)
    for name in files:
        made = array((tmp_path / "out" / name).with_suffix(".png"))
        assert made.shape == (3 if "low" in name else 6, 9)
    best, config = straight / "best.ckpt", straight / "config.yaml"
    words = f"--config {config} --model.weights {best} --out {tmp_path}/again"
    commands.predict_masks([*words.split(), "--images", str(images[0])])
    assert (tmp_path / "again/ö😀.png").read_bytes() == (tmp_path / "out/ö😀.png").read_bytes()
