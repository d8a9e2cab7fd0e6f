"""Masks of upsampled logits as run lengths, in COCO's code."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._moments import statistics_dtype
from .._shared.upsampling import upsample


def mask_rle(
    logits: Tensor,
    size: Sequence[int],
    threshold: float,
    boxes: Tensor | None,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """characters, uint8: the codes of all masks, one after another; offsets, int64 [N + 1]: where
    each begins; areas, int64 [N]; boxes, int64 [N, 4]. NaN is above the threshold.

    boxes: int64 [N, 4], x0, y0, x1, y1, not beyond the image: outside of its box a mask is 0.
    """
    logits = logits.to(statistics_dtype(logits.dtype))
    logits = logits - (math.log(threshold) - math.log1p(-threshold))
    changes, areas, own_boxes = [], [], []
    for i, low in enumerate(logits):
        ones = ~(upsample(low[None, None], size, align_corners)[0, 0] <= 0)
        if boxes is not None:
            x0, y0, x1, y1 = boxes[i].tolist()
            inside = torch.zeros_like(ones)
            inside[y0:y1, x0:x1] = True
            ones &= inside
        columns = ones.T.flatten()
        changes.append(columns.diff(prepend=columns.new_zeros(1)).nonzero()[:, 0])
        areas.append(int(ones.sum()))
        rows, columns = (ones.any(axis).nonzero()[:, 0].tolist() or [0, -1] for axis in (1, 0))
        own_boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])

    def integers(numbers: list) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=logits.device)

    offsets = integers([0, *map(len, changes)]).cumsum(0)
    codes = mask_codes(torch.cat([integers([]), *changes]), offsets, math.prod(size))
    return *codes, integers(areas), integers(own_boxes).view(-1, 4)


def mask_codes(changes: Tensor, offsets: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """Characters and their offsets as above, from the changes: the positions x·H + y at which the
    masks change, int64, one mask after another.

    offsets: int64 [N + 1], where the changes of each mask begin. pixels: H·W.
    """
    codes = [changes.new_empty(0, dtype=torch.uint8)]
    for some in changes.split(offsets.diff().tolist()):
        ends = F.pad(some, (0, 1), value=pixels)
        codes.append(encode(ends.diff(prepend=ends.new_zeros(1))))
    lengths = offsets.new_tensor([*map(len, codes)])
    return torch.cat(codes), lengths.cumsum(0)


def encode(counts: Tensor) -> Tensor:
    """The characters of the lengths of runs of zeros, of ones, of zeros, …, int64. From the fourth
    on, a length is coded as the difference to the one before the last. A character has 5 bits,
    the lowest ones first, and whether more follow."""
    numbers = counts.clone()
    numbers[3:] -= counts[1:-2]
    shifted = numbers[:, None] >> torch.arange(0, 64, 5, device=counts.device)
    rest = shifted >> 4  # with the sign of this character's bits: 0 or −1 if nothing is left
    more = (rest != 0) & (rest != -1)
    characters = 48 + (shifted & 31) + 32 * more
    written = torch.cat([torch.ones_like(more[:, :1]), more[:, :-1]], 1)
    return characters[written].to(torch.uint8)
