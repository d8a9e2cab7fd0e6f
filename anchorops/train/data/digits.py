"""Handwritten digits (UCI, in scikit-learn) on a noisy background: data without a download."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from .. import IGNORED
from ..options import Data

SPLITS = ("train", "val")


@cache
def _digit_images(split: str) -> list[np.ndarray]:
    """The 8×8 images of each digit, uint8 0..240; train and val have different images."""
    pixels, digits = load_digits(return_X_y=True)
    images = (pixels.reshape(-1, 8, 8) * 15).astype(np.uint8)
    chosen = (np.arange(len(images)) % 5 == 4) == (split == "val")
    return [images[chosen & (digits == digit)] for digit in range(10)]


@dataclass
class DigitScenes:
    """Scenes of two to five digits whose frequencies follow Zipf's law: 0 is common, 9 is rare.

    Scene i of a split, train or val, is a pure function of (seed, split, i) and of the size, that
    of a crop; the seed of val is 0. Digit d is drawn with probability proportional to (d + 1)^−zipf
    (val: zipf 1). Classes: background, then the digits; the soft border of a stroke is ignored.
    """

    options: Data
    split: str
    seed: int
    classes = ("background", *map(str, range(10)))
    fingerprint = "none"  # of files
    nodata = None

    def __len__(self) -> int:
        return self.options.train_images if self.split == "train" else self.options.val_images

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image uint8 (3, H, W) and labels int16 (H, W), −1 ignored."""
        seed, zipf = self.seed, self.options.zipf
        if self.split == "val":
            seed, zipf = 0, 1.0
        weights = np.arange(1, 11, dtype=np.float64) ** -zipf
        random = np.random.default_rng([seed, SPLITS.index(self.split), index])
        height, width = self.options.crop
        coarse = Image.fromarray(random.integers(0, 128, (5, 5, 3), dtype=np.uint8))
        ground = coarse.resize((width, height), Image.Resampling.BICUBIC)  # smooth dim colours
        scene = np.array(ground, np.float32) / 255
        labels = np.zeros((height, width), np.int16)
        for _ in range(random.integers(2, 6)):
            digit = random.choice(10, p=weights / weights.sum())
            images = _digit_images(self.split)[digit]
            side = int(random.integers(24, 33))
            stroke = Image.fromarray(images[random.integers(len(images))])
            stroke = stroke.resize((side, side), Image.Resampling.BICUBIC)
            angle = random.uniform(-10, 10)
            stroke = stroke.rotate(angle, Image.Resampling.BILINEAR)
            alpha = np.asarray(stroke, np.float32) / 240
            corners = random.integers(0, (height - side + 1, width - side + 1), (8, 2))
            windows = [np.s_[top : top + side, left : left + side] for top, left in corners]
            window = min(windows, key=lambda window: np.count_nonzero(labels[window]))
            color = random.uniform(0.55, 1.0, 3).astype(np.float32)
            opacity = alpha.clip(0, 0.6)[..., None] / 0.6
            scene[window] += opacity * (color - scene[window])
            labels[window][alpha > 0.25] = IGNORED
            labels[window][alpha > 0.4] = digit + 1
        scene += random.normal(0, 0.04, scene.shape).astype(np.float32)
        image = (scene.clip(0, 1) * 255).astype(np.uint8)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(labels)
