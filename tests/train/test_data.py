"""Scenes of digits, the order of images, augmentation, and the processes that load."""

import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anchorops.train.data import loading
from anchorops.train.data.digits import SPLITS, DigitScenes, _digit_images
from anchorops.train.data.images import read_image
from anchorops.train.data.loading import (
    Prepared,
    augmented,
    class_counts,
    open_split,
)
from anchorops.train.options import Data, Options
from tests.helpers.image_files import write


def test_scenes_of_digits():
    """A function of seed, split and index. Their frequencies have a long tail."""
    options = Data(crop=(64, 96), train_images=2000)
    scenes, again = (DigitScenes(options, "train", seed=3) for _ in range(2))
    image, labels = scenes[7]
    scenes[8]
    assert image.shape == (3, 64, 96) and labels.shape == (64, 96)
    assert torch.equal(image, again[7][0]) and torch.equal(labels, again[7][1])
    steep = replace(options, zipf=3.0, data_seed=5)
    train, val = (open_split(steep, name, seed=3) for name in ("train", "val"))
    same = DigitScenes(steep, "train", seed=5)
    assert all(torch.equal(train[i][0], same[i][0]) for i in range(9))
    assert torch.equal(val[7][0], DigitScenes(options, "val", seed=1)[7][0])
    for other in (train, val, DigitScenes(options, "train", seed=5)):
        assert not torch.equal(image, other[7][0])
    pixels, images, *_ = class_counts(scenes)
    assert images[0] == 2000 and images[1] > 2 * images[10]
    assert pixels[1] > 2 * pixels[3] > 3 * pixels[8] > 0
    seen = ({x.tobytes() for x in np.concatenate(_digit_images(split))} for split in SPLITS)
    assert not set.intersection(*seen)


def test_draws_do_not_depend_on_ranks_or_interruptions():
    def drawn(world: int, accumulate: int, first_step: int = 0) -> list[tuple[int, int]]:
        options = Options(data=Data(batch_size=8, steps=5), accumulate=accumulate, seed=1)
        parts = [loading.draws(10, options, first_step, rank, world) for rank in range(world)]
        return sorted((draw, image) for batch in chain(*parts) for image, draw in batch)

    everything = drawn(1, 1)
    assert everything == drawn(2, 2) == drawn(4, 1)
    assert everything[16:] == drawn(2, 1, first_step=2)
    # each of the four passes over the data shows every image once
    passes = np.array(everything)[:, 1].reshape(4, 10)
    assert (np.sort(passes, 1) == range(10)).all() and (passes[0] != passes[1]).any()


def test_augmentation_is_a_function_of_the_draw():
    options = Data("folder", crop=(32, 32), scale=(0.5, 2.0), flip=True, photometric=True)
    scenes = DigitScenes(Data(crop=(40, 48)), "train", seed=0)
    data = Prepared(scenes, options, seed=5)
    before = torch.get_rng_state()
    image, labels = data[1, 10]
    assert torch.equal(torch.get_rng_state(), before) and image.shape == (3, 32, 32)
    torch.manual_seed(1)
    again, same = data[1, 10]
    assert torch.equal(image, again) and torch.equal(labels, same)
    assert not torch.equal(image, data[1, 11][0])


def test_padding_is_ignored_and_labels_are_not_interpolated():
    """Images are padded at the bottom and at the right, with 0: the mean of normalised images."""
    image = torch.full((3, 20, 40), 255, dtype=torch.uint8)
    mask = torch.randint(2, (20, 40)).short() * 7
    padded, labels = augmented(image, mask, Data("folder", crop=(64, 96), scale=(1.5, 1.5)))
    assert padded.shape == (3, 64, 96) and labels.shape == (64, 96)
    assert (padded[:, :30, :60] > 2).all()
    assert not padded[:, 30:].any() and not padded[..., 60:].any()
    assert set(labels[:30, :60].unique().tolist()) == {0, 7}
    assert (labels[30:] == -1).all() and (labels[:, 60:] == -1).all()


def test_short_and_long_sides():
    """Of an image of 40×80. torch cannot scale to a single pixel."""
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    for short_side, long_side, size in (
        (20, 30, (15, 30)),
        (20, 60, (20, 40)),
        (1, None, (2, 2)),
    ):
        options = Data("folder", short_side=short_side, long_side=long_side)
        assert loading.network_input(image, options).shape[1:] == size


def test_crop_that_shows_one_class_is_drawn_again():
    labels = torch.zeros(32, 256, dtype=torch.int16)
    labels[:, 160:] = 1
    labels[:, 240:] = -1

    def shares(cat_max_ratio: float) -> Tensor:
        torch.manual_seed(0)
        options = Data("folder", crop=(32, 64), cat_max_ratio=cat_max_ratio)
        image = torch.zeros(3, 32, 256, dtype=torch.uint8)
        crops = torch.stack([augmented(image, labels, options)[1] for _ in range(50)])
        zeros, ones = ((crops == k).sum((1, 2)) for k in (0, 1))
        return torch.maximum(zeros, ones) / (zeros + ones)

    assert (shares(1.0) == 1).sum() > 25
    # one of eleven draws fails with probability (1 − 9/49)^11 = 0.11
    assert (shares(0.75) < 0.75).sum() > 35


def test_photometric_distortion_keeps_the_order_of_channels():
    red = torch.tensor([200, 60, 20], dtype=torch.uint8).view(3, 1, 1)
    seen = torch.stack([loading.distorted(red).flatten() for _ in range(100)])
    assert (seen[:, 0] == seen.amax(1)).all() and len(seen.unique(dim=0)) > 50


def test_images_of_many_channels(folder: Path):
    """In training, and in an evaluation or a prediction."""
    path = folder / "images/train/a/1.tif"
    write(path.with_suffix(".jpg"), None)
    write(path, np.full((6, 9, 5), 65_535, np.uint16))
    values = {"mean": [64_535.0] * 5, "std": [500.0] * 5}
    options = Data("folder", str(folder), channels=5, short_side=12, crop=(32, 64), **values)
    image, _ = Prepared(open_split(options, "train", 0), options, seed=0)[0, 0]
    assert image.shape == (5, 32, 64) and (image[:, :12, :18] == 2).all()
    image = loading.network_input(read_image(path, 5), options)
    assert image.shape == (5, 12, 18) and (image == 2).all()


def test_workers_end_with_python():
    """An iterator that still exists then, as after an error in a worker, does not keep them."""
    script = """
from anchorops.train.data.loading import loaded
iterator = loaded(range(100), num_workers=1)
next(iterator)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
