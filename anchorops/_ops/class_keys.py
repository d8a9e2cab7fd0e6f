"""Class keys: from labels at any size to one integer key per pixel of the features.

It moves 1/D of the bytes of a pass over the features. Operators on the same labels can share its
result.
"""

from typing import TypedDict

import torch
from torch import Tensor

from .._backend import CUDA_BACKENDS
from .registration import define, run
from .split_groups import split_groups
from .triton_launch import launcher


class KeyOptions(TypedDict):
    """The keyword arguments of `class_moments` that determine a pixel's key, already checked."""

    groups: int
    per_image: bool
    seed: int | Tensor | None
    ignore_index: int


def _class_keys_fake(
    labels: Tensor,
    height: int,
    width: int,
    num_classes: int,
    per_image: bool,
    ignore_index: int,
    class_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    batch = labels.shape[0]
    keys = labels.new_empty((batch, height * width), dtype=class_dtype or torch.int32)
    shape = (batch, num_classes) if per_image else (num_classes,)
    return keys, labels.new_empty(shape, dtype=torch.int64)


define(
    "class_keys",
    "(Tensor labels, SymInt height, SymInt width, SymInt num_classes, bool per_image, "
    "SymInt ignore_index, ScalarType? class_dtype=None) -> (Tensor keys, Tensor counts)",
    _class_keys_fake,
    backends=CUDA_BACKENDS,
    triton=launcher("class_keys"),
)


def class_keys(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    groups: int = 1,
    per_image: bool = False,
    seed: int | Tensor | None = None,
    ignore_index: int,
    class_dtype: torch.dtype | None = None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The key of each pixel of `features`, and the number of pixels with each key.

    keys: int32 [B, P], (image·K + class)·G + group, −1 where ignored; B = 1 and P = N for points.
        With class_dtype and without groups, the class alone, in this dtype: 255 in uint8 where
        ignored.
    counts: int64 [K], [K, G], [B, K] or [B, K, G].
    """
    if features.dim() == 2:
        height, width, grid = 1, features.shape[0], labels[None, None]
    elif features.dim() == 3:
        height, width, grid = 1, features.shape[2], labels[:, None]
    else:
        height, width, grid = features.shape[2], features.shape[3], labels
    arguments = grid, height, width, num_classes, per_image, ignore_index
    keys, counts = run("class_keys", backend, *arguments, class_dtype)
    if groups > 1:
        assert seed is not None
        return split_groups(keys, counts, groups, seed, backend=backend)
    return keys, counts
