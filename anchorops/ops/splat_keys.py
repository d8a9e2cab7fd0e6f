"""W = upᵀ onehot(keys), for `upsampled_sums` on GPUs. For each key and feature, W is the sum of the
feature's upsampling weights for the labels with this key. On CPU, reference.splat_keys computes it,
part by part.
"""

import torch
from torch import Tensor

from .registration import define

BACKENDS = ("triton", "cuda")


def _splat_keys_fake(
    keys: Tensor, num_keys: int, label_height: int, label_width: int, height: int, width: int
) -> Tensor:
    return keys.new_empty((num_keys, height * width), dtype=torch.float32)


define(
    "splat_keys",
    "(Tensor keys, SymInt num_keys, SymInt label_height, SymInt label_width, SymInt height, "
    "SymInt width) -> Tensor",
    _splat_keys_fake,
    backends=BACKENDS,
)


def splat_keys(
    keys: Tensor, num_keys: int, label_size: tuple[int, int], size: tuple[int, int], backend: str
) -> Tensor:
    """float32 [num_keys, H·W] for upsampling with align_corners=True. keys: int32 [B, H'·W'], −1
    where ignored; label_size: (H', W'); size: (H, W) of the features."""
    operator = getattr(torch.ops.anchorops.splat_keys, backend)
    return operator(keys, num_keys, *label_size, *size)
