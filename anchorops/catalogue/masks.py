"""Masks of instances."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

import anchorops as ao

from . import formulas
from .entry import Entry, Inputs, Sample
from .inputs import F32, in_layout, normal, uniform


class Masks(NamedTuple):
    """Mask logits (N, h, w), and boxes x0, y0, x1, y1 in units of h and w."""

    logits: tuple[int, int, int] = (5, 12, 17)
    layout: str = "planes"
    dtype: torch.dtype = F32
    boxes: bool = False

    def __call__(self, n: int, random: Generator) -> Inputs:
        count, h, w = self.logits
        z = 2 * normal(1, count, n * h, n * w, random=random)
        z[0, -1] = -1.0  # an empty mask
        logits = in_layout(z.to(self.dtype), self.layout)[0]
        if not self.boxes:
            return {"logits": logits}
        boxes = uniform(count, 4, random=random) * torch.tensor([w / 2, h / 2, w, h], device="cpu")
        boxes[0] = torch.tensor([0, 0, w, h])
        return {"logits": logits, "boxes": n * boxes}


def objects(n: int, random: Generator) -> Inputs:
    """The mask logits of 20 ellipses, of a fifth to three fifths of the image's sides."""
    y, x = torch.meshgrid(*[torch.linspace(0, 1, 96 * n, device="cpu")] * 2, indexing="ij")
    centers, radii = uniform(2, 20, 1, 1, random=random), uniform(2, 20, 1, 1, random=random)
    radii = 0.1 + 0.2 * radii
    distances = ((y - centers[0]) / radii[0]) ** 2 + ((x - centers[1]) / radii[1]) ** 2
    return {"logits": 10 - 10 * distances}


def _size(logits: Tensor, ratios: Sequence[float]) -> list[int]:
    return [int(n * ratio) for n, ratio in zip(logits.shape[1:], ratios, strict=True)]


def _extents(pixels: Tensor) -> Tensor:
    """x0, y0, x1, y1 of the pixels of each mask; zeros if there are none."""
    ends = []
    for axis in (1, 2):
        some = pixels.any(axis).int()
        ends.append((some.argmax(1), some.shape[1] - some.flip(1).argmax(1)))
    boxes = torch.stack([begin for begin, _ in ends] + [end for _, end in ends], 1)
    return boxes * pixels.any(2).any(1)[:, None]


def ours(
    logits: Tensor,
    ratios: Sequence[float],
    boxes: Tensor | None = None,
    threshold: float = 0.5,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Pixels may differ where z is almost the threshold: z above it, 0 elsewhere, then does not.
    And whether areas and boxes are those of the pixels."""
    size = _size(logits, ratios)
    z = _above(logits.double(), size, threshold, **options)
    logits, options = logits.detach(), options | {"threshold": threshold}
    boxes = None if boxes is None else boxes.detach() * boxes.new_tensor([*ratios[::-1]] * 2)
    masks = ao.mask_rle(logits, size, boxes=boxes, **options)
    pixels = masks.dense().to(logits.device)
    areas = masks.areas() == pixels.sum((1, 2))
    return z.where(pixels, 0), areas, (masks.boxes() == _extents(pixels)).all(1)


def formula(
    logits: Tensor,
    ratios: Sequence[float],
    boxes: Tensor | None = None,
    threshold: float = 0.5,
    **options: Any,
) -> tuple[Tensor, ...]:
    size = _size(logits, ratios)
    z = _above(logits, size, threshold, **options).clamp(min=0)
    if boxes is not None:
        y, x = (torch.arange(n, device=logits.device) for n in size)
        x0, y0, x1, y1 = boxes.detach()[:, :, None].unbind(1)
        rows = (y >= ratios[0] * y0) & (y < ratios[0] * y1)
        columns = (x >= ratios[1] * x0) & (x < ratios[1] * x1)
        z = z.where(rows[:, :, None] & columns[:, None], 0)
    right = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    return z, right, right


def _above(logits: Tensor, size: list[int], threshold: float, **options: Any) -> Tensor:
    z = formulas.upsampled(logits.detach()[None], size, **options)[0]
    return z - math.log(threshold / (1 - threshold))


ENTRIES = [
    Entry(
        "mask_rle",
        ("mask_rle",),
        ours,
        formula,
        (
            Sample("masks", Masks(), {"ratios": (4, 4)}, ("all", "quick", "kernels")),
            Sample("masks in boxes", Masks(boxes=True), {"ratios": (4, 2)}, ("all",)),
            Sample(
                "masks, bfloat16, aligned",
                Masks(layout="cropped", dtype=torch.bfloat16),
                {"ratios": (3.3, 2.7), "align_corners": True, "threshold": 0.3},
                ("all",),
            ),
            Sample(
                "masks, float16, fewer rows",
                Masks(layout="channels last", dtype=torch.float16),
                {"ratios": (0.4, 1)},
                ("all",),
            ),
        ),
        differentiable=False,
    )
]
