"""Class counts, what tells data sets apart, and the transforms of images."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from anchorops.train.data.counts import check_classes, class_counts, fingerprint
from anchorops.train.data.digits import DigitScenes
from anchorops.train.data.folders import open_folder
from anchorops.train.data.loading import (
    Loader,
    RandomScale,
    Training,
    Unlabelled,
    augmentation,
    evaluation_transform,
)
from tests.helpers.image_files import write


def test_counts_of_masks(folder: Path):
    pixels, images, sizes = class_counts(open_folder(folder, "train"))
    assert pixels.tolist() == [18, 18 + 20] and images.tolist() == [1, 2]
    assert sizes == [(4, 5), (6, 9)]
    pixels, images, _ = class_counts(open_folder(folder, "train", label_map={1: 255}))
    assert pixels.tolist() == [18, 0] and images.tolist() == [1, 0]


def test_foreground_that_is_ignored():
    classes, some, none = ["ground", "thing"], torch.tensor([5, 0]), torch.tensor([0, 0])
    for training, present in ((some, "ground"), (none, "no class")):
        with pytest.raises(
            ValueError, match=f"pixels of {present} only: .*; 255 is ignored unless"
        ):
            check_classes(classes, training, some)
    with pytest.raises(ValueError, match="validation split has no valid pixel"):
        check_classes(classes, some + 1, none)
    assert check_classes([*classes, "rare"], torch.tensor([5, 1, 0]), some) == ["rare"]


def test_fingerprint_of_file_names(folder: Path, tmp_path: Path, monkeypatch: Any):
    """Wherever the root is."""

    def found(root: Path) -> str:
        return fingerprint(open_folder(root, "train"), root)

    before = found(folder)
    assert len(before) == 16 and found(shutil.copytree(folder, tmp_path / "moved")) == before
    monkeypatch.chdir(folder)
    assert found(Path()) == before
    for kind in ("images", "masks"):
        (folder / f"{kind}/train/b.png").rename(folder / f"{kind}/train/c.png")
    assert found(folder) != before
    assert fingerprint(DigitScenes("val", 9, (32, 32), seed=0), folder) == ""


def test_augmentation_is_a_function_of_the_draw():
    scenes = DigitScenes("train", 4, (40, 48), seed=0)
    scaled = RandomScale(None, (0.5, 2.0))
    transform = augmentation(3, (32, 32), scaled=scaled, flip=True, photometric=True)
    data = Training(scenes, transform, seed=5)
    torch.manual_seed(0)
    first = data[1, 10]
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, data[1, 10], strict=True))
    assert not torch.equal(first[0], data[1, 11][0])
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert first[0].shape == (3, 32, 32) and first[1].dtype == torch.int16


def test_padding_is_ignored_and_labels_are_not_interpolated():
    scenes = DigitScenes("train", 2, (32, 32), seed=0)
    transform = augmentation(3, (96, 96), scaled=RandomScale(None, (1.5, 1.5)))
    _, labels = Training(scenes, transform, seed=0)[0, 0]
    assert (labels == -1).sum() >= 96 * 96 - 48 * 48
    assert set(labels.unique().tolist()) <= set(scenes[0][1].unique().tolist()) | {-1}


def test_images_of_many_channels(folder: Path):
    """In training and in prediction."""
    path = folder / "images/train/a/1.tif"
    path.with_suffix(".jpg").unlink()
    write(path, np.full((6, 9, 5), 65_535, np.uint16))
    data = open_folder(folder, "train", channels=5)
    transform = augmentation(5, (8, 8), scaled=RandomScale(None, (1.0, 1.0)))
    image, labels = Training(data, transform, seed=0)[0, 0]
    assert image.shape == (5, 8, 8) and labels.shape == (8, 8) and image.max() == 2
    loader = Loader(Unlabelled([path], evaluation_transform(5, 12), 5), 0, sampler=range(1))
    ((index, image, size),) = loader
    assert index == 0 and image.shape == (1, 5, 12, 18) and (image == 2).all() and size == [6, 9]


def test_random_scale():
    """torch cannot scale to a single pixel: the image has two on each side."""
    assert RandomScale(None, (2.0, 2.0))(tv_tensors.Mask(torch.zeros(8, 6))).shape == (16, 12)
    image = tv_tensors.Image(torch.zeros(3, 8, 6, dtype=torch.uint8))
    assert RandomScale(1, (1.0, 1.0))(image).shape == (3, 2, 2)
