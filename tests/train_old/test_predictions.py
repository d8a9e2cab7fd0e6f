"""`anchorops-train predict`: the masks of images, by the weights of a run with its best mIoU."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import image, write
from PIL import Image

import anchorops as ao
from anchorops.train.commands import main

OPTIONS = "--model segformer-b0 --crop 32 32 --steps 2 --batch-size 2 --workers 0 --device cpu"


@pytest.mark.parametrize(
    "options",
    [
        "--methods cbp sar",  # CBP removes the classifier's bias
        "--evaluation sliding --window-stride 16 24 --short-side 40",
        "--eval-scales 1 2 --eval-flip --auxiliary-weight 0.4 --dropout 0.1",
    ],
)
def test_predictions_are_those_of_the_evaluation(folder: Path, options: str) -> None:
    place = ["--root", str(folder), "--out", str(folder), "--name", "run"]
    main(["folder", *place, *OPTIONS.split(), *options.split()])
    images = [folder / "images/val/a/1.jpg", folder / "images/val/b.png"]
    out = folder / "new/predictions"
    main(["predict", str(folder / "run"), *map(str, images), "--out", str(out), "--device", "cpu"])
    matrix = torch.zeros(2, 2, dtype=torch.int64)
    for path in images:
        mask = (folder / "masks/val" / path.relative_to(folder / "images/val")).with_suffix(".png")
        predicted, labels = (np.array(Image.open(x)) for x in (out / f"{path.stem}.png", mask))
        assert predicted.dtype == np.uint8 and predicted.shape == labels.shape
        predicted, labels = (torch.tensor(x).long()[None] for x in (predicted, labels))
        matrix += ao.confusion(predicted, labels, 2)
    hits = matrix.diag()
    miou = (hits / (matrix.sum(0) + matrix.sum(1) - hits)).mean()
    results = json.loads((folder / "run/results.json").read_text())
    assert miou.item() == pytest.approx(results["best_miou"])


def test_images_that_can_and_cannot_be_predicted(straight: Path, tmp_path: Path) -> None:
    grey, four = tmp_path / "grey.png", tmp_path / "four.tif"
    write(grey, image()[..., 0])
    write(four, np.zeros((5, 6, 4), np.uint8))
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    main(["predict", str(straight), str(grey), *out])
    assert np.array(Image.open(tmp_path / "out/grey.png")).shape == (6, 9)
    first, grey_first, low = (tmp_path / f"{name}.tif" for name in ("first", "grey_first", "low"))
    write(first, np.moveaxis(image(), 2, 0).copy())
    write(grey_first, image()[None, ..., 0])
    write(low, image(3)[..., 0])  # three pixels high
    main(["predict", str(straight), str(first), str(grey_first), str(low), *out])
    for path, height in ((first, 6), (grey_first, 6), (low, 3)):
        assert np.array(Image.open(tmp_path / f"out/{path.stem}.png")).shape == (height, 9)
    for run, images, message in (
        (straight, [grey], "predict: --out: .*out/grey.png exists: give another directory"),
        (straight, [four, four], "four.png would be written twice"),
        (straight, [four], "four.tif: expected an image of 3 channels, got 4"),
        (straight, [tmp_path / "absent.png"], "absent.png"),
        (straight, [], "predict: expected files of images, got none"),
        (tmp_path, [grey], "predict: expected the directory of a run, with its best.pt, got"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["predict", str(run), *map(str, images), *out])
