"""Images that are not of 8 bits: their mean and standard deviation, and pixels without data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from anchorops.train.commands import of_training, parse, predict_masks, trained, validate
from anchorops.train.data.loading import Prepared, augmented, network_input, open_splits
from anchorops.train.options import Data
from tests.helpers.image_files import mask, write
from tests.helpers.tiny_runs import FOLDER, assert_same_run, fitted

RANDOM = np.random.default_rng(0)


@pytest.fixture
def bands(tmp_path: Path) -> Path:
    """Two classes; two channels of 32 bits around 10,000 and 0, and one without deviation."""
    for split in ("train", "val"):
        for name, height in (("a", 6), ("b", 40)):
            samples = RANDOM.normal([10_000, 0, 0.1], [0.05, 2000, 0], (height, 9, 3))
            write(tmp_path / f"images/{split}/{name}.tif", samples.astype(np.float32))
            write(tmp_path / f"masks/{split}/{name}.png", mask(0, 1, 255, height=height))
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    return tmp_path


def prepared(root: Path, **options: Any) -> tuple[Prepared, dict[str, Any]]:
    splits = open_splits(Data("folder", str(root), crop=(64, 32), **options), 0)
    return Prepared(splits.training, splits.options), splits.found


def test_mean_and_standard_deviation(bands: Path, capsys: pytest.CaptureFixture[str]):
    """Of the training images, as numpy computes them from all pixels; for any number of workers."""
    data, found = prepared(bands)
    assert len([x for x in capsys.readouterr().err.splitlines() if x.startswith("mean of ")]) == 1
    images = [data.dataset[i][0].flatten(1) for i in range(2)]
    pixels = torch.cat(images, 1).double().numpy()
    known = found["channels"]
    np.testing.assert_allclose(known["mean"], pixels.mean(1), rtol=1e-8)
    np.testing.assert_allclose(known["std"], [*pixels.std(1)[:2], 1], rtol=1e-8)
    inputs = torch.cat([data[i, None][0].flatten(1) for i in range(2)], 1)
    assert inputs.mean(1).abs().max() < 0.02  # the first values have steps of 2^-10 in float32
    assert (inputs.std(1)[:2] - 1).abs().max() < 0.01 and not inputs[2].any()
    assert prepared(bands, workers=1)[1] == found
    given = {"mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0]}
    assert prepared(bands, **given)[1]["channels"] == {"8 bits": False, **given}


@pytest.mark.parametrize("nodata", [np.nan, -9999.0])
def test_nodata(nodata: float, bands: Path):
    """It is no part of the mean, is the mean for the network, and does not blend into others."""
    before = prepared(bands)[1]
    path = bands / "images/train/c.tif"
    samples = np.full((8, 8, 3), [10_000, 0, 0.1], np.float32)
    samples[:, :4] = [10_000.05, nodata, 5e6]
    write(path, samples)
    write(bands / "masks/train/c.png", mask(1, height=8, width=8))
    data, found = prepared(bands, nodata=nodata, short_side=16)
    assert found["training pixels"][1] == before["training pixels"][1] + 32
    assert found["channels"]["std"] == pytest.approx(before["channels"]["std"], rel=0.4)
    image, labels = data[2, None]
    assert image.shape == (3, 16, 16) and not image[..., :8].any()
    assert image[0].abs().max() < 1 and image[2].abs().max() == 0
    assert (labels[:, :4] == -1).all() and (labels[:, 4:] == 1).all()


def test_photometric_distortion_of_pixels_without_data():
    """Of 12 bits in files of 16; also of 8 bits, whose mean is no integer."""
    for dtype, white in ((torch.float32, 4095), (torch.uint8, 255)):
        image = torch.rand(3, 32, 32).mul(white - 1).add(1).to(dtype)
        image[:, 5:20, 7:20] = 0
        numbers = {"mean": [white / 2] * 3, "std": [white / 4] * 3}
        options = Data("folder", nodata=0.0, photometric=True, crop=(64, 64), **numbers)
        made, _ = augmented(image, torch.ones(32, 32, dtype=torch.int16), options)
        assert not made[:, 5:20, 7:20].any() and not made[:, 32:].any()
        assert made[:, :5, :32].abs().min() > 0 and made.abs().max() < 8
        assert not network_input(image, options)[:, 5:20, 7:20].any()


def test_runs(bands: Path, tmp_path: Path, refused: Callable[..., None]):
    """They go on with equal bits. Their numbers are used by validate and predict, which do not know
    others."""
    words = f"{FOLDER} --data.root {bands} --data.nodata nan --val_every 1 --run {tmp_path}"
    run = fitted(f"{words}/run")
    fitted(f"{words}/parts --max_steps 1")
    image = bands / "images/train/a.tif"
    trained_on = image.read_bytes()
    write(image, (bands / "images/val/a.tif").read_bytes())
    refused(f"fit {words}/parts --resume", "channels: .* has .*: the numbers would not be those of")
    write(image, trained_on)
    assert_same_run(run, fitted(f"{words}/parts --max_steps 2 --resume"))
    assert min(np.asarray(Image.open(run / "predictions.png")).std((0, 1))) > 10
    known = yaml.safe_load((run / "data.yaml").read_text())["channels"]
    figures = validate(["--run", str(run)])
    images, best = f"--images {bands}/images/val", f"--model.weights {run}/best.ckpt"
    other = f"--config {run}/config.yaml --run {tmp_path}/none {best}"
    predict_masks(f"--run {run} {images} --out {tmp_path}/out".split())
    plain = f"validate --config {run}/config.yaml {best}"
    refused(plain, "a.tif: expected 8 bits, as --data.mean and --data.std are not given")
    mean = str(known["mean"]).replace(" ", "")
    options, *_ = parse("validate", f"--run {run} --data.mean {mean} --data.std [9,9,9]".split())
    assert of_training(options, run, True, trained(options, run))[0].data.std == [9, 9, 9]
    (tmp_path / "none").mkdir()
    write(tmp_path / "none/config.yaml", (run / "config.yaml").read_bytes())
    numbers = " ".join(f"--data.{x} {known[x]}".replace(", ", ",") for x in ("mean", "std"))
    for command in ("validate", f"predict {images} --out {tmp_path}/again"):
        refused(f"{command} {other}", "a.tif: expected 8 bits, as .*--data.mean .* not given, got")
    assert validate(f"{other} {numbers}".split()) == figures
    predict_masks(f"{other} {numbers} {images} --out {tmp_path}/again".split())
    for name in ("a.png", "b.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    write(bands / "images/val/c.png", np.zeros((6, 9, 3), np.uint8))
    words = f"predict --run {run} --images {bands}/images/val/c.png --out {tmp_path}/c"
    refused(words, "c.png: expected more than 8 bits, or floats, as the images of the run, got 8 b")
    write(bands / "masks/val/c.png", mask(0))
    words = f"fit {FOLDER} --data.root {bands} --run {tmp_path}/x"
    refused(words, "c.png: .* as .*train/a.tif, g")
    refused(f"{words} --data.photometric true", "a.tif: expected no values below 0, for --data.ph")
