"""Masks of upsampled logits as run lengths, in COCO's code."""

import math
from collections.abc import Sequence

import torch
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
    offsets, areas = logits.new_zeros(len(logits) + 1, dtype=torch.int64), []
    codes, own_boxes = [logits.new_empty(0, dtype=torch.uint8)], []
    for i, low in enumerate(logits):
        ones = ~(upsample(low[None, None], size, align_corners)[0, 0] <= 0)
        if boxes is not None:
            x0, y0, x1, y1 = boxes[i].tolist()
            inside = torch.zeros_like(ones)
            inside[y0:y1, x0:x1] = True
            ones &= inside
        columns = ones.T.flatten()
        changes = columns.diff(prepend=columns.new_zeros(1)).nonzero()[:, 0]
        ends = torch.cat([changes, changes.new_tensor([columns.numel()])])
        codes.append(encode(ends.diff(prepend=ends.new_zeros(1))))
        offsets[i + 1] = offsets[i] + len(codes[-1])
        areas.append(int(ones.sum()))
        rows, columns = (ones.any(axis).nonzero()[:, 0].tolist() or [0, -1] for axis in (1, 0))
        own_boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    own = offsets.new_tensor(own_boxes).view(-1, 4)
    return torch.cat(codes), offsets, offsets.new_tensor(areas), own


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
