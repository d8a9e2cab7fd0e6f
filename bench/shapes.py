"""Shapes for which times are predicted, and what a prediction contains."""

from itertools import product
from typing import NamedTuple

import numpy as np
from label_maps import label_maps

SUMS, SQDISTS, RESIDUALS = 1, 2, 4  # statistics


class Shape(NamedTuple):
    batch: int
    dim: int
    height: int
    width: int
    classes: int
    groups: int = 1  # of each class, drawn for each pixel

    @property
    def num_keys(self) -> int:
        return self.classes * self.groups

    @property
    def plane(self) -> int:
        return self.height * self.width

    @property
    def pixels(self) -> int:
        return self.batch * self.plane


HRNET, SEGFORMER = Shape(8, 720, 128, 256, 19), Shape(16, 768, 128, 128, 150)
SHAPES = {"HRNet": HRNET, "SegFormer": SEGFORMER}
# COCO-Stuff.
MORE_CLASSES = {"SegFormer, 171 classes": SEGFORMER._replace(classes=171)}
# Random groups of the pixels of each class: OCCL has two, MVSC four. Both need only the sums.
GROUPED = {
    f"{title}, {groups} groups": shape._replace(groups=groups)
    for (title, shape), groups in product(SHAPES.items(), (2, 4))
}
# Planes of 16,641 pixels: their first pixels are not at multiples of 16 bytes.
UNALIGNED = {"HRNet, 129×129": Shape(16, 720, 129, 129, 19)}


class Estimate(NamedTuple):
    warps: int  # resident on a multiprocessor
    one: float  # cycles of a tile (a step of the backward pass), one warp alone
    all: float  # the same when all resident warps work on their own tiles
    waves: float
    share: float  # of the copy bandwidth, including launches and partials


def keys_of(shape: Shape, kind: str) -> np.ndarray:
    """int [pixels], −1 where ignored; kind: see label_maps.py."""
    keys = label_maps(kind, shape.batch, shape.height, shape.width, shape.classes)
    keys = np.where(keys == 255, -1, keys).reshape(-1)
    if shape.groups > 1:
        drawn = np.random.default_rng(2).integers(0, shape.groups, keys.shape)
        keys = np.where(keys < 0, -1, keys * shape.groups + drawn)
    return keys
