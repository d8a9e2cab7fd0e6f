"""Random labels, logits and features of the samples, on the CPU, whatever the default device is."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

F32 = torch.float32


def normal(*size: int, random: torch.Generator) -> Tensor:
    return torch.randn(size, generator=random, dtype=F32, device="cpu")


def uniform(*size: int, random: torch.Generator) -> Tensor:
    return torch.rand(size, generator=random, dtype=F32, device="cpu")


def labels_of(
    size: Sequence[int], num_classes: int, random: torch.Generator, half: bool = False
) -> Tensor:
    """Squares of one class and single pixels, int64; a tenth is ignored, −1. The last class is
    absent, where there are three.

    half: int16, and the lower half of the first image is ignored, so nothing valid reads some
        inputs.
    """
    present = max(num_classes - 1, 2)
    draw = partial(torch.randint, present, generator=random, device="cpu")
    labels = draw(size=(size[0], *(-(-n // 6) for n in size[1:])))
    for axis, n in enumerate(size[1:], 1):
        labels = labels.repeat_interleave(6, axis).narrow(axis, 0, n)
    share, single = uniform(*size, random=random), draw(size=tuple(size))
    labels = torch.where(share < 0.1, -1, torch.where(share < 0.3, single, labels))
    if half:
        labels = labels.short()
        labels[0, ..., size[-2] // 2 :, :] = -1
    return labels


def in_layout(x: Tensor, layout: str) -> Tensor:
    """planes, channels last, or cropped: a view inside of larger planes."""
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "cropped":
        return F.pad(x.float(), (3, 2, 1, 1)).to(x.dtype)[..., 1:-1, 3:-2]
    assert layout == "planes", layout
    return x
